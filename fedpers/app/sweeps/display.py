"""What is shown while a sweep runs: one bar on a terminal, elsewhere a short line for each job that ends.

The jobs may run in other processes or on other machines: what they do is read from their folders.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fedpers.app.sweeps.jobs import outcome, rounds_done

if TYPE_CHECKING:
    from rich.progress import Progress

_SECONDS = 0.25
"""Between two looks at the folders."""
_NAMED = 3
"""Running jobs that are named."""
_BAR = 20
"""Columns of a terminal that the bar needs at least."""
_TOUCHED = (".hydra/hydra.yaml", "run.log", "rounds.jsonl")
"""What a job writes once it runs."""


@dataclass
class Shown:
    """A job on the display.

    Parameters
    ----------
    label : str
    folder : Path
    rounds : int
        That it will do.
    """

    label: str
    folder: Path
    rounds: int


class OncePerSweep(logging.Filter):
    """Lets a message of a sweep's runs pass to the screen once; outside of sweeps, and to ``run.log``, always."""

    shown: ClassVar[set[str] | None] = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to show a message."""
        if self.shown is None:
            return True
        text = record.getMessage()
        new = text not in self.shown
        self.shown.add(text)
        return new


class Display:
    """Context in which the state of jobs is shown.

    Parameters
    ----------
    total : int or None
        Jobs of the whole sweep; None if that is not known.
    """

    def __init__(self, total: int | None) -> None:
        self.total = total
        self.done = self.failed = self._skipped = self._skipped_before = self._repeated = 0
        self._watched: list[Shown] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look_again_and_again, name="sweep display", daemon=True)
        self._began = time.time()
        self._progress: Progress | None = None

    def __enter__(self) -> Display:
        """Begin to show."""
        OncePerSweep.shown = set()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TimeRemainingColumn(compact=True),
                console=Console(file=sys.stderr),  # as it is now: runs replace it, and write above the bar
                expand=True,
                speed_estimate_period=600,
            )
            self._task = self._progress.add_task("starting", total=self.total)
            self._progress.start()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the display as it is."""
        OncePerSweep.shown = None
        self._stopped.set()
        self._thread.join()
        self.look()
        self._print_skipped()
        if self._progress is not None:
            self._progress.stop()
        elif self._repeated:
            print(f"{self._repeated} of {self.total or '?'} trials had the settings of an earlier one", flush=True)

    def skip(self, before: int, repeated: int) -> None:
        """Count jobs that are done already: before this command, or as trials with the same settings."""
        with self._lock:
            self.done += before + repeated
            self._skipped += before
            self._repeated += repeated

    def watch(self, jobs: Iterable[Shown]) -> None:
        """Show what becomes of jobs."""
        with self._lock:
            self._watched += jobs
            if self._watched:
                self._print_skipped()

    def look(self) -> None:
        """Look at the folders and show what has changed."""
        with self._lock:
            running = []
            for job in list(self._watched):
                result = outcome(job.folder)
                if result.state == "open":
                    if self._has_begun(job.folder):
                        running.append((job, min(rounds_done(job.folder), job.rounds)))
                    continue
                self._watched.remove(job)
                self.done += result.state == "done"
                self.failed += result.state == "failed"
                if self._progress is None:
                    text = result.text if result.state == "done" else "failed"
                    print(f"{self.done + self.failed} of {self.total or '?'}  {job.label}: {text}", flush=True)
            if self._progress is not None:
                self._show(self._progress, running)

    def _print_skipped(self) -> None:
        if self._skipped > self._skipped_before and self._progress is None:
            print(f"{self._skipped} of {self.total or '?'} jobs were done before", flush=True)
        self._skipped_before = self._skipped

    def _show(self, progress: Progress, running: list[tuple[Shown, int]]) -> None:
        from rich.markup import escape

        named = ", ".join(f"{job.label} {rounds}/{job.rounds}" for job, rounds in running[:_NAMED])
        text = f"{self.done} of {self.total or '?'} done, {len(running)} running, {self.failed} failed"
        if named:
            text += f": {named}"
        room = max(40, progress.console.width - _BAR)
        progress.update(
            self._task,
            description=escape(text if len(text) <= room else f"{text[: room - 1]}…"),
            completed=self.done + self.failed + sum(rounds / job.rounds for job, rounds in running),
            total=self.total,
        )

    def _has_begun(self, folder: Path) -> bool:
        """Whether a job has written something since this display began."""
        if not folder.is_dir():
            return False
        times = []
        for name in _TOUCHED:
            with contextlib.suppress(OSError):
                times.append((folder / name).stat().st_mtime)
        return max(times, default=0.0) >= self._began

    def _look_again_and_again(self) -> None:
        while not self._stopped.wait(_SECONDS):
            self.look()
