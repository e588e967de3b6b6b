"""Who owns which samples."""

import json
import logging
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedpers.data import Dataset, PartitionConfig, partition_samples
from fedpers.data.cache import read_lists, write_lists
from fedpers.data.partitions.index import read_index
from fedpers.errors import ConfigError, DataError

DRAWN = ["iid", "dirichlet", "pathological", "quantity"]


def made(labels: Any, owner: Any = None, train_size: int | None = None) -> Dataset:
    y = torch.as_tensor(labels)
    ids = None if owner is None else torch.as_tensor(owner)
    return Dataset(torch.zeros(len(y), 1), y, int(y.max()) + 1, "made", train_size=train_size, owner=ids)


BALANCED = made(np.arange(600) % 6)


def plain(lists: Any) -> list[list[int]]:
    return [positions.tolist() for positions in lists]


# --- properties ---


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(DRAWN),
    seed=st.integers(0, 2**31),
    clients=st.integers(1, 12),
    classes=st.integers(1, 5),
    minimum=st.integers(1, 8),
    samples=st.integers(20, 200),
    alpha=st.sampled_from([0.05, 0.5, 10.0]),
    skew=st.sampled_from(["linear", "square", "exponential"]),
)
def test_every_partition_keeps_its_promise(
    name: str, seed: int, clients: int, classes: int, minimum: int, samples: int, alpha: float, skew: str
) -> None:
    data = made(np.random.default_rng(seed).integers(0, classes, samples))
    per_client = min(2, len(data.y.unique()))
    config = PartitionConfig(name, clients, min_samples=minimum, alpha=alpha, skew=skew, classes_per_client=per_client)
    try:
        lists = partition_samples(data, config, seed)
    except DataError:
        # iid and quantity fail only where nothing could succeed.
        assert name in ("dirichlet", "pathological") or clients * minimum > samples
        assume(False)
    owned = np.concatenate(lists)
    assert len(lists) == clients
    assert all(positions.dtype == np.int64 for positions in lists)
    assert len(np.unique(owned)) == len(owned)
    assert owned.min() >= 0
    assert owned.max() < samples
    assert min(map(len, lists)) >= minimum
    assert all((np.diff(positions) > 0).all() for positions in lists)
    if name != "pathological":
        assert len(owned) == samples
    again = partition_samples(data, config, seed)
    assert plain(again) == plain(lists)


