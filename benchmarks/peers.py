"""Seconds of a round of training, here and elsewhere: ``python -m benchmarks.peers``.

1,000 clients with 50 pictures 3x32x32 each, 50 clients a round, one pass in batches of 10, SGD, no evaluation; an MLP
3072-64-10, and with ``--cnn`` a small convolutional network. All are measured in turns in this process, threads pinned;
printed are medians over rounds and turns, the spread over turns, and ratios to the textbook loop:

- textbook: one client after the other, PyTorch's own optimizer, a running mean of state dicts; one thread;
- fedpers, by clients computed together and workers, and as it chooses itself;
- with ``--flower`` an app of the same loop under Flower's simulation and under :func:`fedpers.simulate`.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import flwr.app as flower
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.local_grid import seconds
from fedpers.cohort import Training
from fedpers.data import FederatedData
from fedpers.flower_private import server_identity
from fedpers.models import ModelConfig, build_model
from fedpers.randomness import sample_clients
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import FedAvg

CLIENTS, SAMPLES, SHAPE, CLASSES, BATCH, LR = 1000, 50, (3, 32, 32), 10, 10, 0.05
SAMPLED = 50


def made_up_data() -> FederatedData:
    """Random pictures and labels; a client's last two samples are for validation and testing."""
    total = CLIENTS * (SAMPLES + 2)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(total, *SHAPE, generator=generator), torch.randint(CLASSES, (total,), generator=generator)
    parts = torch.arange(total).view(CLIENTS, -1)
    return FederatedData(x, y, list(parts[:, :SAMPLES]), list(parts[:, -2:-1]), list(parts[:, -1:]), CLASSES)


def network(cnn: bool) -> nn.Module:
    """The network that all train."""
    config = ModelConfig("cnn") if cnn else ModelConfig("mlp", hidden=(64,))
    return build_model(config, SHAPE, CLASSES, seed=0)


def train_client(model: nn.Module, x: torch.Tensor, y: torch.Tensor, order: torch.Tensor) -> None:
    """One pass of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), LR)
    for rows in order.split(BATCH):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()


class Textbook:
    """One client after the other."""

    def __init__(self, data: FederatedData, cnn: bool) -> None:
        self.data, self.model = data, network(cnn)
        self.state = {name: value.clone() for name, value in self.model.state_dict().items()}

    def round(self, number: int) -> None:
        """Train the sampled clients and average."""
        sampled = sample_clients(0, number, CLIENTS, SAMPLED / CLIENTS)
        mean = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in self.state.items()}
        for client in sampled:
            self.model.load_state_dict(self.state)
            rows = self.data.train[client]
            train_client(self.model, self.data.x, self.data.y, rows[torch.randperm(len(rows))])
            for name, value in self.model.state_dict().items():
                mean[name] += value / len(sampled)
        self.state = mean

    def close(self) -> None:
        """Nothing is held."""


class Ours:
    """FedAvg of this package, its server and clients, without evaluation."""

    def __init__(self, data: FederatedData, cnn: bool, clients_at_once: int | str, workers: int | str) -> None:
        update = FedAvg.update(training=Training(lr=LR, batch_size=BATCH))
        self.app = update.client_app(network(cnn), data)
        self.strategy = FedAvg(fraction=SAMPLED / CLIENTS)
        self.grid = LocalGrid(self.app, CLIENTS, clients_at_once=clients_at_once, workers=workers)
        self.strategy.begin()
        self.folding = self.strategy.folding(self.grid)
        self.arrays = self.app.initial_arrays()

    def round(self, number: int) -> None:
        """Train the sampled clients and average."""
        with server_identity(1):
            messages = self.strategy.configure_train(number, self.arrays, flower.ConfigRecord(), self.folding)
            arrays, _ = self.strategy.aggregate_train(number, self.folding.send_and_receive(messages))
        assert arrays is not None
        self.arrays = arrays

    def close(self) -> None:
        """End the worker threads."""
        self.grid.close()


def measure(makers: dict[str, Callable[[], Any]], rounds: int, turns: int) -> dict[str, list[float]]:
    """Median seconds of a round of each, once per turn; each is made anew in every turn, in changing order."""
    found: dict[str, list[float]] = {name: [] for name in makers}
    for turn in range(turns):
        names = list(makers)[:: 1 if turn % 2 == 0 else -1]
        for name in names:
            runner = makers[name]()
            times = []
            for number in range(1, rounds + 3):
                start = time.perf_counter()
                runner.round(number)
                times.append(time.perf_counter() - start)
            runner.close()
            found[name].append(statistics.median(times[2:]))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cnn", action="store_true", help="a convolutional network instead of the MLP")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 5, 13, 25, 50], help="clients computed together")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--flower", action="store_true", help="also an app of the textbook loop, under both engines")
    options = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    data = made_up_data()
    makers: dict[str, Callable[[], Any]] = {"textbook, 1 thread": partial(Textbook, data, options.cnn)}
    makers["fedpers, its choice"] = partial(Ours, data, options.cnn, "auto", "auto")
    for workers in options.workers:
        for size in options.sizes:
            name = f"fedpers, {size} at once, {workers} worker{'s' * (workers > 1)}"
            makers[name] = partial(Ours, data, options.cnn, size, workers)
    found = measure(makers, options.rounds, options.turns)
    chosen = Ours(data, options.cnn, "auto", "auto")
    chosen.grid.choose(SAMPLED)
    print(f"{'CNN' if options.cnn else 'MLP'}, seconds of a round; its choice: {chosen.grid}")
    base = statistics.median(found["textbook, 1 thread"])
    for name, times in found.items():
        median = statistics.median(times)
        print(f"{name:36}{median:8.4f}  {min(times):.4f} to {max(times):.4f}  {median / base:6.2f} x", flush=True)
    if options.flower:
        _flower(data, options.cnn)


def _flower(data: FederatedData, cnn: bool) -> None:
    """An app of the textbook loop under both engines."""
    from flwr.clientapp import ClientApp
    from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
    from flwr.simulation import run_simulation

    import fedpers

    app = ClientApp()

    @app.train()
    def train(message: flower.Message, context: flower.Context) -> flower.Message:
        model = network(cnn)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        rows = data.train[int(context.node_config["partition-id"])]
        train_client(model, data.x, data.y, rows[torch.randperm(len(rows))])
        metrics = flower.MetricRecord({"num-examples": len(rows)})
        arrays = flower.ArrayRecord(model.state_dict())
        return flower.Message(flower.RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    arrays = partial(flower.ArrayRecord, network(cnn).state_dict())
    for name, run in (("fedpers.simulate", fedpers.simulate), ("Flower's simulation", run_simulation)):
        took = seconds(run, FlowerFedAvg(fraction_train=1.0, fraction_evaluate=0.0), arrays, app, SAMPLED, 4)
        print(f"{f'Flower app, {name}':36}{took:8.4f}", flush=True)


if __name__ == "__main__":
    main()
