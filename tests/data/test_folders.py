"""Folders and files that other libraries wrote, read as they lie; and what is no such folder, in a sentence."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from fedpers.data import DatasetConfig, FederatedData, PartitionConfig, SplitConfig
from fedpers.data.datasets import load_dataset
from fedpers.data.load import load_federated
from fedpers.errors import ConfigError, DataError

RNG = np.random.default_rng(0)


def natural(config: DatasetConfig, split: str = "official", **values: Any) -> FederatedData:
    return load_federated(config, PartitionConfig("natural", min_samples=2), SplitConfig(split, **values), 0)


# ---------------------------------------------------------------------- PFLlib


def save_as_pfllib(path: Path, x: Any, y: Any) -> None:
    """As its ``save_file`` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez_compressed(file, data={"x": x, "y": y})


@pytest.fixture
def pfllib_folder(tmp_path: Path) -> Path:
    root = tmp_path / "MNIST"
    for part, size in (("train", 6), ("test", 3)):
        for client in range(3):
            x = RNG.normal(size=(size + client, 1, 4, 4)).astype(np.float32)
            save_as_pfllib(root / part / f"{client}.npz", x, np.arange(size + client) % 2)
    (root / "config.json").write_text(json.dumps({"num_clients": 3, "num_classes": 2, "alpha": 0.1}))
    return root


def test_a_folder_of_pfllib_is_what_its_files_hold(pfllib_folder: Path) -> None:
    data = natural(DatasetConfig("pfllib", root=str(pfllib_folder)), validation=0.0)
    assert data.client_names == () or data.client_names == ("0", "1", "2")
    for client in range(3):
        for part in ("train", "test"):
            with np.load(pfllib_folder / part / f"{client}.npz", allow_pickle=True) as file:
                stored = file["data"].item()
            positions = data.part(part)[client]  # type: ignore[arg-type]
            assert torch.equal(data.x[positions], torch.from_numpy(stored["x"]))
            assert data.y[positions].tolist() == stored["y"].tolist()
        assert len(data.validation[client]) == 0


