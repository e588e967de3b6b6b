"""Several owners of the data, drawn at random, form a client, as users an organization.

The partition of flwr-datasets (GroupedNaturalIdPartitioner with ``mode="allow-bigger"``), with groups that are drawn.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedpers.data.partitions.base import Division
from fedpers.data.partitions.natural import large_enough, samples_of_owners
from fedpers.data.sets.base import Dataset
from fedpers.errors import check
from fedpers.randomness import generator
from fedpers.settings.partition import PartitionConfig

NAMED = 3
"""Owners that the name of a client lists."""


def divide(dataset: Dataset, config: PartitionConfig, seed: int) -> Division:
    """Put ``config.owners_per_client`` owners together, and one or more further where their number asks for it.

    Raises
    ------
    ConfigError
        If the data have no client ids, or fewer owners than form a client.
    DataError
        If too few of the clients have ``config.min_samples`` samples.
    """
    owners, size = samples_of_owners(dataset, config), config.owners_per_client
    allowed = f"at most {len(owners)}, the owners in {dataset.name}"
    check(size <= len(owners), "partition.owners_per_client", size, allowed)
    drawn = np.array_split(generator(seed, "owner_groups").permutation(len(owners)), len(owners) // size)
    together = [np.sort(np.concatenate([owners[owner] for owner in group])) for group in drawn]
    lists = large_enough(together, dataset, config, seed, f"groups of {size} owners")
    return Division(lists, names=tuple(_name(dataset, positions) for positions in lists))


def _name(dataset: Dataset, positions: NDArray[np.int64]) -> str:
    """Names of the first owners of a client."""
    assert dataset.owner is not None
    _, first = np.unique(dataset.owner.numpy()[positions], return_index=True)
    names = [dataset.owner_name(int(positions[index])) for index in first[:NAMED]]
    return ", ".join(names) + (", ..." if len(first) > NAMED else "")
