"""Rounds of FedAvg in fluke (PyPI: ``fluke-fl``), in its environment: ``PYTHON benchmarks/peers/run_fluke.py``."""

from __future__ import annotations

import contextlib
import sys
import time

import torch
from fluke import DDict, FlukeENV
from fluke.algorithms.fedavg import FedAVG
from fluke.data import FastDataLoader
from fluke.utils import FederationObserver
from problem import BATCH, CLASSES, LR, WITHOUT_EVALUATION, Part, options, problem, report


class Splitter:
    """Hands each client its pictures, in place of fluke's own splitting of a data set."""

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts

    def assign(self, n_clients: int, batch_size: int):
        """Loaders of training and test sets of all clients, and none for the server."""
        train = [FastDataLoader(*part, num_labels=CLASSES, batch_size=batch_size, shuffle=True) for part in self.parts]
        return (train, [None] * n_clients), None


class Clock(FederationObserver):
    """Notes the time after each round."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def end_round(self, round: int) -> None:
        """Note it."""
        self.stamps.append(time.perf_counter())


def main() -> None:
    """Run and print the seconds of each round."""
    chosen = options(__doc__, WITHOUT_EVALUATION).parse_args()
    torch.set_num_threads(1)
    case = problem(chosen.problem)
    environment = FlukeENV()
    environment.set_device(chosen.device)
    environment.set_inmemory(True)
    environment.set_eval_cfg(pre_fit=False, post_fit=False, locals=False, server=False)
    client = DDict(
        batch_size=BATCH,
        local_epochs=1,
        loss="CrossEntropyLoss",
        optimizer=DDict(name="SGD", lr=LR),
        scheduler=DDict(name="StepLR", step_size=1, gamma=1),
        persistency=False,
    )
    settings = DDict(client=client, server=DDict(weighted=True), model=case.network())
    algorithm, clock = FedAVG(len(case.train), Splitter(case.train), settings), Clock()
    algorithm.finalize = lambda: None  # it would hand the network to every client that has taken part
    algorithm.set_callbacks(clock)
    with contextlib.redirect_stdout(sys.stderr):
        algorithm.run(case.untimed + chosen.rounds, case.sampled / len(case.train))
    seconds = [after - before for before, after in zip(clock.stamps, clock.stamps[1:], strict=False)]
    report(seconds[case.untimed - 1 :])


if __name__ == "__main__":
    main()
