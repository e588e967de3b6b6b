"""Files as LEAF writes them: JSON with ``users``, ``num_samples`` and ``user_data``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpers.data.sets.arrays import dataset_of
from fedpers.data.sets.base import Dataset
from fedpers.errors import DataError, reason
from fedpers.settings.data import DatasetConfig


def leaf(config: DatasetConfig) -> Dataset:
    """Read LEAF's JSON files: each user is a natural client.

    ``dataset.root`` is a file, a folder of files, or a folder with ``train`` and ``test`` (perhaps under ``data``),
    which then are the official parts. Inputs are lists of numbers of one length, taken as they are; lists of a square
    number of at least 64 become pictures ``[1, H, W]``.

    Raises
    ------
    DataError
        If there is no such file, one is damaged, or inputs are no numbers of one length.
    """
    root = Path(config.root or "").expanduser()
    folders = [folder for folder in (root, root / "data") if (folder / "train").is_dir() and (folder / "test").is_dir()]
    parts = [folders[0] / "train", folders[0] / "test"] if folders else [root]
    read = [_read_part(part) for part in parts]
    rows = [row for part in read for row in part]
    try:
        x = np.array([values for _, values, _ in rows], dtype=np.float32)
    except (ValueError, TypeError) as error:
        text = any(isinstance(values, str) for _, values, _ in rows)
        what = "text, for which there is no task yet" if text else reason(error)
        raise DataError(f"{root}: inputs are no lists of numbers of one length ({what}).") from error
    side = math.isqrt(x.shape[1]) if x.ndim == 2 else 0
    if side >= 8 and side * side == x.shape[1]:
        x = x.reshape(len(x), 1, side, side)
    labels = np.array([label for _, _, label in rows])
    owners = np.array([user for user, _, _ in rows])
    train_size = len(read[0]) if len(read) == 2 else None
    return dataset_of(root, root.stem, {"x": x}, {"y": _whole(labels)}, client=owners, train_size=train_size)


def _whole(labels: NDArray[Any]) -> NDArray[Any]:
    """Labels that JSON wrote as 3.0 as whole numbers."""
    whole = labels.dtype.kind == "f" and bool((labels == np.floor(labels)).all())
    return labels.astype(np.int64) if whole else labels


def _read_part(path: Path) -> list[tuple[str, Any, Any]]:
    """User, input and label of every sample of a file or a folder of files."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} has no .json file.")
    return [row for file in files for row in _read_file(file)]


def _read_file(path: Path) -> list[tuple[str, Any, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is missing or damaged ({reason(error)}).") from error
    if not isinstance(content, dict) or not {"users", "user_data"} <= content.keys():
        raise DataError(f"{path} is not a file of LEAF: it has no 'users' and 'user_data'.")
    if not isinstance(content["users"], list) or not isinstance(content["user_data"], dict):
        raise DataError(f"{path} is not a file of LEAF: 'users' is no list, or 'user_data' no dictionary.")
    rows: list[tuple[str, Any, Any]] = []
    for user in dict.fromkeys(map(str, content["users"])):
        samples = content["user_data"].get(user)
        if not isinstance(samples, dict) or not {"x", "y"} <= samples.keys():
            raise DataError(f"{path}: user {user} has no x and y.")
        if not isinstance(samples["x"], list) or not isinstance(samples["y"], list):
            raise DataError(f"{path}: x and y of user {user} are no lists.")
        if len(samples["x"]) != len(samples["y"]):
            raise DataError(f"{path}: user {user} has {len(samples['x'])} inputs but {len(samples['y'])} labels.")
        rows += [(str(user), values, label) for values, label in zip(samples["x"], samples["y"], strict=True)]
    return rows
