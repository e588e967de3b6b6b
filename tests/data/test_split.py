"""What each client trains, validates and tests on."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedpers.data import Dataset, FederatedData, SplitConfig, load_federated, split_clients
from fedpers.data.split import deal_official
from fedpers.errors import ConfigError, DataError
from fedpers.settings import DatasetConfig, PartitionConfig
from fedpers.tasks import Regression


def made(labels: Any, train_size: int | None = None) -> Dataset:
    y = torch.as_tensor(labels)
    return Dataset(torch.zeros(len(y), 1), y, int(y.max()) + 1, "made", train_size=train_size)


def sizes(parts: dict[Any, list[np.ndarray[Any, Any]]]) -> list[tuple[int, ...]]:
    return list(zip(*([len(positions) for positions in lists] for lists in parts.values()), strict=True))


# --- fractions ---


@pytest.mark.parametrize(
    ("n", "validation", "test", "expected"),
    [
        (100, 0.15, 0.25, (60, 15, 25)),
        (10, 0.15, 0.25, (5, 2, 3)),  # 1.5 and 2.5 round up
        (3, 0.15, 0.25, (1, 1, 1)),
        (4, 0.01, 0.9, (1, 1, 2)),  # 0.04 becomes 1, and 3.6 leaves one for training
        (4, 0.9, 0.05, (1, 2, 1)),
    ],
)
def test_fraction_sizes(n: int, validation: float, test: float, expected: tuple[int, ...]) -> None:
    parts = split_clients(made([0] * n), [np.arange(n)], SplitConfig("fractions", validation, test), 0)
    assert sizes(parts) == [expected]


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(3, 60), min_size=1, max_size=6),
    validation=st.floats(0.01, 0.49),
    test=st.floats(0.01, 0.49),
    seed=st.integers(0, 1000),
)
def test_fractions_divide_each_clients_own(counts: list[int], validation: float, test: float, seed: int) -> None:
    shuffled = np.random.default_rng(seed).permutation(sum(counts))
    owned = np.split(shuffled, np.cumsum(counts)[:-1])
    config = SplitConfig("fractions", validation, test)
    parts = split_clients(made([0] * sum(counts)), owned, config, seed)
    assert list(parts) == ["train", "validation", "test"]
    for client, positions in enumerate(owned):
        mine = [parts[part][client] for part in parts]
        assert min(map(len, mine)) >= 1
        assert sorted(np.concatenate(mine)) == sorted(positions)
        assert all((np.diff(part) > 0).all() for part in mine)
        assert abs(len(mine[1]) - validation * len(positions)) <= 1
        assert abs(len(mine[2]) - test * len(positions)) <= 1


def test_a_clients_split_is_its_own_affair() -> None:
    data, config = made([0] * 40), SplitConfig()
    one = split_clients(data, [np.arange(20), np.arange(20, 40)], config, 5)
    two = split_clients(data, [np.arange(20), np.arange(20, 30)], config, 5)
    assert one["test"][0].tolist() == two["test"][0].tolist()
    other = split_clients(data, [np.arange(20), np.arange(20, 40)], config, 6)
    assert one["test"][0].tolist() != other["test"][0].tolist()
    assert one["test"][0].tolist() != (one["test"][1] - 20).tolist()


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda counts: sum(counts) >= 3),
    validation=st.sampled_from([0.0, 0.05, 0.15, 0.4]),
    test=st.floats(0.05, 0.5),
    seed=st.integers(0, 1000),
)
def test_stratified_parts_have_classes_in_proportion(
    counts: list[int], validation: float, test: float, seed: int
) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    positions = np.arange(len(labels))
    lists = {}
    for stratified in (False, True):
        config = SplitConfig("fractions", validation, test, stratified=stratified)
        lists[stratified] = split_clients(made(labels), [positions], config, seed)
    parts = {part: samples for part, (samples,) in lists[True].items()}
    assert sizes(lists[True]) == sizes(lists[False])
    assert np.sort(np.concatenate(list(parts.values()))).tolist() == positions.tolist()
    assert all((np.diff(samples) > 0).all() for samples in parts.values())
    class_counts = {part: np.bincount(labels[samples], minlength=len(counts)) for part, samples in parts.items()}
    share = {part: len(samples) / len(labels) for part, samples in parts.items()}
    assert (np.abs(class_counts["validation"] - share["validation"] * np.array(counts)) < 1).all()
    for part in ("test", "train"):
        assert (np.abs(class_counts[part] - share[part] * np.array(counts)) < 2).all()
    again = split_clients(made(labels), [positions], SplitConfig("fractions", validation, test, stratified=True), seed)
    assert [samples.tolist() for (samples,) in again.values()] == [samples.tolist() for samples in parts.values()]


def test_stratified_by_hand() -> None:
    labels = [0] * 40 + [1] * 20 + [2] * 40
    config = SplitConfig("fractions", 0.15, 0.25, stratified=True)
    parts = split_clients(made(labels), [np.arange(100)], config, 0)
    counts = {part: np.bincount(np.array(labels)[samples], minlength=3).tolist() for part, (samples,) in parts.items()}
    assert counts == {"train": [24, 12, 24], "validation": [6, 3, 6], "test": [10, 5, 10]}
    other = split_clients(made(labels), [np.arange(100)], config, 1)
    assert other["test"][0].tolist() != parts["test"][0].tolist()


def test_stratified_validation_beside_an_official_test() -> None:
    data = made([0, 0, 0, 1] * 20 + [0, 1], train_size=80)
    config = SplitConfig("official", validation=0.25, stratified=True)
    parts = split_clients(data, [np.arange(80)], config, 0)
    assert np.bincount(data.y[parts["validation"][0]]).tolist() == [15, 5]


def test_numbers_have_no_strata() -> None:
    data = Dataset(torch.zeros(9, 1), torch.arange(9.0).unsqueeze(1), 1, "made", task=Regression())
    with pytest.raises(
        ConfigError, match=r"split\.stratified=True: expected false, because made has no class labels\."
    ):
        split_clients(data, [np.arange(9)], SplitConfig(stratified=True), 0)


def test_too_few_samples() -> None:
    with pytest.raises(DataError, match=r"Client 1 has 2 samples, but train, validation and test need one each; raise"):
        split_clients(made([0] * 9), [np.arange(5), np.array([5, 6])], SplitConfig(), 0)
    with pytest.raises(DataError, match=r"Client 0 has 1 samples, but train and validation need one each"):
        split_clients(made([0] * 9, train_size=5), [np.array([3])], SplitConfig("official"), 0)


# --- official ---


def test_official_deal_by_hand() -> None:
    # Training: client 0 owns 3 of class 0 and 1 of class 1; client 1 owns 1 of class 0 and 1 of class 1.
    # Test: 6 of class 0 -> 4.5 and 1.5 (the tie goes to one of them); 4 of class 1 -> 2 and 2; class 2 to nobody.
    train = [0, 0, 0, 1, 0, 1]
    test = [0, 1, 0, 1, 0, 2, 0, 1, 0, 1, 0]
    data = made(train + test, train_size=6)
    dealt = deal_official(data, [np.array([0, 1, 2, 3]), np.array([4, 5])], 0)
    counts = np.stack([np.bincount(data.y[positions], minlength=3) for positions in dealt])
    assert counts[:, 1].tolist() == [2, 2]
    assert counts[:, 2].tolist() == [0, 0]
    assert counts[:, 0].tolist() in ([5, 1], [4, 2])
    assert min(map(min, dealt)) >= 6


def test_official_largest_remainder_by_hand() -> None:
    # 10 test samples over 5, 3 and 1 training samples: 5.56, 3.33, 1.11; the one left goes to the first.
    data = made([0] * 9 + [0] * 10, train_size=9)
    dealt = deal_official(data, [np.arange(5), np.arange(5, 8), np.array([8])], 0)
    assert [len(positions) for positions in dealt] == [6, 3, 1]


@settings(max_examples=60, deadline=None)
@given(
    clients=st.integers(1, 6),
    classes=st.integers(1, 4),
    train=st.integers(20, 80),
    test=st.integers(40, 120),
    seed=st.integers(0, 1000),
)
def test_official_deal_follows_proportions(clients: int, classes: int, train: int, test: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = made(rng.integers(0, classes, train + test), train_size=train)
    owned = np.split(rng.permutation(train), np.sort(rng.choice(np.arange(2, train - 2), clients - 1, replace=False)))
    try:
        dealt = deal_official(data, owned, seed)
    except DataError:  # a client too small to get any; see test_official_errors
        assume(False)
    y = data.y.numpy()
    train_counts = np.stack([np.bincount(y[positions], minlength=classes) for positions in owned])
    got = np.stack([np.bincount(y[positions], minlength=classes) for positions in dealt])
    test_counts = np.bincount(y[train:], minlength=classes)
    used = np.concatenate(dealt)
    assert len(np.unique(used)) == len(used)
    assert used.min() >= train
    for label in range(classes):
        total = train_counts[:, label].sum()
        assert got[:, label].sum() == (test_counts[label] if total else 0)
        if total:
            assert (np.abs(got[:, label] - train_counts[:, label] * test_counts[label] / total) < 1).all()
    assert [p.tolist() for p in deal_official(data, owned, seed)] == [p.tolist() for p in dealt]


def test_ties_do_not_favour_the_same_client() -> None:
    # Two clients own one training sample of each of 40 classes with one test sample each: 20 or so for each client.
    data = made(np.concatenate([np.arange(40), np.arange(40), np.arange(40)]), train_size=80)
    dealt = deal_official(data, [np.arange(40), np.arange(40, 80)], 0)
    assert 8 < len(dealt[0]) < 32
    assert len(dealt[0]) + len(dealt[1]) == 40


def test_official_split_keeps_parts_apart(caplog: pytest.LogCaptureFixture) -> None:
    data = made([0, 1] * 20 + [0, 1, 2] * 10, train_size=40)
    owned = [np.arange(0, 40, 2), np.arange(1, 40, 2)]  # clients of one class each
    with caplog.at_level(logging.WARNING):
        parts = split_clients(data, owned, SplitConfig("official", validation=0.2), 0)
    assert sizes(parts) == [(16, 4, 10), (16, 4, 10)]
    assert [set(data.y[positions].tolist()) for positions in parts["test"]] == [{0}, {1}]
    assert all(max(positions) < 40 for part in ("train", "validation") for positions in parts[part])  # type: ignore[index]
    assert "10 official test samples are left out, no client owns their class" in caplog.text


def test_official_errors() -> None:
    data = made([0] * 10 + [0], train_size=10)
    with pytest.raises(DataError, match=r"split=official: client \d with its 5 training samples gets no offic"):
        split_clients(data, [np.arange(5), np.arange(5, 10)], SplitConfig("official"), 0)
    for size in (None, 10):
        with pytest.raises(ConfigError, match=r"split=official: expected fractions, because made has no official test"):
            split_clients(made([0] * 10, train_size=size), [np.arange(5)], SplitConfig("official"), 0)


def test_leave_one_out_is_for_ratings() -> None:
    with pytest.raises(ConfigError, match=r"split=leave_one_out: expected fractions or official, except for ratings"):
        split_clients(made([0] * 9), [np.arange(9)], SplitConfig("leave_one_out"), 0)


# --- settings ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"name": "oficial"},
            r"split=oficial: expected one of fractions, leave_one_out, official \(did you mean 'official'",
        ),
        ({"validation": -0.1}, r"split\.validation=-0\.1: expected a number >= 0 and < 1\."),
        ({"validation": 1}, r"split\.validation=1\.0: "),
        ({"test": -0.1}, r"split\.test=-0\.1: "),
        ({"test": float("nan")}, r"split\.test=nan: "),
        ({"test": "x"}, r"split\.test=x: "),
        ({"public": 1.0}, r"split\.public=1\.0: expected a number >= 0 and < 1\."),
        ({"public": -0.1}, r"split\.public=-0\.1: "),
        ({"unseen": -1}, r"split\.unseen=-1: expected a number of clients >= 0, a share"),
        ({"unseen": 1.5}, r"split\.unseen=1\.5: "),
        ({"validation": 0.5, "test": 0.5}, r"split\.test=0\.5: expected less than 1 - split\.validation = 0\.5\."),
    ],
)
def test_bad_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SplitConfig(**values)
    assert SplitConfig("official", validation=0.9).test == 0.25  # not used there, so not compared


def test_clients_keep_at_most_so_many_training_samples() -> None:
    def load(most: int | None, stratified: bool = False) -> FederatedData:
        split = SplitConfig(max_train=most, stratified=stratified)
        return load_federated(DatasetConfig("digits"), PartitionConfig("iid", num_clients=5), split, 1)

    every, many, few = load(None), load(100), load(10)
    for client in range(5):
        sets = [set(data.train[client].tolist()) for data in (few, many, every)]
        assert [len(kept) for kept in sets[:2]] == [10, 100]
        assert sets[0] < sets[1] < sets[2]
        assert torch.equal(few.test[client], every.test[client])
        assert torch.equal(few.validation[client], every.validation[client])
    assert load(10_000).checksum == every.checksum
    proportional = load(20, stratified=True)
    for client in range(5):
        counts = torch.bincount(proportional.y[proportional.train[client]], minlength=10)
        assert counts.sum() == 20
        assert set(counts.tolist()) <= {1, 2, 3}


def test_a_client_keeps_one_training_sample_at_least() -> None:
    with pytest.raises(ConfigError, match=r"split.max_train=0: expected a whole number >= 1"):
        SplitConfig(max_train=0)
