"""Client ids that come with the data."""

from __future__ import annotations

import logging

import numpy as np

from fedpers.data.partitions.base import Division, Lists
from fedpers.data.sets.base import Dataset
from fedpers.errors import ConfigError, DataError
from fedpers.randomness import generator
from fedpers.settings.partition import PartitionConfig

logger = logging.getLogger(__name__)


def divide(dataset: Dataset, config: PartitionConfig, seed: int) -> Division:
    """Give each owner its samples; the ids are the assignment, so no partitioner is needed.

    Raises
    ------
    ConfigError
        If the data have no client ids.
    DataError
        If too few owners have ``config.min_samples`` samples.
    """
    lists = large_enough(samples_of_owners(dataset, config), dataset, config, seed)
    return Division(lists, names=tuple(dataset.owner_name(int(positions[0])) for positions in lists))


def samples_of_owners(dataset: Dataset, config: PartitionConfig) -> Lists:
    """Positions of each owner's samples ``[>= 1]``, ascending, by the number of the owner."""
    if dataset.owner is None:
        raise ConfigError(
            "partition",
            config.name,
            f"another partition, because {dataset.name} has no client ids (dataset.client names those of a table or an "
            "npz file; a function returns them third, (x, y, clients))",
        )
    owner = dataset.owner.numpy()
    order = np.argsort(owner, kind="stable")
    order = order[np.searchsorted(owner[order], 0) :]  # -1 is nobody
    starts = np.unique(owner[order], return_index=True)[1]
    return np.split(order, starts[1:])


def large_enough(lists: Lists, dataset: Dataset, config: PartitionConfig, seed: int, noun: str = "owners") -> Lists:
    """Leave out clients with too few samples, and draw ``config.num_clients`` of the others if it is a number."""
    large = [positions for positions in lists if len(positions) >= config.min_samples]
    num_clients = config.num_clients
    if not large or (num_clients is not None and num_clients > len(large)):
        raise DataError(
            f"partition={config.name}: {len(large)} of the {len(lists)} {noun} in {dataset.name} have at least "
            f"partition.min_samples={config.min_samples} samples, expected {num_clients or 'some'}; lower it"
            f"{' or partition.num_clients' if num_clients else ''}."
        )
    if len(large) < len(lists):
        logger.warning(
            "partition=%s: %d of %d %s have fewer than partition.min_samples=%d samples and are left out.",
            config.name,
            len(lists) - len(large),
            len(lists),
            noun,
            config.min_samples,
        )
    if num_clients is not None and num_clients < len(large):
        chosen = np.sort(generator(seed, "owners").choice(len(large), num_clients, replace=False))
        large = [large[k] for k in chosen]
    return large
