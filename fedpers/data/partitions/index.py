"""Partitions that somebody wrote down: lists of positions in a .json or .npz file."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpers.data.federated import PARTS
from fedpers.data.partitions.base import Division, Lists
from fedpers.data.sets.arrays import read_npz
from fedpers.data.sets.base import Dataset
from fedpers.errors import DataError
from fedpers.settings.partition import PartitionConfig

OWNED = "owned"  # the key of lists that are still to be split
_NAME = re.compile(r"(?:(arr|train|validation|test)_)?(\d+)")


def divide(dataset: Dataset, config: PartitionConfig, seed: int) -> Division:
    """Give each client what ``config.file`` lists, with its parts where the file names them.

    Raises
    ------
    DataError
        If the file cannot be used, see :func:`read_index`.
    """
    parts = read_index(str(config.file), len(dataset), config.num_clients, config.min_samples)
    owned = [np.sort(np.concatenate(lists)) for lists in zip(*parts.values(), strict=True)]
    return Division(owned, {} if OWNED in parts else parts)


def read_index(
    path: str | Path, num_samples: int, num_clients: int | None = None, min_samples: int = 1
) -> dict[str, Lists]:
    """Read index lists.

    A .json file holds one list of positions per client, or ``{"train": [...], "validation": [...], "test": [...]}``
    with such lists each (``validation`` may be left out). An .npz file holds one array per client, named as
    ``numpy.savez(path, *lists)`` does (``arr_0``, ``arr_1``, ...), or ``train_0``, ``validation_0``, ``test_0``, ....

    Parameters
    ----------
    path : str or Path
    num_samples : int
        Positions must be in ``0 <= position < num_samples``.
    num_clients : int or None
        Take the first so many clients; None is all.
    min_samples : int
        Samples every client must have, all its lists together.

    Returns
    -------
    dict
        Part -> int64 arrays ``[n_k]``, one per client. The parts are ``train``, ``test`` and perhaps ``validation``,
        or only ``owned`` where the file does not split.

    Raises
    ------
    DataError
        If the file cannot be read or has another form, a position is out of range, a sample is owned twice, or a
        client has too few samples.
    """
    path = Path(path).expanduser()
    if not os.path.isfile(path):
        raise DataError(f"partition.file={path} is missing or not a file.")
    raw = _from_npz(path) if path.suffix == ".npz" else _from_json(path)
    parts = {
        part: [_positions(path, part, client, value) for client, value in enumerate(lists)]
        for part, lists in raw.items()
    }
    lengths = {len(lists) for lists in parts.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise DataError(f"{path}: all parts must list the same clients, at least one.")
    available = lengths.pop()
    if num_clients is not None and num_clients > available:
        raise DataError(f"{path} lists {available} clients, fewer than partition.num_clients={num_clients}.")
    parts = {part: lists[:num_clients] for part, lists in parts.items()}
    positions = np.concatenate([array for lists in parts.values() for array in lists])
    outside = positions[(positions < 0) | (positions >= num_samples)]
    if len(outside):
        raise DataError(f"{path}: position {outside[0]} is outside 0..{num_samples - 1}, the samples to divide.")
    values, counts = np.unique(positions, return_counts=True)
    if (counts > 1).any():
        raise DataError(f"{path}: sample {values[counts > 1][0]} is listed more than once.")
    sizes = np.sum([[len(array) for array in lists] for lists in parts.values()], axis=0)
    if sizes.min() < min_samples:
        raise DataError(
            f"{path}: client {sizes.argmin()} has {sizes.min()} samples, fewer than "
            f"partition.min_samples={min_samples}."
        )
    return parts


def _from_json(path: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a readable .json or .npz file ({error}).") from error
    parts = {OWNED: content} if isinstance(content, list) else content
    if not isinstance(parts, dict) or not all(isinstance(lists, list) for lists in parts.values()):
        raise DataError(f'{path} must hold a list of lists, or {{"train": ..., "validation": ..., "test": ...}}.')
    return _checked_parts(path, parts)


def _from_npz(path: Path) -> dict[str, list[Any]]:
    numbered: dict[str, dict[int, Any]] = {}
    for name, array in read_npz(path).items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise DataError(f"{path} has an array '{name}', expected arr_0, arr_1, ... or train_0, test_0, ....")
        part = match[1] if match[1] in PARTS else OWNED
        numbered.setdefault(part, {})[int(match[2])] = array
    for part, arrays in numbered.items():
        if sorted(arrays) != list(range(len(arrays))):
            raise DataError(f"{path}: the arrays of '{part}' must be numbered 0 to {len(arrays) - 1}.")
    return _checked_parts(path, {part: [arrays[k] for k in sorted(arrays)] for part, arrays in numbered.items()})


def _checked_parts(path: Path, parts: dict[str, list[Any]]) -> dict[str, list[Any]]:
    if set(parts) != {OWNED} and not {"train", "test"} <= set(parts) <= set(PARTS):
        raise DataError(
            f"{path} has the parts {', '.join(sorted(parts)) or 'none'}, expected one list per client or "
            f"train, test and perhaps validation."
        )
    return parts


def _positions(path: Path, part: str, client: int, value: Any) -> NDArray[np.int64]:
    where = f"{path}: the {part} list of client {client}"
    try:
        array = np.asarray(value)
    except ValueError as error:  # lists of different lengths inside
        raise DataError(f"{where} must be a flat list of whole numbers.") from error
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise DataError(f"{where} must be a flat list of whole numbers.")
    return array.astype(np.int64)
