"""One result, however it is computed: ``python -m tests.equivalence cohort [METHOD...]``.

``cohort``: every method, in several settings (:func:`tests.problems.problems`), on clients of unequal sizes, with
several batches, batch normalization, dropout, partial participation and a client that never trains, for 3 rounds;
cohorts of 1, 3 and all clients, and 1 and 2 workers, must agree. Exit status 1 otherwise.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flwr.app as flower
import torch
from flwr.serverapp import Grid
from torch import Tensor

from fedpers.cohort import leaves
from fedpers.flower_private import server_identity
from fedpers.process import one_thread, reproducible_convolutions
from fedpers.records import from_record
from fedpers.runtime.grid import ClientGrid
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import STRATEGIES, CohortApp, PersonalizedStrategy, make_strategy
from tests.problems import problems

ROUNDS = 3
UNSEEN = (4,)  # of data that come without clients that never train


class Raise(logging.Handler):
    """A cohort that falls back to single clients would agree with them and prove nothing."""

    def emit(self, record: logging.LogRecord) -> None:
        if (
            "has no part in" not in record.getMessage()
        ):  # said of settings that a problem has and its method does not read
            raise RuntimeError(record.getMessage())


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
AMPLIFYING = {("pfedpg", "adam"): 10.0, ("scaffold", "default"): 10.0}
"""Factor on the tolerance of float32: Adam's first steps are as long for a tiny gradient as for a large one, and
SCAFFOLD's control variates are differences of parameters over steps times lr, so that rounding grows. In float64 the
tolerance is that of all others."""


def outcome(
    method: str, dtype: torch.dtype, clients_at_once: int, workers: int, device: str = "cpu", label: str = "default"
) -> dict[str, Tensor]:
    """What is there after the last round in this process, by name (:func:`outcome_on`)."""

    def local(app: CohortApp) -> LocalGrid:
        return LocalGrid(app, app.data.num_clients, clients_at_once=clients_at_once, workers=workers)

    return outcome_on(method, dtype, local, device=device, label=label)


def outcome_on(
    method: str,
    dtype: torch.dtype,
    grid_of: Callable[[CohortApp], ClientGrid],
    *,
    device: str = "cpu",
    label: str = "default",
) -> dict[str, Tensor]:
    """What is there after the last round on a grid of this package, by name (:func:`played`)."""
    strategy, app = halves(method, dtype, label, device)
    grid = grid_of(app)
    try:
        with server_identity(1):
            return played(strategy, app, grid)
    finally:
        grid.close()


def halves(
    method: str, dtype: torch.dtype, label: str = "default", device: str = "cpu"
) -> tuple[PersonalizedStrategy, CohortApp]:
    """Both halves of a method on its small problem, with partial participation and clients that never train."""
    given = problems(method, dtype)[label]
    data = given.data if given.data.unseen else replace(given.data, unseen=UNSEEN)
    server = {"fraction": 0.7, "seed": 3, "unseen": data.unseen}
    strategy, update = make_strategy(method, given.options, server=server, training=given.training)
    app = update.client_app(given.network, data, seed=3, device=device)
    strategy.attach(app)
    return strategy, app


def client_half(method: str, dtype: torch.dtype) -> CohortApp:
    """The client half, to be made in another process."""
    return halves(method, dtype)[1]


def played(strategy: PersonalizedStrategy, app: CohortApp, made: Grid) -> dict[str, Tensor]:
    """What is there after the last round, by name.

    Server arrays, server state, personal states, the metrics of clients (of those that never train also after they
    adapted), the method's own metrics and counts.
    """
    strategy.begin()
    grid = strategy.folding(made)
    arrays, config = app.initial_arrays(), flower.ConfigRecord()
    tensors: dict[str, Tensor] = {}
    for r in range(1, ROUNDS + 1):
        new, _ = strategy.aggregate_train(r, grid.send_and_receive(strategy.configure_train(r, arrays, config, grid)))
        assert new is not None
        arrays = new
        if strategy.report.failures:
            raise RuntimeError(f"{type(strategy).__name__}: {strategy.report.failures}")
        for name in ("bytes_down", "bytes_up", "steps", "samples", "gradients"):
            tensors[f"round {r}/{name}"] = torch.tensor(getattr(strategy.report, name)).double()
        for name, value in strategy.report.extra.items():
            tensors[f"round {r}/{name}"] = torch.tensor(value).double()
    strategy.aggregate_evaluate(r, grid.send_and_receive(strategy.configure_evaluate(r, arrays, config, grid)))
    strategy.evaluate_adapted(arrays, config, grid)
    for clients, states in made.blocks():  # type: ignore[attr-defined]
        for k, client in enumerate(clients.tolist()):
            tensors.update({f"clients/{client}/{n}": v[k].cpu().clone() for n, v in leaves(states).items()})
    report = strategy.report
    if report.evaluation_failures:
        raise RuntimeError(f"{type(strategy).__name__}: {report.evaluation_failures}")
    tensors.update({f"server/{n}": v.cpu() for n, v in leaves(from_record(arrays)).items()})
    for role, values in strategy.state.items():
        tensors.update({f"server/{role}/{n}": v.cpu() for n, v in leaves(values).items()})
    for group, rows in (("metrics", report.clients), ("unseen", report.unseen), ("adapted", report.adapted)):
        for name in next(iter(rows.values())):
            tensors[f"{group}/{name}"] = torch.tensor([metrics[name] for metrics in rows.values()]).double()
    return tensors


def difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Largest difference of any entry, relative to the largest value of its tensor."""
    if first.keys() != second.keys() or any(value.shape != second[name].shape for name, value in first.items()):
        return float("inf")
    worst = 0.0
    for name, a in first.items():
        b = second[name]
        if not a.numel():
            continue
        a = a.double()
        scale = max(float(a.abs().max()), 1e-2)
        gap = float((a - b.double()).abs().max()) / scale
        worst = max(worst, gap) if gap == gap else float("inf")
    return worst


