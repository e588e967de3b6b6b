"""What is said of an exception in a method or a client app: where it was raised, in code that is not ours.

A client's answer is one string on every wire. Its first line is the sentence that a reader sees, the lines after it are
the traceback, for the log.
"""

from __future__ import annotations

import logging
import sysconfig
import traceback
from pathlib import Path

from fedpers.errors import FedpersError

_PACKAGE = str(Path(__file__).parent)
_LIBRARIES = tuple({_PACKAGE, *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))})


def described(error: BaseException) -> str:
    """An exception in one line: type, message, and the frames of the user's own code it passed, the first one first."""
    own_frames = frames_of_user(error)
    if isinstance(error, FedpersError) and (not own_frames or _raised_by_user(error)):
        return str(error)
    message = " ".join(str(error).split())
    kind = type(error).__name__
    if isinstance(error, FedpersError):  # its sentence stands by itself
        sentence = message.removesuffix(".")
    else:
        sentence = f"{kind}: {message}" if message else kind
    if not own_frames:
        return sentence
    places = ", ".join(f"{_shown(frame.filename)}:{frame.lineno} in {frame.name}" for frame in own_frames)
    return f"{sentence} (at {places}: {own_frames[-1].line})"


def _raised_by_user(error: BaseException) -> bool:
    """Whether the user's own code raised it: what it says then needs no place."""
    return traceback.extract_tb(error.__traceback__)[-1] in frames_of_user(error)


def frames_of_user(error: BaseException) -> list[traceback.FrameSummary]:
    """Frames of an exception that are neither this package's nor a library's, the outermost first."""
    frames = traceback.extract_tb(error.__traceback__)
    return [frame for frame in frames if not frame.filename.startswith((*_LIBRARIES, "<"))]


def with_traceback(error: BaseException) -> str:
    """:func:`described`, and the traceback on the lines after it, which an error meant for the user needs none of."""
    if isinstance(error, FedpersError):
        return described(error)
    return f"{described(error)}\n{''.join(traceback.format_exception(error)).rstrip()}"


def sentence_of(reason: str) -> str:
    """What a reader sees of a client's answer."""
    return reason.partition("\n")[0]


class FirstOfEachKind:
    """Logs the traceback of the first failure of each kind.

    Parameters
    ----------
    log : logging.Logger
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._kinds: set[str] = set()

    def note(self, where: str, reason: str) -> bool:
        """Log the traceback in `reason`, if there is one and none of its kind was logged; whether it is the first."""
        sentence, _, details = reason.partition("\n")
        if sentence in self._kinds:
            return False
        self._kinds.add(sentence)
        if details:
            self._log.info("%s, the first of its kind: %s\n%s", where, sentence, details)
        return True


def _shown(filename: str) -> str:
    path = Path(filename)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else filename
