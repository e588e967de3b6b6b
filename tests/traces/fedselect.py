"""Traces of the authors' code of FedSelect.

The real server and client halves run in the real in-process runtime; only the order of the samples in each pass is the
recorded one. Masks, counts and ``num_batches_tracked`` must be equal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import flwr.app as flower
import numpy as np
import torch
from torch import Tensor, nn

from fedpers.cohort import Cohort, Training, Tree, entries, tree
from fedpers.cohort import cohort as core
from fedpers.data.federated import FederatedData
from fedpers.flower_private import server_identity
from fedpers.records import from_record, row
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import CohortApp, FedSelect, FedSelectUpdate, make_strategy
from fedpers.strategies.fedselect import grow_by_tensor
from tests.traces import Comparison

TOLERANCE = 1e-5
METHODS = ("fedselect",)
FOLDER = "fedselect"
Values = dict[str, Tensor]


class MLP(nn.Module):
    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        hidden, features = shapes["fc1.weight"]
        self.fc1 = nn.Linear(features, hidden)
        self.fc = nn.Linear(hidden, shapes["fc.weight"][0])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(torch.relu(self.fc1(x.flatten(1))))
        return out


class ConvBN(nn.Module):
    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        channels, inputs = shapes["conv.weight"][:2]
        self.conv = nn.Conv2d(inputs, channels, 3)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(shapes["fc.weight"][1], shapes["fc.weight"][0])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(torch.relu(self.bn(self.conv(x))).flatten(1))
        return out


class Trace:
    """One ``.npz`` file."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.meta: dict[str, Any] = json.loads(str(self.arrays.pop("meta")))
        self.name = path.stem

    def group(self, prefix: str) -> Values:
        """Tensors below a path, by the rest of it."""
        inside = {k[len(prefix) + 1 :]: v for k, v in self.arrays.items() if k.startswith(prefix + "/")}
        return {name: torch.from_numpy(np.array(value)) for name, value in inside.items()}


def network(values: Values) -> nn.Module:
    """The toy network that has these entries."""
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    module: nn.Module = ConvBN(shapes) if "conv.weight" in shapes else MLP(shapes)
    module.load_state_dict(values)
    return module


def join(parts: list[dict[str, np.ndarray]]) -> FederatedData:
    """Clients with ``train_x``, ``train_y`` and, where there is one, a test set."""
    xs, ys, lists = [], [], {"train": [], "test": []}
    at = 0
    for arrays in parts:
        for part, positions in lists.items():
            x, y = arrays.get(f"{part}_x", arrays["train_x"][:0]), arrays.get(f"{part}_y", arrays["train_y"][:0])
            xs.append(x)
            ys.append(y)
            positions.append(torch.arange(at, at + len(y)))
            at += len(y)
    y_all = torch.from_numpy(np.concatenate(ys).astype(np.int64))
    none = [torch.zeros(0, dtype=torch.int64)] * len(parts)
    x_all = torch.from_numpy(np.concatenate(xs).astype(np.float32))
    return FederatedData(x_all, y_all, lists["train"], none, lists["test"], int(y_all.max()) + 1, "trace")


class Recorded:
    """A generator that knows one order."""

    def __init__(self, order: np.ndarray) -> None:
        self.order = order

    def permutation(self, size: int) -> np.ndarray:
        if len(self.order) != size:
            raise ValueError(f"an order of {len(self.order)} samples was recorded, not of {size}")
        return self.order


@contextmanager
def replaying(order: Callable[[int, int, int], np.ndarray]) -> Iterator[None]:
    """Take the order of the samples in each pass from ``order(client, round, pass)``."""

    def recorded(seed: int, purpose: str, client: int, round: int, epoch: int) -> Recorded:
        return Recorded(order(client, round, epoch))

    with mock.patch.object(core, "generator", recorded):
        yield