def compare_cohorts(methods: list[str], device: str = "cpu") -> int:
    """Print the table of differences between cohort sizes and workers; 1 when one is over its tolerance."""
    pairs: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("K=1 / K=3", {"clients_at_once": 1, "workers": 1}, {"clients_at_once": 3, "workers": 1}),
        ("K=1 / K=all", {"clients_at_once": 1, "workers": 1}, {"clients_at_once": 1000, "workers": 1}),
        ("1 / 2 workers", {"clients_at_once": 3, "workers": 1}, {"clients_at_once": 3, "workers": 2}),
    ]
    titles = "".join(f"{title:>16}" for title, _, _ in pairs)
    print(f"{'method':<12}{'settings':<20}{'precision':<10}{titles}{'tolerance':>12}")
    rows = [(method, label) for method in methods for label in problems(method)]
    over = 0
    for method, label in rows:
        for dtype, usual in TOLERANCE.items():
            tolerance = usual * (AMPLIFYING.get((method, label), 1.0) if dtype == torch.float32 else 1.0)
            known: dict[str, dict[str, Tensor]] = {}

            def get(
                setting: dict[str, Any],
                method: str = method,
                label: str = label,
                dtype: torch.dtype = dtype,
                known: dict[str, dict[str, Tensor]] = known,
            ) -> dict[str, Tensor]:
                key = str(setting)
                if key not in known:
                    known[key] = outcome(method, dtype, **setting, device=device, label=label)
                return known[key]

            gaps = [difference(get(a), get(b)) for _, a, b in pairs]
            bad = max(gaps) > tolerance
            over += bad
            name = str(dtype).removeprefix("torch.")
            print(
                f"{method:<12}{label:<20}{name:<10}"
                + "".join(f"{gap:16.1e}" for gap in gaps)
                + f"{tolerance:12.0e}"
                + ("  OVER" if bad else "")
            )
    print(f"{len(methods)} methods in {len(rows)} settings, {over} over tolerance")
    return 1 if over else 0


def compare_runtimes(methods: list[str], device: str = "cpu") -> int:
    """See :mod:`tests.runtimes`."""
    from tests.runtimes import compare_runtimes as compare

    return compare(methods, device)


def compare_resumed(methods: list[str], device: str = "cpu") -> int:
    """See :mod:`tests.resume`."""
    from tests.resume import compare_resumed as compare

    return compare(methods, device)


COMPARISONS: dict[str, Callable[[list[str], str], int]] = {
    "cohort": compare_cohorts,
    "runtime": compare_runtimes,
    "resume": compare_resumed,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one comparison."""
    parser = argparse.ArgumentParser(prog="python -m tests.equivalence", description=__doc__)
    parser.add_argument("comparison", choices=sorted(COMPARISONS))
    parser.add_argument(
        "methods", nargs="*", default=[], metavar="METHOD", help=f"of {', '.join(STRATEGIES)} (default: all)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args(arguments)
    if unknown := [m for m in options.methods if m not in STRATEGIES]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(STRATEGIES)}")
    reproducible_convolutions(options.device)
    watch = Raise(logging.WARNING)
    logging.getLogger("fedpers").addHandler(watch)
    try:
        with one_thread():
            return COMPARISONS[options.comparison](options.methods or list(STRATEGIES), options.device)
    finally:
        logging.getLogger("fedpers").removeHandler(watch)


if __name__ == "__main__":
    sys.exit(main())
