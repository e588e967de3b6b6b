"""Sizes are given, and each client's mix of classes is drawn from a Dirichlet distribution.

Acar et al. 2021, "Federated Learning Based on Dynamic Regularization" (arXiv 2111.04263). Beside ``dirichlet``, where
the size of a client follows from its share of each class, heterogeneity of labels and of sizes are set separately.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedpers.data.partitions.base import Division
from fedpers.data.partitions.drawn import COLUMN, classes_of, clients_of, draw
from fedpers.data.partitions.quantity import skewed_sizes
from fedpers.data.sets.base import Dataset
from fedpers.settings.partition import PartitionConfig


def divide(dataset: Dataset, config: PartitionConfig, seed: int) -> Division:
    """Draw for each sample of a client the class by the client's mix, as long as the class lasts."""
    clients = clients_of(config, dataset)
    if config.sizes == "equal":
        sizes = [len(part) for part in np.array_split(np.arange(len(dataset)), clients)]
    else:
        sizes = skewed_sizes(len(dataset), clients, config.min_samples, config.sizes)

    def partitioner(minimum: int, seed: int) -> Any:
        from flwr_datasets.partitioner import InnerDirichletPartitioner

        return InnerDirichletPartitioner(sizes, COLUMN, float(config.alpha), shuffle=False, seed=seed)

    labels = np.unique(classes_of(dataset), return_inverse=True)[1].reshape(-1)  # it wants 0, 1, ... without gaps
    # Of clients with very small alpha no class may be left that they have at all, in floats.
    return Division(
        draw(labels, clients, config, seed, partitioner, dataset.name, remedy=f"raise partition.alpha={config.alpha}")
    )
