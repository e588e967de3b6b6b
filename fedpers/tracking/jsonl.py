"""``rounds.jsonl``, which is part of the result and must be writable."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedpers.errors import FedpersError
from fedpers.tracking.base import Resumed, plain_number


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
        line = {"round": int(round)} | {name: plain_number(metrics[name]) for name in sorted(metrics)}
        with self._writing():
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Put what was logged onto the disk."""
        with self._writing():
            os.fsync(self._file.fileno())

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Do nothing: the run writes ``summary.json``."""

    def clients(self, values: Mapping[str, Sequence[float]]) -> None:
        """Do nothing: the run writes ``clients.parquet``."""

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
