"""Seconds of a round of training, here and elsewhere: ``python -m benchmarks.peers``.

The problems are those of ``problem.py``. All are measured in turns, one thread for each worker; printed are medians
over rounds and turns, the spread over turns, and ratios to the textbook loop:

- textbook: one client after the other, PyTorch's own optimizer, a running mean of state dicts; one thread;
- fedpers, by clients computed together and workers, and as it chooses itself;
- ``--flower``: the textbook loop as a Flower app, under Flower's simulation and under :func:`fedpers.simulate`;
- ``--pfl PYTHON``, ``--fluke PYTHON``, ``--pfllib PYTHON CHECKOUT``: other frameworks, each in its own environment.

``--profile`` says instead where the time of fedpers' rounds goes. Whole apps of others: ``benchmarks.flower_apps``.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flwr.app as flower
import torch

import fedpers
from benchmarks.peers.flower_app import flower_app
from benchmarks.peers.problem import (
    BATCH,
    CLASSES,
    LR,
    WITHOUT_EVALUATION,
    Part,
    Problem,
    Textbook,
    options,
    problem,
    timed,
)
from fedpers.cohort import Training
from fedpers.data import FederatedData
from fedpers.flower_private import server_identity
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import FedAvg

HERE = Path(__file__).parent
FLOWER_ROUNDS = 4
Measurement = Callable[[], list[float]]
"""Seconds of some rounds, by something that was made anew."""


class Ours:
    """FedAvg of this package, its server and clients."""

    def __init__(
        self, case: Problem, data: FederatedData, clients_at_once: int | str, workers: int | str, device: str
    ) -> None:
        update = FedAvg.update(training=Training(lr=LR, batch_size=BATCH))
        self.case = case
        self.app = update.client_app(case.network(), data).to(device)
        self.strategy = FedAvg(fraction=case.sampled / len(case.train))
        self.grid = LocalGrid(self.app, len(case.train), clients_at_once=clients_at_once, workers=workers)
        self.strategy.begin()
        self.folding = self.strategy.folding(self.grid)
        self.arrays = self.app.initial_arrays()

    def round(self, number: int) -> None:
        """Train the sampled clients and average; evaluate all if the problem says so."""
        with server_identity(1):
            messages = self.strategy.configure_train(number, self.arrays, flower.ConfigRecord(), self.folding)
            arrays, _ = self.strategy.aggregate_train(number, self.folding.send_and_receive(messages))
            assert arrays is not None
            self.arrays = arrays
            if self.case.evaluated:
                messages = self.strategy.configure_evaluate(number, arrays, flower.ConfigRecord(), self.grid)
                self.strategy.aggregate_evaluate(number, self.grid.send_and_receive(messages))

    def close(self) -> None:
        """End the worker threads."""
        self.grid.close()


def our_data(case: Problem) -> FederatedData:
    """The problem's samples; the first test sample of each client is for validation."""
    parts: list[Part] = [*case.train, *case.test]
    positions = torch.arange(sum(len(y) for _, y in parts)).split([len(y) for _, y in parts])
    train, test = positions[: len(case.train)], positions[len(case.train) :]
    lists = (list(train), [rows[:1] for rows in test], [rows[1:] for rows in test])
    return FederatedData(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]), *lists, CLASSES)


def in_this_process(make: Callable[[], Any], untimed: int, chosen: Namespace) -> list[float]:
    """Rounds in this process."""
    runner = make()
    try:
        return timed(runner.round, untimed, chosen.rounds, chosen.device)
    finally:
        runner.close()


def elsewhere(command: list[str], chosen: Namespace) -> list[float]:
    """Rounds of another framework, by a program of this folder in its environment."""
    flags = ["--rounds", str(chosen.rounds), "--device", chosen.device, "--problem", chosen.problem]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)  # where Flower's engine writes this process's path, for its own workers
    done = subprocess.run([*command, *flags], stdout=subprocess.PIPE, text=True, check=True, env=environment)
    times: list[float] = json.loads(done.stdout.splitlines()[-1])
    return times


