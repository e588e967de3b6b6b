"""Samples sorted by class are cut into shards, and each client is dealt a few of them.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data" (arXiv 1602.05629).

The shards of FedSelect (CIFAR-10: 20 of each class, two for a client, which is tested on the same classes and may get
one class twice) are ``partition=shards partition.num_clients=100 partition.shards_per_client=2 split=official``: there
all classes are equally large, and no shard holds samples of two. With as many such shards as classes every client has
classes of its own, as with ``disjoint_classes``.
"""

from __future__ import annotations

from typing import Any

from fedpers.data.partitions.base import Division
from fedpers.data.partitions.drawn import COLUMN, classes_of, clients_of, draw
from fedpers.data.sets.base import Dataset
from fedpers.errors import DataError
from fedpers.settings.partition import PartitionConfig


def divide(dataset: Dataset, config: PartitionConfig, seed: int) -> Division:
    """Deal ``config.shards_per_client`` shards of one size to each client; samples that fill no shard are left out.

    Raises
    ------
    DataError
        If so many shards are too small.
    """
    clients, dealt = clients_of(config, dataset), config.shards_per_client
    size = len(dataset) // (clients * dealt)
    if dealt * size < config.min_samples or size == 0:
        raise DataError(
            f"partition=shards: of the {len(dataset)} samples of {dataset.name}, {clients} clients with {dealt} shards "
            f"each get {dealt * size}, fewer than {max(dealt, config.min_samples)}; lower partition.num_clients, "
            f"partition.shards_per_client or partition.min_samples."
        )

    def partitioner(minimum: int, seed: int) -> Any:
        from flwr_datasets.partitioner import ShardPartitioner

        return ShardPartitioner(clients, COLUMN, num_shards_per_partition=dealt, shuffle=False, seed=seed)

    return Division(draw(classes_of(dataset), clients, config, seed, partitioner, dataset.name))
