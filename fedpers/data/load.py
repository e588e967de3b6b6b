"""From settings to the data of all clients."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from fedpers.data.datasets import load_dataset
from fedpers.data.federated import PARTS, FederatedData, Part
from fedpers.data.index import OWNED, read_index
from fedpers.data.label_sets import deal_label_sets
from fedpers.data.partition import BY_LABEL, partition_samples
from fedpers.data.ratings import leave_one_out
from fedpers.data.sets.rating_files import read_ratings
from fedpers.data.split import draw_unseen, hold_out, split_clients, take_public
from fedpers.errors import DataError, check
from fedpers.settings.data import DatasetConfig, PartitionConfig, SplitConfig


def load_federated(dataset: DatasetConfig, partition: PartitionConfig, split: SplitConfig, seed: int) -> FederatedData:
    """Load a data set, divide it among clients and split each client's samples.

    Parameters
    ----------
    dataset : DatasetConfig
    partition : PartitionConfig
        Its `seed`, if set, replaces `seed` for the partition and the split. Ratings need ``user``, and only they.
    split : SplitConfig
        Not used if an index file names its own ``train``, ``validation`` and ``test`` lists; if it names only
        ``train`` and ``test``, `validation` is the fraction of a client's train list that is held out. `public` and
        `unseen` are used in any case. Ratings need ``leave_one_out``, and only they.
    seed : int
        The run's seed.

    Returns
    -------
    FederatedData
        On the CPU; every client has at least one sample in each part. :class:`~fedpers.data.ratings.RankingData` for
        ratings.

    Raises
    ------
    DataError
        If files are missing or damaged, or the data cannot be divided as asked.
    ConfigError
        If settings do not fit each other or the data set.
    """
    seed = seed if partition.seed is None else partition.seed
    _check_kind(dataset, partition, split)
    if dataset.holds_ratings:
        return leave_one_out(read_ratings(dataset), dataset, split, seed)
    data = load_dataset(dataset)
    if not data.task.classes:
        why = f"because {data.name} has no class labels"
        check(partition.name not in BY_LABEL, "partition", partition.name, f"iid, quantity, natural or index, {why}")
        check(split.name != "official", "split", split.name, f"fractions, {why}")
    groups: tuple[int, ...] = ()
    if partition.name == "label_sets":
        lists, unseen, groups = deal_label_sets(data, partition, split, seed)
    else:
        listed = _listed(len(data), partition, split, seed) if partition.name == "index" else None
        if listed is None:
            divided = data.training_part() if split.name == "official" else data
            listed = split_clients(data, partition_samples(divided, partition, seed), split, seed)
        lists, unseen = listed, draw_unseen(len(listed["train"]), split, seed)
    lists["train"], public = take_public(lists["train"], unseen, split, seed)
    train, validation, test = ([torch.from_numpy(positions) for positions in lists[part]] for part in PARTS)
    return FederatedData(
        data.x,
        data.y,
        train,
        validation,
        test,
        data.num_classes,
        data.name,
        public=None if public is None else torch.from_numpy(public),
        unseen=unseen,
        anchors=tuple(range(partition.anchors)) if partition.name == "label_sets" else (),
        groups=groups,
        task=data.task,
    )


def _check_kind(dataset: DatasetConfig, partition: PartitionConfig, split: SplitConfig) -> None:
    """Ratings are divided by users and split by leaving one out; samples with labels in the other ways."""
    if dataset.holds_ratings:
        why = f"because {dataset.name} holds ratings"
        check(partition.name == "user", "partition", partition.name, f"user, {why}")
        check(split.name == "leave_one_out", "split", split.name, f"leave_one_out, {why}")
        check(split.public == 0, "split.public", split.public, f"0, {why}")
        return
    why = f"because {dataset.name} holds no ratings"
    check(partition.name != "user", "partition", partition.name, f"a division of samples, e.g. dirichlet, {why}")
    check(split.name != "leave_one_out", "split", split.name, f"fractions or official, {why}")
    if partition.name == "label_sets":
        allowed = "0 with partition=label_sets, where partition.unseen_label_sets counts unseen clients"
        check(split.unseen == 0, "split.unseen", split.unseen, allowed)


def _listed(
    num_samples: int, config: PartitionConfig, split: SplitConfig, seed: int
) -> dict[Part, list[NDArray[np.int64]]] | None:
    """Parts named by an index file; None if it leaves the split to us."""
    lists = read_index(str(config.file), num_samples, config.num_clients, config.min_samples)
    if OWNED in lists:
        return None
    if "validation" not in lists:
        held = [hold_out(positions, [split.validation], seed, k) for k, positions in enumerate(lists["train"])]
        lists["train"], lists["validation"] = map(list, zip(*held, strict=True))
    for part in PARTS:
        for client, positions in enumerate(lists[part]):
            if len(positions) == 0:
                raise DataError(f"{config.file}: the {part} list of client {client} is empty.")
    return {part: lists[part] for part in PARTS}
