"""Networks and data of a user's own on the command line, as typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedpers.app import _main
from fedpers.app.compose import composed
from fedpers.app.partition import data_of
from tests.app.test_cli import error_of, fedpers

MODULE = """
import numpy as np
import torch
from torch import nn
from fedpers.data import FederatedData

class Net(nn.Module):
    def __init__(self, num_classes, width=8):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, width), nn.ReLU())
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.body(x))

class Frozen(Net):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.requires_grad_(False)

class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Flatten()

    def forward(self, x):
        return self.head(x)[:, :2]

def arrays(n=400, sites=4):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 6)).astype("float32")
    return x, np.where(x[:, 0] > 0, "yes", "no"), np.array(["Ulm", "Kiel", "Bonn", "Mainz"])[np.arange(n) % sites]

def plain():
    return arrays()[:2]

def clients():
    x, y, site = arrays()
    return {name: (x[site == name], y[site == name]) for name in ("Ulm", "Kiel")}

def divided():
    return FederatedData.from_clients(clients())

def parts():
    x, y, site = arrays()
    return [{"train": (x[:200], y[:200]), "test": (x[200:], y[200:])}, {"train": (x, y)}]

def counts():
    x, y, site = arrays()
    return np.round(x * 5).astype(int), y.astype(object), site.astype(object)

def ragged():
    return [[1.0], [1.0, 2.0]], [0, 1]

def several():
    x, y, site = arrays()
    return {"image": x, "age": x[:, :1]}, y

def nobodys():
    x, y, site = arrays()
    return x, y, np.array(["Ulm", None] * 200, dtype=object)

def nothing():
    return 5

def needs(root):
    return root
