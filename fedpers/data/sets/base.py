"""What a data set is before it is divided, and how its files are found."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpers.data.cache import cache_root
from fedpers.errors import ConfigError, DataError, check
from fedpers.settings.dataset import DatasetConfig
from fedpers.tasks import CLASSIFICATION, Task

logger = logging.getLogger(__name__)

MANY_CLASSES = 1000
"""More classes than this, of whole numbers, may have been meant as numbers to predict."""


@dataclass(frozen=True)
class Dataset:
    """A whole data set, not yet divided among clients.

    Parameters
    ----------
    x : Tensor ``[N, ...]``
        Inputs: float32, normalized; pictures are ``[N, C, H, W]``. Tokens are int64 ``[N, T]``.
    y : Tensor ``[N]``, ``[N, D]`` or ``[N, T]``
        Class ids, int64, ``0 <= y < num_classes``; for a regression float32; the next token at each position.
    num_classes : int
        Of a regression: its targets, D.
    name : str
    train_size : int or None
        The first `train_size` samples are the official training part, the others the official test part;
        None if there is no official split.
    owner : Tensor ``[N]`` or None
        Natural client of each sample, int64, -1 for samples of nobody; None if the data have none.
    owner_names : tuple of str
        What the data call client 0, 1, ... of `owner`; empty where the numbers are the names.
    class_names : tuple of str
        What the data call each class; empty if they do not.
    domain : Tensor ``[N]`` or None
        Domain of each sample (the style of a picture, the source of a digit), int64 from 0; None if the data have none.
    domain_names : tuple of str
        What the data call domain 0, 1, ...; empty where the numbers are the names.
    num_tokens : int
        Size of the vocabulary where inputs are tokens, int64 ``[N, T]``; 0 for other inputs.
    task : Task
        What is learned.

    Raises
    ------
    DataError
        If the arrays are empty or differ in length, a label is out of range, or an official part is empty.
    """

    x: Tensor
    y: Tensor
    num_classes: int
    name: str
    train_size: int | None = None
    owner: Tensor | None = None
    owner_names: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    domain: Tensor | None = None
    domain_names: tuple[str, ...] = ()
    num_tokens: int = 0
    task: Task = CLASSIFICATION

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise DataError(f"{self.name}: x has {len(self.x)} samples but y has {len(self.y)}.")
        if len(self.y) == 0:
            raise DataError(f"{self.name}: there are no samples.")
        if self.task.classes and (int(self.y.min()) < 0 or int(self.y.max()) >= self.num_classes):
            low, high = int(self.y.min()), int(self.y.max())
            raise DataError(f"{self.name}: labels run from {low} to {high}, expected 0 to {self.num_classes - 1}.")
        if self.owner is not None and len(self.owner) != len(self.y):
            raise DataError(f"{self.name}: there are {len(self.owner)} client ids for {len(self.y)} samples.")
        if self.domain is not None and len(self.domain) != len(self.y):
            raise DataError(f"{self.name}: there are {len(self.domain)} domains for {len(self.y)} samples.")
        if self.train_size is not None and not 0 < self.train_size <= len(self.y):
            raise DataError(
                f"{self.name}: an official training part of {self.train_size} samples does not fit "
                f"{len(self.y)} samples."
            )

    def __len__(self) -> int:
        return len(self.y)

    def owner_name(self, sample: int) -> str:
        """What the data call the natural client of a sample."""
        if self.owner is None:
            raise ConfigError("partition", "natural", f"another partition, because {self.name} has no client ids")
        number = int(self.owner[sample])
        return self.owner_names[number] if self.owner_names else str(number)

    def training_part(self) -> Dataset:
        """Official training part alone (views, same positions).

        Raises
        ------
        ConfigError
            If there is no official test part.
        """
        n = self.train_size
        if n is None or n == len(self):
            raise ConfigError("split", "official", f"fractions, because {self.name} has no official test part")
        owner = None if self.owner is None else self.owner[:n]
        return replace(
            self, x=self.x[:n], y=self.y[:n], owner=owner, domain=None if self.domain is None else self.domain[:n]
        )


def data_root(config: DatasetConfig, kind: Literal["file", "folder", "file or folder"] | None = None) -> Path:
    """Where a data set lies: ``config.root``, or the folder ``data`` of the cache.

    Parameters
    ----------
    config : DatasetConfig
    kind : {"file", "folder", "file or folder"}, optional
        What has to be there; nothing by default, as for a folder into which something may be downloaded.

    Raises
    ------
    DataError
        If ``config.root`` is missing or something else.
    """
    if config.root is None:
        return cache_root() / "data"
    root = Path(config.root).expanduser()
    # unlike those of Path, these are False for what lies in a folder that may not be entered
    present = {"file": os.path.isfile, "folder": os.path.isdir, "file or folder": os.path.exists}
    if kind is not None and not present[kind](root):
        raise DataError(f"dataset.root={root} is missing{'' if kind == 'file or folder' else f' or not a {kind}'}.")
    return root


def normalized(pictures: NDArray[np.uint8], train_size: int) -> Tensor:
    """Float32 ``[N, C, H, W]`` from uint8 ``[N, H, W, C]``: mean 0 and deviation 1 in each channel.

    Mean and deviation are those of the first `train_size` pictures. Scaling by 1/255 cancels out.
    """
    values = np.arange(256)
    x = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).float()
    for channel in range(x.shape[1]):
        # Counted, not summed: exact, and no second float copy of the data.
        counts = np.bincount(pictures[:train_size, ..., channel].ravel(), minlength=256)
        mean = float(np.average(values, weights=counts))
        deviation = float(np.sqrt(np.average((values - mean) ** 2, weights=counts)))
        x[:, channel].sub_(mean).div_(deviation or 1.0)  # a constant channel becomes 0
    return x


def labels_for(task: str | None, labels: NDArray[Any], key: str, what: str) -> NDArray[Any]:
    """Labels of the type that stands for a task: floats ``[n, D]`` for a regression, whole numbers or text for classes.

    Parameters
    ----------
    task : str or None
        ``classification``, ``regression``, or None to leave the labels as they are.
    labels : array ``[n, ...]``
    key, what : str
        The setting as it is typed, and whose labels these are, for errors.

    Raises
    ------
    ConfigError
        If they are no numbers, or for classes no whole ones.
    """
    kind = labels.dtype.kind
    if task == "regression":
        check(kind in "iufb", key, task, f"classification, because {what} is {labels.dtype}, no number")
        floats: NDArray[Any] = labels.astype(np.float64)
        return floats[:, None] if labels.ndim == 1 else floats
    if task == "classification" and kind == "f" and labels.ndim == 1:
        whole = bool((np.isfinite(labels) & (labels == np.floor(labels))).all())
        check(whole, key, task, f"regression, because {what} is not always a whole number")
        return labels.astype(np.int64)
    return labels


def warn_of_many_classes(name: str, labels: NDArray[Any], remedy: str) -> None:
    """Say how many classes whole numbers ``[n]`` make, if these are more than a classification usually has."""
    classes = len(np.unique(labels)) if labels.dtype.kind in "iu" else 0
    if classes > MANY_CLASSES:
        logger.warning("%s: the labels are %d classes; %s predicts them as numbers.", name, classes, remedy)


def number_labels(labels: NDArray[Any]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Number labels ``[N]`` from 0 in their order.

    Returns
    -------
    ids : int64 array ``[N]``
    names : tuple of str
        Label of class 0, 1, ...; empty if the labels are these numbers.
    """
    values, ids = np.unique(labels, return_inverse=True)
    if values.dtype.kind in "iu" and (values == np.arange(len(values))).all():
        return ids.astype(np.int64), ()
    names = (value.decode(errors="replace") if isinstance(value, bytes) else str(value) for value in values.tolist())
    return ids.astype(np.int64), tuple(names)


def finite_floats(values: NDArray[Any], what_is: str) -> NDArray[np.float32]:
    """Float32 copy of an entry for each sample ``[N, ...]``.

    Raises
    ------
    DataError
        If a value is not finite, or is not in float32; the sentence begins with `what_is`, such as "x is".
    """
    with np.errstate(over="ignore"):  # what overflows float32 is refused just below
        copy = np.ascontiguousarray(values, dtype=np.float32)
    finite = np.isfinite(copy).reshape(len(copy), -1).all(1)
    if not finite.all():
        count = int((~finite).sum())
        raise DataError(f"{what_is} not finite (nan or infinite) in {count} of {len(copy)} samples.")
    return copy