class Bench:
    """Both halves of the method with some clients, and a way to put them into a recorded state."""

    def __init__(self, init: Values, data: FederatedData, options: dict[str, Any], training: Training, device: str):
        strategy, update = make_strategy("fedselect", options, training=training)
        assert isinstance(strategy, FedSelect)
        assert isinstance(update, FedSelectUpdate)
        self.strategy, self.update = strategy, update
        self.app: CohortApp = update.client_app(network(init), data, device=device)
        self.grid = LocalGrid(self.app, data.num_clients, clients_at_once=data.num_clients, workers=1)
        assert self.grid.engine is not None
        self.store = self.grid.engine.store

    def put(self, client: int, **roles: Values | Tensor) -> None:
        """Overwrite roles of a client's personal state."""
        state = self.store.gather([client])
        for role, values in roles.items():
            if isinstance(values, Tensor):
                state[role] = values.reshape(1).to(state[role])
            else:
                for name, value in values.items():
                    state[role, name] = value[None].to(state[role, name])
        self.store.scatter([client], state, torch.ones(1, dtype=torch.bool))

    def state(self, client: int, role: str) -> Values:
        return {name: value[0].cpu() for name, value in entries(self.store.gather([client])[role]).items()}

    def cohort(self, client: int, round: int = 1) -> Cohort:
        return self.app.cohort([client], self.store.gather([client]), {"server-round": round})

    def network(self, client: int, arrays: Tree) -> Values:
        """What a client starts from, or predicts with."""
        networks = self.update.personalize(self.cohort(client), {"arrays": arrays.to(self.app.device)}, {})
        return {name: value[0].cpu() for name, value in entries(networks).items()}


def compare(method: str, path: Path, device: str = "cpu") -> Comparison:
    """Run the method on one trace and compare all that was recorded."""
    trace = Trace(path)
    comparison = Comparison(method, f"{FOLDER}/{path.stem}", TOLERANCE)
    kind = path.stem.partition("_")[0]
    {"a": _one_visit, "b": _mask_updates, "c": _merging, "d": _whole_runs}[kind](trace, comparison, device)
    return comparison


def _states(comparison: Comparison, kind: str, ours: Values, theirs: Values) -> None:
    for name, value in theirs.items():
        (comparison.add if value.is_floating_point() else comparison.exact)(kind, ours[name], value)


def _masks(comparison: Comparison, kind: str, ours: Mapping[str, Tensor], theirs: Values) -> None:
    for name, value in theirs.items():
        comparison.exact(kind, ours[name].cpu(), value)


def _one_visit(trace: Trace, comparison: Comparison, device: str) -> None:
    """One alternating epoch with a given mask."""
    meta = trace.meta
    data = join([{"train_x": trace.arrays["x"], "train_y": trace.arrays["y"]}])
    training = Training(
        lr=meta["lr"], batch_size=meta["batch_size"], clip=meta["max_grad_norm"] if meta["clip_grad_norm"] else None
    )
    bench = Bench(trace.group("before"), data, {}, training, device)
    mask = trace.group("mask")
    bench.put(0, mask=mask, used=mask, trained=torch.tensor(0 if meta["model_in_train_mode"] else 1))
    phases: list[Values] = []
    losses: list[Tensor] = []
    fit, count = Cohort.fit, Cohort.count_loss

    def watched_fit(self: Cohort, params: Tree, *args: Any, **settings: Any) -> None:
        fit(self, params, *args, **settings)
        phases.append({name: value[0].cpu().clone() for name, value in entries(params).items()})

    def watched_count(self: Cohort, step: Any, loss: Tensor) -> None:
        losses.append(loss[0].cpu())
        count(self, step, loss)

    orders = trace.arrays["order"]
    with (
        replaying(lambda client, round, epoch: orders[epoch]),
        mock.patch.object(Cohort, "fit", watched_fit),
        mock.patch.object(Cohort, "count_loss", watched_count),
    ):
        arrays = bench.app.initial_arrays()
        config = flower.ConfigRecord()
        bench.strategy.begin()
        with server_identity(1):
            replies = list(bench.grid.send_and_receive(bench.strategy.configure_train(1, arrays, config, bench.grid)))
    comparison.exact("passes", len(phases), 2)
    _states(comparison, "after phase 1", phases[0], trace.group("after_phase1"))
    _states(comparison, "after phase 2", phases[1], trace.group("after_phase2"))
    _states(comparison, "state", bench.state(0, "model"), trace.group("after_phase2"))
    comparison.add("losses", torch.stack(losses).view(2, -1), trace.arrays["batch_loss"])
    comparison.exact("replies", [reply.has_content() for reply in replies], [True])
    bench.grid.close()


