"""Samples dealt at random, equally many to each client."""

from __future__ import annotations

from typing import Any

from fedpers.data.partitions.base import Division
from fedpers.data.partitions.drawn import classes_of, clients_of, draw
from fedpers.data.sets.base import Dataset
from fedpers.settings.partition import PartitionConfig


def divide(dataset: Dataset, config: PartitionConfig, seed: int) -> Division:
    """Deal samples at random; sizes differ by at most 1."""
    clients = clients_of(config, dataset)

    def partitioner(minimum: int, seed: int) -> Any:
        from flwr_datasets.partitioner import IidPartitioner

        return IidPartitioner(clients)

    return Division(draw(classes_of(dataset), clients, config, seed, partitioner, dataset.name))