class Wanting:
    """A pickle that wants to run something."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("it-ran",)


def test_a_pickle_that_wants_to_run_something_is_refused(
    pfllib_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    file = pfllib_folder / "train" / "1.npz"
    save_as_pfllib(file, Wanting(), np.arange(2))
    with pytest.raises(DataError, match=r"train/1\.npz cannot be read \(it names (posix|os|nt)\.mkdir, which is not"):
        load_dataset(DatasetConfig("pfllib", root=str(pfllib_folder)))
    assert not Path("it-ran").exists()
    with pytest.raises(FileNotFoundError):  # whereas it would have run
        os.rmdir("it-ran")
    pickle.loads(pickle.dumps(Wanting()))
    os.rmdir("it-ran")


def spoiled(folder: Path, how: str) -> None:
    if how == "no folder":
        folder.rename(folder.with_name("elsewhere"))
    elif how == "a client without a file":
        (folder / "test" / "2.npz").unlink()
    elif how == "more clients than stated":
        save_as_pfllib(folder / "train" / "3.npz", np.zeros((2, 1, 4, 4)), np.arange(2))
    elif how == "cut in half":
        file = folder / "train" / "0.npz"
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif how == "another shape":
        save_as_pfllib(folder / "test" / "0.npz", np.zeros((2, 3, 4, 4)), np.arange(2))
    elif how == "ragged":
        save_as_pfllib(folder / "test" / "0.npz", [[1], [1, 2]], np.arange(2))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no folder", r"dataset\.root=.*MNIST is missing or not a folder"),
        ("a client without a file", r"there are 3 clients, but test/2\.npz is missing"),
        ("more clients than stated", r"there are 3 clients, but train has more files"),
        ("cut in half", r"train/0\.npz cannot be read"),
        ("another shape", r"clients differ in the shape of a sample: \(1, 4, 4\), \(3, 4, 4\)"),
        ("ragged", r"test/0\.npz"),
    ],
)
def test_a_damaged_folder_of_pfllib_is_a_sentence(pfllib_folder: Path, how: str, message: str) -> None:
    spoiled(pfllib_folder, how)
    with pytest.raises(DataError, match=message):
        load_dataset(DatasetConfig("pfllib", root=str(pfllib_folder)))


# ------------------------------------------------------------------------ LEAF


def leaf_file(path: Path, users: dict[str, tuple[list[Any], list[Any]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "users": list(users),
        "num_samples": [len(y) for _, y in users.values()],
        "user_data": {user: {"x": x, "y": y} for user, (x, y) in users.items()},
    }
    path.write_text(json.dumps(content))


def test_files_of_leaf_name_users_and_parts(tmp_path: Path) -> None:
    pictures = RNG.random((8, 64)).round(3).tolist()
    for part in ("train", "test"):
        leaf_file(tmp_path / "data" / part / "a.json", {"f0_12": (pictures[:5], [0, 1, 2, 0, 1])})
        leaf_file(tmp_path / "data" / part / "b.json", {"f1_07": (pictures[5:], [2.0, 1.0, 0.0])})
    data = natural(DatasetConfig("leaf", root=str(tmp_path)))
    assert data.x.shape == (16, 1, 8, 8)
    assert data.client_names == ("f0_12", "f1_07")
    assert data.y[data.test[1]].tolist() == [2, 1, 0]
    whole = load_dataset(DatasetConfig("leaf", root=str(tmp_path / "data" / "train" / "a.json")))
    assert whole.train_size is None
    assert len(whole) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"users": ["a"], "user_data": {"a": {"x": [[1', r"a\.json is missing or damaged"),
        ("[]", r"a\.json is not a file of LEAF"),
        ('{"users": ["a"], "user_data": {}}', r"user a has no x and y"),
        ('{"users": ["a"], "user_data": {"a": {"x": [[1]], "y": []}}}', r"user a has 1 inputs but 0 labels"),
        ('{"users": ["a"], "user_data": {"a": {"x": ["so"], "y": [1]}}}', r"is not 2 characters of text with one"),
        ('{"users": ["a"], "user_data": {"a": {"x": [[1], [1, 2]], "y": [1, 0]}}}', r"no lists of numbers"),
    ],
)
def test_a_damaged_file_of_leaf_is_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=message):
        load_dataset(DatasetConfig("leaf", root=str(tmp_path)))


# ---------------------------------------------------------------------- tables


def table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "age": np.arange(12) * 1.5,
            "income": np.arange(12) ** 2,
            "label": list("abc") * 4,
            "site": ["Ulm", "Kiel"] * 6,
        }
    )


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "semicolons", "parquet"])
def test_columns_of_a_table_are_features_label_and_client(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"patients.{'csv' if kind == 'semicolons' else kind}"
    rows = table()
    if kind == "parquet":
        rows.to_parquet(path)
    else:
        rows.to_csv(path, index=False, sep=";" if kind == "semicolons" else ",")
    name = "parquet" if kind == "parquet" else "csv"
    data = load_dataset(DatasetConfig(name, root=str(path), client="site"))
    assert data.name == "patients"
    assert data.class_names == ("a", "b", "c")
    assert data.owner_names == ("Kiel", "Ulm")
    assert data.x.shape == (12, 2)
    torch.testing.assert_close(data.x.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(data.x.std(0, correction=0), torch.ones(2))
    domains = load_dataset(DatasetConfig(name, root=str(path), domain="site"))
    assert domains.domain_names == ("Kiel", "Ulm")
    assert domains.domain is not None
    assert domains.domain.tolist() == [1, 0] * 6
    assert domains.owner is None
    assert torch.equal(domains.x, data.x)
    one = load_dataset(DatasetConfig(name, root=str(path), label="age", features=("income",)))
    assert one.task.name == "regression"
    assert one.x.shape == (12, 1)


def test_what_a_table_lacks_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    table().to_csv(path, index=False)
    root = str(path)
    with pytest.raises(ConfigError, match=r"dataset\.label=lable: expected a column of .*did you mean 'label'"):
        load_dataset(DatasetConfig("csv", root=root, label="lable"))
    with pytest.raises(ConfigError, match=r"dataset\.domain=sites: expected a column of .*did you mean 'site'"):
        load_dataset(DatasetConfig("csv", root=root, domain="sites"))
    with pytest.raises(ConfigError, match=r"dataset\.features=wage: expected a column"):
        load_dataset(DatasetConfig("csv", root=root, features=("wage",)))
    with pytest.raises(DataError, match=r"column 'site' has '\w+' in row 1, but features are numbers"):
        load_dataset(DatasetConfig("csv", root=root))
    rows = table().astype({"age": object})
    rows.loc[6, "age"] = "oops"
    rows.to_csv(path, index=False)
    with pytest.raises(DataError, match=r"column 'age' has 'oops' in row 7, but features are numbers"):
        load_dataset(DatasetConfig("csv", root=root, client="site"))
    rows = table()
    rows.loc[3, "age"] = np.nan
    rows.to_csv(path, index=False)
    with pytest.raises(DataError, match=r"column 'age' has no value in row 4"):
        load_dataset(DatasetConfig("csv", root=root, client="site"))
    with pytest.raises(DataError, match=r"gone\.csv is missing"):
        load_dataset(DatasetConfig("csv", root=str(tmp_path / "gone.csv")))
    path.write_bytes(b"PAR1 not a table")
    with pytest.raises(DataError, match=r"cannot be read as parquet"):
        load_dataset(DatasetConfig("parquet", root=root))


def test_clients_are_what_stands_there(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    for names in (["3e1", "30", "41"], ["12345678901234567890123", "12345678901234567890124", "7"], ["a", "b ", " c"]):
        path.write_text("age,site,label\n" + "".join(f"1,{name},x \n2,{name},y\n" for name in names))
        data = load_dataset(DatasetConfig("csv", root=str(path), client="site"))
        assert data.owner_names == tuple(sorted(name.strip() for name in names))
        assert data.class_names == ("x", "y")


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_is_that_of_the_header(separator: str, tmp_path: Path) -> None:
    lines = [["feature1", "feature2", "label"], ["1", "2", "dog"], ["3", "5", "eel"]]
    (tmp_path / "p.csv").write_text("\n".join(separator.join(line) for line in lines))
    data = load_dataset(DatasetConfig("csv", root=str(tmp_path / "p.csv")))
    assert data.class_names == ("dog", "eel")
    assert data.x.shape == (2, 2)


def test_rows_with_more_cells_than_the_header_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("label,a,b\n1,1,2,3\n0,1,2,4\n")
    with pytest.raises(DataError, match=r"p\.csv: rows have more cells than the header\."):
        load_dataset(DatasetConfig("csv", root=str(tmp_path / "p.csv")))


def test_the_numbers_of_rows_that_pandas_writes_are_no_features(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "p.csv"
    table().to_csv(path)
    data = load_dataset(DatasetConfig("csv", root=str(path), client="site"))
    assert data.x.shape == (12, 2)
    assert "p.csv: column 'Unnamed: 0' has no name of its own and is left out" in caplog.text
    named = load_dataset(DatasetConfig("csv", root=str(path), client="site", features=("Unnamed: 0", "age")))
    assert named.x.shape == (12, 2)
    table().rename_axis("__index_level_0__").reset_index().to_parquet(tmp_path / "p.parquet")
    data = load_dataset(DatasetConfig("parquet", root=str(tmp_path / "p.parquet"), client="site"))
    assert data.x.shape == (12, 2)


@pytest.mark.parametrize("features", [("age", "label"), ("age", "age")])
def test_the_label_is_no_feature(features: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.features=\['age', .*names of columns without the label 'label'"):
        DatasetConfig("csv", root="p.csv", features=features)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_whole_numbers_of_a_table_may_be_predicted_as_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    path = tmp_path / f"p.{kind}"
    rows = pd.DataFrame({"a": np.arange(1500.0), "age": np.arange(1500) % 90, "id": np.arange(1500)})
    rows = rows.assign(half=rows.age / 2, whole=rows.age * 1.0, word="old")
    rows.to_csv(path, index=False) if kind == "csv" else rows.to_parquet(path)

    def loaded(label: str, task: Any = None) -> Any:
        return load_dataset(DatasetConfig(kind, root=str(path), label=label, features=("a",), task=task))

    assert (loaded("age").task.name, loaded("age").num_classes) == ("classification", 90)
    assert not caplog.records
    data = loaded("age", "regression")
    assert (data.task.name, data.num_classes, data.y.shape) == ("regression", 1, (1500, 1))
    assert data.y.flatten().tolist() == rows.age.tolist()
    assert loaded("id").num_classes == 1500
    assert "p." in caplog.text
    assert "the labels are 1500 classes; dataset.task=regression predicts them as numbers" in caplog.text
    assert loaded("half").task.name == "regression"
    assert loaded("whole", "classification").num_classes == 90
    for label, task, message in (
        ("half", "classification", r"dataset\.task=classification: expected regression, because column 'half' of"),
        ("word", "regression", r"dataset\.task=regression: expected classification, because column 'word' of"),
    ):
        with pytest.raises(ConfigError, match=message):
            loaded(label, task)
    with pytest.raises(ConfigError, match=r"dataset\.task=null: expected classification or regression, because column"):
        loaded("whole")


# -------------------------------------------------------------------- pictures


def picture(path: Path, value: int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (9, 7), value if mode == "L" else (value, 0, 255)).save(path)


def test_folders_of_classes_and_domains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for domain in ("photo", "sketch"):
        for number, kind in enumerate(("dog", "horse")):
            for k in range(3):
                picture(tmp_path / domain / kind / f"{k}.png", 40 * k + number)
    (tmp_path / "photo" / "dog" / "notes.txt").write_text("no picture")
    (tmp_path / "photo" / ".DS_Store").write_text("")
    data = load_dataset(DatasetConfig("images", root=str(tmp_path), size=8))
    assert data.x.shape == (12, 3, 8, 8)
    assert data.class_names == ("dog", "horse")
    assert data.owner_names == data.domain_names == ("photo", "sketch")
    assert data.owner is not None
    assert data.domain is not None
    assert torch.equal(data.owner, data.domain)
    assert "1 file is no picture of a class, left out: photo/dog/notes.txt" in caplog.text
    alone = load_dataset(DatasetConfig("images", root=str(tmp_path / "photo"), size=8))
    assert alone.owner is None
    assert alone.domain is None
    assert len(alone) == 6
    shutil.rmtree(tmp_path / "sketch" / "horse")  # a domain may lack a class
    fewer = load_dataset(DatasetConfig("images", root=str(tmp_path), size=8))
    assert (len(fewer), fewer.class_names, fewer.domain_names) == (9, ("dog", "horse"), ("photo", "sketch"))


def test_grey_pictures_have_one_channel_and_damaged_ones_are_named(tmp_path: Path) -> None:
    for kind in ("a", "b"):
        picture(tmp_path / kind / "0.png", 100, "L")
    assert load_dataset(DatasetConfig("images", root=str(tmp_path), size=8)).x.shape == (2, 1, 8, 8)
    (tmp_path / "b" / "1.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(DataError, match=r"b/1\.png is damaged"):
        load_dataset(DatasetConfig("images", root=str(tmp_path)))
    with pytest.raises(DataError, match=r"has no pictures in folders CLASS/"):
        load_dataset(DatasetConfig("images", root=str(tmp_path / "a")))
    with pytest.raises(DataError, match=r"gone is missing or not a folder"):
        load_dataset(DatasetConfig("images", root=str(tmp_path / "gone")))


# ---------------------------------------------------------------- Hugging Face


def test_a_saved_set_of_hugging_face(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    pictures = [Image.new("L", (8, 8), 20 * k) for k in range(6)]
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1] * 3}, features=features)
    datasets.DatasetDict({"train": rows, "test": rows.select([0, 1])}).save_to_disk(str(tmp_path / "set"))
    data = load_dataset(DatasetConfig("hf", path=str(tmp_path / "set"), size=8))
    assert data.x.shape == (8, 1, 8, 8)
    assert data.train_size == 6
    numbers = datasets.Dataset.from_dict({"a": [0.0, 1.0, 2.0], "label": [0, 1, 0], "site": ["x", "y", "x"]})
    numbers.save_to_disk(str(tmp_path / "numbers"))
    data = load_dataset(DatasetConfig("hf", path=str(tmp_path / "numbers"), client="site", domain="site"))
    assert data.owner_names == data.domain_names == ("x", "y")
    assert data.train_size is None
    with pytest.raises(ConfigError, match=r"dataset\.client=sites: expected a column"):
        load_dataset(DatasetConfig("hf", path=str(tmp_path / "set"), client="sites"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"dataset\.path=.*empty cannot be loaded"):
        load_dataset(DatasetConfig("hf", path=str(tmp_path / "empty")))


@pytest.mark.parametrize("pictures", [True, False])
def test_names_that_a_set_of_hugging_face_has_are_kept(tmp_path: Path, pictures: bool) -> None:
    import datasets

    kinds, sites = datasets.ClassLabel(names=["no", "maybe", "yes"]), datasets.ClassLabel(names=["Ulm", "Kiel"])
    inputs = [Image.new("L", (8, 8), 20 * k) for k in range(6)] if pictures else [float(k) for k in range(6)]
    kind = datasets.Image() if pictures else datasets.Value("float64")
    rows = datasets.Dataset.from_dict(
        {"input": inputs, "label": [0, 2] * 3, "site": [0, 1, 1] * 2},
        features=datasets.Features({"input": kind, "label": kinds, "site": sites}),
    )
    rows.save_to_disk(str(tmp_path / "set"))
    data = load_dataset(DatasetConfig("hf", path=str(tmp_path / "set"), client="site", size=8))
    assert data.class_names == ("no", "maybe", "yes")  # also the one that no sample has
    assert (data.num_classes, data.y.tolist()) == (3, [0, 2] * 3)
    assert [data.owner_name(sample) for sample in range(3)] == ["Ulm", "Kiel", "Kiel"]
    numbers = load_dataset(DatasetConfig("hf", path=str(tmp_path / "set"), features=None if pictures else ("input",),
                                         size=8, task="regression"))  # fmt: skip
    assert (numbers.task.name, numbers.class_names, numbers.num_classes) == ("regression", (), 1)


# ------------------------------------------------------------------ owners' tests


def test_official_test_samples_go_to_their_owners(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    client = np.array(["Ulm"] * 10 + ["Kiel"] * 10 + ["Bonn"] * 5 + ["Ulm"] * 2 + ["Kiel"] * 3 + ["Mainz"] * 2)
    y = np.arange(32) % 2
    path = tmp_path / "d.npz"
    np.savez(path, x=RNG.normal(size=(32, 3)), y=y, client=client, n=np.array(25))
    config = DatasetConfig("npz", root=str(path), client="client", n_train="n")
    data = natural(config)
    assert data.client_names == ("Kiel", "Ulm")
    assert [positions.tolist() for positions in data.test] == [[27, 28, 29], [25, 26]]
    assert "1 of 3 clients (Bonn) have no official test samples and are left out" in caplog.text
    assert "1 of 3 clients (Mainz) have no official training samples and are left out" in caplog.text


def test_pfllibs_divisions_are_those_that_were_compared_with_its_files() -> None:
    """Digests for made-up labels of the code whose lists for MNIST, CIFAR and Fashion-MNIST are PFLlib's own."""
    import hashlib

    from fedpers.data.partitions.pfllib import divide_as_pfllib

    y = np.random.RandomState(0).randint(0, 10, 4000)
    digests = {}
    for name in ("pfllib_dirichlet", "pfllib_pathological"):
        parts = divide_as_pfllib(y, 10, PartitionConfig(name, 20, seed=1), 5)
        owned = np.concatenate([positions for lists in parts.values() for positions in lists])
        assert sorted(owned.tolist()) == list(range(4000))
        text = json.dumps({part: [positions.tolist() for positions in lists] for part, lists in parts.items()})
        digests[name] = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    assert digests == {"pfllib_dirichlet": "fefa7dfbc3216793", "pfllib_pathological": "70ccdb3faf964193"}


