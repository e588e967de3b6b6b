"""The rounds of a run, whatever they run on, and the metrics of each by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import flwr.app as flower
import numpy as np
from flwr.serverapp import Grid

from fedpers.cohort import Tree
from fedpers.data.federated import PARTS, FederatedData
from fedpers.evaluation.metrics import distribution
from fedpers.run.clock import DeviceClock
from fedpers.settings import Config
from fedpers.strategies import PersonalizedStrategy, RoundReport

TIMES = ("seconds", "train_seconds", "samples_per_second")
"""Metrics that differ between two runs of the same settings."""
_CLIENT_PREFIXES = ("validation", "test", "unseen", "adapted")
METRIC_PREFIXES = (*_CLIENT_PREFIXES, "global")
"""What the names of measured metrics begin with: parts of the clients that train, the unseen ones' test part, and the
global test set."""
_SPREAD = {"mean": "", "weighted": "_weighted", "std": "_std", "worst_decile": "_worst_decile", "min": "_min"}


def run_rounds(
    strategy: PersonalizedStrategy,
    grid: Grid,
    arrays: flower.ArrayRecord,
    rounds: int,
    *,
    auc: bool = False,
    timeout: float | None = None,
    budget: int | None = None,
    spent: float = 0.0,
    stops: Callable[[RoundReport], bool] | None = None,
    clock: DeviceClock | None = None,
    last_report: RoundReport | None = None,
    state: Mapping[str, Tree] | None = None,
    after_round: Callable[[RoundReport, flower.ArrayRecord, bool], None] | None = None,
) -> Iterator[RoundReport]:
    """Train and evaluate round by round.

    Round 0 is an evaluation of the initial state; the last round is always evaluated, and then the unseen clients
    once more, after they adapted. The last is number `rounds`, or an earlier one by `budget` or `stops`.

    Parameters
    ----------
    strategy : PersonalizedStrategy
    grid : Grid
    arrays : ArrayRecord
        What the server starts from.
    rounds : int
    auc : bool
    timeout : float, optional
    budget : int, optional
        Gradients that all clients together may compute: the round that reaches it is the last.
    spent : float
        Those of the rounds that ran already.
    stops : callable, optional
        Whether an evaluated round is the last, by its report.
    clock : DeviceClock, optional
        Says how long a round would take on the clients' own devices.
    last_report : RoundReport, optional
        Of the last round that ran already, as `after_round` was given it; `arrays`, `state` and the clients' personal
        state are those after it.
    state : mapping of role to Tree, optional
        ``strategy.state`` after that round.
    after_round : callable, optional
        Called with the report and the arrays after each round, and whether it is the last, before the evaluations that
        only follow that one.

    Yields
    ------
    RoundReport
        After each round, `last_report` first.
    """
    evaluation = flower.ConfigRecord({"auc": auc})
    if last_report is None:
        strategy.begin(timeout)
    else:
        strategy.restore(last_report, state or {}, timeout)
    grid = strategy.folding(grid)
    for round in range(0 if last_report is None else last_report.round, rounds + 1):
        runs = last_report is None or round > last_report.round
        if round and runs:
            messages = strategy.configure_train(round, arrays, flower.ConfigRecord(), grid)
            new, _ = strategy.aggregate_train(round, grid.send_and_receive(messages, timeout=timeout))
            arrays = arrays if new is None else new
            spent += strategy.report.gradients
            if clock is not None:
                strategy.report.simulated_seconds = clock.seconds(strategy.report, strategy.reply_metrics)
        last = round == rounds or (budget is not None and spent >= budget)
        if runs and round % strategy.evaluate_every == 0:
            messages = strategy.evaluation_messages(round, arrays, evaluation, grid)
            strategy.aggregate_evaluate(round, grid.send_and_receive(messages, timeout=timeout))
        last = last or (round > 0 and stops is not None and stops(strategy.report))
        if runs and after_round is not None:
            after_round(strategy.report, arrays, last)
        if last and round % strategy.evaluate_every:
            messages = strategy.evaluation_messages(round, arrays, evaluation, grid)
            strategy.aggregate_evaluate(round, grid.send_and_receive(messages, timeout=timeout))
        if last and strategy.unseen:
            strategy.evaluate_adapted(arrays, evaluation, grid)
        yield strategy.report
        if last:
            return


def gradient_budget(config: Config, data: FederatedData) -> int | None:
    """Gradients that all clients together may compute in a run; None where ``training.budget`` says nothing."""
    budget = config.training.budget
    return None if budget is None else budget * (data.num_clients - len(data.unseen))


def metrics_of(report: RoundReport, headline: str) -> dict[str, float]:
    """Metrics of a round by the names used everywhere, e.g. ``test/accuracy_worst_decile``.

    Parameters
    ----------
    report : RoundReport
    headline : str
        The metric whose distribution over clients is described too (``data.task.headline``).
    """
    metrics: dict[str, float] = {}
    if report.round:
        metrics["train/loss"] = report.train_loss
        metrics.update({f"train/{name}": value for name, value in report.extra.items()})
    for group in _CLIENT_PREFIXES:
        rows = list({"unseen": report.unseen, "adapted": report.adapted}.get(group, report.clients).values())
        part = group if group in PARTS else "test"
        weights = np.array([row.get(f"{part}-examples", 0.0) for row in rows])
        measured = dict.fromkeys(key for row in rows for key in row if key.startswith(f"{part}-"))
        for name in (key.removeprefix(f"{part}-") for key in measured):
            if name == "examples":
                continue
            statistics = distribution(np.array([row.get(f"{part}-{name}", math.nan) for row in rows]), weights)
            for statistic, ending in (_SPREAD if name == headline else {"mean": ""}).items():
                metrics[f"{group}/{name.replace('-', '_')}{ending}"] = statistics[statistic]
    metrics.update({f"global/{name.replace('-', '_')}": value for name, value in report.common.items()})
    metrics["clients/sampled"] = len(report.sampled)
    metrics["clients/diverged"] = len(report.diverged)
    metrics["clients/failed"] = len(report.failures) + len(report.evaluation_failures)
    gradients = [row.get("adaptation-gradients", 0.0) for row in report.clients.values()]
    if any(gradients):
        metrics["adaptation_gradients"] = sum(gradients)
    for name in ("bytes_up", "bytes_down", "steps", "samples", "gradients", "seconds", "train_seconds"):
        metrics[name] = getattr(report, name)
    if report.simulated_seconds:
        metrics["simulated_seconds"] = report.simulated_seconds
    if report.train_seconds:
        metrics["samples_per_second"] = report.samples / report.train_seconds
    return metrics
