"""From settings to the data of all clients."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from fedpers.data.datasets import DatasetConfig, load_dataset
from fedpers.data.federated import PARTS, FederatedData, Part
from fedpers.data.index import OWNED, read_index
from fedpers.data.partition import PartitionConfig, partition_samples
from fedpers.data.split import SplitConfig, hold_out, split_clients
from fedpers.errors import DataError


def load_federated(dataset: DatasetConfig, partition: PartitionConfig, split: SplitConfig, seed: int) -> FederatedData:
    """Load a data set, divide it among clients and split each client's samples.

    Parameters
    ----------
    dataset : DatasetConfig
    partition : PartitionConfig
        Its `seed`, if set, replaces `seed` for the partition and the split.
    split : SplitConfig
        Not used if an index file names its own ``train``, ``validation`` and ``test`` lists; if it names only
        ``train`` and ``test``, `validation` is the fraction of a client's train list that is held out.
    seed : int
        The run's seed.

    Returns
    -------
    FederatedData
        On the CPU; every client has at least one sample in each part.

    Raises
    ------
    DataError
        If files are missing or damaged, or the data cannot be divided as asked.
    ConfigError
        If settings do not fit each other or the data set.
    """
    data = load_dataset(dataset)
    seed = seed if partition.seed is None else partition.seed
    lists = _listed(len(data), partition, split, seed) if partition.name == "index" else None
    if lists is None:
        divided = data.training_part() if split.name == "official" else data
        lists = split_clients(data, partition_samples(divided, partition, seed), split, seed)
    train, validation, test = ([torch.from_numpy(positions) for positions in lists[part]] for part in PARTS)
    return FederatedData(data.x, data.y, train, validation, test, data.num_classes, data.name)


def _listed(
    num_samples: int, config: PartitionConfig, split: SplitConfig, seed: int
) -> dict[Part, list[NDArray[np.int64]]] | None:
    """Parts named by an index file; None if it leaves the split to us."""
    given = read_index(str(config.file), num_samples, config.num_clients, config.min_samples)
    if OWNED in given:
        return None
    if "validation" not in given:
        held = [hold_out(positions, [split.validation], seed, k) for k, positions in enumerate(given["train"])]
        given["train"], given["validation"] = map(list, zip(*held, strict=True))
    for part in PARTS:
        for client, positions in enumerate(given[part]):
            if len(positions) == 0:
                raise DataError(f"{config.file}: the {part} list of client {client} is empty.")
    return {part: given[part] for part in PARTS}