def _mask_updates(trace: Trace, comparison: Comparison, device: str) -> None:
    """Hand-made mask updates; where the code raises an IndexError, nothing becomes personal."""
    for number, case in enumerate(trace.meta["cases"]):
        if not case["invert"] or (case["error"] or "").startswith("KeyError"):
            continue  # the pruning branch, and a printed name
        prefix = f"case{number:02d}"
        current, previous = trace.group(f"{prefix}/current"), trace.group(f"{prefix}/previous")
        mask = {n: m.to(device, torch.uint8)[None] for n, m in trace.group(f"{prefix}/mask").items()}
        chosen = {n: m for n, m in mask.items() if "weight" in n}
        change = {n: (current[n] - previous[n]).abs().to(device)[None] for n in chosen}
        grown = {**mask, **grow_by_tensor(chosen, change, case["prune_percent"], case["bound"])}
        expected = trace.group(f"{prefix}/mask" if case["error"] else f"{prefix}/new_mask")
        _masks(comparison, "masks", {n: m[0] for n, m in grown.items()}, expected)
        for name, added in case.get("promoted", {}).items():
            comparison.exact("promoted", int((grown[name] - mask[name]).sum()), added)


def _merging(trace: Trace, comparison: Comparison, device: str) -> None:
    """Three replies into an average, and back."""
    clients = int(trace.meta["clients"])
    first = trace.group("c0/state")
    side = int((first["fc.weight"].shape[1] / first["conv.weight"].shape[0]) ** 0.5) + 2
    x = np.zeros((4, first["conv.weight"].shape[1], side, side))  # nobody trains
    none = {"train_x": x, "train_y": np.arange(4) % len(first["fc.weight"])}
    bench = Bench(first, join([none] * clients), {}, Training(batch_size=4), device)
    arrays = tree({n: torch.zeros_like(v) for n, v in entries(from_record(bench.app.initial_arrays())).items()})
    bench.strategy.sent_arrays = arrays
    fold: Any = bench.strategy.fold()
    for client in range(clients):
        state, mask = trace.group(f"c{client}/state"), trace.group(f"c{client}/mask")
        bench.put(client, model=state, used=mask)
        sent = tree({n: state[n].to(device)[None] for n in mask}, 1)
        records = {"arrays": sent, "mask": tree({n: m.to(device, torch.uint8)[None] for n, m in mask.items()}, 1)}
        packed = bench.update.encode({name: row(stacked, 0) for name, stacked in records.items()})
        fold.add(fold.decode(packed, client), 1.0, client)
        for name, value in trace.group(f"after_c{client}/sum").items():
            comparison.add("sums", fold.sums["arrays"][name], value)
        for name, value in trace.group(f"after_c{client}/count").items():
            comparison.exact("counts", fold.sums["count"][name].cpu(), value)
    average = bench.strategy.combine(arrays.to(device), fold.result(), list(range(clients)))
    _states(comparison, "average", {n: v.cpu() for n, v in entries(average).items()}, trace.group("average"))
    for client in range(clients):
        _states(comparison, "received", bench.network(client, average), trace.group(f"c{client}/received"))
    bench.grid.close()


