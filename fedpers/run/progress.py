"""What a run has yielded so far, and how it survives in JSON to the last digit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from fedpers.settings import StopConfig
from fedpers.strategies import RoundReport

Evaluation = tuple[int, dict[str, float], RoundReport]
"""An evaluated round: its number, its metrics, its report."""
_TOTALS = ("bytes_up", "bytes_down", "steps", "samples", "gradients", "seconds", "train_seconds", "simulated_seconds")
_FLOAT = "$float"
_BY_CLIENT = ("clients", "unseen", "adapted")
_REASONS = ("failures", "evaluation_failures")
_LATER = ("common", "simulated_seconds", "bytes_to_others")
"""Fields that reports of earlier versions lack."""


@dataclass
class Progress:
    """What a run has yielded so far.

    Attributes
    ----------
    first_round : int
        The first that may be selected: before a drift clients have other samples than in the end.
    rounds_done : int
        Rounds trained, aggregated and, where due, evaluated.
    ended_by : str or None
        Setting after which there are no more rounds: ``rounds``, ``training.budget``, ``stop.patience`` or
        ``stop.target``; None as long as there are.
    waited : int
        Evaluations since the score by which rounds are selected was last better than ever before.
    selected_by : str or None
        Metric of the selection; None: there is no validation part, and the latest round is taken.
    best, last : tuple (round, metrics, report) or None
        Evaluated round with the highest score (the first of equals, or the last if the data's protocol says so), and
        the latest evaluated one. A round without a score, or in which a client could not be measured, is not chosen: a
        mean over the others would flatter it.
    """

    selected_by: str | None = "validation/accuracy"
    latest_wins: bool = False
    unseen: tuple[int, ...] = ()
    first_round: int = 1
    rounds_done: int = 0
    ended_by: str | None = None
    waited: int = 0
    best: Evaluation | None = None
    last: Evaluation | None = None
    totals: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    trained: Counter[int] = field(default_factory=Counter)

    def take(self, report: RoundReport, metrics: dict[str, float]) -> None:
        """Take in a finished round."""
        self.rounds_done = report.round
        self.trained.update(set(report.sampled) - set(report.failures))
        for name in _TOTALS:
            self.totals[name] = self.totals.get(name, 0) + getattr(report, name)
        failures = len(report.failures) + len(report.evaluation_failures)
        self.totals["failures"] = self.totals.get("failures", 0) + failures
        waited, is_best = self._waited(report, metrics), self.is_best(report, metrics)
        if report.clients and report.round:
            self.last = (report.round, metrics, report)
        self.waited = waited
        if is_best:
            self.best = self.last

    def is_best(self, report: RoundReport, metrics: dict[str, float]) -> bool:
        """Whether a round that has not been taken in yet is the best so far."""
        return self._may_be_selected(report) and self._better(metrics)

    def ends_by(self, report: RoundReport, metrics: dict[str, float], stop: StopConfig) -> str | None:
        """Setting of `stop` that makes a round, which has not been taken in yet, the last; None if there is none."""
        if self.selected_by is None or not report.clients:
            return None
        enough = stop.target is not None and metrics.get(self.selected_by, math.nan) >= stop.target
        if enough and self._may_be_selected(report):
            return "stop.target"
        tired = stop.patience is not None and self._waited(report, metrics) >= stop.patience
        return "stop.patience" if tired else None

    def _may_be_selected(self, report: RoundReport) -> bool:
        measured = bool(report.clients) and not self.left_out(report)
        return measured and report.round >= max(1, self.first_round)

    def _waited(self, report: RoundReport, metrics: dict[str, float]) -> int:
        """:attr:`waited` after a round; where the data's protocol takes the latest of equals, they are no better."""
        if self.selected_by is None or not report.clients or report.round < max(1, self.first_round):
            return self.waited
        best = -math.inf if self.best is None else self.best[1][self.selected_by]
        better = metrics.get(self.selected_by, math.nan) > best
        return 0 if better and self._may_be_selected(report) else self.waited + 1

    def left_out(self, report: RoundReport) -> list[int]:
        """Clients that train but could not be measured in a round, ascending."""
        return sorted(report.evaluation_failures.keys() - set(self.unseen))

    def _better(self, metrics: dict[str, float]) -> bool:
        if self.selected_by is None:
            return True
        score = metrics.get(self.selected_by, math.nan)
        best = -math.inf if self.best is None else self.best[1][self.selected_by]
        return score > best or (self.latest_wins and score == best)

    def to_json(self) -> dict[str, Any]:
        """Everything that rounds add, for :meth:`restore`; reports that are both best and last only once."""
        return {
            "rounds_done": self.rounds_done,
            "waited": self.waited,
            "totals": self.totals,
            "trained": {str(client): count for client, count in sorted(self.trained.items())},
            "best": None if self.best is None else self.best[0],
            "last": None if self.last is None else self.last[0],
            "evaluations": {
                str(evaluation[0]): {"metrics": evaluation[1], "report": report_to_json(evaluation[2])}
                for evaluation in (self.best, self.last)
                if evaluation is not None
            },
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Undo :meth:`to_json`.

        Raises
        ------
        KeyError, TypeError, ValueError, AttributeError
            If `saved` is something else.
        """
        evaluations: dict[int, Evaluation] = {
            int(number): (int(number), _numbers(entry["metrics"]), report_from_json(entry["report"]))
            for number, entry in saved["evaluations"].items()
        }
        self.rounds_done = whole(saved["rounds_done"])
        self.waited = whole(saved.get("waited", 0))  # checkpoints of before it was counted lack it
        self.totals = _numbers(saved["totals"])
        self.trained = Counter({int(client): whole(count) for client, count in saved["trained"].items()})
        self.best = None if saved["best"] is None else evaluations[saved["best"]]
        self.last = None if saved["last"] is None else evaluations[saved["last"]]


def report_to_json(report: RoundReport) -> dict[str, Any]:
    """All fields of a report, clients as text; see :func:`exactly` for its numbers."""
    values = asdict(report)
    for name in (*_BY_CLIENT, *_REASONS):
        values[name] = {str(client): value for client, value in values[name].items()}
    return values


def report_from_json(saved: Mapping[str, Any]) -> RoundReport:
    """Undo :func:`report_to_json`; a KeyError, TypeError, ValueError or AttributeError says that it is none."""
    names = {f.name for f in fields(RoundReport)}
    if not names - set(_LATER) <= set(saved) <= names:
        raise ValueError(f"a report has {sorted(names)}")
    values: dict[str, Any] = {}
    for name, value in saved.items():
        if name in _BY_CLIENT:
            values[name] = {int(client): _numbers(numbers) for client, numbers in value.items()}
        elif name in _REASONS:
            values[name] = {int(client): str(reason) for client, reason in value.items()}
        elif name == "sampled":
            values[name] = [whole(client) for client in value]
        elif name in ("extra", "common"):
            values[name] = _numbers(value)
        else:
            values[name] = _number(value)
    whole(values["round"])
    return RoundReport(**values)


def exactly(value: Any) -> Any:
    """Plain values as standard JSON can hold them: NaN and infinities become objects, tuples lists."""
    if isinstance(value, Mapping):
        return {str(key): exactly(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [exactly(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{value!r:.100} is no plain value")


def restored(value: Any) -> Any:
    """Undo :func:`exactly`, but for tuples."""
    if isinstance(value, dict):
        return float(value[_FLOAT]) if value.keys() == {_FLOAT} else {key: restored(v) for key, v in value.items()}
    return [restored(item) for item in value] if isinstance(value, list) else value


def whole(value: Any) -> int:
    """Return a whole number >= 0; ValueError for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r:.100} is no whole number >= 0")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{value!r:.100} is no number")
    return value


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): _number(value) for name, value in values.items()}
