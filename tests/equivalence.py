"""One result, however it is computed: ``python -m tests.equivalence cohort [METHOD...]``.

``cohort``: every method on clients of unequal sizes, with several batches, batch normalization, dropout and partial
participation, for 3 rounds; cohorts of 1, 3 and all clients, and 1 and 2 workers, must agree. Exit status 1 otherwise.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from typing import Any

import flwr.app as flower
import torch
from torch import Tensor

from fedpers.cohort import leaves
from fedpers.runtime.flower_private import server_identity
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import STRATEGIES, make_strategy
from fedpers.strategies.records import from_record
from tests.problems import problem

ROUNDS = 3


class Raise(logging.Handler):
    """A cohort that falls back to single clients would agree with them and prove nothing."""

    def emit(self, record: logging.LogRecord) -> None:
        raise RuntimeError(record.getMessage())


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def outcome(method: str, dtype: torch.dtype, cohort: int, workers: int, device: str = "cpu") -> dict[str, Tensor]:
    """Server arrays, server state, personal states and clients' metrics after the last round, by name."""
    given = problem(method, dtype)
    data = given.data
    server = {"fraction": 0.7, "seed": 3, "unseen": data.unseen}
    strategy, update = make_strategy(method, given.options, server=server, training=given.training)
    app = update.client_app(given.network, data, seed=3, device=device)
    grid = LocalGrid(app, data.num_clients, cohort=cohort, workers=workers)
    arrays, config = app.initial_arrays(), flower.ConfigRecord()
    with server_identity(1):
        for r in range(1, ROUNDS + 1):
            new, _ = strategy.aggregate_train(
                r, grid.send_and_receive(strategy.configure_train(r, arrays, config, grid))
            )
            assert new is not None
            arrays = new
        strategy.aggregate_evaluate(r, grid.send_and_receive(strategy.configure_evaluate(r, arrays, config, grid)))
    grid.close()
    assert grid.engine is not None
    if strategy.report.failures or strategy.report.evaluation_failures:
        raise RuntimeError(f"{method}: {strategy.report.failures or strategy.report.evaluation_failures}")
    found: dict[str, Tensor] = {f"server/{n}": v.cpu() for n, v in leaves(from_record(arrays)).items()}
    for role, values in strategy.state.items():
        found.update({f"server/{role}/{n}": v.cpu() for n, v in leaves(values).items()})
    states = grid.engine.store.gather(range(data.num_clients))
    found.update({f"clients/{n}": v.cpu() for n, v in leaves(states).items()})
    for group, rows in (("metrics", strategy.report.clients), ("unseen", strategy.report.unseen)):
        for name in next(iter(rows.values()), {}):
            found[f"{group}/{name}"] = torch.tensor([own[name] for own in rows.values()]).double()
    return found


def difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Largest difference of any entry, relative to the largest value of its tensor."""
    if first.keys() != second.keys():
        return float("inf")
    worst = 0.0
    for name, a in first.items():
        b = second[name]
        if not a.numel():
            continue
        scale = max(float(a.abs().max()), 1e-2)
        gap = float((a.double() - b.double()).abs().max()) / scale
        worst = max(worst, gap) if gap == gap else float("inf")
    return worst


def compare_cohorts(methods: list[str], device: str = "cpu") -> int:
    """Print the table of differences between cohort sizes and workers; 1 when one is over its tolerance."""
    pairs: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("K=1 / K=3", {"cohort": 1, "workers": 1}, {"cohort": 3, "workers": 1}),
        ("K=1 / K=all", {"cohort": 1, "workers": 1}, {"cohort": 1000, "workers": 1}),
        ("1 / 2 workers", {"cohort": 3, "workers": 1}, {"cohort": 3, "workers": 2}),
    ]
    print(f"{'method':<12}{'precision':<10}" + "".join(f"{title:>16}" for title, _, _ in pairs) + f"{'tolerance':>12}")
    over = 0
    for method in methods:
        for dtype, tolerance in TOLERANCE.items():
            known: dict[str, dict[str, Tensor]] = {}

            def get(
                setting: dict[str, Any],
                method: str = method,
                dtype: torch.dtype = dtype,
                known: dict[str, dict[str, Tensor]] = known,
            ) -> dict[str, Tensor]:
                key = str(setting)
                if key not in known:
                    known[key] = outcome(method, dtype, **setting, device=device)
                return known[key]

            gaps = [difference(get(a), get(b)) for _, a, b in pairs]
            bad = max(gaps) > tolerance
            over += bad
            name = str(dtype).removeprefix("torch.")
            print(
                f"{method:<12}{name:<10}"
                + "".join(f"{gap:16.1e}" for gap in gaps)
                + f"{tolerance:12.0e}"
                + ("  OVER" if bad else "")
            )
    print(f"{len(methods)} methods, {over} over tolerance")
    return 1 if over else 0


COMPARISONS: dict[str, Callable[[list[str], str], int]] = {"cohort": compare_cohorts}


def main(arguments: list[str] | None = None) -> int:
    """Run one comparison."""
    parser = argparse.ArgumentParser(prog="python -m tests.equivalence", description=__doc__)
    parser.add_argument("comparison", choices=sorted(COMPARISONS))
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(STRATEGIES)} (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args(arguments)
    if unknown := [m for m in options.methods if m not in STRATEGIES]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(STRATEGIES)}")
    watch = Raise(logging.WARNING)
    logging.getLogger("fedpers").addHandler(watch)
    try:
        return COMPARISONS[options.comparison](options.methods or list(STRATEGIES), options.device)
    finally:
        logging.getLogger("fedpers").removeHandler(watch)


if __name__ == "__main__":
    sys.exit(main())
