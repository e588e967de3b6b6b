"""Samples sorted by the number to predict, with noise, are cut into equal parts: for a regression.

The partition of flwr-datasets of that name: of b = strictness * z + (1 - strictness) * noise, where z is the target
with mean 0 and deviation 1, client 0 has the smallest, the last client the largest.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedpers.data.partitions.base import Division
from fedpers.data.partitions.drawn import COLUMN, clients_of, draw
from fedpers.data.sets.base import Dataset
from fedpers.errors import ConfigError, DataError, check
from fedpers.settings.partition import PartitionConfig

LEAST_DEVIATION = 1e-6
"""flwr-datasets refuses to divide by a target whose standard deviation is smaller."""


def divide(dataset: Dataset, config: PartitionConfig, seed: int) -> Division:
    """Divide by ``config.target``; sizes differ by at most 1.

    Raises
    ------
    ConfigError
        If the data have class labels, or no such target.
    DataError
        If targets are the same, or as good as.
    """
    if dataset.task.classes:
        allowed = f"a partition for classes, e.g. dirichlet, because {dataset.name} has class labels, no numbers"
        raise ConfigError("partition", "continuous", allowed)
    targets = dataset.y.numpy().reshape(len(dataset), -1)
    allowed = f"below {targets.shape[1]}, the number of targets of {dataset.name}"
    check(config.target < targets.shape[1], "partition.target", config.target, allowed)
    values = np.ascontiguousarray(targets[:, config.target], dtype=np.float32)
    if values.std() < LEAST_DEVIATION:
        raise DataError(
            f"partition=continuous: target {config.target} of {dataset.name} is {values[0]:g} for all samples, within "
            f"{LEAST_DEVIATION:g}; use another partition.target, other units, or partition=iid."
        )
    clients = clients_of(config, dataset)

    def partitioner(minimum: int, seed: int) -> Any:
        from flwr_datasets.partitioner import ContinuousPartitioner

        return ContinuousPartitioner(clients, COLUMN, config.strictness, shuffle=False, seed=seed)

    return Division(draw(values, clients, config, seed, partitioner, dataset.name))
