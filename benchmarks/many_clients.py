"""Set-up, memory and seconds with very many clients: ``python -m benchmarks.many_clients``.

Each number of clients is measured in a process of its own: clients have 20 samples of 32 features (12 for training), a
network 32-32-10, 100 of them are sampled in a round, and each keeps a personal head.
"""

from __future__ import annotations

import argparse
import logging
import resource
import statistics
import subprocess
import sys
import time

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedpers import simulate
from fedpers.cohort import Training
from fedpers.data import FederatedData
from fedpers.models import ModelConfig, build_model
from fedpers.strategies import FedPer, FedPerUpdate

SAMPLES, FEATURES, CLASSES, SAMPLED = 20, 32, 10, 100


def measure(clients: int, rounds: int) -> None:
    """Print one line of figures."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    torch.manual_seed(0)
    x, y = torch.randn(clients * SAMPLES, FEATURES), torch.randint(CLASSES, (clients * SAMPLES,))
    positions = torch.arange(clients * SAMPLES).view(clients, SAMPLES)
    begun = time.perf_counter()
    train, validation, test = (list(positions[:, a:b]) for a, b in ((0, 12), (12, 15), (15, 20)))
    data = FederatedData(x, y, train, validation, test, CLASSES, "many")
    made = time.perf_counter() - begun
    network = build_model(ModelConfig("mlp", hidden=(32,)), (FEATURES,), CLASSES, 0)
    training = Training(lr=0.1, epochs=1, batch_size=4)
    app = FedPerUpdate(training=training).client_app(network, data, seed=0)
    ready = time.perf_counter() - begun
    server = ServerApp()
    spent: dict[str, list[float]] = {"train": [], "evaluate": []}

    class Timed(FedPer):
        """Notes the seconds between what is sent and what is made of the replies."""

        def configure_train(self, *arguments):  # type: ignore[no-untyped-def]
            self.since = time.perf_counter()
            return super().configure_train(*arguments)

        def aggregate_train(self, *arguments):  # type: ignore[no-untyped-def]
            result = super().aggregate_train(*arguments)
            spent["train"].append(time.perf_counter() - self.since)
            return result

        def configure_evaluate(self, *arguments):  # type: ignore[no-untyped-def]
            self.since = time.perf_counter()
            return super().configure_evaluate(*arguments)

        def aggregate_evaluate(self, *arguments):  # type: ignore[no-untyped-def]
            result = super().aggregate_evaluate(*arguments)
            spent["evaluate"].append(time.perf_counter() - self.since)
            return result

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = Timed(fraction=SAMPLED / clients, evaluate_every=rounds)
        strategy.start(grid, app.initial_arrays(), num_rounds=rounds)

    simulate(server, app, num_supernodes=clients)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"{clients:>9,} clients: data {made:.2f} s, all ready {ready:.2f} s, a round "
        f"{statistics.median(spent['train']):.3f} s, evaluating all {max(spent['evaluate']):.2f} s, at most "
        f"{peak:.2f} GB",
        flush=True,
    )


def main() -> None:
    """Measure each number of clients in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--here", dest="in_process", action="store_true", help="in this process")
    options = parser.parse_args()
    for clients in options.clients:
        if options.in_process:
            measure(clients, options.rounds)
        else:
            command = [sys.executable, "-m", "benchmarks.many_clients", "--here"]
            subprocess.run([*command, "--clients", str(clients), "--rounds", str(options.rounds)], check=True)


if __name__ == "__main__":
    main()
