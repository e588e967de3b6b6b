"""Data sets by name. To add one, write a function ``DatasetConfig -> Dataset`` in ``sets/`` and name it here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fedpers.data.sets.arrays import npz
from fedpers.data.sets.base import Dataset, reason
from fedpers.data.sets.pictures import cifar, digits, idx_files
from fedpers.errors import DataError, check
from fedpers.settings.data import DatasetConfig


def load_dataset(config: DatasetConfig) -> Dataset:
    """Load a data set.

    Parameters
    ----------
    config : DatasetConfig

    Returns
    -------
    Dataset
        On the CPU.

    Raises
    ------
    DataError
        If files are missing or damaged, cannot be downloaded, or hold something else than expected.
    ConfigError
        If it is a set of ratings, which has no samples with labels.
    """
    allowed = "a set of samples with labels; for ratings use load_federated"
    check(not config.holds_ratings, "dataset", config.name, allowed)
    try:
        return DATASETS[config.name](config)
    except OSError as e:  # e.g. a folder that may not be entered
        raise DataError(f"{config.name}: {reason(e)}.") from e


DATASETS: dict[str, Callable[[DatasetConfig], Dataset]] = {
    "digits": digits,
    "mnist": partial(idx_files, kind="MNIST"),
    "fashion_mnist": partial(idx_files, kind="FashionMNIST"),
    "cifar10": partial(cifar, kind="CIFAR10", num_classes=10),
    "cifar100": partial(cifar, kind="CIFAR100", num_classes=100),
    "npz": npz,
}
