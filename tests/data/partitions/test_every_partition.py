"""What all partitions promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from fedpers.data import Dataset, PartitionConfig, SplitConfig, partition_samples, split_clients
from fedpers.data.partitions import PARTITIONS, divide
from fedpers.data.partitions.base import Division
from fedpers.errors import ConfigError, DataError
from fedpers.settings.base import choice_options
from tests.data.partitions.helpers import made, numbers, plain

NAMES = sorted({*PARTITIONS} - {"index", "pfllib_dirichlet", "pfllib_pathological"})
"""All with a minimum of samples that need no file."""
OF_DATA = ("natural", "grouped_natural", "domains")


def problem(name: str, samples: int, classes: int, owners: int, seed: int) -> Dataset:
    rng = np.random.default_rng(seed)
    if name == "continuous":
        return numbers(rng.normal(size=samples))
    owner, domain = rng.integers(-1, owners, samples), rng.integers(0, owners, samples)
    return made(rng.integers(0, classes, samples), owner=owner, domain=domain)


def divided(data: Dataset, config: PartitionConfig, seed: int) -> tuple[Division | None, str]:
    """A division, or the sentence that says why there is none."""
    try:
        return divide(data, config, seed), ""
    except (DataError, ConfigError) as error:
        return None, str(error)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    clients=st.integers(1, 12),
    counted=st.booleans(),
    classes=st.integers(1, 6),
    owners=st.integers(1, 6),
    minimum=st.integers(1, 8),
    samples=st.integers(20, 200),
    few=st.integers(1, 3),
    alpha=st.sampled_from([0.05, 0.5, 10.0]),
    skew=st.sampled_from(["linear", "square", "exponential"]),
    equal=st.booleans(),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    within=st.sampled_from(["iid", "dirichlet"]),
    stratified=st.booleans(),
)
def test_each_sample_at_most_once_and_enough_for_every_client(
    name: str, seed: int, clients: int, counted: bool, classes: int, owners: int, minimum: int, samples: int, few: int,
    alpha: float, skew: str, equal: bool, share: float, within: str, stratified: bool,
) -> None:  # fmt: skip
    data = problem(name, samples, classes, owners, seed)
    values: dict[str, Any] = {
        "num_clients": clients if counted or name not in OF_DATA else None, "min_samples": minimum, "alpha": alpha,
        "skew": skew, "sizes": "equal" if equal else skew, "classes_per_client": few, "shards_per_client": few,
        "owners_per_client": few, "strictness": share, "sigma": 4 * share, "within": within,
    }  # fmt: skip
    known = choice_options(PartitionConfig, name)
    config = PartitionConfig(name, **{key: value for key, value in values.items() if key in known})
    division, sentence = divided(data, config, seed)
    event("refused" if division is None else "divided")
    if division is None:
        assert sentence.endswith(".")
        assert "\n" not in sentence
        assert name not in ("iid", "quantity", "continuous") or clients * minimum > samples  # nothing could succeed
        return
    lists = division.owned
    owned = np.concatenate(lists)
    assert all(positions.dtype == np.int64 for positions in lists)
    assert all((np.diff(positions) > 0).all() for positions in lists)
    assert len(np.unique(owned)) == len(owned)
    assert owned.min() >= 0
    assert owned.max() < samples
    assert min(map(len, lists)) >= minimum
    if config.num_clients is not None:
        assert len(lists) == config.num_clients
    assert len(division.groups) in (0, len(lists))
    assert len(division.names) in (0, len(lists))
    again = divide(data, config, seed)
    assert plain(again.owned) == plain(lists)
    assert (again.groups, again.names) == (division.groups, division.names)
    if minimum >= 3:
        strata = stratified and data.task.classes
        parts = split_clients(data, lists, SplitConfig(stratified=strata), seed)
        for client, positions in enumerate(lists):
            mine = [parts[part][client] for part in ("train", "validation", "test")]
            assert min(map(len, mine)) >= 1
            assert np.sort(np.concatenate(mine)).tolist() == positions.tolist()


RANDOM = {
    "continuous": {"strictness": 0.5},
    "dirichlet": {"alpha": 1.0},
    "domains": {"num_clients": 4},
    "grouped_natural": {},
    "inner_dirichlet": {"alpha": 1.0},
    "natural": {"num_clients": 5},
    "disjoint_classes": {"num_clients": 3},
}


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_and_an_own_seed_wins(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = made(np.arange(600) % 6, owner=np.arange(600) % 20, domain=np.arange(600) % 2)
    if name == "continuous":
        data = numbers(np.random.default_rng(0).normal(size=600))
    values: dict[str, Any] = {"num_clients": None if name in OF_DATA else 6, **RANDOM.get(name, {})}

    def lists(run: int, **options: Any) -> list[list[int]]:
        return plain(partition_samples(data, PartitionConfig(name, min_samples=10, **values, **options), run))

    one = lists(1)
    assert one != lists(2)
    assert one == lists(2, seed=1)
    monkeypatch.setenv("FEDPERS_CACHE", str(tmp_path))  # computed anew, not read
    assert one == lists(1)
    assert one == lists(1)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_a_partition_is_in_its_cache_key(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever is typed differently is divided anew."""
    data = made(np.arange(600) % 6, owner=np.arange(600) % 20, domain=np.arange(600) % 2)
    if name == "continuous":
        data = numbers(np.random.default_rng(0).normal(size=(600, 2)))
    monkeypatch.setenv("FEDPERS_CACHE", str(tmp_path))
    other: dict[str, Any] = {
        "num_clients": 12, "seed": 9, "min_samples": 11, "alpha": 2.0, "skew": "square", "sizes": "linear",
        "classes_per_client": 3, "shards_per_client": 3, "owners_per_client": 3, "strictness": 0.75, "sigma": 0.5,
        "target": 1, "within": "dirichlet",
    }  # fmt: skip
    base: dict[str, Any] = {"num_clients": None if name in OF_DATA else 6, "min_samples": 10}
    if name in ("dirichlet", "inner_dirichlet"):
        base["alpha"] = 1.0
    known = choice_options(PartitionConfig, name)
    partition_samples(data, PartitionConfig(name, **base), 0)
    stored = len(list(tmp_path.rglob("*.npz")))
    if stored == 0:  # nothing to cache
        return
    for key in set(other) & set(known):
        partition_samples(data, PartitionConfig(name, **{**base, key: other[key]}), 0)
        now = len(list(tmp_path.rglob("*.npz")))
        assert now > stored, key
        stored = now


@pytest.mark.parametrize("name", sorted({*NAMES} - {"natural", "grouped_natural"}))
def test_a_minimum_that_cannot_be_met(name: str) -> None:
    data = numbers(np.arange(60)) if name == "continuous" else made(np.arange(60) % 6, domain=np.arange(60) % 2)
    with pytest.raises(DataError, match=r"lower .*partition\.min_samples( \(10 at most\))?\.") as error:
        partition_samples(data, PartitionConfig(name, 6, min_samples=11), 0)
    assert "partition.num_clients" in str(error.value)
