"""Seconds per round of the in-process runtime: ``python -m benchmarks.local_grid [--flower]``.

An app written for Flower alone, with Flower's own FedAvg on the server: 100 clients whose ``train`` does nothing, and a
network of 580,000 float32 parameters in 10 arrays. Then a method of this package with no epochs on a network of that
size, which computes in cohorts. Printed is the median over the rounds after the first.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy

Run = Callable[[ServerApp, ClientApp, int], None]


def server(strategy: Strategy, arrays: Callable[[], ArrayRecord], rounds: int, stamps: list[float]) -> ServerApp:
    """Server app that notes the time after every round."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        def note(server_round: int, arrays: ArrayRecord) -> None:
            stamps.append(time.perf_counter())

        strategy.start(grid, arrays(), num_rounds=rounds, evaluate_fn=note)

    return app


def empty_client(*, rebuild: bool = False) -> ClientApp:
    """Client app that returns what it received; `rebuild` makes the record anew from a PyTorch state dict."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = message.content["arrays"]
        if rebuild:
            arrays = ArrayRecord(arrays.to_torch_state_dict())
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "loss": 0.0})}), reply_to=message)

    return app


def seconds(run: Run, strategy: Strategy, arrays: Callable[[], ArrayRecord], client: ClientApp, clients: int,
            rounds: int) -> float:  # fmt: skip
    """Median seconds of the rounds after the first."""
    stamps: list[float] = []
    run(server(strategy, arrays, rounds, stamps), client, clients)
    return statistics.median(after - before for before, after in pairwise(stamps[1:]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--parameters", type=int, default=580_000)
    parser.add_argument("--arrays", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--flower", action="store_true", help="also under Flower's own simulation (3 rounds)")
    options = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)

    import fedpers

    def plain() -> ArrayRecord:
        rng = np.random.default_rng(0)
        parts = np.array_split(rng.normal(size=options.parameters).astype(np.float32), options.arrays)
        return ArrayRecord(list(parts))

    def report(line: str, run: Run, evaluate: bool, client: ClientApp, rounds: int) -> None:
        strategy = FedAvg(fraction_evaluate=float(evaluate))
        took = seconds(run, strategy, plain, client, options.clients, rounds)
        print(f"{line + (', evaluated' if evaluate else ''):<66}{took:8.3f} s a round", flush=True)

    print(f"{options.clients} clients, {options.parameters:,} float32 parameters in {options.arrays} arrays")
    for evaluate in (False, True):
        report("simulate: Flower app, empty train", fedpers.simulate, evaluate, empty_client(), options.rounds)
    for evaluate in (False, True):
        report("simulate: Flower app, record made anew from a state dict", fedpers.simulate, evaluate,
               empty_client(rebuild=True), options.rounds)  # fmt: skip
    for method in ("fedavg", "fedrep"):
        took = method_seconds(method, options.clients, options.parameters, options.rounds)
        print(f"{f'simulate: {method} of this package, no epochs':<66}{took:8.3f} s a round", flush=True)
    if options.flower:
        from flwr.simulation import run_simulation

        for evaluate in (False, True):
            report("Flower's simulation: Flower app, empty train", run_simulation, evaluate, empty_client(), 4)


def method_seconds(name: str, clients: int, parameters: int, rounds: int) -> float:
    """Seconds per round of a method without its training: messages, cohorts, checks and aggregation."""
    import fedpers
    from fedpers.cohort import Training
    from fedpers.data import FederatedData
    from fedpers.models import MLP
    from fedpers.strategies import make_strategy

    features, classes = 784, 10
    lists = [torch.arange(3 * c, 3 * c + 3) for c in range(clients)]
    data = FederatedData(
        torch.randn(3 * clients, features), torch.randint(classes, (3 * clients,)),
        [positions[:1] for positions in lists], [positions[1:2] for positions in lists],
        [positions[2:] for positions in lists], classes,
    )  # fmt: skip
    width = round(parameters / (features + 1 + classes))
    model = MLP((features,), classes, (width,))
    options = {"head_epochs": 0, "body_epochs": 0} if name == "fedrep" else {}
    strategy, update = make_strategy(name, options, server={"evaluate_every": rounds + 1}, training=Training(epochs=0))
    client = update.client_app(model, data)
    return seconds(fedpers.simulate, strategy, client.initial_arrays, client, clients, rounds)


if __name__ == "__main__":
    main()