def measurements(chosen: Namespace) -> dict[str, Measurement]:
    """What is measured, by the name of its row."""
    case = problem(chosen.problem)
    data = our_data(case)
    makers: dict[str, Callable[[], Any]] = {"textbook": partial(Textbook, case, chosen.device)}
    makers["fedpers, its choice"] = partial(Ours, case, data, "auto", "auto", chosen.device)
    for workers in chosen.workers:
        for size in chosen.sizes:
            name = f"fedpers, {size} at once, {workers} worker{'s' * (workers > 1)}"
            makers[name] = partial(Ours, case, data, size, workers, chosen.device)
    measured: dict[str, Measurement] = {
        name: partial(in_this_process, make, case.untimed, chosen) for name, make in makers.items()
    }
    if chosen.pfl:
        measured["pfl"] = partial(elsewhere, [chosen.pfl, str(HERE / "run_pfl.py")], chosen)
    if chosen.fluke:
        measured["fluke"] = partial(elsewhere, [chosen.fluke, str(HERE / "run_fluke.py")], chosen)
    if chosen.pfllib:
        python, checkout = chosen.pfllib
        measured["PFLlib"] = partial(elsewhere, [python, str(HERE / "run_pfllib.py"), "--checkout", checkout], chosen)
    if chosen.flower:
        from flwr.simulation import run_simulation

        runs: dict[str, Callable[..., None]] = {"fedpers.simulate": fedpers.simulate, "Flower": run_simulation}
        for name, run in runs.items():
            measured[f"Flower app, {name}"] = partial(flower_app, run, chosen.problem)
    return measured


def in_turns(measured: dict[str, Measurement], turns: int) -> dict[str, list[float]]:
    """Median seconds of a round of each, once per turn, in changing order."""
    seconds: dict[str, list[float]] = {name: [] for name in measured}
    for turn in range(turns):
        for name in list(measured)[:: 1 if turn % 2 == 0 else -1]:
            seconds[name].append(statistics.median(measured[name]()))
            print(f"turn {turn + 1} of {turns}: {name} {seconds[name][-1]:.4f} s", file=sys.stderr, flush=True)
    return seconds


def profile(chosen: Namespace) -> None:
    """Print where the time of rounds with one worker goes, by operation; the rest is Python and PyTorch's dispatch."""
    case = problem(chosen.problem)
    for size in chosen.sizes:
        runner = Ours(case, our_data(case), size, 1, chosen.device)
        for number in range(1, case.untimed + 1):
            runner.round(number)
        timed_rounds = range(case.untimed + 1, case.untimed + chosen.rounds + 1)
        start = time.perf_counter()
        for number in timed_rounds:
            runner.round(number)
        plain = time.perf_counter() - start
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for number in timed_rounds:
                runner.round(number)
        runner.close()
        rows = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)
        kernels = [row for row in rows if row.key in KERNELS]
        inside = sum(row.self_cpu_time_total for row in kernels) / 1e6
        print(
            f"\n{size} at once: {plain / chosen.rounds:.4f} s a round, {1 - inside / plain:.0%} outside these kernels"
        )
        for row in kernels[:10]:
            share = row.self_cpu_time_total / 1e6 / plain
            print(f"  {row.key:28}{share:7.1%}{row.count / chosen.rounds:9.0f} calls a round", flush=True)


KERNELS = {
    "aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm", "aten::mkldnn_convolution", "aten::convolution_backward",
    "aten::max_pool2d_with_indices", "aten::max_pool2d_with_indices_backward", "aten::relu", "aten::threshold_backward",
    "aten::_log_softmax", "aten::_log_softmax_backward_data", "aten::gather", "aten::scatter_add_", "aten::sum",
    "aten::sub_", "aten::add_", "aten::mul_", "aten::add", "aten::sub", "aten::mul", "aten::div", "aten::fill_",
    "aten::index_select", "aten::index", "aten::copy_",
}  # fmt: skip
"""Operations that compute on entries of tensors; others look at shapes, or call these."""


def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 5, 13, 25, 50], help="clients computed together")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--flower", action="store_true")
    parser.add_argument("--pfl", metavar="PYTHON")
    parser.add_argument("--fluke", metavar="PYTHON")
    parser.add_argument("--pfllib", nargs=2, metavar=("PYTHON", "CHECKOUT"))
    parser.add_argument("--profile", action="store_true")
    chosen = parser.parse_args()
    if (chosen.flower or chosen.pfl or chosen.fluke) and chosen.problem not in WITHOUT_EVALUATION:
        parser.error(f"--flower, --pfl and --fluke are for --problem {' or '.join(WITHOUT_EVALUATION)}")
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if chosen.profile:
        profile(chosen)
        return
    case = problem(chosen.problem)
    choice = Ours(case, our_data(case), "auto", "auto", chosen.device).grid
    choice.choose(case.sampled)
    print(f"{case.name}, seconds of a round; fedpers chooses {choice}", flush=True)
    choice.close()
    seconds = in_turns(measurements(chosen), chosen.turns)
    base = statistics.median(seconds["textbook"])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:36}{median:8.4f}  {min(times):.4f} to {max(times):.4f}  {median / base:6.2f} x", flush=True)


if __name__ == "__main__":
    main()
