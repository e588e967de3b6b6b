"""Clients that hold sets of labels."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedpers.data import (
    Dataset,
    DatasetConfig,
    FederatedData,
    PartitionConfig,
    SplitConfig,
    load_federated,
    partition_samples,
)
from fedpers.data.partitions.label_sets import deal_label_sets
from fedpers.errors import ConfigError, DataError


def made(classes: int, each: int, test: int = 0) -> Dataset:
    y = torch.arange(classes).repeat(each + test)
    return Dataset(torch.zeros(len(y), 1), y, classes, "made", train_size=classes * each if test else None)


def config(**values: Any) -> PartitionConfig:
    return PartitionConfig("label_sets", **values)


def labels(data: FederatedData | Dataset, positions: Any) -> set[int]:
    return set(data.y[torch.as_tensor(positions)].tolist())


def test_digits() -> None:
    data = load_federated(DatasetConfig(), config(num_clients=20), SplitConfig(), 0)
    assert data.num_clients == 25
    assert data.unseen == (20, 21, 22, 23, 24)
    assert data.anchors == (0, 1, 2, 3, 4)
    assert data.sizes().tolist() == [100] * 25
    trained = torch.cat(list(data.train)).unique()
    for part in ("validation", "test"):
        assert not torch.isin(torch.cat(list(data.part(part))), trained).any()  # type: ignore[arg-type]
    assert not torch.isin(torch.cat(list(data.validation)), torch.cat(list(data.test))).any()
    anchors = [labels(data, data.train[k]) for k in range(5)]
    assert sorted(label for label_set in anchors for label in label_set) == list(range(10))
    assert [len(label_set) for label_set in anchors] == [2] * 5
    sets = [frozenset(labels(data, positions)) for positions in data.train]
    assert all(len(label_set) == 4 for label_set in sets[5:])
    assert len(set(sets[20:])) == 5
    assert not set(sets[20:]) & set(sets[:20])
    for client in range(25):
        assert labels(data, data.validation[client]) <= sets[client]
        assert labels(data, data.test[client]) <= sets[client]
        assert len(data.train[client].unique()) == 100
    pool = torch.cat([data.test[k] for k in data.unseen]).unique()
    for client in data.unseen:  # all there is of its labels
        same = pool[torch.isin(data.y[pool], torch.tensor(sorted(sets[client])))]
        assert data.test[client].tolist() == same.tolist()
    again = load_federated(DatasetConfig(), config(num_clients=20), SplitConfig(), 0)
    assert again.checksum == data.checksum
    assert load_federated(DatasetConfig(), config(num_clients=20), SplitConfig(), 1).checksum != data.checksum


def test_samples_are_spread_and_shared() -> None:
    lists, _, _ = deal_label_sets(made(10, 100), config(num_clients=30, samples_per_client=50), SplitConfig(), 0)
    y = made(10, 100).y.numpy()
    for positions in lists["train"][5:]:
        counts = np.bincount(y[positions], minlength=10)
        assert sorted(counts[counts > 0].tolist()) == [12, 12, 13, 13]
    assert len(np.unique(np.concatenate(lists["train"]))) < sum(map(len, lists["train"]))
    # 600, 150 and 250 samples in the pools, so 50, 12.5 and 20.8 for a client.
    assert [len(lists[part][7]) for part in ("train", "validation", "test")] == [50, 13, 21]


def test_without_validation() -> None:
    lists, _, _ = deal_label_sets(made(10, 100), config(num_clients=8), SplitConfig(validation=0), 0)
    assert all(len(positions) == 0 for positions in lists["validation"])
    assert all(len(positions) for part in ("train", "test") for positions in lists[part])


def test_official_test_part() -> None:
    data = made(6, 50, test=20)
    split = SplitConfig("official", validation=0.2)
    settings_ = config(num_clients=8, anchors=3, labels_per_client=2, samples_per_client=30, unseen_label_sets=4)
    lists, unseen, groups = deal_label_sets(data, settings_, split, 1)
    assert unseen == (8, 9, 10, 11)
    assert len(groups) == 12
    assert groups[:3] == (0, 1, 2)
    assert min(map(min, lists["test"])) >= 300
    assert max(map(max, [*lists["train"], *lists["validation"]])) < 300
    assert [len(lists["test"][k]) for k in unseen] == [40] * 4
    assert len(lists["test"][0]) == 15  # 30 * 120 / 240


@settings(max_examples=60, deadline=None)
@given(
    classes=st.integers(2, 9),
    anchors=st.integers(0, 5),
    normal=st.integers(0, 6),
    size=st.integers(1, 4),
    extra=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_sets_of_labels(classes: int, anchors: int, normal: int, size: int, extra: int, seed: int) -> None:
    data = made(classes, 40)
    clients = max(anchors + normal, 1)
    settings_ = config(
        num_clients=clients, anchors=anchors, labels_per_client=size, samples_per_client=12, unseen_label_sets=extra
    )
    if anchors > classes or size > classes:
        with pytest.raises(ConfigError, match="the classes of made"):
            deal_label_sets(data, settings_, SplitConfig(), seed)
        return
    assume(extra <= math.comb(classes, size) - anchors - 1)  # enough sets even if anchors take as many as they can
    lists, unseen, groups = deal_label_sets(data, settings_, SplitConfig(), seed)
    sets = [frozenset(labels(data, positions)) for positions in lists["train"]]
    assert len(sets) == clients + extra
    assert unseen == tuple(range(clients, clients + extra))
    assert not {sets[k] for k in unseen} & set(sets[:clients])
    assert len({sets[k] for k in unseen}) == extra
    assert all(len(label_set) == size for label_set in sets[anchors:])
    if anchors:
        assert sorted(label for label_set in sets[:anchors] for label in label_set) == list(range(classes))
        assert max(map(len, sets[:anchors])) - min(map(len, sets[:anchors])) <= 1
        for labels_of_client, group in zip(sets, groups, strict=True):
            shared = [len(labels_of_client & anchor) for anchor in sets[:anchors]]
            assert shared[group] == max(shared)
    else:
        same = {(sets[a] == sets[b]) == (groups[a] == groups[b]) for a in range(len(sets)) for b in range(len(sets))}
        assert same == {True}
    trained = np.concatenate(lists["train"])
    for part in ("validation", "test"):
        assert not np.isin(np.concatenate(lists[part]), trained).any()  # type: ignore[index]


def test_public_samples_are_nobodys() -> None:
    data = load_federated(DatasetConfig(), config(num_clients=8), SplitConfig(public=0.2), 0)
    assert data.public is not None
    assert not torch.isin(data.public, torch.cat(list(data.train))).any()
    assert data.sizes().max() < 100


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"anchors": 21}, r"partition\.anchors=21: expected at most partition\.num_clients=20\."),
        ({"labels_per_client": 0}, r"partition\.labels_per_client=0: expected a whole number >= 1\."),
        (
            {"samples_per_client": 3},
            r"partition\.samples_per_client=3: expected at least partition\.labels_per_client=4\.",
        ),
        ({"unseen_label_sets": -1}, r"partition\.unseen_label_sets=-1: expected a whole number >= 0\."),
    ],
)
def test_bad_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**values)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"anchors": 11}, ConfigError, r"partition\.anchors=11: expected at most 10, the classes of digits\."),
        (
            {"labels_per_client": 11},
            ConfigError,
            r"partition\.labels_per_client=11: expected at most 10, the classes of di",
        ),
        (
            {"labels_per_client": 9, "unseen_label_sets": 10},
            ConfigError,
            r"partition\.unseen_label_sets=10: expected at most 9, the sets of 9 among 10 labels that other cl",
        ),
        (
            {"samples_per_client": 300},
            DataError,
            r"partition=label_sets: client 0 is to have 150 training samples of class \d, but there are \d+; lower",
        ),
    ],
)
def test_errors(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_federated(DatasetConfig(), config(**values), SplitConfig(), 0)


def test_empty_pool() -> None:
    with pytest.raises(
        DataError, match=r"there are no validation samples of the classes \[\d, \d\] of client 0; enlarge"
    ):
        deal_label_sets(
            made(10, 20),
            config(samples_per_client=10, labels_per_client=2, unseen_label_sets=0),
            SplitConfig(validation=0.01),
            0,
        )


def test_it_is_no_division() -> None:
    with pytest.raises(
        ConfigError, match=r"partition=label_sets: expected a partition that deals each sample to one cl"
    ):
        partition_samples(made(3, 10), config(), 0)
