"""Arrays of one's own in an ``.npz`` file."""

from __future__ import annotations

import lzma
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpers.data.sets.base import Dataset, normalized, reason
from fedpers.errors import DataError
from fedpers.settings.data import DatasetConfig
from fedpers.tasks import CLASSIFICATION, Regression

MAX_CHANNELS = 4
MAX_CLASSES = 100_000  # labels beyond are ids or values, not classes


def npz(config: DatasetConfig) -> Dataset:
    """Any arrays on disk; nothing is unpickled."""
    path = Path(config.root or "").expanduser()
    array_names = [name for name in (config.x, config.y, config.client, config.n_train) if name is not None]
    arrays = read_npz(path, array_names)
    x, y = arrays[config.x], arrays[config.y]
    is_classification = y.ndim == 1 and y.dtype.kind in "iu"
    if not is_classification and (y.dtype.kind != "f" or y.ndim not in (1, 2) or 0 in y.shape[1:]):
        raise DataError(
            f"{path}: {config.y} must be whole numbers [N], class ids, or floats [N] or [N, D], targets of a "
            f"regression, not {y.dtype} {list(y.shape)}."
        )
    if x.ndim == 0 or len(x) != len(y):
        raise DataError(f"{path}: {config.x} has {x.shape[0] if x.ndim else 0} samples but {config.y} has {len(y)}.")
    if len(y) == 0:
        raise DataError(f"{path}: there are no samples.")
    labels = _class_ids(path, config.y, y) if is_classification else _targets(path, config.y, y)
    train_size = None if config.n_train is None else _train_size(path, config.n_train, arrays[config.n_train], len(y))
    if x.dtype == np.uint8:
        if x.ndim == 3:
            x = x[..., None]
        if x.ndim != 4 or x.shape[-1] > MAX_CHANNELS:
            raise DataError(
                f"{path}: {config.x} is uint8 {list(x.shape)}, expected pictures [N, H, W] or "
                f"[N, H, W, C] with C <= {MAX_CHANNELS}, or floats."
            )
        inputs = normalized(x, train_size or len(x))
    elif x.dtype.kind == "f":
        inputs = _finite(path, config.x, x)
    else:
        raise DataError(f"{path}: {config.x} is {x.dtype}, expected uint8 pictures or floats.")
    owner = None if config.client is None else _owner(path, config.client, arrays[config.client])
    num_classes = int(labels.max()) + 1 if is_classification else labels[0].numel()
    task = CLASSIFICATION if is_classification else Regression()
    return Dataset(inputs, labels, num_classes, path.stem, train_size=train_size, owner=owner, task=task)


def _class_ids(path: Path, name: str, y: NDArray[Any]) -> Tensor:
    if int(y.min()) < 0 or int(y.max()) >= MAX_CLASSES:
        bad = y.min() if int(y.min()) < 0 else y.max()
        raise DataError(f"{path}: {name} has the label {bad}, expected class ids from 0 to {MAX_CLASSES - 1}.")
    return torch.from_numpy(y.astype(np.int64))


def _targets(path: Path, name: str, y: NDArray[Any]) -> Tensor:
    """Float32 ``[N]`` or ``[N, D]``; floats ``[N]`` without a fraction may be meant as class ids."""
    targets = _finite(path, name, y)
    if y.ndim == 1 and (y == np.floor(y)).all():
        raise DataError(
            f"{path}: {name} holds whole numbers as {y.dtype}; store class ids as whole numbers, or the targets of a "
            f"regression as floats [N, 1]."
        )
    return targets


def _finite(path: Path, name: str, values: NDArray[Any]) -> Tensor:
    """Float32 copy, refused if it is not finite."""
    with np.errstate(over="ignore"):  # what overflows float32 is refused just below
        copy = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    finite = copy.isfinite().reshape(len(copy), -1).all(1)
    if not bool(finite.all()):
        count = int((~finite).sum())
        raise DataError(f"{path}: {name} is not finite (nan or infinite) in {count} of {len(copy)} samples.")
    return copy


def _train_size(path: Path, name: str, value: NDArray[Any], num_samples: int) -> int:
    if value.size != 1 or value.dtype.kind not in "iu" or not 0 < int(value.item()) <= num_samples:
        raise DataError(f"{path}: {name} must be one whole number from 1 to {num_samples}.")
    return int(value.item())


def _owner(path: Path, name: str, value: NDArray[Any]) -> Tensor:
    if value.ndim != 1 or value.dtype.kind not in "iuUS":
        raise DataError(f"{path}: {name} must be whole numbers or text [N], not {value.dtype} {list(value.shape)}.")
    if value.dtype.kind in "US":
        value = np.unique(value, return_inverse=True)[1]
    return torch.from_numpy(value.astype(np.int64))


def read_npz(path: Path, names: list[str] | None = None) -> dict[str, NDArray[Any]]:
    """Read arrays of an ``.npz`` file, never unpickling.

    Parameters
    ----------
    path : Path
    names : list of str or None
        Which arrays; None is all.

    Raises
    ------
    DataError
        If the file is missing or damaged, an array is missing (those present are listed) or holds objects.
    """
    if not os.path.isfile(path):  # unlike Path.is_file, also False in a folder that may not be entered
        raise DataError(f"{path} is missing or not a file.")
    name = None
    try:
        # np.load takes whatever is not a zip file for a pickle; opening it as a zip first gives the right error.
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:
            absent = [n for n in names or () if n not in file.files]
            if absent:
                raise DataError(f"{path} has no array '{absent[0]}'; it has {', '.join(sorted(file.files)) or 'none'}.")
            arrays = {}
            for name in file.files if names is None else names:
                arrays[name] = file[name]
                if not isinstance(arrays[name], np.ndarray):
                    raise DataError(f"{path}: {name} is not an array.")
            return arrays
    except ValueError as e:
        if name is not None and "pickle" in str(e):
            raise DataError(f"{path}: {name} holds Python objects, which are not read; store numbers.") from e
        raise DataError(f"{path} is damaged ({reason(e)}).") from e
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError) as e:
        raise DataError(f"{path} is damaged or not an .npz file ({reason(e)}).") from e
