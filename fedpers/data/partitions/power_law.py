"""Each client has a few neighbouring classes, and sizes follow a log-normal distribution.

The MNIST of Li et al. 2020, "Federated Optimization in Heterogeneous Networks" (FedProx, arXiv 1812.06127): 1,000
clients with two digits each and numbers of samples by a power law.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fedpers.data.partitions.base import Division
from fedpers.data.partitions.drawn import COLUMN, check_classes, classes_of, clients_of, draw
from fedpers.data.sets.base import Dataset
from fedpers.errors import DataError, check
from fedpers.randomness import generator
from fedpers.settings.partition import PartitionConfig


def divide(dataset: Dataset, config: PartitionConfig, seed: int) -> Division:
    """Give client k the classes k, k + 1, ... (modulo their number), and of each a share.

    Of each of its ``config.classes_per_client`` classes a client has as many samples as ``config.min_samples`` needs,
    and of those left a share in proportion to exp(``config.sigma`` * z), z standard normal. All samples are dealt.

    Raises
    ------
    ConfigError
        If there are fewer classes, or the number of clients is no multiple of the number of classes.
    DataError
        If a class is too small.
    """
    check_classes(dataset, config.classes_per_client)
    clients, labels = clients_of(config, dataset), classes_of(dataset)
    counts = np.unique(labels, return_counts=True)[1]
    allowed = f"a multiple of {len(counts)}, the classes of {dataset.name}"
    check(clients % len(counts) == 0, "partition.num_clients", clients, allowed)
    holders = config.classes_per_client * clients // len(counts)  # of each class
    least = math.ceil(config.min_samples / config.classes_per_client)
    if counts.min() < holders * (least + 1):
        raise DataError(
            f"partition=power_law: a class of {dataset.name} has {counts.min()} samples, but {holders} clients with at "
            f"least {least + 1} each need {holders * (least + 1)}; lower partition.num_clients, "
            f"partition.classes_per_client or partition.min_samples."
        )

    def partitioner(minimum: int, seed: int) -> Any:
        from flwr_datasets.partitioner import DistributionPartitioner

        shares = generator(seed, "shares").lognormal(0.0, config.sigma, (len(counts), holders))
        return DistributionPartitioner(
            shares, clients, config.classes_per_client, COLUMN, least, shuffle=False, seed=seed
        )

    return Division(draw(labels, clients, config, seed, partitioner, dataset.name))
