"""Each client has a few classes only, which several clients may share.

Li et al. 2021, "Federated Learning on Non-IID Data Silos" (arXiv 2102.02079): client k has class k (modulo the number
of classes) and others at random, and each class is divided evenly among those who have it. Without overlap:
``disjoint_classes``.
"""

from __future__ import annotations

from typing import Any

from fedpers.data.partitions.base import Division
from fedpers.data.partitions.drawn import COLUMN, check_classes, classes_of, clients_of, draw
from fedpers.data.sets.base import Dataset
from fedpers.settings.partition import PartitionConfig


def divide(dataset: Dataset, config: PartitionConfig, seed: int) -> Division:
    """Give each client ``config.classes_per_client`` classes.

    Raises
    ------
    ConfigError
        If there are fewer classes.
    """
    check_classes(dataset, config.classes_per_client)
    clients = clients_of(config, dataset)

    def partitioner(minimum: int, seed: int) -> Any:
        from flwr_datasets.partitioner import PathologicalPartitioner

        # "first-deterministic" is the rule of the paper it cites, and leaves no class out if clients >= classes.
        return PathologicalPartitioner(
            clients, COLUMN, config.classes_per_client, "first-deterministic", shuffle=False, seed=seed
        )

    remedy = "change partition.classes_per_client"
    return Division(draw(classes_of(dataset), clients, config, seed, partitioner, dataset.name, remedy=remedy))
