"""Who owns which samples. flwr-datasets assigns; what it computed is cached, because it imports slowly."""

from __future__ import annotations

import bisect
import hashlib
import importlib.metadata
import json
import logging
import warnings
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpers.data.cache import read_lists, write_lists
from fedpers.data.partitions.index import read_index
from fedpers.data.partitions.pfllib import PFLLIB
from fedpers.data.sets.base import Dataset
from fedpers.errors import ConfigError, DataError, check
from fedpers.randomness import derive, generator
from fedpers.settings.data import DEFAULT_CLIENTS, PartitionConfig

logger = logging.getLogger(__name__)

BY_LABEL = (
    "dirichlet",
    "pathological",
    "label_sets",
    "pfllib_dirichlet",
    "pfllib_pathological",
)  # they divide classes, which a regression does not have
ATTEMPTS = 6  # seeds tried until every client has min_samples
TRIES = {"dirichlet": 11, "pathological": 1}  # divisions flwr-datasets tries with one seed
_CACHE_FORMAT = 1  # raise when the same settings give another division


def partition_samples(dataset: Dataset, config: PartitionConfig, seed: int) -> list[NDArray[np.int64]]:
    """Divide the samples of `dataset` among clients.

    Parameters
    ----------
    dataset : Dataset
        All its samples are divided; pass :meth:`Dataset.training_part` to keep an official test part out.
    config : PartitionConfig
    seed : int
        Used if `config` has no seed of its own.

    Returns
    -------
    list of int64 arrays ``[n_k]``
        Positions of each client's samples, ascending. No sample has two owners; every client has at least
        ``config.min_samples``. Samples without an owner are logged.

    Raises
    ------
    DataError
        If ``config.min_samples`` cannot be had, saying why; or if an index file cannot be used.
    ConfigError
        If a setting does not fit the data set.
    """
    seed = seed if config.seed is None else config.seed
    allowed = "a partition that deals each sample to one client, because label_sets and user do not"
    check(config.name not in ("label_sets", "user", *PFLLIB), "partition", config.name, allowed)
    if config.num_clients is not None:
        _check_enough(dataset, config, config.num_clients)
    if config.name == "natural":
        lists = _natural(dataset, config, seed)
    elif config.name == "index":
        parts = read_index(str(config.file), len(dataset), config.num_clients, config.min_samples)
        lists = [np.sort(np.concatenate(client_parts)) for client_parts in zip(*parts.values(), strict=True)]
    else:
        lists = _drawn(dataset, config, seed)
    unused = len(dataset) - sum(len(positions) for positions in lists)
    if unused:
        logger.info("%s: %d of %d samples belong to no client.", dataset.name, unused, len(dataset))
    return lists


def _check_enough(dataset: Dataset, config: PartitionConfig, clients: int) -> None:
    if clients > len(dataset):
        raise DataError(f"partition.num_clients={clients} is more than the {len(dataset)} samples of {dataset.name}.")
    if clients * config.min_samples > len(dataset):
        raise DataError(
            f"{clients} clients with at least {config.min_samples} samples each need "
            f"{clients * config.min_samples} samples, but {dataset.name} has {len(dataset)}; lower "
            f"partition.num_clients or partition.min_samples."
        )


def _natural(dataset: Dataset, config: PartitionConfig, seed: int) -> list[NDArray[np.int64]]:
    """Group samples by owner; the ids are the assignment, so no partitioner is needed."""
    if dataset.owner is None:
        raise ConfigError(
            "partition",
            "natural",
            f"another partition, because {dataset.name} has no client ids (an npz file names them with dataset.client)",
        )
    owner = dataset.owner.numpy()
    order = np.argsort(owner, kind="stable")
    order = order[np.searchsorted(owner[order], 0) :]  # -1 is nobody
    starts = np.unique(owner[order], return_index=True)[1]
    owners = np.split(order, starts[1:])
    lists = [positions for positions in owners if len(positions) >= config.min_samples]
    num_clients = config.num_clients
    if not lists or (num_clients is not None and num_clients > len(lists)):
        raise DataError(
            f"partition=natural: {len(lists)} of the {len(owners)} owners in {dataset.name} have at least "
            f"partition.min_samples={config.min_samples} samples, expected {num_clients or 'some'}; lower it"
            f"{' or partition.num_clients' if num_clients else ''}."
        )
    if len(lists) < len(owners):
        logger.warning(
            "partition=natural: %d of %d owners have fewer than %d samples and are left out.",
            len(owners) - len(lists),
            len(owners),
            config.min_samples,
        )
    if num_clients is not None and num_clients < len(lists):
        chosen = np.sort(generator(seed, "owners").choice(len(lists), num_clients, replace=False))
        lists = [lists[k] for k in chosen]
    return lists