def _whole_runs(trace: Trace, comparison: Comparison, device: str) -> None:
    """All rounds, chained from the common start."""
    args = trace.meta["args"]
    clients, rounds = len(trace.arrays["ids"]), int(args["com_rounds"])
    parts = ("train_x", "train_y", "test_x", "test_y")
    data = join([{part: trace.arrays[f"c{c}/{part}"] for part in parts} for c in range(clients)])
    options = {
        "rate": args["prune_percent"] / 100, "limit": args["prune_target"] / 100, "interval": args["lth_epoch_iters"]
    }  # fmt: skip
    training = Training(lr=args["lr"], epochs=args["la_epochs"], batch_size=args["local_bs"])
    bench = Bench(trace.group("init"), data, options, training, device)
    strategy, grid = bench.strategy, bench.grid
    strategy.begin()
    arrays, config = bench.app.initial_arrays(), flower.ConfigRecord()
    last = f"r{rounds - 1}"
    with replaying(lambda c, r, epoch: trace.arrays[f"r{r - 1}/c{c}/order"][epoch]), server_identity(1):
        for r in range(rounds):
            for c in range(clients):
                where = f"r{r}/c{c}"
                _states(comparison, "before", bench.network(c, from_record(arrays)), trace.group(f"{where}/before"))
                _masks(comparison, "masks", bench.state(c, "mask"), trace.group(f"{where}/mask_used"))
                _states(comparison, "previous", bench.state(c, "previous"), trace.group(f"{where}/delta_previous"))
            replies = list(grid.send_and_receive(strategy.configure_train(r + 1, arrays, config, grid)))
            _compare_losses(trace, comparison, bench, replies, r)
            new, _ = strategy.aggregate_train(r + 1, replies)
            assert new is not None
            arrays = new
            for c in range(clients):
                where = f"r{r}/c{c}"
                _states(comparison, "after", bench.state(c, "model"), trace.group(f"{where}/after"))
                used = trace.group(f"{where}/mask_used")
                _masks(comparison, "masks", bench.state(c, "used"), used)
                _masks(comparison, "masks", bench.state(c, "mask"), trace.group(f"{where}/mask_new") or used)
                _states(comparison, "received", bench.network(c, from_record(arrays)), trace.group(f"{where}/received"))
            count = trace.group(f"r{r}/server/count")
            ours = entries(from_record(arrays))
            for name, value in trace.group(f"r{r}/server/average").items():
                read = count[name] > 0  # where nobody has a global entry the code leaves 0, and nobody reads it
                comparison.add("average", ours[name].cpu()[read], value[read])
            messages = strategy.evaluation_messages(r + 1, arrays, flower.ConfigRecord(), grid)
            strategy.aggregate_evaluate(r + 1, grid.send_and_receive(messages))
            measured = [strategy.report.clients[c]["test-trained-batch-accuracy"] for c in range(clients)]
            comparison.add("accuracy", measured, trace.arrays[f"r{r}/accuracy"])
    for c in range(clients):
        _masks(comparison, "masks", bench.state(c, "used"), trace.group(f"final/c{c}/returned_mask"))
        _states(comparison, "after", bench.state(c, "model"), trace.group(f"{last}/c{c}/after"))
    _compare_cross(trace, comparison, bench)
    grid.close()


def _compare_losses(trace: Trace, comparison: Comparison, bench: Bench, replies: list[flower.Message], r: int) -> None:
    """Mean loss over the samples of all passes, from the recorded losses of batches."""
    for reply in replies:
        c = bench.strategy.exchange.client_of[reply.metadata.src_node_id]
        theirs = trace.arrays[f"r{r}/c{c}/batch_loss"]
        size = len(trace.arrays[f"c{c}/train_y"])
        weights = [len(part) for part in torch.arange(size).split(int(trace.meta["args"]["local_bs"]))]
        mean = float((theirs * np.array(weights)).sum() / (size * len(theirs)))
        comparison.add("losses", [float(reply.content["metrics"]["train-loss"])], [mean])  # type: ignore[index,arg-type,call-overload]


def _compare_cross(trace: Trace, comparison: Comparison, bench: Bench) -> None:
    """Every trained network on every client's test set."""
    theirs = trace.arrays["final/cross_accuracy"]
    for model in range(len(theirs)):
        state = bench.store.gather([model])
        for client in range(len(theirs)):
            cohort = bench.app.cohort([client], state, {"server-round": 1})
            outputs = cohort.logits(cohort.state["model"], "test", bench.update.predict)
            comparison.add("cross accuracy", bench.update.measure(cohort, outputs, "test", {})["batch-accuracy"][0],
                      theirs[model, client])  # fmt: skip


def cases(root: Path, methods: list[str]) -> Iterator[tuple[str, Path]]:
    """All traces that exist under `root`."""
    if "fedselect" in methods:
        yield from (("fedselect", path) for path in sorted((root / FOLDER).glob("*.npz")))
