"""Trackers: each takes the metrics of every round, under the same names, e.g. ``validation/accuracy``.

``rounds.jsonl`` is part of the result and must be writable. Every other tracker is a convenience: one that
fails is switched off with a warning and the run goes on.
"""

from __future__ import annotations

import json
import logging
import math
import numbers
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from netrc import NetrcParseError, netrc
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from fedpers.errors import FedpersError
from fedpers.settings.run import TensorBoardConfig, TrackerConfig, WandbConfig

if TYPE_CHECKING:
    from rich.console import Console

logger = logging.getLogger(__name__)

INIT_SECONDS = 20.0
"""Seconds that Weights & Biases may take to start a run."""
FINISH_SECONDS = 60.0
"""Seconds it may take to upload the rest at the end; what is left stays on disk for ``wandb sync``."""


@dataclass(frozen=True)
class Resumed:
    """Where trackers go on when a run is resumed.

    Attributes
    ----------
    round : int
        The first round that will be logged, perhaps again.
    ids : mapping of str to str
        :attr:`Trackers.ids` of the run so far.
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
        """Take the final numbers of the run."""

    def close(self) -> None:
        """Write what is left and let go of files; a second call does nothing."""


class JsonlTracker:
    """Writes ``rounds.jsonl``: one JSON object per round, ``round`` first, then the names in order.

    Every line is on its way to disk before the next round begins. NaN and infinities become null. The
    summary has its own file and is not repeated here.

    Parameters
    ----------
    folder : Path
        The run folder; made if it does not exist. A ``rounds.jsonl`` in it is replaced.
    resumed : Resumed, optional
        A ``rounds.jsonl`` is kept up to the round before and appended to.

    Raises
    ------
    FedpersError
        If the folder or the file cannot be written, here or in :meth:`log`, or it lacks a round that it should have.
    """

    def __init__(self, folder: Path, resumed: Resumed | None = None) -> None:
        self._path = Path(folder) / "rounds.jsonl"
        with self._writing():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w" if resumed is None else "r+", encoding="utf-8", newline="\n")
            if resumed is not None:
                try:
                    end = _end_of_rounds(self._path, resumed.round)
                except FedpersError:
                    self._file.close()
                    raise
                self._file.truncate(end)
                self._file.seek(end)

    def log(self, round: int, metrics: Mapping[str, float]) -> None:
        """Append one line."""
        line = {"round": int(round)} | {name: _plain(metrics[name]) for name in sorted(metrics)}
        with self._writing():
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Put what was logged onto the disk."""
        with self._writing():
            os.fsync(self._file.fileno())

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Do nothing: the run writes ``summary.json``."""

    def close(self) -> None:
        """Close the file."""
        with self._writing():
            self._file.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FedpersError(f"Cannot write {self._path}: {error.strerror or error}.") from error


def _end_of_rounds(path: Path, count: int) -> int:
    """Bytes of the lines of rounds 0 to ``count - 1``, with which the file must begin."""
    end = 0
    with path.open("rb") as file:
        for round in range(count):
            line = file.readline()
            try:
                good = line.endswith(b"\n") and json.loads(line)["round"] == round
            except (ValueError, KeyError, TypeError, RecursionError):
                good = False
            if not good:
                raise FedpersError(f"{path} lacks round {round}, after which the run would be resumed.")
            end += len(line)
    return end


class TensorBoardTracker:
    """Writes TensorBoard events to ``tensorboard/`` in the run folder.

    Parameters
    ----------
    config : TensorBoardConfig
    folder : Path
        The run folder.
    run_config : mapping
        Shown under *Text*.
    resumed : Resumed, optional
        Events of its round and later ones are no longer shown.
    """

    def __init__(
        self, config: TensorBoardConfig, folder: Path, run_config: Mapping[str, Any], resumed: Resumed | None = None
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(
            str(Path(folder) / "tensorboard"),
            flush_secs=config.flush_secs,
            purge_step=None if resumed is None else resumed.round,
        )
        # four spaces make it a code block in TensorBoard's markdown
        text = json.dumps(dict(run_config), indent=2, default=str)
        self._writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()))

    def log(self, round: int, metrics: Mapping[str, float]) -> None:
        """Add one scalar per metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), round)

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Add one scalar per metric, named ``summary/...``."""
        for name, value in metrics.items():
            self._writer.add_scalar(f"summary/{name}", float(value), 0)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbTracker:
    """Weights & Biases run with its files in ``wandb/`` in the run folder; silent on the console.

    Without a login it is offline and opens no connection; ``wandb sync`` uploads it later. A server that does not
    answer is waited for :data:`INIT_SECONDS` at the start and :data:`FINISH_SECONDS` at the end.

    Parameters
    ----------
    config : WandbConfig
    folder : Path
        The run folder.
    run_name : str
        Used where the config gives no name.
    run_config : mapping
        Stored as the run's config.
    resumed : Resumed, optional
        The run with its id goes on. Rounds that are logged again stay as wandb has them.

    Raises
    ------
    FedpersError
        If ``mode=online`` is asked for without a login (rather than prompting for one).
    """

    def __init__(
        self,
        config: WandbConfig,
        folder: Path,
        run_name: str,
        run_config: Mapping[str, Any],
        resumed: Resumed | None = None,
    ) -> None:
        mode: str = config.mode
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
        if mode == "online" and not _logged_in():
            raise FedpersError("there is no login for online mode; run 'wandb login' or set WANDB_API_KEY.")
        root = Path(folder).absolute()
        environment = {"WANDB_CACHE_DIR": os.environ.get("WANDB_CACHE_DIR", str(root / "wandb" / "cache"))}
        if mode != "online":
            # its crash reports would look up a host name even offline
            environment["WANDB_ERROR_REPORTING"] = "false"
        with _environment(environment):
            import wandb

            bounds: dict[str, Any] = {"init_timeout": INIT_SECONDS, "finish_timeout": FINISH_SECONDS}
            known = {name: value for name, value in bounds.items() if name in wandb.Settings.model_fields}
            self._run: Any = wandb.init(
                project=config.project,
                name=config.name or run_name,
                group=config.group,
                mode=mode,  # type: ignore[arg-type,unused-ignore]
                dir=str(root),
                config=dict(run_config),
                reinit="create_new",
                id=None if resumed is None else resumed.ids.get("wandb"),
                resume=None if resumed is None else "allow",
                settings=wandb.Settings(silent=True, console="off", **known),
            )
        # wandb's background process logs where the first run of this process is: a folder without links out of it can
        # be moved, and resumed
        for link in (root / "wandb").glob("*/logs/debug-core.log"):
            if link.is_symlink():
                link.unlink()

    @property
    def id(self) -> str:
        """What wandb calls the run."""
        return str(self._run.id)

    def log(self, round: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics with the round as step."""
        self._run.log({name: _plain(value, math.nan) for name, value in metrics.items()}, step=round)

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Set the run's summary, in place of the last round's values."""
        self._run.summary.update({name: _plain(value, math.nan) for name, value in metrics.items()})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class ConsoleTracker:
    """Progress bar with a validation score and rounds per second; nothing where there is no terminal.

    Parameters
    ----------
    total_rounds : int
    run_name : str
        Shown before the bar.
    headline : str
        Metric shown, a share.
    console : rich.console.Console, optional
        Standard error if not given.
    done : int
        Rounds that an earlier process ran.
    """

    def __init__(
        self,
        total_rounds: int,
        run_name: str,
        headline: str = "validation/accuracy",
        console: Console | None = None,
        done: int = 0,
    ) -> None:
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[score]}{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(escape(run_name), total=total_rounds, completed=done, score="", rate="")
        self._headline = headline
        self._progress.start()

    def log(self, round: int, metrics: Mapping[str, float]) -> None:
        """Move the bar to `round`; a round without a score keeps the one before."""
        self._progress.update(self._task, completed=round)
        if self._headline in metrics:
            self._progress.update(self._task, score=f"val {100 * float(metrics[self._headline]):.1f} %")
        task = self._progress.tasks[0]
        speed = task.finished_speed or task.speed
        if speed:
            self._progress.update(self._task, rate=f", {speed:.1f} rounds/s")

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Do nothing: the command prints the result itself."""

    def close(self) -> None:
        """Leave the bar as it is and give the terminal back."""
        self._progress.stop()


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


def _plain(value: float, undefined: float | None = None) -> float | None:
    """Turn a NumPy or torch number into a Python one, and NaN or an infinity into `undefined`."""
    if isinstance(value, numbers.Integral):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else undefined


def _logged_in() -> bool:
    """Whether wandb would find a key, looked up in its own places without asking anyone."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    given = os.environ.get("NETRC")
    for path in [Path(given)] if given else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if path.is_file() and netrc(path).authenticators(host):
                return True
        except (OSError, NetrcParseError) as error:
            logger.debug("%s cannot be read, so it holds no wandb login: %s", path, error)
    return False


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