@pytest.mark.parametrize("name", DRAWN)
def test_seed_decides_and_own_seed_wins(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = partition_samples(BALANCED, PartitionConfig(name, 6, alpha=1.0), 1)
    assert plain(one) != plain(partition_samples(BALANCED, PartitionConfig(name, 6, alpha=1.0), 2))
    assert plain(one) == plain(partition_samples(BALANCED, PartitionConfig(name, 6, seed=1, alpha=1.0), 2))
    monkeypatch.setenv("FEDPERS_CACHE", str(tmp_path))  # computed anew, not read
    assert plain(one) == plain(partition_samples(BALANCED, PartitionConfig(name, 6, alpha=1.0), 1))


def test_iid_sizes_and_mix() -> None:
    lists = partition_samples(BALANCED, PartitionConfig("iid", 7), 0)
    assert sorted(map(len, lists)) == [85, 85, 86, 86, 86, 86, 86]
    assert all(len(np.unique(BALANCED.y[positions])) == 6 for positions in lists)


def test_dirichlet_alpha_sets_the_mix() -> None:
    def classes(alpha: float) -> float:
        lists = partition_samples(BALANCED, PartitionConfig("dirichlet", 5, alpha=alpha), 0)
        shares = [np.bincount(BALANCED.y[positions], minlength=6).max() / len(positions) for positions in lists]
        return float(np.mean(shares))

    assert classes(1000.0) < 0.2 < 0.3 < classes(0.1)


def test_pathological_has_exactly_so_many_classes() -> None:
    for count in (1, 2, 6):
        lists = partition_samples(BALANCED, PartitionConfig("pathological", 12, classes_per_client=count), 3)
        assert [len(np.unique(BALANCED.y[positions])) for positions in lists] == [count] * 12
        assert sum(map(len, lists)) == 600


def test_unused_samples_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        lists = partition_samples(BALANCED, PartitionConfig("pathological", 2, classes_per_client=1), 0)
    assert plain(lists) == [list(range(0, 600, 6)), list(range(1, 600, 6))]
    assert "made: 400 of 600 samples belong to no client." in caplog.text


@pytest.mark.parametrize(
    ("skew", "sizes"),
    [
        # 40 samples, 4 clients, 5 each: 20 to share.
        ("linear", [5 + 2, 5 + 4, 5 + 6, 5 + 8]),
        ("square", [5 + 0, 5 + 2, 5 + 6, 5 + 10 + 2]),  # 20 * (1, 4, 9, 16) / 30 = 0.67, 2.67, 6, 10.67
        ("exponential", [5 + 0, 5 + 1, 5 + 4, 5 + 12 + 3]),  # 20 * (.032, .087, .237, .644)
    ],
)
def test_quantity_sizes(skew: str, sizes: list[int]) -> None:
    lists = partition_samples(made(np.arange(40) % 2), PartitionConfig("quantity", 4, min_samples=5, skew=skew), 0)
    assert [len(positions) for positions in lists] == sizes


@pytest.mark.slow
def test_quantity_with_many_clients_is_finite() -> None:
    lists = partition_samples(
        made(np.zeros(4000, int)), PartitionConfig("quantity", 1000, min_samples=3, skew="exponential"), 0
    )
    assert min(map(len, lists)) == 3
    assert sum(map(len, lists)) == 4000


# --- natural ---


def test_natural_groups_and_leaves_out_small_owners(caplog: pytest.LogCaptureFixture) -> None:
    data = made([0] * 7, owner=[9, 4, 9, 4, 2, 9, 4])
    with caplog.at_level(logging.INFO):
        lists = partition_samples(data, PartitionConfig("natural", min_samples=2), 0)
    assert plain(lists) == [[1, 3, 6], [0, 2, 5]]
    assert "1 of 2" not in caplog.text
    assert "1 of 3 owners have fewer than partition.min_samples=2 samples and are left out" in caplog.text
    assert "1 of 7 samples belong to no client" in caplog.text


def test_natural_draws_so_many_owners() -> None:
    data = made(np.zeros(100, int), owner=np.repeat(np.arange(20), 5))
    drawn = {seed: partition_samples(data, PartitionConfig("natural", 4, min_samples=5), seed) for seed in range(5)}
    assert all(len(lists) == 4 for lists in drawn.values())
    assert len({str(plain(lists)) for lists in drawn.values()}) > 1
    assert all(len({int(p) // 5 for p in positions}) == 1 for lists in drawn.values() for positions in lists)
    assert PartitionConfig("natural").num_clients is None
    assert PartitionConfig("iid").num_clients == 10


def test_natural_errors() -> None:
    with pytest.raises(ConfigError, match=r"partition=natural: expected another partition, because made has no cl"):
        partition_samples(BALANCED, PartitionConfig("natural"), 0)
    data = made([0] * 7, owner=[9, 4, 9, 4, 2, 9, 4])
    with pytest.raises(DataError, match=r"0 of the 3 owners in made have at least partition\.min_samples=4 samples"):
        partition_samples(data, PartitionConfig("natural", min_samples=4), 0)
    with pytest.raises(DataError, match=r"2 of the 3 owners .* expected 3; lower it or partition\.num_clients\."):
        partition_samples(data, PartitionConfig("natural", 3, min_samples=2), 0)


# --- what cannot be done ---


@pytest.mark.parametrize("name", DRAWN)
def test_too_many_clients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpers.data.partitions.drawn._given", None)  # nothing slow is started
    with pytest.raises(DataError, match=r"partition\.num_clients=601 is more than the 600 samples of made\."):
        partition_samples(BALANCED, PartitionConfig(name, 601, min_samples=10), 0)
    with pytest.raises(DataError, match=r"61 clients with at least 10 samples each need 610 samples, but made has 600"):
        partition_samples(BALANCED, PartitionConfig(name, 61, min_samples=10), 0)


@pytest.mark.slow
def test_dirichlet_says_how_close_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    config = PartitionConfig("dirichlet", 12, min_samples=40, alpha=0.2)
    with pytest.raises(DataError, match=r"partition=dirichlet: in 66 attempts .* 12 clients") as error:
        partition_samples(BALANCED, config, 0)
    assert "\n" not in str(error.value)
    assert "raise partition.alpha=0.2, or lower partition.num_clients" in str(error.value)
    match = re.search(r"had (\d+) samples at best, fewer than partition\.min_samples=40", str(error.value))
    assert match is not None
    best = int(match[1])
    # What it came close to is what it can do, and not one more.
    possible = partition_samples(BALANCED, PartitionConfig("dirichlet", 12, min_samples=best, alpha=0.2), 0)
    assert min(map(len, possible)) == best
    with pytest.raises(DataError):
        partition_samples(BALANCED, PartitionConfig("dirichlet", 12, min_samples=best + 1, alpha=0.2), 0)


def test_pathological_errors() -> None:
    with pytest.raises(ConfigError, match=r"partition\.classes_per_client=7: expected at most 6, the classes of made"):
        partition_samples(BALANCED, PartitionConfig("pathological", 5, classes_per_client=7), 0)
    rare = made([0] * 98 + [1] * 2)  # class 1 is too rare for five clients
    with pytest.raises(
        DataError,
        match=r"partition=pathological: in 6 attempts .* some had no samples; change partition.classes_per_client",
    ):
        partition_samples(rare, PartitionConfig("pathological", 5, min_samples=1), 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"name": "dirichlett"},
            r"partition=dirichlett: expected one of continuous, dirichlet, .*did you mean 'dirichlet'",
        ),
        ({"alpha": 0}, r"partition\.alpha=0\.0: expected a number > 0\."),
        ({"alpha": float("inf")}, r"partition\.alpha=inf: expected a number\."),
        ({"alpha": float("nan")}, r"partition\.alpha=nan: "),
        ({"alpha": "x"}, r"partition\.alpha=x: "),
        ({"num_clients": 0}, r"partition\.num_clients=0: expected a whole number >= 1, or null\."),
        ({"num_clients": 2.5}, r"partition\.num_clients=2\.5: "),
        ({"num_clients": True}, r"partition\.num_clients=True: "),
        ({"min_samples": 0}, r"partition\.min_samples=0: expected a whole number >= 1\."),
        ({"min_samples": None}, r"partition\.min_samples=None: "),
        ({"classes_per_client": 0}, r"partition\.classes_per_client=0: "),
        ({"seed": 1.5}, r"partition\.seed=1\.5: expected a whole number or null\."),
        ({"skew": "linar"}, r"partition\.skew=linar: expected one of exponential, linear, square \(did you mean"),
        ({"name": "index"}, r"partition\.file=None: expected the path of a \.json or \.npz file\."),
    ],
)
def test_bad_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PartitionConfig(**values)


# --- global random state ---


def test_global_random_state_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import flwr_datasets.partitioner  # noqa: F401  (some import on the way draws from Python's generator)

    monkeypatch.setenv("FEDPERS_CACHE", str(tmp_path))

    def state() -> str:
        return str((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))  # noqa: NPY002

    before = state()
    for name in DRAWN:
        partition_samples(BALANCED, PartitionConfig(name, 5, alpha=1.0), 0)
    assert state() == before
    assert len(list((tmp_path / "partitions").iterdir())) == len(DRAWN)


# --- cache ---


def test_cache_hit_is_the_same_without_dividing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDPERS_CACHE", str(tmp_path))
    config = PartitionConfig("dirichlet", 5, alpha=1.0)
    first = partition_samples(BALANCED, config, 0)
    assert [path.suffix for path in (tmp_path / "partitions").iterdir()] == [".npz"]
    monkeypatch.setattr("fedpers.data.partitions.drawn._given", None)
    second = partition_samples(BALANCED, config, 0)
    assert plain(second) == plain(first)
    assert second[0].dtype == np.int64
    for other in (PartitionConfig("dirichlet", 5, alpha=1.1), PartitionConfig("dirichlet", 4, alpha=1.0)):
        with pytest.raises(TypeError):  # would be divided anew
            partition_samples(BALANCED, other, 0)
    with pytest.raises(TypeError):
        partition_samples(made(np.arange(600) % 5), config, 0)


@pytest.mark.parametrize("damage", ["cut", "empty", "twice", "range", "sizes", "clients"])
def test_damaged_cache_is_rebuilt(
    damage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FEDPERS_CACHE", str(tmp_path))
    config = PartitionConfig("iid", 3)
    first = partition_samples(BALANCED, config, 0)
    (path,) = (tmp_path / "partitions").iterdir()
    content = path.read_bytes()
    if damage in ("cut", "empty"):
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    else:
        positions, sizes = np.concatenate(first), np.array([200, 200, 200])
        if damage == "twice":
            positions[0] = positions[1]
        if damage == "range":
            positions[0] = 600
        sizes = {"sizes": np.array([200, 200, 100]), "clients": np.array([300, 300])}.get(damage, sizes)
        np.savez(path, positions=positions, sizes=sizes)
    assert plain(partition_samples(BALANCED, config, 0)) == plain(first)
    assert "is damaged" in caplog.text
    assert "will be rebuilt" in caplog.text
    stored = read_lists(path.stem, 3, 600)
    assert stored is not None
    assert plain(stored) == plain(first)


def test_unwritable_cache_is_fine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDPERS_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.INFO):
        assert len(partition_samples(BALANCED, PartitionConfig("iid", 3), 0)) == 3
    assert "The partition is not cached" in caplog.text


def test_failed_write_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setenv("FEDPERS_CACHE", str(tmp_path))
    monkeypatch.setattr("fedpers.data.cache.np.savez", full)
    write_lists("key", [np.arange(3)])
    assert list((tmp_path / "partitions").iterdir()) == []


# --- index files ---


def index(path: Path, content: Any) -> str:
    file = path / "lists.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


def test_index_json_and_npz_agree(tmp_path: Path) -> None:
    lists = [[5, 0, 2], [1], [4, 3]]
    np.savez(tmp_path / "lists.npz", *[np.array(positions) for positions in lists])
    for file in (index(tmp_path, lists), str(tmp_path / "lists.npz")):
        config = PartitionConfig("index", file=file, min_samples=1)
        assert plain(partition_samples(made([0] * 9), config, 0)) == [[0, 2, 5], [1], [3, 4]]
        config = PartitionConfig("index", 2, file=file, min_samples=1)
        assert plain(partition_samples(made([0] * 9), config, 0)) == [[0, 2, 5], [1]]


def test_index_with_parts(tmp_path: Path) -> None:
    parts = {"train": [[0, 3], [1]], "validation": [[4], []], "test": [[5], [6, 2]]}
    named = {f"{part}_{k}": np.array(v, dtype=int) for part, lists in parts.items() for k, v in enumerate(lists)}
    np.savez(tmp_path / "lists.npz", **named)
    for file in (index(tmp_path, parts), str(tmp_path / "lists.npz")):
        assert {part: plain(lists) for part, lists in read_index(file, 7).items()} == parts
        config = PartitionConfig("index", file=file, min_samples=3)
        assert plain(partition_samples(made([0] * 7), config, 0)) == [[0, 3, 4, 5], [1, 2, 6]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[1", r"is not a readable \.json or \.npz file"),
        ("3", r"must hold a list of lists"),
        ({"train": 3}, r"must hold a list of lists"),
        ({"train": [[1]]}, r"has the parts train, expected"),
        ({"train": [[1]], "test": [[2]], "tset": [[3]]}, r"has the parts test, train, tset, expected"),
        ({"train": [[1], [3]], "test": [[2]]}, r"all parts must list the same clients"),
        ([], r"all parts must list the same clients, at least one"),
        ([1, 2], r"the owned list of client 0 must be a flat list of whole numbers"),
        ([[1], [1.5]], r"client 1 must be a flat list of whole numbers"),
        ([[1], ["2"]], r"client 1 must be a flat list of whole numbers"),
        ([[[1], [2, 3]]], r"client 0 must be a flat list of whole numbers"),
        ([[1], [True]], r"client 1 must be a flat list of whole numbers"),
        ([[1], [9]], r"position 9 is outside 0\.\.8"),
        ([[1], [-1]], r"position -1 is outside 0\.\.8"),
        ([[1, 2], [3, 2]], r"sample 2 is listed more than once"),
        ({"train": [[1]], "test": [[1]]}, r"sample 1 is listed more than once"),
        ([[1], []], r"client 1 has 0 samples, fewer than partition\.min_samples=1"),
    ],
)
def test_bad_index(tmp_path: Path, content: Any, message: str) -> None:
    config = PartitionConfig("index", file=index(tmp_path, content), min_samples=1)
    with pytest.raises(DataError, match=message) as error:
        partition_samples(made([0] * 9), config, 0)
    assert "\n" not in str(error.value)


def test_bad_index_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"partition\.file=.*absent\.json is missing or not a file"):
        read_index(tmp_path / "absent.json", 9)
    np.savez(tmp_path / "a.npz", arr_0=np.array([1]), arr_2=np.array([2]))
    with pytest.raises(DataError, match="must be numbered 0 to 1"):
        read_index(tmp_path / "a.npz", 9)
    np.savez(tmp_path / "b.npz", other=np.array([1]))
    with pytest.raises(DataError, match="has an array 'other', expected arr_0"):
        read_index(tmp_path / "b.npz", 9)
    np.savez(tmp_path / "c.npz", np.array([1, None]))
    with pytest.raises(DataError, match="arr_0 holds Python objects"):
        read_index(tmp_path / "c.npz", 9)
    with pytest.raises(DataError, match=r"lists 1 clients, fewer than partition\.num_clients=2"):
        read_index(index(tmp_path, [[1]]), 9, 2)
