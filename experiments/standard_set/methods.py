"""What each method sends, keeps and goes with: ``python -m experiments.standard_set.methods > methods.md``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import flwr.app as flower

from fedpers.app.compose import composed
from fedpers.app.listing import describe_method
from fedpers.flower_private import server_identity
from fedpers.run.setup import prepare_run
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import STRATEGIES
from tests.reference import SOURCES
from tests.traces import HERE

RATINGS = ("fedmf", "fedncf", "fedrap", "no_learning", "pfedrec")
NEEDS = {"fedbn": ["model=cnn_bn"], "group_perfl": ["heterogeneity=label_groups"]}
"""What a method cannot do without."""
COLUMNS = (
    "method", "year", "shared", "personal", "server's state", "messages", "down", "up", "unseen clients",
    "other networks", "postprocessors", "traces",
)  # fmt: skip

PREFACE = """# What methods send, keep and go with

Made by `python -m experiments.standard_set.methods`. What a method shares and keeps is said by the file of the method.
Messages, bytes and the server's state are measured in the second round of a small run in which half of the clients
train (digits and its MLP; 30 users of 300 items; methods that bring another network along have that): messages for the
training plus those before it, kilobytes down and up for each client that trains. Unseen clients, whom nobody asked to
train, are evaluated as they come, and after they `train once` or by a rule of the method's own. `other networks`:
clients may have different ones. Postprocessors are compression, privacy, robust aggregates and server optimizers;
traces are cases of `python -m tests.reference`.
"""


class CountingGrid(LocalGrid):
    """Counts the messages to clients."""

    messages = 0

    def send_and_receive(self, messages: Iterable[flower.Message], **options: Any) -> Iterable[flower.Message]:
        """Count, then send."""
        addressed = list(messages)
        self.messages += len(addressed)
        return super().send_and_receive(addressed, **options)


def measured(name: str) -> dict[str, str]:
    """Messages, bytes and state of one round of training, without evaluation."""
    settings = [f"strategy={name}", "rounds=2", "fraction=0.5", "runtime.workers=1"]
    if name in RATINGS:
        settings += ["dataset=synthetic_ratings", "dataset.num_users=30", "dataset.num_items=300"]
    else:
        settings += ["partition.num_clients=10"] + ([] if name == "fedjets" else ["split.unseen=2"])
        settings += NEEDS.get(name, [])
    config = composed(settings)
    setup = prepare_run(config)
    strategy, app = setup.strategy, setup.app
    grid = CountingGrid(app, app.data.num_clients, workers=1)
    with server_identity(1):
        strategy.begin()
        arrays = app.initial_arrays()
        for round in (1, 2):
            grid.messages = 0
            messages = list(strategy.configure_train(round, arrays, flower.ConfigRecord(), grid))
            sent = len(messages)
            replies = list(grid.send_and_receive(messages))
            arrays = strategy.aggregate_train(round, replies)[0] or arrays
    report = strategy.report
    clients = len(report.sampled)
    grid.close()
    before = grid.messages - sent
    return {
        "server's state": ", ".join(f"`{role}`" for role in strategy.state) or "-",
        "messages": f"{sent}" + (f" + {before}" if before else ""),
        "down": size(report.bytes_down / clients),
        "up": size(report.bytes_up / clients),
    }


def size(count: float) -> str:
    """Bytes for a client, in kB."""
    return f"{count / 1000:.1f}"


def row(name: str, traces: dict[str, int]) -> dict[str, str]:
    """All columns of a method."""
    kind = STRATEGIES[name]
    described = describe_method(name)
    return {
        "method": f"`{name}`",
        "year": described.year,
        "shared": described.shared,
        "personal": described.personal,
        **measured(name),
        "unseen clients": "train once" if kind.adapts_by_training() else "a rule of its own",
        "other networks": "yes" if kind.update.mixes_networks else "-",
        "postprocessors": "all" if kind.plain_mean() else "-",
        "traces": str(traces[name]) if traces.get(name) else "-",
    }


def main() -> None:
    """Print the table as Markdown."""
    traces: dict[str, int] = {}
    for source in SOURCES:
        for name, _ in source.cases(HERE, list(source.METHODS)):
            traces[name] = traces.get(name, 0) + 1
    print(PREFACE)
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for name in STRATEGIES:
        values = row(name, traces)
        print("| " + " | ".join(values[column] for column in COLUMNS) + " |", flush=True)


if __name__ == "__main__":
    main()
