"""Ray runtime beside Flower's simulation: ``python -m benchmarks.ray_grid``.

Clients whose ``train`` does nothing and a network of 580,000 float32 parameters: what is left is the runtime. FedAvg of
this package on Ray actors, seconds per round, and bytes that went through Ray's object store in a round beside clients
times model size; then Flower's FedAvg with an empty Flower app under Flower's own simulation, in the same run. With
``--train`` instead rounds that compute, of ``benchmarks.cohort``'s two-convolution CNN: in this process with 1 and with
`actors` workers, and on 1 and on `actors` Ray actors. Printed is the median over the rounds after the first.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from functools import partial
from itertools import pairwise
from typing import Any

import flwr.app as flower
import numpy as np
import ray
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from benchmarks.cohort import BATCH, cohort_round, made_up
from benchmarks.local_grid import empty_client, seconds
from fedpers.cohort import Cohort, Reply, Training
from fedpers.data import FederatedData
from fedpers.flower_private import server_identity
from fedpers.models import MLP, ModelConfig, build_model
from fedpers.runtime.ray import RayGrid
from fedpers.runtime.ray_shards import Job
from fedpers.strategies import CohortApp, FedAvg, FedAvgUpdate, Received

FEATURES, CLASSES = 784, 10


class EmptyUpdate(FedAvgUpdate):
    """Sends back what it received."""

    def train(self, cohort: Cohort, received: Received, config: Any) -> Reply:
        """Train nothing."""
        return cohort.reply(cohort.assemble(received["arrays"]), share="all")


class CountingGrid(RayGrid):
    """Notes how large the objects are that go to the actors and come back."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.down = self.up = 0

    def _submit(self, job: Job) -> None:
        package = job.arguments[3]
        if package not in self._counted:
            self._counted.append(package)
            self.down += _size(package)
        super()._submit(job)

    def _take(self, job: Job) -> None:
        assert job.future is not None
        pickled, arrays = job.future.result()
        self.up += len(pickled) + sum(array.nbytes for array in arrays)
        super()._take(job)

    _counted: list[Any] = []  # noqa: RUF012


def _size(reference: Any) -> int:
    """Bytes of an object in the store; small ones travel inside of messages and count 0."""
    return int(ray.experimental.get_object_locations([reference])[reference].get("object_size") or 0)


def empty_app(clients: int, parameters: int) -> CohortApp:
    """Clients with three samples each and a network of that size."""
    lists = [torch.arange(3 * c, 3 * c + 3) for c in range(clients)]
    data = FederatedData(
        torch.randn(3 * clients, FEATURES), torch.randint(CLASSES, (3 * clients,)),
        [positions[:1] for positions in lists], [positions[1:2] for positions in lists],
        [positions[2:] for positions in lists], CLASSES,
    )  # fmt: skip
    model = MLP((FEATURES,), CLASSES, (round(parameters / (FEATURES + 1 + CLASSES)),))
    return EmptyUpdate(training=Training(epochs=1)).client_app(model, data)


def ray_seconds(grid: CountingGrid, app: CohortApp, rounds: int, evaluate: bool) -> tuple[float, float, float]:
    """Median seconds of a round after the first; bytes down and up of such a round."""
    strategy = FedAvg()
    strategy.begin()
    folding = strategy.folding(grid)
    arrays, config = app.initial_arrays(), flower.ConfigRecord()
    stamps = []
    with server_identity(1):
        for r in range(1, rounds + 1):
            messages = strategy.configure_train(r, arrays, config, folding)
            new, _ = strategy.aggregate_train(r, folding.send_and_receive(messages))
            assert new is not None
            arrays = new
            if evaluate:
                messages = strategy.configure_evaluate(r, arrays, config, folding)
                strategy.aggregate_evaluate(r, folding.send_and_receive(messages))
            stamps.append(time.perf_counter())
            if r == 1:
                down, up = grid.down, grid.up
    took = statistics.median(after - before for before, after in pairwise(stamps))
    return took, (grid.down - down) / (rounds - 1), (grid.up - up) / (rounds - 1)


def training_rounds(clients: int, actors: int, rounds: int, turns: int) -> None:
    """Print seconds of a round of training by runtime: the median over `turns`, and the least and the most."""
    shape, classes = (1, 28, 28), 10
    data, model = made_up(shape, classes, clients), build_model(ModelConfig("cnn"), shape, classes, 0)
    app = FedAvgUpdate(training=Training(lr=0.05, batch_size=BATCH)).client_app(model, data)

    def in_process(workers: int) -> float:
        return cohort_round(model, data, "cpu", "auto", workers, rounds - 1)[0]

    def on_ray(number: int) -> float:
        with CountingGrid(app, actors=number) as grid:
            return ray_seconds(grid, app, rounds, evaluate=False)[0]

    measured = {
        f"{title}={number}": partial(run, number)
        for number in sorted({1, actors})
        for title, run in (("in this process, workers", in_process), ("Ray, actors", on_ray))
    }
    took: dict[str, list[float]] = {title: [] for title in measured}
    for _ in range(turns):
        for title, run in measured.items():
            took[title].append(run())
    print(f"{clients} clients, CNN 28x28, one pass in batches of {BATCH}; medians of {turns} turns (least to most)")
    for title, values in took.items():
        print(f"{title:<40}{statistics.median(values):8.3f} s a round ({min(values):.3f} to {max(values):.3f})")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--parameters", type=int, default=580_000)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--train", action="store_true", help="rounds that compute, by runtime")
    parser.add_argument("--turns", type=int, default=3, help="of --train")
    options = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if options.train:
        logging.getLogger("fedpers").setLevel(logging.ERROR)  # nobody has samples for testing
        training_rounds(options.clients, options.actors, options.rounds, options.turns)
        return
    app = empty_app(options.clients, options.parameters)
    size = sum(value.nbytes for value in app.template.values())
    print(f"{options.clients} clients, {size / 4:,.0f} float32 parameters, {options.actors} actors")
    for evaluate in (False, True):
        with CountingGrid(app, actors=options.actors) as grid:
            took, down, up = ray_seconds(grid, app, options.rounds, evaluate)
        title = f"Ray runtime, fedavg, empty train{', evaluated' if evaluate else ''}"
        print(f"{title:<60}{took:8.3f} s a round", flush=True)
        print(
            f"  object store: {down / 1e6:.2f} MB to the actors, {up / 1e6:.2f} MB back; clients x model size is "
            f"{options.clients * size / 1e6:.0f} MB each way",
            flush=True,
        )

    def plain() -> ArrayRecord:
        rng = np.random.default_rng(0)
        return ArrayRecord(list(np.array_split(rng.normal(size=options.parameters).astype(np.float32), 10)))

    from flwr.simulation import run_simulation

    alone = partial(run_simulation, backend_config={"init_args": {"address": "local"}})  # not on some other Ray cluster
    for evaluate in (False, True):
        strategy = FlowerFedAvg(fraction_evaluate=float(evaluate))
        took = seconds(alone, strategy, plain, empty_client(), options.clients, 4)
        title = f"Flower's simulation, Flower's FedAvg, empty train{', evaluated' if evaluate else ''}"
        print(f"{title:<60}{took:8.3f} s a round", flush=True)


if __name__ == "__main__":
    main()
