"""Clients trained together against one after another: ``python -m benchmarks.cohort [--device cuda]``.

One round of FedAvg (one epoch, batch size 10, 100 clients of 50 made-up samples) for an MLP, the two-convolution CNN
and a narrow ResNet-18, with different cohort sizes and workers; beside it the ordinary loop of ``torch.nn`` and
``torch.optim``, one client after another on all threads. Prints seconds per round, the median of several after a first,
and which share that is of the peak: the operations of matrix products and convolutions in a round, over those that a
product of two large matrices does in the same time on as many threads.
"""

from __future__ import annotations

import argparse
import copy
import logging
import time
from collections.abc import Callable

import flwr.app as flower
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fedpers.cohort import Training
from fedpers.data.federated import FederatedData
from fedpers.flower_private import server_identity
from fedpers.models import ModelConfig, build_model
from fedpers.process import cores
from fedpers.runtime.local import LocalGrid
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
) -> tuple[float, int, int]:
    """Seconds per round in the in-process runtime, clients computed together, and workers."""
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
    return seconds, choice.clients_at_once, choice.workers


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


def operations(model: nn.Module, data: FederatedData) -> int:
    """Floating-point operations of a round, as PyTorch counts them: products and convolutions, forward and backward."""
    positions = data.train[0][:BATCH]
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(copy.deepcopy(model)(data.x[positions]), data.y[positions]).backward()
    batches: int = len(data.train) * (SAMPLES // BATCH)
    return int(counter.get_total_flops()) * batches


def peak(device: str, threads: int, size: int = 2048) -> float:
    """Operations per second in the product of two square float32 matrices on `threads` threads."""
    a, b = torch.randn(2, size, size, device=device)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    seconds = median(lambda: a @ b, device, 5)
    torch.set_num_threads(before)
    return 2 * size**3 / seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    logging.getLogger("fedpers").setLevel(logging.ERROR)  # nobody has samples for testing
    sizes = (1, 20, options.clients)
    print(f"{options.clients} clients, {SAMPLES} samples each, batches of {BATCH}, {options.device}, {cores()} cores")
    peaks = {threads: peak(options.device, threads) for threads in range(1, cores() + 1)}
    print("peak: " + ", ".join(f"{value / 1e9:.0f} GFLOP/s with threads={n}" for n, value in peaks.items()))
    for name, config, shape in (
        ("mlp 64-64-10", ModelConfig("mlp"), (1, 8, 8)),
        ("cnn 28x28", ModelConfig("cnn"), (1, 28, 28)),
        ("resnet18 gn 32x32", ModelConfig("resnet18", width=16), (3, 32, 32)),
    ):
        data = made_up(shape, 10, options.clients)
        model = build_model(config, shape, 10, 0)
        plain, flops = plain_round(model, data, options.device, options.rounds), operations(model, data)
        share = flops / plain / peaks[cores()]
        title = f"{name}, {flops / 1e9:.2f} GFLOP: plain loop, one client after another"
        print(f"\n{title}{plain:10.3f} s{share:8.1%} of the peak")
        settings: list[tuple[int | str, int | str]] = [(k, 1) for k in sizes]
        if options.device == "cpu":
            settings.append((1, cores()))
        for cohort, workers in [*dict.fromkeys(settings), ("auto", "auto")]:
            seconds, size, threads = cohort_round(model, data, options.device, cohort, workers, options.rounds)
            label = f"K={size} workers={threads}{' (auto)' if cohort == 'auto' else ''}"
            share = flops / seconds / peaks[threads]
            print(f"  {label:<36}{seconds:10.3f} s{plain / seconds:8.1f} times the plain loop{share:8.1%} of the peak")


if __name__ == "__main__":
    main()
