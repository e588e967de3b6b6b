"""Data sets by name. To add one, write a function ``DatasetConfig -> Dataset`` in ``sets/`` and name it here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedpers.custom import call_custom, import_custom
from fedpers.data.federated import FederatedData
from fedpers.data.sets.ag_news import ag_news
from fedpers.data.sets.arrays import checked_ids, dataset_of, npz
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
from fedpers.data.values import array_of, inputs_of, is_pictures
from fedpers.errors import ConfigError, DataError, check, reason
from fedpers.settings.base import options
from fedpers.settings.dataset import DatasetConfig
from fedpers.settings.split import SplitConfig


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
        made = custom(config, SplitConfig(), 0)
        if not isinstance(made, Dataset):
            raise ConfigError("dataset", config.name, "a set that is not divided yet; use load_federated")
        return made
    try:
        return DATASETS[config.name](config)
    except OSError as e:  # e.g. a folder that may not be entered
        raise DataError(f"{config.name}: {reason(e)}.") from e


def custom(config: DatasetConfig, split: SplitConfig, seed: int) -> Dataset | FederatedData:
    """Call a function of the user's own.

    It returns ``(x, y)`` or ``(x, y, clients)``, arrays or tensors as in an .npz file, of which whole numbers become
    floats; a :class:`Dataset`; :class:`FederatedData`; or a list or dictionary as
    :meth:`FederatedData.from_clients` takes it. Token ids come in one of the latter.

    Parameters
    ----------
    config : DatasetConfig
    split : SplitConfig
        Of it `validation` and `test` are the shares of clients that a list or dictionary does not split yet.
    seed : int
        Of that split.

    Raises
    ------
    ConfigError
        If it cannot be imported or called, or returns something else; or a setting of `split` would have no effect.
    DataError
        If it returns what is no data.
    """
    function = import_custom("dataset.name", config.name)
    check(callable(function), "dataset.name", config.name, "module:function")
    made = call_custom("dataset", config.name, function, {}, config.arguments or {})
    name = config.name
    if isinstance(made, Dataset):
        return made
    why = f"because {config.name} divides its samples itself"
    if isinstance(made, FederatedData):
        _refuse_effectless(split, (), why)
        return made
    if isinstance(made, tuple) and len(made) in (2, 3):
        return _whole_set(name, *made)
    if isinstance(made, list | dict):
        given = made.values() if isinstance(made, dict) else made
        split_already = all(isinstance(client, dict) for client in given)
        _refuse_effectless(split, () if split_already else ("validation", "test"), why)
        return FederatedData.from_clients(made, validation=split.validation, test=split.test, seed=seed, name=name)
    allowed = f"a function that returns (x, y), (x, y, clients) or data of clients, not {type(made).__name__}"
    raise ConfigError("dataset.name", config.name, allowed)


def _whole_set(name: str, x: Any, y: Any, owner: Any = None) -> Dataset:
    """A set of arrays that a function returned."""
    if isinstance(x, dict):
        raise DataError(f"{name}: x has several inputs; return the clients, a list or dictionary of (x, y), instead.")
    x, y = inputs_of(x, f"{name}: x"), array_of(y, f"{name}: y")
    if x.dtype.kind in "iub" and not is_pictures(x):
        x = x.astype(np.float32)
    client = None if owner is None else checked_ids(Path(name), "clients", array_of(owner, f"{name}: clients"))
    return dataset_of(Path(name), name, {"x": x}, {"y": y}, client=client)


def _refuse_effectless(split: SplitConfig, used: tuple[str, ...], why: str) -> None:
    """Refuse settings of the split that differ from their defaults and would be ignored."""
    usual = SplitConfig()
    check(split.name == usual.name, "split", split.name, f"{usual.name}, {why}")
    for name in options(SplitConfig):
        value, default = getattr(split, name), getattr(usual, name)
        check(name in used or value == default, f"split.{name}", value, f"{default}, its default, {why}")


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
