"""Clients that hold sets of labels: anchors, normal clients, and unseen ones with sets nobody trained on.

The setting of FedJETs (arXiv 2306.08586, section "Experiments"). What its text leaves open is settled here: sizes, and
how clients are validated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedpers.data.federated import Part
from fedpers.data.partitions.base import Lists
from fedpers.data.sets.base import Dataset
from fedpers.errors import ConfigError, DataError, check
from fedpers.randomness import generator
from fedpers.settings.partition import PartitionConfig
from fedpers.settings.split import SplitConfig


def deal_label_sets(
    dataset: Dataset, config: PartitionConfig, split: SplitConfig, seed: int
) -> tuple[dict[Part, Lists], tuple[int, ...], tuple[int, ...]]:
    """Deal samples to clients by sets of labels.

    First the samples are divided into three pools, so that nobody trains on a sample that anybody is tested on. With
    ``split=fractions`` they are drawn at random from each class; with ``official`` the test pool is the official test
    part. Clients 0 to ``anchors - 1`` then divide all classes among themselves as evenly as possible; each of the
    others up to ``num_clients - 1`` holds `labels_per_client` labels drawn at random, and the `unseen_label_sets`
    clients after them hold sets of so many labels that no client before them and no other unseen client holds.

    A client's samples are spread evenly over its labels, are distinct, and may also belong to other clients. It gets
    `samples_per_client` from the training pool and in proportion from the other two, as far as these last. An unseen
    client is tested on all samples of its labels in the test pool. Its training samples, dealt like those of the
    others, are for adaptation only.

    Parameters
    ----------
    dataset : Dataset
        The whole data set, official test part included.
    config : PartitionConfig
    split : SplitConfig
        ``fractions`` or ``official``.
    seed : int

    Returns
    -------
    lists : dict
        ``train``, ``validation`` and ``test`` -> one ascending int64 array ``[>= 1]`` per client.
    unseen : tuple of int
        The clients that never train: the last ones.
    groups : tuple of int
        Group of each client: the anchor with which it shares most labels (of several the first), or without anchors
        clients with the same labels.

    Raises
    ------
    ConfigError
        If a number of labels or sets is too large for the classes there are.
    DataError
        If a pool lacks samples of a label.
    """
    pools = _pools(dataset, split, seed)
    sets, unseen = _label_sets(dataset, config, seed)
    size = config.samples_per_client
    sizes: dict[Part, int] = {
        part: max(1, int(size * len(pool) / len(pools["train"]) + 0.5)) for part, pool in pools.items()
    }
    y = dataset.y.numpy()
    by_label = {part: [pool[y[pool] == label] for label in range(dataset.num_classes)] for part, pool in pools.items()}
    lists: dict[Part, Lists] = {part: [] for part in pools}
    for client, labels in enumerate(sets):
        rng = generator(seed, "label_sets", client)
        for part, pool in by_label.items():
            candidates = [pool[label] for label in labels]
            if part == "test" and client in unseen:
                drawn = np.concatenate(candidates)
            else:
                shares = np.full(len(labels), sizes[part] // len(labels))
                shares[rng.permutation(len(labels))[: sizes[part] % len(labels)]] += 1
                lacking = [k for k, positions in enumerate(candidates) if len(positions) < shares[k]]
                if part == "train" and lacking:
                    label, available, share = labels[lacking[0]], len(candidates[lacking[0]]), shares[lacking[0]]
                    raise DataError(
                        f"partition=label_sets: client {client} is to have {share} training samples of class {label}, "
                        f"but there are {available}; lower partition.samples_per_client."
                    )
                drawn = np.concatenate(
                    [rng.permutation(positions)[:share] for positions, share in zip(candidates, shares, strict=True)]
                )
            if len(drawn) == 0 and (part != "validation" or split.validation > 0):
                raise DataError(
                    f"partition=label_sets: there are no {part} samples of the classes {sorted(labels)} of client "
                    f"{client}; enlarge the split's parts."
                )
            lists[part].append(np.sort(drawn))
    return lists, unseen, _groups(sets, config.anchors)


def _pools(dataset: Dataset, split: SplitConfig, seed: int) -> dict[Part, NDArray[np.int64]]:
    """Divide all samples into three pools, each class in the same proportions (official test samples as given)."""
    official = split.name == "official"
    start = len(dataset.training_part()) if official else len(dataset)
    fractions = [split.validation] if official else [split.validation, split.test]
    y = dataset.y.numpy()[:start]
    parts: list[Lists] = [[] for _ in range(len(fractions) + 1)]
    for label in range(dataset.num_classes):
        shuffled = generator(seed, "label_sets_pools", label).permutation(np.flatnonzero(y == label))
        ends = (np.cumsum([0.0, *fractions]) * len(shuffled) + 0.5).astype(np.int64)
        *held, rest = np.split(shuffled, ends[1:])
        for part, positions in zip(parts, (rest, *held), strict=True):
            part.append(positions)
    train, validation, *test = (np.concatenate(part) for part in parts)
    return {"train": train, "validation": validation, "test": test[0] if test else np.arange(start, len(dataset))}


def _label_sets(dataset: Dataset, config: PartitionConfig, seed: int) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """Labels of each client, and which clients are unseen."""
    classes = dataset.num_classes
    clients = int(config.num_clients or 0)
    count, size, extra = config.anchors, config.labels_per_client, config.unseen_label_sets
    description = f"the classes of {dataset.name}"
    check(count <= classes, "partition.anchors", count, f"at most {classes}, {description}")
    check(size <= classes, "partition.labels_per_client", size, f"at most {classes}, {description}")
    rng = generator(seed, "label_sets")
    anchors = [tuple(sorted(part.tolist())) for part in np.array_split(rng.permutation(classes), max(count, 1))][:count]
    used_sets = set(anchors)
    num_available = math.comb(classes, size) - sum(len(labels) == size for labels in used_sets) - (clients > count)
    allowed = f"at most {max(num_available, 0)}, the sets of {size} among {classes} labels that other clients can spare"
    if extra > num_available:
        raise ConfigError("partition.unseen_label_sets", extra, allowed)
    unseen: list[tuple[int, ...]] = []
    while len(unseen) < extra:
        labels = _draw(rng, classes, size)
        if labels not in used_sets:
            unseen.append(labels)
            used_sets.add(labels)
    normal: list[tuple[int, ...]] = []
    while len(normal) < clients - count:
        labels = _draw(rng, classes, size)
        if labels not in unseen:
            normal.append(labels)
    return [*anchors, *normal, *unseen], tuple(range(clients, clients + extra))


def _groups(sets: Sequence[tuple[int, ...]], anchors: int) -> tuple[int, ...]:
    """Group of each client, see :func:`deal_label_sets`."""
    if not anchors:
        numbers = {labels: number for number, labels in enumerate(dict.fromkeys(sets))}
        return tuple(numbers[labels] for labels in sets)
    shared = [[len(set(labels) & set(sets[anchor])) for anchor in range(anchors)] for labels in sets]
    return tuple(counts.index(max(counts)) for counts in shared)


def _draw(rng: np.random.Generator, classes: int, size: int) -> tuple[int, ...]:
    labels: Sequence[int] = rng.choice(classes, size, replace=False).tolist()
    return tuple(sorted(labels))
