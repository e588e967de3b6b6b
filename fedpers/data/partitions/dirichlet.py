"""Each class is divided by proportions drawn from a Dirichlet distribution.

Yurochkin et al. 2019, "Bayesian Nonparametric Federated Learning of Neural Networks" (arXiv 1905.12022), without the
balancing that is in the authors' code only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpers.data.partitions.base import Division, Lists
from fedpers.data.partitions.drawn import COLUMN, classes_of, clients_of, draw
from fedpers.data.sets.base import Dataset
from fedpers.settings.partition import PartitionConfig

TRIES = 11
"""Divisions that flwr-datasets tries with one seed."""


def divide(dataset: Dataset, config: PartitionConfig, seed: int) -> Division:
    """Divide each class by proportions from Dirichlet(``config.alpha``), so that every client has enough samples."""
    return Division(by_dirichlet(classes_of(dataset), clients_of(config, dataset), config, seed, dataset.name))


def by_dirichlet(labels: NDArray[np.int64], clients: int, config: PartitionConfig, seed: int, name: str) -> Lists:
    """Divide samples with these `labels` ``[N]``; see :func:`~fedpers.data.partitions.drawn.draw`."""

    def partitioner(minimum: int, seed: int) -> Any:
        from flwr_datasets.partitioner import DirichletPartitioner

        return DirichletPartitioner(
            clients, COLUMN, float(config.alpha), min_partition_size=minimum, shuffle=False, seed=seed
        )

    return draw(
        labels,
        clients,
        config,
        seed,
        partitioner,
        name,
        remedy=f"raise partition.alpha={config.alpha}",
        tries=TRIES,
        enforces_minimum=True,
    )
