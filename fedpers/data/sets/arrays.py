"""Arrays of one's own in an ``.npz`` file."""

from __future__ import annotations

import logging
import lzma
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpers.data.sets.base import Dataset, data_root, finite_floats, normalized, number_labels
from fedpers.data.values import is_one_hot
from fedpers.errors import DataError, reason
from fedpers.settings.dataset import DatasetConfig
from fedpers.tasks import CLASSIFICATION, NextToken, Regression, Task

logger = logging.getLogger(__name__)

MAX_CHANNELS = 4
MAX_CLASSES = 100_000  # labels beyond are ids or values, not classes


def npz(config: DatasetConfig) -> Dataset:
    """Any arrays on disk; nothing is unpickled."""
    path = data_root(config, "file")
    named = (config.x, config.y, config.client, config.domain, config.n_train)
    arrays = read_npz(path, [name for name in named if name is not None])
    x, y = arrays[config.x], arrays[config.y]
    train_size = None if config.n_train is None else _train_size(path, config.n_train, arrays[config.n_train], len(y))
    client, domain = (
        None if name is None else checked_ids(path, name, arrays[name]) for name in (config.client, config.domain)
    )
    return dataset_of(
        path,
        path.stem,
        {config.x: x},
        {config.y: y},
        client=client,
        domain=domain,
        tokens=config.tokens,
        train_size=train_size,
    )


def checked_ids(path: Path, name: str, ids: NDArray[Any]) -> NDArray[Any]:
    """Clients or domains of samples, if they are whole numbers or text ``[N]``.

    Raises
    ------
    DataError
        If they are anything else; it names `path` and `name`.
    """
    if ids.ndim != 1 or ids.dtype.kind not in "iuUS":
        raise DataError(f"{path}: {name} must be whole numbers or text [N], not {ids.dtype} {list(ids.shape)}.")
    return ids


def dataset_of(
    path: Path,
    name: str,
    named_x: Mapping[str, NDArray[Any] | Tensor],
    named_y: Mapping[str, NDArray[Any]],
    *,
    client: NDArray[Any] | None = None,
    domain: NDArray[Any] | None = None,
    tokens: bool = False,
    num_tokens: int = 0,
    train_size: int | None = None,
    class_names: tuple[str, ...] = (),
) -> Dataset:
    """Make a data set of arrays that were read somewhere, or say what is wrong with them.

    Parameters
    ----------
    path : Path
        Where they come from, for errors.
    name : str
        Of the data set.
    named_x : mapping with one entry
        The inputs under the name an error calls them: uint8 pictures ``[N, H, W]`` or ``[N, H, W, C]``, which are
        normalized; floats ``[N, ...]``, which are taken as they are; tokens, whole numbers >= 0 ``[N, T]``; or a tensor
        ``[N, ...]`` of inputs that are ready.
    named_y : mapping with one entry
        Classes, whole numbers or text ``[N]``; or targets, floats ``[N]`` or ``[N, D]``; or with tokens the next one at
        each position, whole numbers ``[N, T]``, -1 where nothing is to be predicted.
    client : array ``[N]``, optional
        Natural client of each sample, whole numbers or text.
    domain : array ``[N]``, optional
        Domain of each sample, whole numbers or text.
    tokens : bool
        Whether the inputs are tokens.
    num_tokens : int
        Size of the vocabulary of tokens; 0 is the largest one that occurs plus one.
    train_size : int, optional
        So many samples, the first, are the official training part.
    class_names : tuple of str
        What the data call classes 0, 1, ..., which then are the labels as they stand.

    Raises
    ------
    DataError
        If arrays differ in length, are empty, or hold something else than these.
    """
    ((x_name, x),) = named_x.items()
    ((y_name, y),) = named_y.items()
    task = _task_of(path, x_name, x, y_name, y, tokens)
    if x.ndim == 0 or len(x) != len(y):
        raise DataError(f"{path}: {x_name} has {x.shape[0] if x.ndim else 0} samples but {y_name} has {len(y)}.")
    if len(y) == 0:
        raise DataError(f"{path}: there are no samples.")
    if tokens:
        largest = max(x.max(), y.max()) if isinstance(task, NextToken) else x.max()
        num_tokens = _vocabulary(path, x_name, int(x.min()), int(largest), num_tokens)
    classes: tuple[str, ...] = ()
    if isinstance(task, NextToken):
        labels, num_classes = torch.from_numpy(y.astype(np.int64)), num_tokens
    elif isinstance(task, Regression):
        labels = _targets(path, y_name, y)
        num_classes = labels[0].numel()
    elif class_names:
        labels, classes = torch.from_numpy(y.astype(np.int64)), class_names
        num_classes = len(classes)
    else:
        labels, classes = _class_ids(path, y_name, y)
        num_classes = int(labels.max()) + 1
    owner, owner_names = _numbered(client)
    domains, domain_names = _numbered(domain)
    return Dataset(
        _inputs(path, x_name, x, tokens, train_size),
        labels,
        num_classes,
        name,
        train_size=train_size,
        owner=owner,
        owner_names=owner_names,
        class_names=classes,
        domain=domains,
        domain_names=domain_names,
        num_tokens=num_tokens if tokens else 0,
        task=task,
    )


def _is_whole(x: NDArray[Any] | Tensor) -> bool:
    """Whether it holds whole numbers."""
    return not x.is_floating_point() if isinstance(x, Tensor) else x.dtype.kind in "iu"


