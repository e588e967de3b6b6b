"""Arrays that stay in their file: mapped into memory, read where they are used, never whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpers.errors import DataError, reason

BLOCK = 1 << 24
"""Bytes that are read at once where all of an array is read."""
_ARRAYS: WeakValueDictionary[int, np.memmap[Any, Any]] = WeakValueDictionary()
"""Mapped arrays by the address of their first value, for as long as a tensor holds them."""


def mapped(path: Path) -> Tensor:
    """Map the array of a ``.npy`` file into memory.

    Parameters
    ----------
    path : Path

    Returns
    -------
    Tensor ``[N, ...]``
        Float32 or int64, over the file's own bytes. Whoever writes into it changes a copy of these pages, never the
        file.

    Raises
    ------
    DataError
        If the file is missing or damaged, holds another type, or does not lie row by row.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing or not a file.")
    try:
        with np.errstate(over="ignore"):  # of a size that is refused
            array = np.lib.format.open_memmap(path, mode="c")
    except Exception as error:  # whatever damaged bytes lead to
        raise DataError(f"{path} is damaged or not an .npy file of numbers ({reason(error)}).") from error
    if array.dtype not in (np.dtype(np.float32), np.dtype(np.int64)) or array.ndim == 0:
        allowed = "expected float32 or int64 [N, ...], which need no copy; dataset=npz converts, in memory"
        raise DataError(f"{path} is {array.dtype} {list(array.shape)}, {allowed}.")
    if not array.flags.c_contiguous:
        raise DataError(f"{path} lies column by column, expected rows one after the other (numpy.ascontiguousarray).")
    _ARRAYS[array.ctypes.data] = array
    return torch.from_numpy(array)


def blocks(x: Tensor) -> Iterator[NDArray[Any]]:
    """All values of a tensor, some rows ``[n, ...]`` at a time.

    Those of a mapped array are read from its file, not through the map, so that its pages do not count as this
    process's memory; what somebody wrote into the tensor is not among them.

    Parameters
    ----------
    x : Tensor ``[N, ...]``
    """
    rows = max(1, BLOCK // max(1, x[:1].nbytes))
    array = _ARRAYS.get(x.data_ptr()) if x.device.type == "cpu" else None
    if array is None or array.shape != tuple(x.shape) or not x.is_contiguous():
        for start in range(0, len(x), rows):
            yield x[start : start + rows].cpu().numpy()
        return
    shape = array.shape[1:]
    with open(str(array.filename), "rb") as file:
        file.seek(array.offset)
        for start in range(0, len(array), rows):
            count = min(rows, len(array) - start) * int(np.prod(shape))
            yield np.fromfile(file, array.dtype, count).reshape(-1, *shape)
