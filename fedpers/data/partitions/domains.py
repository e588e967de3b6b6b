"""Each client has samples of one domain: pictures of one style, digits of one source.

The setting of Li et al. 2021 (FedBN, arXiv 2102.07623) and Yang et al. 2023 (pFedPG, arXiv 2308.15367), with one client
for each domain unless ``num_clients`` says more.
"""

from __future__ import annotations

import numpy as np

from fedpers.data.partitions.base import Division, Lists
from fedpers.data.partitions.dirichlet import by_dirichlet
from fedpers.data.partitions.drawn import classes_of
from fedpers.data.sets.base import Dataset
from fedpers.errors import ConfigError, DataError, check
from fedpers.randomness import derive, generator
from fedpers.settings.partition import PartitionConfig


def divide(dataset: Dataset, config: PartitionConfig, seed: int) -> Division:
    """Divide each domain among its clients; client k has domain k modulo the number of domains, which is its group.

    Raises
    ------
    ConfigError
        If the data have no domains or there are fewer clients than domains, or if classes that a regression does not
        have are to be divided.
    DataError
        If a domain has too few samples.
    """
    if dataset.domain is None:
        raise ConfigError("partition", "domains", f"another partition, because {dataset.name} has no domains")
    allowed = f"iid, because {dataset.name} has no class labels"
    check(dataset.task.classes or config.within == "iid", "partition.within", config.within, allowed)
    domain, labels = dataset.domain.numpy(), classes_of(dataset)
    present: list[int] = np.unique(domain).tolist()
    clients = config.num_clients or len(present)
    allowed = f"at least {len(present)}, the domains of {dataset.name}, or null for a client each"
    check(clients >= len(present), "partition.num_clients", clients, allowed)
    owned: Lists = [np.zeros(0, np.int64)] * clients
    for first, number in enumerate(present):
        mine = range(first, clients, len(present))
        positions = np.flatnonzero(domain == number)
        name = f"domain {_name(dataset, number)} of {dataset.name}"
        if len(positions) < len(mine) * config.min_samples:
            raise DataError(
                f"partition=domains: {name} has {len(positions)} samples, too few for {len(mine)} of {clients} clients "
                f"with at least {config.min_samples} each; lower partition.num_clients or partition.min_samples."
            )
        if config.within == "dirichlet":
            dealt = by_dirichlet(labels[positions], len(mine), config, derive(seed, "domain", number), name)
        else:
            dealt = np.array_split(generator(seed, "domain", number).permutation(len(positions)), len(mine))
        for client, indices in zip(mine, dealt, strict=True):
            owned[client] = positions[np.sort(indices)]
    groups = [present[client % len(present)] for client in range(clients)]
    names = [
        _name(dataset, group) + (f" {client // len(present)}" if clients > len(present) else "")
        for client, group in enumerate(groups)
    ]
    return Division(owned, groups=tuple(groups), names=tuple(names) if dataset.domain_names else ())


def _name(dataset: Dataset, domain: int) -> str:
    return dataset.domain_names[domain] if dataset.domain_names else str(domain)
