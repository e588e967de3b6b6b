"""What a tracker is: it takes the metrics of every round. Names are the same for all, e.g. ``validation/accuracy``."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Resumed:
    """Where trackers go on when a run is resumed.

    Attributes
    ----------
    round : int
        That of the checkpoint: the first that will be logged, again if the run had come further.
    ids : mapping of str to str
        :attr:`fedpers.tracking.trackers.Trackers.ids` of the run so far.
    """

    round: int
    ids: Mapping[str, str] = field(default_factory=dict)


class Tracker(Protocol):
    """Takes the metrics of a run while it runs."""

    def log(self, round: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one round.

        Parameters
        ----------
        round : int
            1 for the first training round; 0 for an evaluation before it. Ascending.
        metrics : mapping of str to float
            Numbers by name; NaN or infinite where undefined.
        """

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Take the final numbers of the run, once, at its end, also when it was stopped.

        Parameters
        ----------
        metrics : mapping of str to float
            By names such as ``selected/test/accuracy``.
        """

    def clients(self, values: Mapping[str, Sequence[float]]) -> None:
        """Take what single clients came to, once, after the summary.

        Parameters
        ----------
        values : mapping of str to sequence of float
            A finite number for each client that has one, by names such as ``selected/test/accuracy``.
        """

    def close(self) -> None:
        """Write what is left and let go of files; a second call does nothing."""


def plain_number(value: float, undefined: float | None = None) -> float | None:
    """Turn a NumPy number into a Python one, and NaN or an infinity into `undefined`."""
    if isinstance(value, numbers.Integral):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else undefined
