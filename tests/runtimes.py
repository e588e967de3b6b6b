"""One result on every runtime: the comparison behind ``python -m tests.equivalence runtime``.

In this process one client at a time, and in cohorts on automatic choice; on two Ray actors; on a Ray cluster of two
nodes (raylets of their own on this machine); under Flower's simulation. Compared with the first after 3 rounds: arrays
and state of the server, metrics and personal state of every client.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import ray
import torch
from ray.cluster_utils import Cluster
from torch import Tensor

from fedpers.runtime.flower_simulation import FlowerSimulation
from fedpers.runtime.local import LocalGrid
from fedpers.runtime.ray import RayGrid
from fedpers.strategies import CohortApp
from tests.equivalence import TOLERANCE, client_half, difference, halves, outcome_on, played
from tests.problems import SIZES

Outcomes = Callable[[str, torch.dtype], dict[str, Tensor]]


@contextlib.contextmanager
def cluster(nodes: int = 2, cpus: int = 1) -> Iterator[Cluster]:
    """A Ray cluster of several raylets on this machine, to which this process is connected."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus})
    try:
        for _ in range(nodes - 1):
            made.add_node(num_cpus=cpus)
        made.wait_for_nodes()
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def local(cohort: int | str) -> Callable[[CohortApp], LocalGrid]:
    return lambda app: LocalGrid(
        app, app.data.num_clients, clients_at_once=cohort, workers=1 if cohort == 1 else "auto"
    )


def on_ray(app: CohortApp) -> RayGrid:
    return RayGrid(app, actors=2, clients_at_once=2)


def under_flower(engine: FlowerSimulation, method: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Play a method under Flower's simulation."""
    strategy, app = halves(method, dtype)
    outcome: dict[str, Tensor] = {}
    engine.run(partial(client_half, method, dtype), lambda grid: outcome.update(played(strategy, app, grid)), app)
    return outcome


def compare_runtimes(methods: list[str], device: str = "cpu") -> int:
    """Print the table of differences from one client at a time in this process; 1 when one is over its tolerance."""
    rows = [(method, dtype) for method in methods for dtype in TOLERANCE]
    first = {row: outcome_on(*row, local(1), device=device) for row in rows}
    columns: dict[str, dict[tuple[str, torch.dtype], float]] = {}
    seconds: dict[str, float] = {}

    def measure(title: str, run: Outcomes) -> None:
        start = time.perf_counter()
        columns[title] = {row: difference(*_common(first[row], run(*row), row[1])) for row in rows}
        seconds[title] = time.perf_counter() - start

    measure("local auto", lambda *row: outcome_on(*row, local("auto"), device=device))
    with cluster(nodes=1, cpus=2):
        measure("Ray 2 actors", lambda *row: outcome_on(*row, on_ray, device=device))
    with cluster():
        measure("Ray 2 nodes", lambda *row: outcome_on(*row, on_ray, device=device))
    with FlowerSimulation(len(SIZES)) as engine:
        measure("Flower", lambda *row: under_flower(engine, *row))
    print(f"{'method':<12}{'precision':<10}" + "".join(f"{title:>16}" for title in columns) + f"{'tolerance':>12}")
    over = 0
    for method, dtype in rows:
        gaps = [column[method, dtype] for column in columns.values()]
        bad = not max(gaps) <= TOLERANCE[dtype]
        over += bad
        print(
            f"{method:<12}{str(dtype).removeprefix('torch.'):<10}"
            + "".join(f"{gap:16.1e}" for gap in gaps)
            + f"{TOLERANCE[dtype]:12.0e}"
            + ("  OVER" if bad else "")
        )
    print(f"{'seconds':<22}" + "".join(f"{spent:16.1f}" for spent in seconds.values()))
    print(f"{len(methods)} methods on {1 + len(columns)} runtimes, {over} over tolerance")
    return 1 if over else 0


def _common(
    first: dict[str, Tensor], second: dict[str, Tensor], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both in double precision; in single precision without personal states, which rounding alone may move further.

    (SCAFFOLD's control variates divide by the rate.)
    """
    if dtype == torch.float64:
        return first, second
    kept = [{n: v for n, v in values.items() if not n.startswith("clients/")} for values in (first, second)]
    return kept[0], kept[1]
