"""Divisions that flwr-datasets draws; what it computed is cached, because it imports slowly."""

from __future__ import annotations

import bisect
import hashlib
import importlib.metadata
import json
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpers.data.cache import read_lists, write_lists
from fedpers.data.partitions.base import Lists
from fedpers.data.sets.base import Dataset
from fedpers.errors import ConfigError, DataError
from fedpers.randomness import derive, generator
from fedpers.settings.base import choice_options
from fedpers.settings.partition import PartitionConfig

ATTEMPTS = 6  # seeds tried until every client has min_samples
COLUMN = "label"
"""Column of the tables that partitioners see: the values by which they divide."""
_CACHE_FORMAT = 1  # raise when the same settings give another division


def classes_of(dataset: Dataset) -> NDArray[np.int64]:
    """Class of each sample ``[N]``; 0 for all of a regression."""
    return dataset.y.numpy() if dataset.task.classes else np.zeros(len(dataset), np.int64)


def clients_of(config: PartitionConfig, dataset: Dataset) -> int:
    """How many clients a drawn division has.

    Raises
    ------
    DataError
        If there are too few samples for so many.
    """
    clients, least = config.num_clients, config.min_samples
    assert clients is not None  # which drawn divisions have by default
    if clients > len(dataset):
        raise DataError(f"partition.num_clients={clients} is more than the {len(dataset)} samples of {dataset.name}.")
    if clients * least > len(dataset):
        raise DataError(
            f"{clients} clients with at least {least} samples each need {clients * least} samples, but {dataset.name} "
            f"has {len(dataset)}; lower partition.num_clients ({len(dataset) // least} at most) or "
            f"partition.min_samples ({len(dataset) // clients} at most)."
        )
    return clients


def check_classes(dataset: Dataset, per_client: int) -> None:
    """Refuse more classes for a client than there are."""
    classes = len(np.unique(classes_of(dataset)))
    if per_client > classes:
        allowed = f"at most {classes}, the classes of {dataset.name}"
        raise ConfigError("partition.classes_per_client", per_client, allowed)


def draw(
    values: NDArray[Any],
    clients: int,
    config: PartitionConfig,
    seed: int,
    partitioner: Callable[[int, int], Any],
    name: str,
    *,
    remedy: str = "",
    tries: int = 1,
    enforces_minimum: bool = False,
) -> Lists:
    """Divide at random, again and again until every client has enough; from the cache if it was done before.

    Parameters
    ----------
    values : array ``[N]``
        By which samples are divided: classes, or numbers.
    clients : int
    config : PartitionConfig
    seed : int
    partitioner : callable
        (least number of samples, seed) -> a partitioner of flwr-datasets, which has not seen its table yet; a table has
        the column :data:`COLUMN` with `values`.
    name : str
        What is divided, for errors.
    remedy : str
        What helps besides lowering ``num_clients`` and ``min_samples``, in the imperative.
    tries : int
        Divisions that the partitioner itself tries with one seed.
    enforces_minimum : bool
        Whether the partitioner takes the least number of samples into account, and fails where it cannot have it.

    Returns
    -------
    list of int64 arrays ``[>= config.min_samples]``
        Positions in `values` of each client's samples, ascending.

    Raises
    ------
    DataError
        If no division has ``config.min_samples`` for every client.
    """
    key = _key(values, clients, config, seed)
    stored = read_lists(key, clients, len(values))
    if stored is not None and min(map(len, stored)) >= config.min_samples:
        return stored
    seeds = [derive(seed, "partition", attempt) for attempt in range(ATTEMPTS)]
    best = 0
    for drawn in seeds:
        lists = _load(_given(partitioner(config.min_samples, drawn), values, drawn), clients)
        smallest = min(map(len, lists))
        if smallest >= config.min_samples:
            write_lists(key, lists)
            return lists
        best = max(best, smallest)
    if enforces_minimum:

        def possible(minimum: int) -> bool:
            return any(_succeeds(_given(partitioner(minimum, drawn), values, drawn)) for drawn in seeds)

        # The partitioner does not tell how close it came. The same seeds give the same divisions, so ask it for less.
        best = bisect.bisect_left(range(1, config.min_samples), True, key=lambda minimum: not possible(minimum))
    enough = f"partition.min_samples={config.min_samples}"
    outcome = f"the smallest client had {best} samples at best, fewer than {enough}" if best else "some had no samples"
    raise DataError(
        f"partition={config.name}: in {ATTEMPTS * tries} attempts at dividing {name} among {clients} clients, "
        f"{outcome}; {f'{remedy}, or ' if remedy else ''}lower partition.num_clients or "
        f"partition.min_samples{f' ({best} at most)' if best else ''}."
    )


def _key(values: NDArray[Any], clients: int, config: PartitionConfig, seed: int) -> str:
    """File name for all that a division depends on."""
    chosen = {name: getattr(config, name) for name in choice_options(PartitionConfig, config.name)}
    version = importlib.metadata.version("flwr-datasets")
    settings = {**chosen, "num_clients": clients, "seed": seed, "flwr_datasets": version, "format": _CACHE_FORMAT}
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    digest.update(str(values.dtype).encode())
    digest.update(np.ascontiguousarray(values).data)
    return f"{config.name}-{digest.hexdigest()}"


def _given(partitioner: Any, values: NDArray[Any], seed: int) -> Any:
    """The partitioner with its table; it divides when it is first asked for something."""
    from datasets import Dataset as Table

    # The partitioners cut tables from top to bottom; which samples come where is drawn here.
    order = generator(seed, "order").permutation(len(values))
    partitioner.dataset = Table.from_dict({COLUMN: values[order], "position": order})
    return partitioner


def _succeeds(partitioner: Any) -> bool:
    """Let it divide; False if it finds no division."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of every try; and of unused classes, but unused samples are logged
        try:
            return bool(partitioner.num_partitions)
        except ValueError:  # its tries are used up, or a class has fewer samples than clients that are to have it
            return False


def _load(partitioner: Any, clients: int) -> Lists:
    """Positions of every client, ascending; all empty if there is no division."""
    if not _succeeds(partitioner):
        return [np.zeros(0, np.int64)] * clients
    parts = (partitioner.load_partition(client) for client in range(clients))
    return [np.sort(np.array(part["position"][:], dtype=np.int64)) for part in parts]
