"""PFLlib's divisions of samples among clients, draw by draw (``dataset/utils/dataset_utils.py`` of its repository)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedpers.data.partitions.base import Division, Lists
from fedpers.data.sets.base import Dataset
from fedpers.errors import DataError, check
from fedpers.settings.partition import PartitionConfig

TRAIN_SHARE, BATCH = 0.75, 10
"""Constants of PFLlib: a client's training share, and the batch size from which its least number of samples follows."""
ATTEMPTS = 1000


def divide(dataset: Dataset, config: PartitionConfig, seed: int) -> Division:
    """Divide as PFLlib, with its parts for training and testing; see :func:`divide_as_pfllib`."""
    parts = divide_as_pfllib(dataset.y.numpy(), dataset.num_classes, config, seed)
    return Division([np.sort(np.concatenate(pair)) for pair in zip(*parts.values(), strict=True)], parts)


def divide_as_pfllib(y: NDArray[np.int64], num_classes: int, config: PartitionConfig, seed: int) -> dict[str, Lists]:
    """Divide all samples and split each client's into parts for training and testing.

    With the labels of a data set in its official order, the training part first, and ``partition.seed=1``, the seed of
    PFLlib's scripts, each client has the samples that PFLlib gives it; lists are sorted here.

    Parameters
    ----------
    y : int64 array ``[N]``
        Classes, from 0 to ``num_classes - 1``.
    num_classes : int
    config : PartitionConfig
        Its ``alpha`` or ``classes_per_client``, and ``num_clients``; ``min_samples`` has no part in it.
    seed : int
        Used if `config` has no seed of its own.

    Returns
    -------
    dict
        ``train`` and ``test`` -> one ascending int64 array per client.

    Raises
    ------
    DataError
        If no division with enough samples for each client is found.
    ConfigError
        If a client is to have more classes than there are.
    """
    clients = config.num_clients
    assert clients is not None  # which these partitions have by default
    chosen = config.seed if config.seed is not None else seed
    check(chosen < 2**32, "partition.seed", chosen, f"below 2^32 for partition={config.name}, as PFLlib's is")
    # PFLlib draws from NumPy's global generator, which is of this kind
    rng = np.random.RandomState(chosen)
    least = int(min(BATCH / (1 - TRAIN_SHARE), len(y) / clients / 2))
    if config.name == "pfllib_dirichlet":
        owned = _dirichlet(y, num_classes, clients, config.alpha, least, rng)
    else:
        owned = _pathological(y, num_classes, clients, config.classes_per_client, least, rng)
    parts: dict[str, Lists] = {"train": [], "test": []}
    for positions in owned:
        num_train = math.floor(TRAIN_SHARE * len(positions))
        order = rng.permutation(len(positions))  # as scikit-learn's train_test_split draws
        num_test = len(positions) - num_train
        parts["test"].append(np.sort(positions[order[:num_test]]))
        parts["train"].append(np.sort(positions[order[num_test:]]))
    return parts


def _dirichlet(
    y: NDArray[np.int64], num_classes: int, clients: int, alpha: float, least: int, rng: np.random.RandomState
) -> Lists:
    """Deal each class by proportions drawn anew; a client with an N/K-th of all samples takes no more."""
    for _ in range(ATTEMPTS):
        owned: Lists = [np.zeros(0, np.int64) for _ in range(clients)]
        for label in range(num_classes):
            positions = np.flatnonzero(y == label)
            rng.shuffle(positions)
            # with a tiny alpha all clients, or all that still take samples, may have drawn nothing
            proportions = np.nan_to_num(rng.dirichlet(np.repeat(alpha, clients)))
            proportions = proportions * [len(mine) < len(y) / clients for mine in owned]
            total = proportions.sum() or 1.0
            cuts = (np.cumsum(proportions / total) * len(positions)).astype(int)[:-1]
            owned = [np.concatenate(pair) for pair in zip(owned, np.split(positions, cuts), strict=True)]
        if min(map(len, owned)) >= least:
            return owned
    raise DataError(
        f"partition=pfllib_dirichlet: in {ATTEMPTS} attempts not all of {clients} clients had {least} samples; raise "
        f"partition.alpha or lower partition.num_clients."
    )


def _pathological(
    y: NDArray[np.int64], num_classes: int, clients: int, per_client: int, least: int, rng: np.random.RandomState
) -> Lists:
    """Deal class after class to the first clients that want more; the last of them takes what is left of it."""
    check(per_client <= num_classes, "partition.classes_per_client", per_client, f"at most {num_classes}, all classes")
    owned: Lists = [np.zeros(0, np.int64) for _ in range(clients)]
    wanted = [per_client] * clients
    for label in range(num_classes):
        positions = np.flatnonzero(y == label)
        takers = [client for client in range(clients) if wanted[client] > 0]
        takers = takers[: math.ceil(clients / num_classes * per_client)]
        if not takers:
            break
        average = len(positions) / len(takers)
        low, high = int(max(average / 10, least / num_classes)), int(average)
        if low >= high:
            raise DataError(
                f"partition=pfllib_pathological: class {label} has {len(positions)} samples, too few for "
                f"{len(takers)} clients; lower partition.num_clients or partition.classes_per_client."
            )
        sizes = rng.randint(low, high, len(takers) - 1)
        for client, part in zip(takers, np.split(positions, np.cumsum(sizes)), strict=True):
            owned[client] = np.concatenate([owned[client], part])
            wanted[client] -= 1
    for client, positions in enumerate(owned):
        if len(positions) < 2:
            raise DataError(
                f"partition=pfllib_pathological: client {client} has {len(positions) or 'no'} "
                f"sample{'' if len(positions) else 's'}, too few to train and to test on; raise "
                f"partition.classes_per_client or lower partition.num_clients."
            )
    return owned