@pytest.mark.parametrize("seed", range(3))
def test_damaged_bytes_of_a_pickle_are_a_sentence(tmp_path: Path, seed: int) -> None:
    """Whatever stands there, nothing of it reaches NumPy's own way to restore arrays."""
    draws = np.random.default_rng(seed)
    root = tmp_path / "D"
    for part in ("train", "test"):
        save_as_pfllib(root / part / "0.npz", np.zeros((4, 3), np.float32), np.arange(4) % 2)
    file = root / "train" / "0.npz"
    with zipfile.ZipFile(file) as packed:
        whole = packed.read("data.npy")
    for _ in range(300):
        broken = bytearray(whole)
        for place in draws.integers(128, len(whole), 2):
            broken[place] = draws.integers(256)
        with zipfile.ZipFile(file, "w") as packed:
            packed.writestr("data.npy", bytes(broken))
        with contextlib.suppress(DataError):
            load_dataset(DatasetConfig("pfllib", root=str(root)))


def test_a_nested_folder_and_deep_pixels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for kind in ("cat", "dog"):
        for k in range(2):
            picture(tmp_path / kind / f"{k}.png", 40 * k)
    picture(tmp_path / "dog" / "old" / "x.png", 9)
    data = load_dataset(DatasetConfig("images", root=str(tmp_path), size=8))
    assert (len(data), data.class_names, data.owner) == (4, ("cat", "dog"), None)
    assert "dog/old/x.png" in caplog.text
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "cat" / "deep.png")
    with pytest.raises(DataError, match=r"cat/deep\.png has I(;16)? pixels, expected a picture of 8 bits"):
        load_dataset(DatasetConfig("images", root=str(tmp_path), size=8))
