"""Partitions that divide classes: shards, mixes of a given size, power law."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedpers.data import partition_samples
from fedpers.errors import ConfigError, DataError
from tests.data.partitions.helpers import made, plain, settings_of

BALANCED = made(np.arange(600) % 6)


def owned(name: str, clients: int, seed: int = 0, **values: Any) -> list[np.ndarray[Any, Any]]:
    return partition_samples(BALANCED, settings_of(name, clients, **values), seed)


def counts(lists: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    return np.stack([np.bincount(BALANCED.y[positions], minlength=6) for positions in lists])


def test_shards_are_of_one_size_and_of_one_class_where_they_fit() -> None:
    table = counts(owned("shards", 30, shards_per_client=2))  # 10 shards of 10 samples in each class
    assert (table.sum(1) == 20).all()
    assert set(np.unique(table)) <= {0, 10, 20}
    assert (table.sum(0) == 100).all()


def test_as_many_shards_as_classes_are_classes_without_overlap() -> None:
    table = counts(owned("shards", 3, shards_per_client=2))
    assert sorted(np.unique(table)) == [0, 100]
    assert ((table > 0).sum(0) == 1).all()
    assert ((table > 0).sum(1) == 2).all()


def test_what_fills_no_shard_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        lists = owned("shards", 7, shards_per_client=2)  # 600 = 14 * 42 + 12
    assert [len(positions) for positions in lists] == [84] * 7
    assert "12 of 600 samples belong to no client" in caplog.text


def test_too_many_shards() -> None:
    message = (
        r"of the 600 samples of made, 6 clients with 101 shards each get 0, fewer than 101; lower partition\.num_cl"
    )
    with pytest.raises(DataError, match=message):
        owned("shards", 6, shards_per_client=101)
    with pytest.raises(DataError, match=r"59 clients with 2 shards each get 10, fewer than 11; lower"):
        partition_samples(made([0] * 649), settings_of("shards", 59, min_samples=11, shards_per_client=2), 0)


@pytest.mark.parametrize(("sizes", "expected"), [("equal", [86, 86, 86, 86, 86, 85, 85]), ("linear", None)])
def test_inner_dirichlet_has_the_sizes_it_is_given(sizes: Any, expected: list[int] | None) -> None:
    lists = owned("inner_dirichlet", 7, alpha=0.3, sizes=sizes)
    lengths = [len(positions) for positions in lists]
    if expected is None:
        expected = [len(positions) for positions in owned("quantity", 7, skew=sizes)]
    assert lengths == expected
    assert sum(lengths) == 600


def test_inner_dirichlet_alpha_sets_the_mix() -> None:
    def largest_share(alpha: float) -> float:
        table = counts(owned("inner_dirichlet", 6, alpha=alpha))
        return float((table.max(1) / table.sum(1)).mean())

    assert largest_share(1000.0) < 0.25 < 0.4 < largest_share(0.1)


def test_inner_dirichlet_of_classes_with_gaps() -> None:
    data = made(np.array([1, 4, 9])[np.arange(90) % 3])
    lists = partition_samples(data, settings_of("inner_dirichlet", 3, alpha=1.0), 0)
    assert sorted(np.concatenate(lists).tolist()) == list(range(90))


def test_power_law_gives_neighbouring_classes_and_deals_all() -> None:
    table = counts(owned("power_law", 12, min_samples=8, classes_per_client=2))
    assert [np.flatnonzero(row).tolist() for row in table] == [sorted([k % 6, (k + 1) % 6]) for k in range(12)]
    assert (table.sum(0) == 100).all()
    assert table[table > 0].min() >= 4
    assert table.sum(1).max() > 3 * table.sum(1).min()
    even = counts(owned("power_law", 12, min_samples=8, classes_per_client=2, sigma=0.0))
    assert even.sum(1).max() <= even.sum(1).min() + 8  # 100 = 4 * 25


def test_power_law_errors() -> None:
    with pytest.raises(
        ConfigError, match=r"partition\.num_clients=10: expected a multiple of 6, the classes of made\."
    ):
        owned("power_law", 10)
    with pytest.raises(ConfigError, match=r"partition\.classes_per_client=7: expected at most 6, the classes of made"):
        owned("power_law", 12, classes_per_client=7)
    rare = made([0] * 98 + [1] * 4)
    with pytest.raises(
        DataError, match=r"a class of made has 4 samples, but 4 clients with at least 6 each need 24; low"
    ):
        partition_samples(rare, settings_of("power_law", 4, min_samples=10), 0)


def test_rules_of_flwr_datasets_for_groups_of_owners() -> None:
    """What is computed here without tables is what its partitioner computes of the same order of owners."""
    from datasets import Dataset as Table
    from flwr_datasets.partitioner import GroupedNaturalIdPartitioner

    from fedpers.randomness import generator

    owner = np.random.default_rng(0).integers(0, 17, 300)
    lists = partition_samples(made([0] * 300, owner=owner), settings_of("grouped_natural", owners_per_client=3), 4)
    order = generator(4, "owner_groups").permutation(17)
    rank = np.argsort(order)
    partitioner = GroupedNaturalIdPartitioner("rank", 3, "allow-bigger", sort_unique_ids=True)
    partitioner.dataset = Table.from_dict({"rank": rank[owner], "position": np.arange(300)})
    theirs = [sorted(partitioner.load_partition(k)["position"][:]) for k in range(partitioner.num_partitions)]
    assert plain(lists) == theirs


def test_disjoint_classes_belong_to_one_client_each() -> None:
    table = counts(owned("disjoint_classes", 3))
    assert sorted(np.unique(table)) == [0, 100]
    assert ((table > 0).sum(0) == 1).all()
    assert ((table > 0).sum(1) == 2).all()
    assert sorted((counts(owned("disjoint_classes", 4)) > 0).sum(1)) == [1, 1, 2, 2]
    assert settings_of("disjoint_classes").num_clients == 5


def test_disjoint_classes_errors() -> None:
    with pytest.raises(ConfigError, match=r"partition\.num_clients=7: expected at most 6, the classes of made\."):
        owned("disjoint_classes", 7)
    rare = made([0] * 98 + [1] * 4)
    message = r"client \d has all 4 samples of its classes \(1\), fewer than partition\.min_samples=10; lower it or"
    with pytest.raises(DataError, match=message):
        partition_samples(rare, settings_of("disjoint_classes", 2, min_samples=10), 0)
