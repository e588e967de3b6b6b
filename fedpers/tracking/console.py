"""How far a run is: a progress bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console


_SECONDS_PER_LINE = 30.0


class WithoutProgress(io.TextIOBase):
    """Standard error on which runs show no progress, because a sweep shows that of all.

    Parameters
    ----------
    stream : file
        Where everything else is written.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Pass on `text`."""
        return self._stream.write(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()

    def fileno(self) -> int:
        """Descriptor of the stream."""
        return self._stream.fileno()


class ConsoleTracker:
    """Progress bar with a validation score and rounds per second.

    Where there is no terminal, as in a job's log: a line for an evaluated round, if the last one is 30 seconds old, and
    for a round without a score, if the last one is a minute old.

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

        # rich takes FORCE_COLOR for a terminal, where a bar would be drawn into a log, or into that of a sweep
        shown = sys.stderr.isatty() if console is None else console.is_terminal
        console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[score]}{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            expand=True,
            disable=not shown,
        )
        self._task = self._progress.add_task(escape(run_name), total=total_rounds, completed=done, score="", rate="")
        self._headline = headline
        self._lines = not shown and not isinstance(sys.stderr, WithoutProgress)
        self._began, self._done, self._last_line = time.monotonic(), done, time.monotonic()
        self._name, self._total, self._console = run_name, total_rounds, console
        self._progress.start()

    def log(self, round: int, metrics: Mapping[str, float]) -> None:
        """Move the bar to `round`; a round without a score keeps the one before."""
        self._progress.update(self._task, completed=round)
        score = ""
        if self._headline in metrics:
            score = f"val {100 * float(metrics[self._headline]):.1f} %"
            self._progress.update(self._task, score=score)
        now = time.monotonic()
        wait = _SECONDS_PER_LINE if score else 2 * _SECONDS_PER_LINE
        if self._lines and now - self._last_line >= wait and self._done < round < self._total:
            seconds = (now - self._began) / (round - self._done)
            text = f"{self._name}: round {round} of {self._total}{', ' * bool(score)}{score}, {seconds:.2g} s a round"
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
            self._last_line = now
        task = self._progress.tasks[0]
        speed = task.finished_speed or task.speed
        if speed:
            self._progress.update(self._task, rate=f", {speed:.1f} rounds/s")

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Do nothing: the command prints the result itself."""

    def clients(self, values: Mapping[str, Sequence[float]]) -> None:
        """Do nothing: ``clients.parquet`` holds it."""

    def close(self) -> None:
        """Leave the bar as it is and give the terminal back."""
        self._progress.stop()