def _drawn(dataset: Dataset, config: PartitionConfig, seed: int) -> list[NDArray[np.int64]]:
    """Divide at random, again and again until every client has enough; from the cache if it was done before."""
    labels = dataset.y.numpy() if dataset.task.classes else np.zeros(len(dataset), np.int64)
    clients = config.num_clients or DEFAULT_CLIENTS
    classes = len(np.unique(labels))
    if config.name == "pathological" and config.classes_per_client > classes:
        raise ConfigError(
            "partition.classes_per_client",
            config.classes_per_client,
            f"at most {classes}, the classes of {dataset.name}",
        )
    key = _key(labels, config, seed)
    stored = read_lists(key, clients, len(labels))
    if stored is not None and min(map(len, stored)) >= config.min_samples:
        return stored
    seeds = [derive(seed, "partition", attempt) for attempt in range(ATTEMPTS)]
    best = 0
    for drawn in seeds:
        lists = _load(_partitioner(labels, config, clients, config.min_samples, drawn), clients)
        smallest = min(map(len, lists))
        if smallest >= config.min_samples:
            write_lists(key, lists)
            return lists
        best = max(best, smallest)
    change = "change partition.classes_per_client"
    if config.name == "dirichlet":
        change = "raise partition.alpha"

        def possible(minimum: int) -> bool:
            return any(_succeeds(_partitioner(labels, config, clients, minimum, drawn)) for drawn in seeds)

        # The partitioner does not tell how close it came. The same seeds give the same divisions, so ask it for less.
        best = bisect.bisect_left(range(1, config.min_samples), True, key=lambda minimum: not possible(minimum))
    attempts = ATTEMPTS * TRIES[config.name]
    raise DataError(
        f"partition={config.name}: in {attempts} attempts at dividing {dataset.name} among {clients} clients, the "
        f"smallest client had {best} samples at best, fewer than partition.min_samples={config.min_samples}; {change}, "
        f"or lower partition.num_clients or partition.min_samples."
    )


def _key(labels: NDArray[np.int64], config: PartitionConfig, seed: int) -> str:
    version = importlib.metadata.version("flwr-datasets")
    settings = {**asdict(config), "seed": seed, "flwr_datasets": version, "format": _CACHE_FORMAT}
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(labels).data)
    return f"{config.name}-{digest.hexdigest()}"


def _partitioner(labels: NDArray[np.int64], config: PartitionConfig, clients: int, minimum: int, seed: int) -> Any:
    """Partitioner of flwr-datasets with its table; it divides when it is first asked for something."""
    from datasets import Dataset as Table
    from flwr_datasets import partitioner as flwr

    partitioner: Any
    if config.name == "dirichlet":
        partitioner = flwr.DirichletPartitioner(
            clients, "label", float(config.alpha), min_partition_size=minimum, shuffle=False, seed=seed
        )
    elif config.name == "pathological":
        # "first-deterministic" is the rule of the paper it cites, and leaves no class out if clients >= classes.
        partitioner = flwr.PathologicalPartitioner(
            clients, "label", config.classes_per_client, "first-deterministic", shuffle=False, seed=seed
        )
    elif config.name == "quantity":
        partitioner = flwr.SizePartitioner(_sizes(len(labels), clients, config))
    else:
        partitioner = flwr.IidPartitioner(clients)
    # The partitioners cut tables from top to bottom; which samples come where is drawn here.
    order = generator(seed, "order").permutation(len(labels))
    partitioner.dataset = Table.from_dict({"label": labels[order], "position": order})
    return partitioner


def _succeeds(partitioner: Any) -> bool:
    """Let it divide; False if it finds no division."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of every try; and of unused classes, but unused samples are logged
        try:
            return bool(partitioner.num_partitions)
        except ValueError:  # its tries are used up, or a class has fewer samples than clients that are to have it
            return False


def _load(partitioner: Any, clients: int) -> list[NDArray[np.int64]]:
    """Positions of every client, ascending; all empty if there is no division."""
    if not _succeeds(partitioner):
        return [np.zeros(0, np.int64)] * clients
    parts = (partitioner.load_partition(client) for client in range(clients))
    return [np.sort(np.array(part["position"][:], dtype=np.int64)) for part in parts]


def _sizes(num_samples: int, clients: int, config: PartitionConfig) -> list[int]:
    """Size clients for ``quantity``; what rounding leaves goes to the last, the largest."""
    k = np.arange(1.0, clients + 1)
    units = {"linear": k, "square": k**2, "exponential": np.exp(k - clients)}[config.skew]
    spare = num_samples - clients * config.min_samples
    sizes = config.min_samples + np.floor(spare * (units / units.sum())).astype(np.int64)
    sizes[-1] += num_samples - sizes.sum()
    return [int(size) for size in sizes]
