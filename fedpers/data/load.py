"""From settings to the data of all clients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from fedpers.data.datasets import custom, load_dataset
from fedpers.data.federated import PARTS, FederatedData, Part
from fedpers.data.partitions import BY_OWNER, WITH_PARTS, WITHOUT_CLASSES, divide
from fedpers.data.partitions.base import Division, Lists
from fedpers.data.partitions.label_sets import deal_label_sets
from fedpers.data.ratings import leave_one_out
from fedpers.data.sets.base import Dataset
from fedpers.data.sets.rating_files import read_ratings
from fedpers.data.split import (
    draw_unseen,
    hold_out,
    keep_at_most,
    split_clients,
    strata,
    take_global,
    take_public,
    tested_owners,
)
from fedpers.errors import DataError, check, one_of
from fedpers.settings.dataset import DatasetConfig
from fedpers.settings.partition import PartitionConfig
from fedpers.settings.split import SplitConfig


def load_federated(dataset: DatasetConfig, partition: PartitionConfig, split: SplitConfig, seed: int) -> FederatedData:
    """Load a data set, divide it among clients and split each client's samples.

    Parameters
    ----------
    dataset : DatasetConfig
    partition : PartitionConfig
        Its `seed`, if set, replaces `seed` for the partition and the split. Ratings need ``user``, and only they.
    split : SplitConfig
        How each client's samples are divided. Of partitions that bring lists of their own (index files,
        ``pfllib_...``) it divides nothing if they name ``train``, ``validation`` and ``test``; if they name only
        ``train`` and ``test``, `validation` is the fraction of a client's train list that is held out. With
        ``label_sets`` `unseen` must be 0. Ratings need ``leave_one_out``, and only they.
    seed : int
        The run's seed.

    Returns
    -------
    FederatedData
        On the CPU; every client has samples for training and testing, and for validation unless
        ``split.validation`` is 0. :class:`~fedpers.data.ratings.RankingData` for
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
            _check_divided(partition, split, f"because {dataset.name} divides its samples itself")
            return made
        data = made
    else:
        data = load_dataset(dataset)
    if not data.task.classes:
        why = f"because {data.name} has no class labels"
        fits = partition.name in WITHOUT_CLASSES
        check(fits, "partition", partition.name, f"{one_of(WITHOUT_CLASSES, '')}, {why}")
        check(split.name != "official" or partition.name in BY_OWNER, "split", split.name, f"fractions, {why}")
    groups: tuple[int, ...]
    tested: NDArray[np.int64] | None = None
    owners: NDArray[np.int64] | None = None
    names: tuple[str, ...] = ()
    if partition.name == "label_sets":
        lists, unseen, groups = deal_label_sets(data, partition, split, seed)
    else:
        division = _division(data, partition, split, seed)
        groups, names = division.groups, division.names
        if division.parts:
            why = f"because partition={partition.name} has parts"
            check(split.global_test == 0, "split.global_test", split.global_test, f"0, {why}")
        else:
            owned, tested, owners = take_global(division.owned, split, seed)
            division = replace(division, owned=owned)
        lists = _parts(data, division, partition, split, seed)
        unseen = draw_unseen(len(lists["train"]), split, seed)
    lists["train"] = keep_at_most(lists["train"], split, seed, strata(data, split))
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
        num_tokens=data.num_tokens,
        global_test=None if tested is None else torch.from_numpy(tested),
        global_owners=None if owners is None else torch.from_numpy(owners),
        task=data.task,
    )


def _check_kind(dataset: DatasetConfig, partition: PartitionConfig, split: SplitConfig) -> None:
    """Refuse a partition or split that does not go with the kind of data."""
    if dataset.holds_ratings:
        why = f"because {dataset.name} holds ratings"
        check(partition.name == "user", "partition", partition.name, f"user, {why}")
        check(split.name == "leave_one_out", "split", split.name, f"leave_one_out, {why}")
        check(split.public == 0, "split.public", split.public, f"0, {why}")
        check(split.global_test == 0, "split.global_test", split.global_test, f"0, {why}")
        return
    why = f"because {dataset.name} holds no ratings"
    check(partition.name != "user", "partition", partition.name, f"a division of samples, e.g. dirichlet, {why}")
    check(split.name != "leave_one_out", "split", split.name, f"fractions or official, {why}")
    if partition.name.startswith("pfllib_"):
        check(split.name != "official", "split", split.name, f"fractions, because partition={partition.name} has parts")
    if partition.name == "label_sets":
        allowed = "0 with partition=label_sets, whose clients share samples"
        check(split.global_test == 0, "split.global_test", split.global_test, allowed)
        allowed = "0 with partition=label_sets, where partition.unseen_label_sets counts unseen clients"
        check(split.unseen == 0, "split.unseen", split.unseen, allowed)
        check(not split.stratified, "split.stratified", True, "false with partition=label_sets, which deals by class")


def _check_divided(partition: PartitionConfig, split: SplitConfig, why: str) -> None:
    """Refuse settings that have no effect on data which come divided."""
    check(partition.name == "natural", "partition", partition.name, f"natural, {why}")
    check(split.global_test == 0, "split.global_test", split.global_test, f"0, {why}")
    check(split.max_train is None, "split.max_train", split.max_train, f"null, {why}")
    check(partition.num_clients is None, "partition.num_clients", partition.num_clients, f"null, {why}")
    least, usual = partition.min_samples, PartitionConfig("natural").min_samples
    check(least == usual, "partition.min_samples", least, f"{usual}, its default, {why}")


def _division(data: Dataset, partition: PartitionConfig, split: SplitConfig, seed: int) -> Division:
    """Divide the samples; with ``split=official`` the training part only: :func:`split_clients` deals its test part."""
    if partition.name in WITH_PARTS:
        division = divide(data, partition, seed)
        if division.parts or split.name != "official":
            return division
    if split.name == "official":
        data = tested_owners(data) if partition.name in BY_OWNER else data.training_part()
    return divide(data, partition, seed)


def _parts(
    data: Dataset, division: Division, config: PartitionConfig, split: SplitConfig, seed: int
) -> dict[Part, Lists]:
    """Parts of each client: those that come with the division, with validation held out of train if it is missing."""
    if not division.parts:
        by_owner, by_domain = config.name in BY_OWNER, config.name == "domains"
        return split_clients(data, division.owned, split, seed, by_owner=by_owner, by_domain=by_domain)
    lists = dict(division.parts)
    where = config.file or f"partition={config.name}"
    held_out = bool(split.validation) and "validation" not in lists
    for part in PARTS if split.validation and not held_out else ("train", "test"):
        for client, positions in enumerate(lists[part]):
            if config.file and len(positions) == 0:
                raise DataError(f"{where}: the {part} list of client {client} is empty.")
            if len(positions) < 1 + (held_out and part == "train"):
                remedy = "name more" if config.file else "lower partition.num_clients"
                also = ", of which one is needed for validation" if held_out and part == "train" else ""
                options = ", or set split.validation=0" if also and len(positions) else ""
                purpose = "training" if part == "train" else part
                raise DataError(
                    f"{where}: client {client} has {len(positions)} samples for {purpose}{also}; {remedy}{options}."
                )
    if "validation" not in lists:
        labels = strata(data, split)
        held = [hold_out(positions, [split.validation], seed, k, labels) for k, positions in enumerate(lists["train"])]
        lists["train"], lists["validation"] = map(list, zip(*held, strict=True))
    return {part: lists[part] for part in PARTS}
