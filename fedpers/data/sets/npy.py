"""Arrays of one's own that need not fit into memory: ``.npy`` files, of which the inputs are mapped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpers.data.mapped import blocks, mapped
from fedpers.data.sets.arrays import checked_ids, dataset_of
from fedpers.data.sets.base import Dataset, data_root
from fedpers.errors import DataError, reason
from fedpers.settings.dataset import DatasetConfig


def npy(config: DatasetConfig) -> Dataset:
    """Read a folder of ``x.npy``, ``y.npy`` and perhaps ``client.npy`` and ``domain.npy``.

    x, float32 ``[N, ...]`` or token ids ``[N, T]``, int64 >= 0, is taken as it is and stays in its file: a batch reads
    the samples it needs. It is read through once, in blocks, to see that it is finite. y are classes, whole numbers or
    text ``[N]``, targets, floats ``[N]`` or ``[N, D]``, or the next tokens ``[N, T]``, -1 where there is none; natural
    clients and domains are whole numbers or text ``[N]``. There is no official test part.

    Shifts (the group ``heterogeneity``) and computing on a GPU copy the whole of x into memory.

    Raises
    ------
    DataError
        If a file is missing or damaged or holds something else, or files differ in the number of samples.
    """
    root = data_root(config, "folder")
    x, y = mapped(root / "x.npy"), _read(root / "y.npy")
    client, domain = (
        checked_ids(root, f"{name}.npy", _read(root / f"{name}.npy")) if os.path.lexists(root / f"{name}.npy") else None
        for name in ("client", "domain")
    )
    data = dataset_of(
        root, root.resolve().name, {"x.npy": x}, {"y.npy": y}, client=client, domain=domain, tokens=config.tokens
    )
    if x.is_floating_point():
        bad = sum(int((~np.isfinite(block).reshape(len(block), -1).all(1)).sum()) for block in blocks(x))
        if bad:
            raise DataError(f"{root}: x.npy is not finite (nan or infinite) in {bad} of {len(x)} samples.")
    return data


def _read(path: Path) -> NDArray[Any]:
    """An array read whole; nothing is unpickled."""
    if not os.path.isfile(path):
        raise DataError(f"{path} is missing or not a file.")
    try:
        with path.open("rb") as file:
            array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        if array.dtype.kind == "U":
            array.tolist()  # raises if the bytes are no Unicode
        return array
    except Exception as error:  # whatever damaged bytes lead to
        raise DataError(f"{path} is damaged or not an .npy file of numbers ({reason(error)}).") from error
