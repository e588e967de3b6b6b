"""All trackers of a run. One that fails, unless it writes ``rounds.jsonl``, is switched off with a warning."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from fedpers.settings.run import TrackerConfig
from fedpers.tracking.base import Resumed, Tracker
from fedpers.tracking.console import ConsoleTracker
from fedpers.tracking.jsonl import JsonlTracker
from fedpers.tracking.tensorboard import TensorBoardTracker
from fedpers.tracking.weights_and_biases import WandbTracker

logger = logging.getLogger(__name__)


class Trackers:
    """All trackers of a run; itself a :class:`Tracker`, and a context manager that closes them.

    Parameters
    ----------
    required : Tracker
        Its errors are raised.
    optional : mapping of str to callable
        Name -> what makes the tracker. One that raises, when made or later, is switched off with one warning.
    """

    def __init__(self, required: Tracker, optional: Mapping[str, Callable[[], Tracker]]) -> None:
        self._required = required
        self._optional: dict[str, Tracker] = {}
        for name, make in optional.items():
            try:
                self._optional[name] = make()
            except Exception as error:
                _warn(name, error)

    @property
    def names(self) -> list[str]:
        """Optional trackers that are on."""
        return list(self._optional)

    @property
    def ids(self) -> dict[str, str]:
        """What services call the run, by tracker, to go on with it later."""
        return {name: tracker.id for name, tracker in self._optional.items() if isinstance(tracker, WandbTracker)}

    def sync(self) -> None:
        """Put what is part of the result onto the disk."""
        if isinstance(self._required, JsonlTracker):
            self._required.sync()

    def log(self, round: int, metrics: Mapping[str, float]) -> None:
        """Give the metrics of one round to every tracker; see :meth:`Tracker.log`."""
        self._required.log(round, metrics)
        self._each(lambda tracker: tracker.log(round, metrics))

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Give the final numbers to every tracker."""
        self._required.summary(metrics)
        self._each(lambda tracker: tracker.summary(metrics))

    def clients(self, values: Mapping[str, Sequence[float]]) -> None:
        """Give what single clients came to to every tracker."""
        self._required.clients(values)
        self._each(lambda tracker: tracker.clients(values))

    def close(self) -> None:
        """Close every tracker."""
        try:
            self._required.close()
        finally:
            self._each(lambda tracker: tracker.close())
            self._optional.clear()

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._optional.items()):
            try:
                call(tracker)
            except Exception as error:
                _warn(name, error)
                del self._optional[name]
                try:
                    tracker.close()  # a progress bar must still give the terminal back
                except Exception as second:
                    logger.debug("Closing the failed tracker '%s' failed as well: %s", name, second)

    def __enter__(self) -> Trackers:
        """Give the trackers themselves."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close every tracker."""
        self.close()


def make_trackers(
    config: TrackerConfig,
    folder: Path,
    run_name: str,
    run_config: Mapping[str, Any],
    total_rounds: int,
    headline: str = "validation/accuracy",
    resumed: Resumed | None = None,
) -> Trackers:
    """Make ``rounds.jsonl``, the progress bar, and the trackers that `config` asks for.

    Parameters
    ----------
    config : TrackerConfig
    folder : Path
        The run folder; made if it does not exist.
    run_name : str
        Shown beside the progress bar and in trackers.
    run_config : mapping
        The resolved config, for trackers that store it.
    total_rounds : int
        Length of the progress bar.
    headline : str
        Metric the bar shows.
    resumed : Resumed, optional
        Where a resumed run goes on.

    Raises
    ------
    FedpersError
        If the run folder cannot be written, or a resumed run cannot go on in it.
    """
    optional: dict[str, Callable[[], Tracker]] = {}
    done = 0 if resumed is None else resumed.round
    wandb, tensorboard = config.wandb, config.tensorboard
    if wandb is not None:
        optional["wandb"] = lambda: WandbTracker(wandb, folder, run_name, run_config, resumed)
    if tensorboard is not None:
        optional["tensorboard"] = lambda: TensorBoardTracker(tensorboard, folder, run_config, resumed)
    # last, so that what the others print while they start is above the bar
    optional["console"] = lambda: ConsoleTracker(total_rounds, run_name, headline, done=done)
    return Trackers(JsonlTracker(folder, resumed), optional)


def _warn(name: str, error: Exception) -> None:
    reason = " ".join(str(error).split()) or type(error).__name__
    logger.warning("Tracker '%s' failed and is switched off for this run: %s", name, reason)