def _task_of(path: Path, x_name: str, x: NDArray[Any] | Tensor, y_name: str, y: NDArray[Any], tokens: bool) -> Task:
    """What can be learned of labels like these."""
    if tokens and (x.ndim != 2 or not _is_whole(x)):
        raise DataError(f"{path}: {x_name} is {x.dtype} {list(x.shape)}, expected tokens, whole numbers [N, T].")
    if tokens and y.dtype.kind in "iu" and y.shape == tuple(x.shape):
        return NextToken()
    if y.ndim == 1 and y.dtype.kind in "iubUS":
        return CLASSIFICATION
    if y.ndim == 2 and y.shape[1] >= 2 and y.dtype.kind in "iubf" and is_one_hot(y):
        raise DataError(f"{path}: {y_name} is one-hot {list(y.shape)}, expected the numbers of the classes [N].")
    if y.dtype.kind == "f" and y.ndim in (1, 2) and 0 not in y.shape[1:]:
        if y.ndim == 2 and y.shape[1] >= 2 and len(y) and ((y == 0) | (y == 1)).all():
            logger.warning(
                "%s: %s holds 0 and 1 only and is taken for the targets of a regression; several classes of a sample "
                "need a task of one's own.",
                path,
                y_name,
            )
        return Regression()
    raise DataError(
        f"{path}: {y_name} must be whole numbers or text [N], classes, or floats [N] or [N, D], targets of a "
        f"regression{f', or the next ones [N, T] of the tokens {x_name}' if tokens else ''}, not {y.dtype} "
        f"{list(y.shape)}."
    )


def _vocabulary(path: Path, x_name: str, low: int, high: int, num_tokens: int) -> int:
    """Size of the vocabulary of tokens from `low` to `high`: `num_tokens`, or if that is 0 as many as they need."""
    if low < 0 or 0 < num_tokens <= high:
        allowed = f"0 to {num_tokens - 1}" if num_tokens else "0 or more"
        raise DataError(f"{path}: tokens in {x_name} run from {low} to {high}, expected {allowed}.")
    return num_tokens or high + 1


def _inputs(path: Path, name: str, x: NDArray[Any] | Tensor, tokens: bool, train_size: int | None) -> Tensor:
    """Inputs ``[N, ...]`` as networks take them."""
    hint = "; whole numbers that are tokens need dataset.tokens=true" if _is_whole(x) and x.ndim == 2 else ""
    if isinstance(x, Tensor) and (tokens or not _is_whole(x)):
        return x
    if isinstance(x, Tensor):
        raise DataError(f"{path}: {name} is {str(x.dtype).removeprefix('torch.')}, expected floats{hint}.")
    if tokens:
        return torch.from_numpy(x.astype(np.int64))
    if x.dtype == np.uint8:
        if x.ndim == 3:
            x = x[..., None]
        if x.ndim != 4 or x.shape[-1] > MAX_CHANNELS:
            raise DataError(
                f"{path}: {name} is uint8 {list(x.shape)}, expected pictures [N, H, W] or "
                f"[N, H, W, C] with C <= {MAX_CHANNELS}, or floats."
            )
        return normalized(x, train_size or len(x))
    if x.dtype.kind == "f":
        return torch.from_numpy(finite_floats(x, f"{path}: {name} is"))
    raise DataError(f"{path}: {name} is {x.dtype}, expected uint8 pictures or floats{hint}.")


def _numbered(ids: NDArray[Any] | None) -> tuple[Tensor | None, tuple[str, ...]]:
    """Ids as int64 ``[N]`` from 0 and what they are called, as :func:`number_labels` does; None as it is."""
    if ids is None:
        return None, ()
    numbers, names = number_labels(ids)
    return torch.from_numpy(numbers), names


def _class_ids(path: Path, name: str, y: NDArray[Any]) -> tuple[Tensor, tuple[str, ...]]:
    """Class ids ``[N]``, and the classes' names unless they are these ids."""
    signs = y.dtype.kind == "i" and int(y.min()) == -1 and set(np.unique(y)) == {-1, 1}
    # else -1 often stands for "unknown"
    if y.dtype.kind in "iu" and not signs and (int(y.min()) < 0 or int(y.max()) >= MAX_CLASSES):
        bad = y.min() if int(y.min()) < 0 else y.max()
        raise DataError(f"{path}: {name} has the label {bad}, expected class ids from 0 to {MAX_CLASSES - 1}.")
    ids, names = number_labels(y)
    if names and y.dtype.kind in "iu":
        logger.warning("%s: the labels %s are numbered as classes 0 to %d.", path, _short(names), len(names) - 1)
    return torch.from_numpy(ids), names


def _short(names: tuple[str, ...]) -> str:
    """Names for a sentence, of many the first and the last."""
    return ", ".join(names) if len(names) <= 5 else f"{names[0]}, {names[1]}, ..., {names[-1]}"


def _targets(path: Path, name: str, y: NDArray[Any]) -> Tensor:
    """Float32 ``[N]`` or ``[N, D]``; floats ``[N]`` without a fraction may be meant as class ids."""
    targets = torch.from_numpy(finite_floats(y, f"{path}: {name} is"))
    if y.ndim == 1 and (y == np.floor(y)).all():
        raise DataError(
            f"{path}: {name} holds whole numbers as {y.dtype}; store class ids as whole numbers, or the targets of a "
            f"regression as floats [N, 1]."
        )
    return targets


def _train_size(path: Path, name: str, value: NDArray[Any], num_samples: int) -> int:
    if value.size != 1 or value.dtype.kind not in "iu" or not 0 < int(value.item()) <= num_samples:
        raise DataError(f"{path}: {name} must be one whole number from 1 to {num_samples}.")
    return int(value.item())


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
