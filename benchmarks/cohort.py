"""Clients trained together against one after another: ``python -m benchmarks.cohort [--device cuda]``.

One round of FedAvg (one epoch, batch size 10, 100 clients of 50 made-up samples) for an MLP, the two-convolution CNN
and a narrow ResNet-18, with different cohort sizes and workers; beside it the ordinary loop of ``torch.nn`` and
``torch.optim``, one client after another on all threads. Prints seconds per round, the median of several after a first.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import flwr.app as flower
import torch
from torch import nn
from torch.nn import functional as F

from fedpers.cohort import Training
from fedpers.data.federated import FederatedData
from fedpers.flower_private import server_identity
from fedpers.models import ModelConfig, build_model
from fedpers.runtime.local import LocalGrid
from fedpers.runtime.probe import cores
from fedpers.strategies import FedAvg, FedAvgUpdate

CLIENTS, SAMPLES, BATCH = 100, 50, 10


def made_up(shape: tuple[int, ...], classes: int, clients: int) -> FederatedData:
    """Random samples: only the time counts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(clients * SAMPLES, *shape, generator=generator)
    y = torch.randint(0, classes, (len(x),), generator=generator)
    owned = list(torch.arange(len(x)).view(clients, SAMPLES))
    nothing = [torch.arange(0)] * clients
    return FederatedData(x, y, owned, nothing, nothing, classes, "made-up")


def median(call: Callable[[], object], device: str, rounds: int) -> float:
    """Median seconds of `rounds` calls after a first one."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[rounds // 2]


def cohort_round(
    model: nn.Module, data: FederatedData, device: str, cohort: int | str, workers: int | str, rounds: int
) -> tuple[float, str]:
    """Seconds per round in the in-process runtime."""
    update = FedAvgUpdate(training=Training(lr=0.05, batch_size=BATCH))
    app = update.client_app(model, data, device=device)
    grid = LocalGrid(app, data.num_clients, clients_at_once=cohort, workers=workers)
    strategy = FedAvg()
    strategy.begin()
    arrays = app.initial_arrays()
    with server_identity(1):

        def one() -> None:
            messages = strategy.configure_train(1, arrays, flower.ConfigRecord(), grid)
            strategy.aggregate_train(1, grid.send_and_receive(messages))

        seconds = median(one, device, rounds)
    grid.close()
    assert grid.engine is not None
    assert not strategy.report.failures
    choice = grid.engine.choice
    assert choice is not None
    return seconds, f"K={choice.clients_at_once} workers={choice.workers}"


def plain_round(model: nn.Module, data: FederatedData, device: str, rounds: int) -> float:
    """Seconds per round of an ordinary loop over clients."""
    moved = data.to(device)

    def one() -> None:
        for index in moved.train:
            network = copy.deepcopy(model).to(device)
            optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
            for batch in index[torch.randperm(len(index))].split(BATCH):
                optimizer.zero_grad()
                positions = batch.to(device)
                F.cross_entropy(network(moved.x[positions]), moved.y[positions]).backward()
                optimizer.step()

    return median(one, device, rounds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    sizes = (1, 20, options.clients)
    print(f"{options.clients} clients, {SAMPLES} samples each, batches of {BATCH}, {options.device}, {cores()} cores")
    for name, config, shape in (
        ("mlp 64-64-10", ModelConfig("mlp"), (1, 8, 8)),
        ("cnn 28x28", ModelConfig("cnn"), (1, 28, 28)),
        ("resnet18 gn 32x32", ModelConfig("resnet18", width=16), (3, 32, 32)),
    ):
        data = made_up(shape, 10, options.clients)
        model = build_model(config, shape, 10, 0)
        plain = plain_round(model, data, options.device, options.rounds)
        print(f"\n{name}: plain loop, one client after another{plain:10.3f} s")
        settings: list[tuple[int | str, int | str]] = [(k, 1) for k in sizes]
        if options.device == "cpu":
            settings.append((1, cores()))
        for cohort, workers in [*dict.fromkeys(settings), ("auto", "auto")]:
            seconds, used = cohort_round(model, data, options.device, cohort, workers, options.rounds)
            label = f"{used}{' (auto)' if cohort == 'auto' else ''}"
            print(f"  {label:<36}{seconds:10.3f} s{plain / seconds:8.1f} times the plain loop")


if __name__ == "__main__":
    main()