"""


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine_parts.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("typed", ["dataset=mine_parts:arrays", "dataset.name=mine_parts:arrays"])
def test_own_data_and_network(working_folder: Path, typed: str) -> None:
    (folder,) = fedpers(
        typed, "dataset.arguments.sites=2", "partition=natural", "model.name=mine_parts:Net",
        "model.arguments.width=5", "strategy=fedper", "rounds=3", output=working_folder / "runs",
    )  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["num_clients"] == 2
    assert folder.name.endswith("_fedper_mine_parts.arrays_seed0")  # no file system minds
    assert summary["model"] == "mine_parts:Net"
    assert summary["last"]["test/accuracy"] > 0.6
    clients = pd.read_parquet(folder / "clients.parquet")
    assert list(clients["name"]) == ["Kiel", "Ulm"]
    assert _main(["resume", str(folder), "rounds=4"]) == 2  # names code that would be run
    typed_again = ["dataset.name=mine_parts:arrays", "model.name=mine_parts:Net"]
    assert _main(["resume", str(folder), "rounds=4", *typed_again]) == 0
    assert json.loads((folder / "summary.json").read_text())["rounds_done"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "clients"),
    [
        ("plain partition=iid partition.num_clients=5", 5),
        ("clients partition=natural", 2),
        ("divided partition=natural", 2),
        ("parts partition=natural", 2),
        ("counts partition=natural", 4),
    ],
)
def test_a_function_may_return_arrays_clients_or_everything(working_folder: Path, typed: str, clients: int) -> None:
    (folder,) = fedpers(
        f"dataset=mine_parts:{typed.split()[0]}", *typed.split()[1:], "rounds=1", output=working_folder / "runs"
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["num_clients"] == clients
    assert summary["failures"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("model=mine_parts:Nett", r"model.name=mine_parts:Nett: expected module:Name, but module mine_parts has no"),
        (
            "model=mine_parts:Frozen dataset=mine_parts:arrays partition=natural",
            "model=Frozen: expected a network with parameters that are not frozen in what FedAvgUpdate shares (all)",
        ),
        (
            "model=mine_parts:Fixed dataset=mine_parts:arrays partition=natural",
            "model=Fixed: expected a network that has parameters",
        ),
        ("model=nowhere:Net", r"model.name=nowhere:Net: expected module:Name of a module that can be imported"),
        (
            "model=mine_parts:Net model.arguments.with=3",
            "model.arguments.with=3: expected a parameter of mine_",
        ),
        (
            "model=mine_parts:plain",
            "model.name=mine_parts:plain: expected module:Name of what makes an nn.M",
        ),
        ("dataset=mine_parts:nothing", r"dataset.name=mine_parts:nothing: expected a function that returns (x, y)"),
        (
            "dataset=mine_parts:needs",
            "dataset.arguments.root=None: expected a value, because mine_parts:n",
        ),
        (
            "dataset=mine_parts:divided",
            "partition=dirichlet: expected natural, because mine_parts:divided",
        ),
        ("dataset=mine_parts:ragged", "ragged: x differ in shape"),
        (
            "dataset=mine_parts:several",
            "several: x has several inputs; return the clients, a list or dictionary of (x, y)",
        ),
        ("dataset=mine_parts:nobodys", "nobodys: clients must be whole numbers or text [N], not object [400]"),
        *(
            (f"dataset=mine_parts:{made} partition=natural {setting}={value}", f"{setting}={value}: expected {allowed}")
            for made, setting, value, allowed in (
                ("clients", "partition.num_clients", "2", "null, because mine_parts:clients divides its samples"),
                ("clients", "partition.min_samples", "3", "40, its default, because mine_parts:clients divides"),
                ("clients", "split", "official", "fractions, because mine_parts:clients divides"),
                ("clients", "split.unseen", "1", "0, its default, because mine_parts:clients divides"),
                ("clients", "split.public", "0.1", "0.0, its default, because mine_parts:clients divides"),
                ("divided", "split.test", "0.5", "0.25, its default, because mine_parts:divided divides"),
                ("divided", "partition.num_clients", "1", "null, because mine_parts:divided divides"),
                ("parts", "split.validation", "0.5", "0.15, its default, because mine_parts:parts divides"),
            )
        ),
        ("dataset=digits dataset.arguments.n=3", r"dataset.arguments"),
        ("model=nett", r"or module:Name"),
    ],
)
def test_what_is_wrong_with_them_is_a_sentence(
    working_folder: Path, capsys: pytest.CaptureFixture[str], typed: str, message: str
) -> None:
    assert message in error_of(capsys, *typed.split(), "rounds=1", f"output={working_folder / 'runs'}")


@pytest.mark.slow
def test_clients_of_a_function_are_split_by_the_settings(working_folder: Path) -> None:
    def owned(*settings: str) -> Any:
        return data_of(composed(["dataset=mine_parts:clients", "partition=natural", *settings]))

    usual = owned()
    assert [int(usual.sizes(part)[0]) for part in ("train", "validation", "test")] == [60, 15, 25]
    other = owned("split.validation=0.2", "split.test=0.5")
    assert [int(other.sizes(part)[0]) for part in ("train", "validation", "test")] == [30, 20, 50]
    seeded = owned("seed=1").checksum
    assert seeded != usual.checksum
    assert seeded == owned("partition.seed=1").checksum == owned("partition.seed=1", "seed=2").checksum


@pytest.mark.slow
def test_without_a_part_for_validation_the_last_round_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder,) = fedpers("split.validation=0", "partition.num_clients=5", "partition=iid", "rounds=3", output=tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["selected_round"] == summary["last_round"] == 3
    assert (summary["selected_on"], summary["protocol"]) == ("nothing", "last round")
    assert summary["selected"] == summary["last"]
    assert "no part for validation, so that no round is selected" in capsys.readouterr().out
    part = fedpers("split.validation=0", "partition.num_clients=5", "partition=iid", "rounds=2",
                   output=tmp_path / "part")[0]  # fmt: skip
    assert _main(["resume", str(part), "rounds=3"]) == 0
    assert json.loads((part / "summary.json").read_text())["selected"] == summary["selected"]
    assert _main(["compare", str(folder)]) == 0
    assert "last round" in capsys.readouterr().out


def test_a_module_typed_with_its_ending_is_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    text = error_of(capsys, "model=nets.py:Net")
    assert text == "fedpers: model.name=nets.py:Net: expected the module's name without .py: nets:Net."


@pytest.mark.parametrize("typed", [":Net", "mine_parts:", ".mine_parts:Net", "mine_parts..a:Net"])
def test_half_a_name_is_refused(working_folder: Path, capsys: pytest.CaptureFixture[str], typed: str) -> None:
    assert "module:Name" in error_of(capsys, f"model={typed}", f"output={working_folder / 'runs'}")


def test_a_module_that_raises_is_named_with_the_place(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (working_folder / "raises_parts.py").write_text("from torch import nn\nlayer = nn.Linear(undefined, 3)\n")
    text = error_of(capsys, "model=raises_parts:Net")
    assert "expected module:Name of a module that can be imported (NameError: name 'undefined' is not defined" in text
    assert "raises_parts.py:2" in text


def test_a_network_is_no_class_of_networks(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (working_folder / "made_parts.py").write_text("from torch import nn\nnet = nn.Linear(64, 10)\n")
    text = error_of(capsys, "model=made_parts:net", f"output={working_folder / 'runs'}")
    expected = "expected module:Name of a class or a function that makes a network"
    assert text == f"fedpers: model.name=made_parts:net: {expected}."
