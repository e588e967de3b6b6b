"""Data sets by name. To add one, write a function ``DatasetConfig -> Dataset`` in ``sets/`` and name it here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from fedpers.custom import call_custom, import_custom
from fedpers.data.federated import FederatedData
from fedpers.data.sets.ag_news import ag_news
from fedpers.data.sets.arrays import dataset_of, npz
from fedpers.data.sets.base import Dataset
from fedpers.data.sets.domains import domains
from fedpers.data.sets.har import har
from fedpers.data.sets.hugging_face import hugging_face
from fedpers.data.sets.images import images
from fedpers.data.sets.leaf import leaf
from fedpers.data.sets.npy import npy
from fedpers.data.sets.pfllib import pfllib
from fedpers.data.sets.pictures import cifar, digits, emnist, idx_files, svhn, usps
from fedpers.data.sets.tables import table
from fedpers.data.sets.text import text
from fedpers.errors import ConfigError, DataError, check, reason
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
    if ":" in config.name:
        made = custom(config)
        if not isinstance(made, Dataset):
            raise ConfigError("dataset", config.name, "a set that is not divided yet; use load_federated")
        return made
    try:
        return DATASETS[config.name](config)
    except OSError as e:  # e.g. a folder that may not be entered
        raise DataError(f"{config.name}: {reason(e)}.") from e


def custom(config: DatasetConfig) -> Dataset | FederatedData:
    """Call a function of the user's own.

    It returns ``(x, y)`` or ``(x, y, clients)``, arrays or tensors as in an .npz file; a :class:`Dataset`;
    :class:`FederatedData`; or whatever :meth:`FederatedData.from_clients` takes, of which the parts are made by the
    default fractions.

    Raises
    ------
    ConfigError
        If it cannot be imported or called, or returns something else.
    """
    function = import_custom("dataset.name", config.name)
    check(callable(function), "dataset.name", config.name, "module:function")
    made = call_custom("dataset", config.name, function, {}, config.arguments or {})
    name = config.name.partition(":")[2]
    if isinstance(made, Dataset | FederatedData):
        divided: Dataset | FederatedData = made
        return divided
    if isinstance(made, tuple) and len(made) in (2, 3):
        x, y, *owner = (np.asarray(values) for values in made)
        return dataset_of(Path(name), name, {"x": x}, {"y": y}, client=owner[0] if owner else None)
    if isinstance(made, list | dict):
        return FederatedData.from_clients(made, name=name)
    allowed = f"a function that returns (x, y), (x, y, clients) or data of clients, not {type(made).__name__}"
    raise ConfigError("dataset.name", config.name, allowed)


DATASETS: dict[str, Callable[[DatasetConfig], Dataset]] = {
    "digits": digits,
    "mnist": partial(idx_files, kind="MNIST"),
    "fashion_mnist": partial(idx_files, kind="FashionMNIST"),
    "kmnist": partial(idx_files, kind="KMNIST"),
    "emnist": emnist,
    "usps": usps,
    "svhn": svhn,
    "cifar10": partial(cifar, kind="CIFAR10", num_classes=10),
    "cifar100": partial(cifar, kind="CIFAR100", num_classes=100),
    "har": har,
    "npz": npz,
    "npy": npy,
    "domains": domains,
    "pfllib": pfllib,
    "leaf": leaf,
    "text": text,
    "ag_news": ag_news,
    "images": images,
    "csv": table,
    "parquet": table,
    "hf": hugging_face,
}
