"""Partitions by what comes with the data: owners, and numbers to predict."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedpers.data import DatasetConfig, SplitConfig, load_federated, partition_samples
from fedpers.data.partitions import divide
from fedpers.errors import ConfigError, DataError
from tests.data.partitions.helpers import made, numbers, plain, settings_of


def test_several_owners_form_a_client() -> None:
    owner = np.arange(140) % 7
    data = made([0] * 140, owner=owner, owner_names=tuple("abcdefg"))
    division = divide(data, settings_of("grouped_natural", owners_per_client=3), 0)
    owners = [np.unique(owner[positions]).tolist() for positions in division.owned]
    assert sorted(map(len, owners)) == [3, 4]
    assert sorted(number for group in owners for number in group) == list(range(7))
    letters = [["abcdefg"[number] for number in group] for group in owners]
    assert list(division.names) == [", ".join(names[:3]) + (", ..." if len(names) > 3 else "") for names in letters]
    alone = divide(data, settings_of("grouped_natural", owners_per_client=1), 0)
    assert sorted(plain(alone.owned)) == sorted(plain(partition_samples(data, settings_of("natural"), 0)))


def test_so_many_groups_of_owners_are_drawn_of_those_that_are_large_enough(caplog: pytest.LogCaptureFixture) -> None:
    data = made([0] * 100, owner=[0, 1] + [2 + k % 8 for k in range(98)])
    config = settings_of("grouped_natural", 3, owners_per_client=2, min_samples=12)
    assert all(len(positions) >= 12 for positions in partition_samples(data, config, 0))
    with pytest.raises(
        DataError, match=r"5 groups of 2 owners in made have at least .*=12 samples, expected 6; lower it"
    ):
        partition_samples(data, settings_of("grouped_natural", 6, owners_per_client=2, min_samples=12), 0)


def test_groups_of_owners_that_cannot_be() -> None:
    with pytest.raises(
        ConfigError, match=r"partition=grouped_natural: expected another partition, because made has no"
    ):
        partition_samples(made([0] * 9), settings_of("grouped_natural"), 0)
    data = made([0] * 20, owner=[5] * 20)
    message = r"partition\.owners_per_client=2: expected at most 1, the owners in made\."
    with pytest.raises(ConfigError, match=message):
        partition_samples(data, settings_of("grouped_natural"), 0)


def test_one_owner_is_one_client() -> None:
    data = made([0] * 20, owner=[5] * 20)
    assert plain(partition_samples(data, settings_of("natural"), 0)) == [list(range(20))]
    with pytest.raises(
        DataError, match=r"1 of the 1 owners in made .* expected 2; lower it or partition\.num_clients\."
    ):
        partition_samples(data, settings_of("natural", 2), 0)


def test_official_test_samples_of_all_owners_of_a_client(tmp_path: Path) -> None:
    path = tmp_path / "arrays.npz"
    who = np.arange(200) % 8
    np.savez(path, x=np.random.default_rng(0).normal(size=(200, 5)), y=np.arange(200) % 4, who=who, n=120)
    dataset = DatasetConfig("npz", str(path), client="who", n_train="n")
    data = load_federated(dataset, settings_of("grouped_natural"), SplitConfig("official"), 3)
    assert data.num_clients == 4
    for client in range(4):
        owners = np.unique(who[data.train[client]])
        assert len(owners) == 2
        assert data.test[client].tolist() == [k for k in range(120, 200) if who[k] in owners]


# --- numbers to predict ---


def test_continuous_cuts_the_sorted_targets() -> None:
    targets = np.random.default_rng(0).normal(size=(203, 2))
    config = settings_of("continuous", 4, strictness=1.0, target=1)
    lists = partition_samples(numbers(targets), config, 0)
    assert [len(positions) for positions in lists] == [51, 51, 51, 50]
    order = np.argsort(targets[:, 1].astype(np.float32))
    assert [sorted(part.tolist()) for part in np.array_split(order, 4)] == plain(lists)


def test_strictness_sets_how_much_the_target_decides() -> None:
    targets = np.random.default_rng(0).normal(size=1000)

    def explained(strictness: float) -> float:
        lists = partition_samples(numbers(targets), settings_of("continuous", 5, strictness=strictness), 0)
        return float(np.std([targets[positions].mean() for positions in lists]))

    assert explained(0.0) < 0.15 < explained(0.5) < explained(1.0)


def test_continuous_errors() -> None:
    with pytest.raises(
        ConfigError, match=r"partition=continuous: expected a partition for classes, .* made has class lab"
    ):
        partition_samples(made([0, 1] * 50), settings_of("continuous", 4), 0)
    with pytest.raises(ConfigError, match=r"partition\.target=1: expected below 1, the number of targets of made\."):
        partition_samples(numbers(np.arange(100)), settings_of("continuous", 4, target=1), 0)
    with pytest.raises(DataError, match=r"target 0 of made is 3 for all samples, within 1e-06; use another"):
        partition_samples(numbers([3.0] * 100), settings_of("continuous", 4), 0)
