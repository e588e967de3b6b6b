"""Who owns which samples: one file for each way to divide a data set among clients, and the table of their names."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fedpers.data.partitions import (
    continuous,
    dirichlet,
    disjoint_classes,
    domains,
    grouped_natural,
    iid,
    index,
    inner_dirichlet,
    natural,
    pathological,
    pfllib,
    power_law,
    quantity,
    shards,
)
from fedpers.data.partitions.base import Divide, Division, Lists
from fedpers.data.sets.base import Dataset
from fedpers.errors import check, one_of
from fedpers.settings.partition import PartitionConfig

logger = logging.getLogger(__name__)

PARTITIONS: Mapping[str, Divide] = {
    "continuous": continuous.divide,
    "dirichlet": dirichlet.divide,
    "disjoint_classes": disjoint_classes.divide,
    "domains": domains.divide,
    "grouped_natural": grouped_natural.divide,
    "iid": iid.divide,
    "index": index.divide,
    "inner_dirichlet": inner_dirichlet.divide,
    "natural": natural.divide,
    "pathological": pathological.divide,
    "pfllib_dirichlet": pfllib.divide,
    "pfllib_pathological": pfllib.divide,
    "power_law": power_law.divide,
    "quantity": quantity.divide,
    "shards": shards.divide,
}
"""Partitions that deal each sample to one client at most, as ``label_sets``, whose clients share samples, does not, and
``user``, which is for ratings."""
WITH_PARTS = ("index", "pfllib_dirichlet", "pfllib_pathological")
"""Those that may say which of a client's samples are for testing; they divide the official test part too."""
BY_OWNER = ("natural", "grouped_natural")
"""Those whose clients are owners of samples, official test samples included."""
WITHOUT_CLASSES = ("continuous", "domains", "grouped_natural", "iid", "index", "natural", "quantity")
"""Those for a regression, which has no classes to divide."""


def divide(dataset: Dataset, config: PartitionConfig, seed: int) -> Division:
    """Divide the samples of `dataset` among clients.

    Parameters
    ----------
    dataset : Dataset
        All its samples are divided; pass :meth:`Dataset.training_part` to keep an official test part out.
    config : PartitionConfig
        Its `name` is one of :data:`PARTITIONS`.
    seed : int
        Used if `config` has no seed of its own.

    Returns
    -------
    Division
        No sample has two owners; every client has at least ``config.min_samples``, except for PFLlib's divisions, which
        have a minimum of their own. Samples without an owner are logged.

    Raises
    ------
    DataError
        If ``config.min_samples`` cannot be had, saying why; or if an index file cannot be used.
    ConfigError
        If a setting does not fit the data set.
    """
    seed = seed if config.seed is None else config.seed
    allowed = f"a partition that deals each sample to one client, {one_of(PARTITIONS, config.name)}"
    check(config.name in PARTITIONS, "partition", config.name, allowed)
    division = PARTITIONS[config.name](dataset, config, seed)
    unused = len(dataset) - sum(len(positions) for positions in division.owned)
    if unused:
        logger.info("%s: %d of %d samples belong to no client.", dataset.name, unused, len(dataset))
    return division


def partition_samples(dataset: Dataset, config: PartitionConfig, seed: int) -> Lists:
    """Divide the samples of `dataset` among clients: positions alone, see :func:`divide`.

    Returns
    -------
    list of int64 arrays ``[n_k]``
        Positions of each client's samples, ascending.
    """
    return divide(dataset, config, seed).owned
