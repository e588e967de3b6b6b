"""Settings to the data of all clients, and the settings files."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedpers.data import PARTS, DatasetConfig, FederatedData, PartitionConfig, SplitConfig, load_federated
from fedpers.data.split import take_public
from fedpers.errors import ConfigError, DataError
from fedpers.settings.base import choice_options
from fedpers.tasks import Regression


def disjoint(data: FederatedData) -> bool:
    used = torch.cat([positions for part in PARTS for positions in data.part(part)])
    return len(used.unique()) == len(used)


@pytest.fixture
def arrays(tmp_path: Path) -> str:
    """200 samples of 4 classes in 5 features, of 8 owners; the first 120 are the official training part."""
    rng = np.random.default_rng(0)
    y = np.arange(200) % 4
    path = tmp_path / "arrays.npz"
    np.savez(path, x=rng.normal(size=(200, 5)), y=y, who=np.arange(200) % 8, n=120)
    return str(path)


@pytest.mark.parametrize("name", ["iid", "dirichlet", "pathological", "quantity"])
def test_digits_by_default(name: str) -> None:
    config = PartitionConfig(name)
    data = load_federated(DatasetConfig(), config, SplitConfig(), 0)
    assert data.num_clients == 10
    assert data.num_classes == 10
    assert data.name == "digits"
    assert disjoint(data)
    assert all(data.sizes(part).min() >= 1 for part in PARTS)
    assert sum(data.sizes(part) for part in PARTS).min() >= 40  # type: ignore[union-attr]
    again = load_federated(DatasetConfig(), config, SplitConfig(), 0)
    assert again.checksum == data.checksum
    assert load_federated(DatasetConfig(), config, SplitConfig(), 1).checksum != data.checksum


def test_own_seed_fixes_the_data() -> None:
    config = PartitionConfig("iid", 4, seed=7)
    checksums = {load_federated(DatasetConfig(), config, SplitConfig(), seed).checksum for seed in range(3)}
    assert len(checksums) == 1
    assert load_federated(DatasetConfig(), PartitionConfig("iid", 4), SplitConfig(), 7).checksum in checksums


@pytest.mark.parametrize("name", ["iid", "dirichlet", "pathological", "quantity", "natural"])
def test_official(arrays: str, name: str) -> None:
    dataset = DatasetConfig("npz", arrays, client="who", n_train="n")
    partition = PartitionConfig(name, 4, alpha=1.0, min_samples=8)
    data = load_federated(dataset, partition, SplitConfig("official"), 3)
    assert data.num_clients == 4
    assert disjoint(data)
    assert torch.cat([*data.train, *data.validation]).max() < 120 <= torch.cat(list(data.test)).min()
    if name == "pathological":  # a client is tested on its own classes
        counts = data.label_counts("train") + data.label_counts("validation")
        assert ((data.label_counts("test") > 0) <= (counts > 0)).all()


def test_natural_one_class_clients(arrays: str) -> None:
    dataset = DatasetConfig("npz", arrays, client="who")  # owner k has class k % 4 only
    data = load_federated(dataset, PartitionConfig("natural", min_samples=10), SplitConfig(), 0)
    assert data.num_clients == 8
    assert ((data.label_counts("train") > 0).sum(1) == 1).all()


def test_index_file_with_parts_bypasses_the_split(tmp_path: Path) -> None:
    file = tmp_path / "lists.json"
    lists = {"train": [[0, 3], [1]], "validation": [[4], [7]], "test": [[5], [6, 2]]}
    file.write_text(json.dumps(lists))
    config = PartitionConfig("index", file=str(file), min_samples=3)
    for split in ("fractions", "official"):
        data = load_federated(DatasetConfig(), config, SplitConfig(split), 0)
        assert {part: [positions.tolist() for positions in data.part(part)] for part in PARTS} == lists
        assert data.train[0].dtype == torch.int64
    with pytest.raises(DataError, match=r"client 0 has 4 samples, fewer than partition\.min_samples=5"):
        load_federated(DatasetConfig(), PartitionConfig("index", file=str(file), min_samples=5), SplitConfig(), 0)
    lists["test"][0] = []
    file.write_text(json.dumps(lists))
    with pytest.raises(DataError, match="the test list of client 0 is empty"):
        load_federated(DatasetConfig(), config, SplitConfig(), 0)


def test_index_file_without_validation(tmp_path: Path) -> None:
    file = tmp_path / "lists.json"
    file.write_text(json.dumps({"train": [list(range(20))], "test": [[30, 31]]}))
    config = PartitionConfig("index", file=str(file), min_samples=10)
    data = load_federated(DatasetConfig(), config, SplitConfig(validation=0.1), 0)
    assert data.test[0].tolist() == [30, 31]
    assert len(data.validation[0]) == 2
    assert sorted([*data.train[0].tolist(), *data.validation[0].tolist()]) == list(range(20))


def test_plain_index_file_is_split(tmp_path: Path, arrays: str) -> None:
    file = tmp_path / "lists.json"
    file.write_text(json.dumps([list(range(0, 40)), list(range(40, 130))]))
    config = PartitionConfig("index", file=str(file))
    data = load_federated(DatasetConfig("npz", arrays), config, SplitConfig(), 0)
    assert [data.sizes(part).tolist() for part in PARTS] == [[24, 53], [6, 14], [10, 23]]
    with pytest.raises(DataError, match=r"position 120 is outside 0\.\.119, the samples to divide"):
        load_federated(DatasetConfig("npz", arrays, n_train="n"), config, SplitConfig("official"), 0)


def test_official_needs_an_official_part() -> None:
    with pytest.raises(ConfigError, match=r"split=official: expected fractions, because digits has no official test"):
        load_federated(DatasetConfig(), PartitionConfig(), SplitConfig("official"), 0)


def test_more_clients_than_samples() -> None:
    with pytest.raises(DataError, match=r"partition\.num_clients=1798 is more than the 1797 samples of digits"):
        load_federated(DatasetConfig(), PartitionConfig("dirichlet", 1798), SplitConfig(), 0)


@pytest.mark.parametrize("name", ["pfllib_dirichlet", "pfllib_pathological"])
def test_pfllibs_divisions_name_options_that_they_have(name: str) -> None:
    with pytest.raises(DataError, match=rf"^partition={name}: .* lower partition\.num_clients") as error:
        load_federated(DatasetConfig(), PartitionConfig(name, 900), SplitConfig(), 0)
    keys = {key.removeprefix("partition.") for key in re.findall(r"partition\.\w+", str(error.value))}
    assert keys <= choice_options(PartitionConfig, name).keys()


# --- public samples and unseen clients ---


def test_public_samples_leave_validation_and_test_as_they_are() -> None:
    partition = PartitionConfig("dirichlet", 6, alpha=0.5)
    plain = load_federated(DatasetConfig(), partition, SplitConfig(), 3)
    data = load_federated(DatasetConfig(), partition, SplitConfig(public=0.3, unseen=2), 3)
    assert plain.public is None
    assert plain.unseen == ()
    for part in ("validation", "test"):
        assert [indices.tolist() for indices in data.part(part)] == [indices.tolist() for indices in plain.part(part)]  # type: ignore[arg-type]
    assert data.public is not None
    assert len(data.unseen) == 2
    trained = torch.cat([plain.train[k] for k in range(6) if k not in data.unseen])
    assert len(data.public) == round(0.3 * len(trained))
    assert set(data.public.tolist()) <= set(trained.tolist())
    for k in range(6):
        kept = [i for i in plain.train[k].tolist() if i not in set(data.public.tolist())]
        assert data.train[k].tolist() == kept
    assert data.checksum != plain.checksum
    again = load_federated(DatasetConfig(), partition, SplitConfig(public=0.3, unseen=2), 3)
    assert again.checksum == data.checksum
    other = load_federated(DatasetConfig(), partition, SplitConfig(public=0.3), 3)
    assert data.checksum != other.checksum != plain.checksum


def test_public_samples_of_an_index_file(tmp_path: Path) -> None:
    file = tmp_path / "lists.json"
    file.write_text(json.dumps({"train": [[0, 1, 2], [3, 4, 5, 6]], "validation": [[7], [8]], "test": [[9], [10]]}))
    config = PartitionConfig("index", file=str(file), min_samples=1)
    data = load_federated(DatasetConfig(), config, SplitConfig(public=5 / 7), 0)
    assert data.public is not None
    assert data.sizes().tolist() == [1, 1]
    assert sorted([*data.public.tolist(), *data.train[0].tolist(), *data.train[1].tolist()]) == list(range(7))
    message = (
        r"split\.public=0\.9: expected at most 0\.7142, because of the 7 training samples each of the 2 clients keeps"
    )
    with pytest.raises(ConfigError, match=message):
        load_federated(DatasetConfig(), config, SplitConfig(public=0.9), 0)


@settings(max_examples=40, deadline=None)
@given(
    lists=st.lists(st.sets(st.integers(0, 30), min_size=1, max_size=20), min_size=1, max_size=5),
    share=st.floats(0.01, 0.99),
    unseen=st.sets(st.integers(0, 4), max_size=3),
    seed=st.integers(0, 100),
)
def test_public_of_lists_that_share_samples(lists: list[set[int]], share: float, unseen: set[int], seed: int) -> None:
    train = [np.array(sorted(samples)) for samples in lists]
    assume(any(k not in unseen for k in range(len(train))))
    trained = {i for k, samples in enumerate(lists) if k not in unseen for i in samples}
    try:
        left, public = take_public(train, sorted(unseen), SplitConfig(public=share), seed)
    except ConfigError:
        assert max(1, int(share * len(trained) + 0.5)) > len(trained) - len(lists)
        return
    assert public is not None
    assert len(public) == max(1, int(share * len(trained) + 0.5))
    assert set(public.tolist()) <= trained
    for samples, kept in zip(lists, left, strict=True):
        assert len(kept) >= 1
        assert kept.tolist() == sorted(samples - set(public.tolist()))


def test_unseen_clients() -> None:
    drawn = {
        load_federated(DatasetConfig(), PartitionConfig("iid", 8), SplitConfig(unseen=3), s).unseen for s in range(5)
    }
    assert len(drawn) > 1
    assert all(len(set(clients)) == 3 and set(clients) <= set(range(8)) for clients in drawn)
    with pytest.raises(
        ConfigError, match=r"split\.unseen=8: expected a number below 8, the clients, so that one is left to train"
    ):
        load_federated(DatasetConfig(), PartitionConfig("iid", 8), SplitConfig(unseen=8), 0)
    with pytest.raises(
        ConfigError, match=r"split\.unseen=0\.9: expected a share that gives a number below 2, the clients"
    ):
        load_federated(DatasetConfig(), PartitionConfig("iid", 2), SplitConfig(unseen=0.9), 0)
    half = load_federated(DatasetConfig(), PartitionConfig("iid", 10), SplitConfig(unseen=0.25), 0)
    assert len(half.unseen) == 3  # rounded half up, as the sampled clients are


@pytest.mark.parametrize(
    ("lists", "validation", "message"),
    [
        ({"train": [[7], [1, 2]], "test": [[3, 4], [5]]}, 0.1, "client 0 has 1 samples for training, of which one is "),
        ({"train": [[], [1, 2]], "test": [[3, 4], [5]]}, 0.0, "the train list of client 0 is empty"),
        ({"train": [[1], [2]], "test": [[3, 4], []]}, 0.0, "the test list of client 1 is empty"),
    ],
)
def test_an_index_file_with_too_little(
    lists: dict[str, list[list[int]]], validation: float, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "lists.json"
    file.write_text(json.dumps(lists))
    partition = PartitionConfig("index", file=str(file), min_samples=1)
    with pytest.raises(DataError, match=message):
        load_federated(DatasetConfig(), partition, SplitConfig(validation=validation), 0)


# --- targets of a regression ---


@pytest.fixture
def numbers(tmp_path: Path) -> str:
    """120 samples of 3 features with two numbers each, of 6 owners; the first 80 are the official training part."""
    rng = np.random.default_rng(0)
    path = tmp_path / "numbers.npz"
    np.savez(path, x=rng.normal(size=(120, 3)), y=rng.normal(size=(120, 2)), who=np.arange(120) % 6, n=80)
    return str(path)


@pytest.mark.parametrize("name", ["iid", "quantity", "natural", "index"])
def test_numbers_are_divided_without_classes(numbers: str, name: str, tmp_path: Path) -> None:
    file = tmp_path / "lists.json"
    file.write_text(json.dumps([list(range(k, 120, 6)) for k in range(6)]))
    partition = PartitionConfig(name, None if name in ("natural", "index") else 6, min_samples=10, file=str(file))
    data = load_federated(DatasetConfig("npz", numbers, client="who"), partition, SplitConfig(public=0.1), 0)
    assert (data.num_clients, data.num_classes, data.task) == (6, 2, Regression())
    assert tuple(data.y.shape) == (120, 2)
    assert disjoint(data)
    assert data.public is not None
    assert sum(len(positions) for part in PARTS for positions in data.part(part)) + len(data.public) == 120
    assert data.label_counts().tolist() == data.sizes().unsqueeze(1).tolist()


@pytest.mark.parametrize("name", ["dirichlet", "pathological", "label_sets"])
def test_numbers_have_no_classes_to_divide(numbers: str, name: str) -> None:
    message = rf"partition={name}: expected one of .*iid, index, natural, .*because numbers has no class labels\."
    with pytest.raises(ConfigError, match=message):
        load_federated(DatasetConfig("npz", numbers), PartitionConfig(name, 6), SplitConfig(), 0)


def test_numbers_have_no_mix_of_labels_to_deal_by(numbers: str) -> None:
    dataset = DatasetConfig("npz", numbers, n_train="n")
    with pytest.raises(ConfigError, match=r"split=official: expected fractions, because numbers has no class labels\."):
        load_federated(dataset, PartitionConfig("iid", 4), SplitConfig("official"), 0)


# --- settings that do not fit the data ---


@pytest.mark.parametrize(
    ("dataset", "partition", "split", "message"),
    [
        (
            "synthetic_ratings",
            "iid",
            SplitConfig("leave_one_out"),
            r"partition=iid: expected user, because synthetic_rat",
        ),
        (
            "synthetic_ratings",
            "user",
            SplitConfig(),
            r"split=fractions: expected leave_one_out, because synthetic_rati",
        ),
        (
            "synthetic_ratings",
            "user",
            SplitConfig("leave_one_out", public=0.1),
            r"split\.public=0\.1: expected 0, because",
        ),
        (
            "digits",
            "user",
            SplitConfig(),
            r"partition=user: expected a division of samples, .* digits holds no ratings",
        ),
        (
            "digits",
            "iid",
            SplitConfig("leave_one_out"),
            r"split=leave_one_out: expected fractions or official, because d",
        ),
        ("digits", "label_sets", SplitConfig(unseen=1), r"split\.unseen=1: expected 0 with partition=label_sets"),
    ],
)
def test_settings_that_do_not_fit(dataset: str, partition: str, split: SplitConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_federated(DatasetConfig(dataset), PartitionConfig(partition), split, 0)
