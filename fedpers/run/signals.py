"""Ctrl-C and SIGTERM while rounds run: the first lets a round end, the second ends at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal.

    Parameters
    ----------
    number : int
        The signal's.
    reason : str
        What of the run is there, a sentence without its end.
    """

    def __init__(self, number: int, reason: str = "") -> None:
        super().__init__(reason)
        self.exit_code = 128 + number
        self.reason = reason


class StopSignals:
    """Context in which signals stop a run in an orderly way.

    Outside of the main thread, and for signals that are ignored, nothing changes.

    Parameters
    ----------
    patient : bool
        Whether the first signal only sets :attr:`received`, so that the round can end; else each raises
        :class:`Interrupted` at once.

    Attributes
    ----------
    received : int or None
        The signal that came, if any.
    round : int
        Round under way, for the message.
    """

    def __init__(self, patient: bool) -> None:
        self.patient = patient
        self.received: int | None = None
        self.round = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put back those from before."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if not self.patient or self.received is not None:
            raise Interrupted(number)
        self.received = number
        again = "Ctrl-C again" if number == signal.SIGINT else "a second signal"
        text = f"\nfedpers: finishing round {self.round}, then stopping; {again} stops at once.\n"
        with contextlib.suppress(OSError):  # not print: the signal may have come in the midst of one
            os.write(2, text.encode())
