"""Each class belongs to exactly one client; clients have equally many classes, give or take one.

The disjoint label space of Yang et al. 2023 (pFedPG, arXiv 2308.15367): CIFAR-10 with 5 clients of two classes,
CIFAR-100 with 10 clients of ten. Which classes go together is drawn.
"""

from __future__ import annotations

import numpy as np

from fedpers.data.partitions.base import Division
from fedpers.data.partitions.drawn import classes_of, clients_of
from fedpers.data.sets.base import Dataset
from fedpers.errors import DataError, check
from fedpers.randomness import generator
from fedpers.settings.partition import PartitionConfig


def divide(dataset: Dataset, config: PartitionConfig, seed: int) -> Division:
    """Deal whole classes to clients.

    Returns
    -------
    Division
        All samples of `dataset` are somebody's; positions ascending.

    Raises
    ------
    ConfigError
        If there are more clients than classes.
    DataError
        If the classes of a client have fewer than ``config.min_samples`` samples.
    """
    clients, labels = clients_of(config, dataset), classes_of(dataset)
    classes = np.unique(labels)
    allowed = f"at most {len(classes)}, the classes of {dataset.name}"
    check(clients <= len(classes), "partition.num_clients", clients, allowed)
    class_sets = np.array_split(generator(seed, "disjoint_classes").permutation(classes), clients)
    owned = [np.flatnonzero(np.isin(labels, mine)) for mine in class_sets]
    smallest = min(range(clients), key=lambda client: len(owned[client]))
    if len(owned[smallest]) < config.min_samples:
        classes_held = ", ".join(map(str, np.sort(class_sets[smallest])))
        raise DataError(
            f"partition=disjoint_classes: client {smallest} has all {len(owned[smallest])} samples of its classes "
            f"({classes_held}), fewer than partition.min_samples={config.min_samples}; lower it or "
            f"partition.num_clients."
        )
    return Division(owned)
