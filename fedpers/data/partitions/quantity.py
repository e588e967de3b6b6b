"""Labels mixed as in the whole, sizes differ."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedpers.data.partitions.base import Division
from fedpers.data.partitions.drawn import classes_of, clients_of, draw
from fedpers.data.sets.base import Dataset
from fedpers.settings.partition import PartitionConfig


def divide(dataset: Dataset, config: PartitionConfig, seed: int) -> Division:
    """Deal samples at random, so many to each client as ``config.skew`` says."""
    clients = clients_of(config, dataset)
    sizes = skewed_sizes(len(dataset), clients, config.min_samples, config.skew)

    def partitioner(minimum: int, seed: int) -> Any:
        from flwr_datasets.partitioner import SizePartitioner

        return SizePartitioner(sizes)

    return Division(draw(classes_of(dataset), clients, config, seed, partitioner, dataset.name))


def skewed_sizes(num_samples: int, clients: int, minimum: int, skew: str) -> list[int]:
    """Samples of each client: `minimum`, and a share of the rest.

    Parameters
    ----------
    num_samples : int
        At least ``clients * minimum``; all of them are dealt.
    clients, minimum : int
    skew : str
        ``linear``, ``square`` or ``exponential``: client k = 1, 2, ... has a share in proportion to k, k**2 or exp(k).

    Returns
    -------
    list of int
        Ascending; what rounding leaves goes to the last, the largest.
    """
    k = np.arange(1.0, clients + 1)
    units = {"linear": k, "square": k**2, "exponential": np.exp(k - clients)}[skew]
    spare = num_samples - clients * minimum
    sizes = minimum + np.floor(spare * (units / units.sum())).astype(np.int64)
    sizes[-1] += num_samples - sizes.sum()
    return [int(size) for size in sizes]
