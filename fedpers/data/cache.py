"""Where downloads and computed partitions are kept, and how a partition is stored."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedpers.files import whole_file

logger = logging.getLogger(__name__)


def cache_root() -> Path:
    """Folder for downloads (``data``) and partitions: ``$FEDPERS_CACHE``, or ``~/.cache/fedpers``."""
    return Path(os.environ.get("FEDPERS_CACHE") or "~/.cache/fedpers").expanduser()


def _path(key: str) -> Path:
    return cache_root() / "partitions" / f"{key}.npz"


def read_lists(key: str, num_lists: int, num_samples: int) -> list[NDArray[np.int64]] | None:
    """Read the partition stored under `key`.

    Parameters
    ----------
    key : str
        File name without its ending.
    num_lists, num_samples : int
        What the partition must look like: so many clients, positions below `num_samples`, none twice.

    Returns
    -------
    list of int64 arrays ``[n_k]``, or None
        None if nothing is stored, or if the file is damaged (which is logged; it will be replaced).
    """
    path = _path(key)
    try:
        with np.load(path, allow_pickle=False) as stored:
            positions, sizes = stored["positions"].astype(np.int64), stored["sizes"].astype(np.int64)
        if len(sizes) != num_lists or sizes.min() < 0 or sizes.sum() != len(positions):
            raise ValueError("sizes do not fit")
        if len(np.unique(positions)) != len(positions) or positions.min() < 0 or positions.max() >= num_samples:
            raise ValueError("positions do not fit")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("The cached partition %s is damaged (%s) and will be rebuilt.", path, error)
        return None
    return np.split(positions, np.cumsum(sizes)[:-1])


def write_lists(key: str, lists: Sequence[NDArray[np.int64]]) -> None:
    """Store a partition under `key`, whole or not at all; a cache that cannot be written is only logged."""
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as draft, draft.open("wb") as file:
            np.savez(file, positions=np.concatenate(lists), sizes=np.array([len(part) for part in lists]))
    except OSError as error:
        logger.info("The partition is not cached, %s cannot be written (%s).", path, error)
