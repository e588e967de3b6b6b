"""From settings to the data of all clients."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from fedpers.data.datasets import custom, load_dataset
from fedpers.data.federated import PARTS, FederatedData, Part
from fedpers.data.index import OWNED, read_index
from fedpers.data.label_sets import deal_label_sets
from fedpers.data.partition import BY_LABEL, partition_samples
from fedpers.data.pfllib_partition import PFLLIB, divide_as_pfllib
from fedpers.data.ratings import leave_one_out
from fedpers.data.sets.base import Dataset
from fedpers.data.sets.rating_files import read_ratings
from fedpers.data.split import draw_unseen, hold_out, split_clients, take_public, tested_owners
from fedpers.errors import DataError, check
from fedpers.settings.data import DatasetConfig, PartitionConfig, SplitConfig

WITH_PARTS = ("index", *PFLLIB)
"""Partitions that say which of a client's samples are for testing."""


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
    if ":" in dataset.name:
        made = custom(dataset, split, seed)
        if isinstance(made, FederatedData):
            _check_divided(partition, f"because {dataset.name} divides its samples itself")
            return made
        data = made
    else:
        data = load_dataset(dataset)
    by_owner = partition.name == "natural"
    if not data.task.classes:
        why = f"because {data.name} has no class labels"
        check(partition.name not in BY_LABEL, "partition", partition.name, f"iid, quantity, natural or index, {why}")
        check(split.name != "official" or by_owner, "split", split.name, f"fractions, {why}")
    groups: tuple[int, ...] = ()
    if partition.name == "label_sets":
        lists, unseen, groups = deal_label_sets(data, partition, split, seed)
    else:
        listed = _listed(data, partition, split, seed) if partition.name in WITH_PARTS else None
        if listed is None:
            divided = data
            if split.name == "official":
                divided = tested_owners(data) if by_owner else data.training_part()
            owned = partition_samples(divided, partition, seed)
            listed = split_clients(data, owned, split, seed, by_owner=by_owner)
        lists, unseen = listed, draw_unseen(len(listed["train"]), split, seed)
    names = tuple(data.owner_name(int(positions[0])) for positions in lists["train"]) if by_owner else ()
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
        client_names=names,
        class_names=data.class_names,
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


def _check_divided(partition: PartitionConfig, why: str) -> None:
    """Refuse settings that have no effect on data which come divided."""
    check(partition.name == "natural", "partition", partition.name, f"natural, {why}")
    check(partition.num_clients is None, "partition.num_clients", partition.num_clients, f"null, {why}")
    least, usual = partition.min_samples, PartitionConfig("natural").min_samples
    check(least == usual, "partition.min_samples", least, f"{usual}, its default, {why}")


def _listed(
    data: Dataset, config: PartitionConfig, split: SplitConfig, seed: int
) -> dict[Part, list[NDArray[np.int64]]] | None:
    """Parts that come with the partition; None if an index file leaves the split to us."""
    if config.name == "index":
        lists = read_index(str(config.file), len(data), config.num_clients, config.min_samples)
        if OWNED in lists:
            return None
    else:
        check(split.name != "official", "split", split.name, f"fractions, because partition={config.name} has parts")
        lists = divide_as_pfllib(data.y.numpy(), data.num_classes, config, seed)
    if "validation" not in lists:
        for client, positions in enumerate(lists["train"]):
            if split.validation and len(positions) < 2 and config.name in PFLLIB:
                raise DataError(
                    f"partition={config.name}: client {client} has {len(positions)} samples for training, of which one "
                    f"is needed for validation; lower partition.num_clients, or set split.validation=0."
                )
        held = [hold_out(positions, [split.validation], seed, k) for k, positions in enumerate(lists["train"])]
        lists["train"], lists["validation"] = map(list, zip(*held, strict=True))
    for part in PARTS if split.validation else ("train", "test"):
        for client, positions in enumerate(lists[part]):
            if len(positions) == 0:
                where = config.file or f"partition={config.name}"
                raise DataError(f"{where}: the {part} list of client {client} is empty.")
    return {part: lists[part] for part in PARTS}
