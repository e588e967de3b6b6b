"""Networks that a run leaves behind: they score as the run measured them, wherever its folder is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

import fedpers
import fedpers.run.setup as run_setup
from fedpers.app import _main
from fedpers.client.predictor import Predictor
from fedpers.data import FederatedData
from fedpers.errors import DataError, FedpersError
from fedpers.run import prepare_run
from fedpers.settings import Config, build

SMALL = [
    "partition.num_clients=5",
    "partition.alpha=0.5",
    "runtime.clients_at_once=3",
    "runtime.workers=1",
    "rounds=2",
]
MLP = ["model=mlp", "model.hidden=[8]"]
RATINGS = [
    "dataset=synthetic_ratings", "dataset.num_users=40", "dataset.num_items=300", "rounds=2",
    "runtime.clients_at_once=8", "runtime.workers=1",
]  # fmt: skip
METHODS = {
    "fedavg": [],
    "fedper": [],
    "ditto": [],
    "apfl": [],
    "fedbn": ["model=cnn", "model.norm=batch", "model.width=4", "model.hidden=[16]"],
    "fedrep": [],
    "pfedme": [],
    "gpfl": [],
    "fedselect": [],
    "local": [],
    "lg_fedavg": [],
    "ensemble": [],
    "fedrod": [],
    "fedcp": [],
    "feddbe": [],
    "fedproto": [],
    "fedamp": [],
    "pfedhn": [],
    "clustered": [],
    "fedkd": [],
    "pretrained": [*MLP, "model.pretrained=public", "split.public=0.2"],
    "head_only": [],
    "ifca": [],
    "knnper": [],
    "perfedavg": [],
    "fedavg_ft": [],
    "fedala": [],
    "fedjets": ["strategy.experts=3", "partition=dirichlet", "split=fractions"],
}
NEED_SAMPLES = {"ifca", "knnper", "perfedavg", "fedavg_ft", "fedala", "gpfl", "fedjets", "pretrained", "head_only"}
"""Methods whose clients choose, remember or adapt before they predict; a network pretrained on samples."""
QUICK = ("fedavg", "knnper")


def run(folder: Path, *arguments: str) -> Path:
    """Run the command in this process into `folder`."""
    network = [] if any(argument.startswith("model") for argument in arguments) else MLP
    changed = {argument.partition("=")[0] for argument in arguments}
    small = [setting for setting in [*SMALL, *network] if setting.partition("=")[0] not in changed]
    assert _main([*small, *arguments, f"hydra.run.dir={folder}"]) == 0
    return folder


def data_of(folder: Path) -> FederatedData:
    return prepare_run(build(Config, yaml.safe_load((folder / "config.yaml").read_text()))).data


def accuracy(module: nn.Module, data: FederatedData, client: int) -> float:
    """Share of a client's test samples that a module classifies rightly."""
    positions = data.test[client]
    with torch.no_grad():
        right = module(data.x[positions]).argmax(1) == data.y[positions]
    return float(right.double().mean())


@pytest.fixture
def lose_data(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make that no data set can be loaded any more."""

    def lose() -> None:
        def missing(*args: object) -> FederatedData:
            raise DataError("the data set is not on this machine.")

        monkeypatch.setattr(run_setup, "load_federated", missing)

    return lose


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of FedPer, to be copied or left as it is."""
    return run(tmp_path_factory.mktemp("finished") / "run", "strategy=fedper")


@pytest.mark.parametrize(
    "method", [method if method in QUICK else pytest.param(method, marks=pytest.mark.slow) for method in METHODS]
)
def test_a_clients_network_scores_as_the_run_measured_it(
    method: str, tmp_path: Path, lose_data: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(tmp_path / "run", f"strategy={method}", *METHODS[method])
    data, measured = data_of(folder), pd.read_parquet(folder / "clients.parquet")["test_accuracy_last"]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["strategy"], summary["rounds_done"], summary["failures"]) == (method, 2, 0)
    moved = Path(shutil.move(folder, tmp_path / "elsewhere"))
    with_data = {client: fedpers.load_client(moved, client) for client in range(data.num_clients)}
    assert {c: accuracy(module, data, c) for c, module in with_data.items()} == dict(measured)
    assert not any(module.training or next(module.parameters()).is_cuda for module in with_data.values())
    lose_data()
    if method in NEED_SAMPLES:
        with pytest.raises(FedpersError, match=r"samples of .* are needed .* is not on this machine"):
            fedpers.load_client(moved, 0)
        return
    alone = fedpers.load_client(moved, 1)
    assert accuracy(alone, data, 1) == measured[1]
    expected, values = with_data[1].state_dict(), alone.state_dict()
    assert values.keys() == expected.keys()
    assert all(torch.equal(values[name], expected[name]) for name in values)


def test_a_fine_tuned_network_is_exported_as_it_was_measured(tmp_path: Path, lose_data: Callable[[], None]) -> None:
    folder = run(tmp_path / "run", "strategy=fedper", "strategy.finetune_epochs=1", "rounds=1")
    data, measured = data_of(folder), pd.read_parquet(folder / "clients.parquet")["test_accuracy_last"]
    for client in range(data.num_clients):
        assert accuracy(fedpers.load_client(folder, client), data, client) == measured[client]
    shutil.move(folder, tmp_path / "elsewhere")
    lose_data()
    with pytest.raises(FedpersError, match=r"samples of .* are needed .* is not on this machine"):
        fedpers.load_client(tmp_path / "elsewhere", 0)


def test_a_plain_network_is_itself_and_one_with_more_is_wrapped(finished: Path, tmp_path: Path) -> None:
    assert not isinstance(fedpers.load_client(finished, 0), Predictor)
    folder = run(tmp_path / "run", "strategy=knnper", "rounds=1")
    memory = fedpers.load_client(folder, 0)
    assert isinstance(memory, Predictor)
    assert {"given.memory", "given.labels", "given.known", "given.share"} <= memory.state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedrap", "fedmf", "fedncf", "pfedrec", "fedavg"])
def test_networks_of_users_rank_as_the_run_measured_them(
    method: str, tmp_path: Path, lose_data: Callable[[], None]
) -> None:
    folder = tmp_path / "run"
    assert _main([*RATINGS, f"strategy={method}", f"hydra.run.dir={folder}"]) == 0
    data, table = data_of(folder), pd.read_parquet(folder / "clients.parquet")
    if method != "fedncf":  # which of its users' items is updated follows from their samples
        lose_data()
    for client in (0, 1, data.num_clients - 1):
        module, positions = fedpers.load_client(folder, client), data.test[client]
        with torch.no_grad():
            measured = data.task.measure([module(data.x[positions])], [data.y[positions]], data.num_classes)
        for name, value in measured.items():
            if name != "examples":
                assert float(value) == table.loc[client, f"test_{name.replace('-', '_')}_last"]


@pytest.mark.slow
def test_networks_of_several_kinds(tmp_path: Path) -> None:
    folder = run(tmp_path / "mixed", "strategy=fedproto", "model=auto", "model.kinds=[mlp,cnn]", "model.features=8")
    data, measured = data_of(folder), pd.read_parquet(folder / "clients.parquet")["test_accuracy_last"]
    modules = [fedpers.load_client(folder, client) for client in range(data.num_clients)]
    assert [accuracy(module, data, client) for client, module in enumerate(modules)] == list(measured)
    assert len({len(module.state_dict()) for module in modules}) == 2


def test_the_common_network_is_what_all_clients_are_sent(tmp_path: Path, finished: Path) -> None:
    folder = run(tmp_path / "run", "strategy=ditto", "split.global_test=0.2")
    data, summary = data_of(folder), json.loads((folder / "summary.json").read_text())
    module = fedpers.load_server(folder)
    assert data.global_test is not None
    right = module(data.x[data.global_test]).argmax(1) == data.y[data.global_test]
    assert float(right.double().mean()) == summary["last"]["global/accuracy"]
    with pytest.raises(FedpersError, match="strategy=fedper has no network that all clients are sent whole"):
        fedpers.load_server(finished)


def test_the_command_writes_a_file(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(path.relative_to(finished) for path in finished.rglob("*"))
    assert _main(["export", str(finished), "--client", "3"]) == 0
    values = load_file("client_3.safetensors")
    module = fedpers.load_client(finished, 3)
    assert {name: value.tolist() for name, value in values.items()} == {
        name: value.tolist() for name, value in module.state_dict().items()
    }
    count = sum(value.numel() for value in values.values())
    assert capsys.readouterr().out == f"fedper, client 3 after round 2: {count} values in client_3.safetensors\n"
    with safe_open("client_3.safetensors", framework="pt") as file:
        assert file.metadata() == {"method": "fedper", "round": "2", "client": "3", "name": ""}
    assert _main(["export", str(finished), "--client=3", "--out", "other.safetensors"]) == 0
    load_model(module, "other.safetensors")
    assert sorted(path.relative_to(finished) for path in finished.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--client", "5"], "client=5: expected a number from 0 to 4."),
        (["--client", "Kiel"], "client=Kiel: expected a number from 0 to 4."),
        ([], "strategy=fedper has no network that all clients are sent whole: name a client, whose network it is."),
        (["--client", "1", "--out", "file/below"], "file/below cannot be written ("),
        (["--client", "1", "seed=5"], "seed=5: expected 0, which the run has; "),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_sentence(
    arguments: list[str], sentence: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert _main(["export", str(finished), *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"fedpers: {sentence}")


def test_clients_go_by_their_names(tmp_path: Path) -> None:
    rows = [f"{float(i % 7)},{float(i % 3)},{i % 2},{name}" for name in ("Kiel", "Ulm") for i in range(60)]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["a,b,label,client", *rows]))
    folder = tmp_path / "run"
    settings = [
        "dataset=csv",
        f"dataset.root={table}",
        "dataset.client=client",
        "partition=natural",
        "rounds=1",
        "strategy=local",
    ]
    assert _main([*settings, f"hydra.run.dir={folder}"]) == 0
    by_name, by_number = fedpers.load_client(folder, "Ulm"), fedpers.load_client(folder, 1)
    assert all(torch.equal(a, b) for a, b in zip(by_name.parameters(), by_number.parameters(), strict=True))
    with pytest.raises(FedpersError, match="client=Bonn: expected a number from 0 to 1, or one of Kiel, Ulm"):
        fedpers.load_client(folder, "Bonn")


def test_a_network_of_ones_own_counts_only_when_it_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "exported_net.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__()\n"
        "        self.body, self.head = nn.Flatten(), nn.Linear(64, num_classes)\n\n"
        "    def forward(self, x):\n"
        "        return self.head(self.body(x))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = run(tmp_path / "run", "model=exported_net:Net")
    capsys.readouterr()
    assert _main(["export", str(folder), "--client", "0", "--out", str(tmp_path / "file")]) == 2
    assert f"it counts only when you type it, as in 'fedpers export {folder} model.name=exported_net:Net'" in (
        capsys.readouterr().err
    )
    module = fedpers.load_client(folder, 0, overrides=["model.name=exported_net:Net"])
    assert type(module).__name__ == "Net"


# --------------------------------------------------------------- the best round


@pytest.mark.slow
def test_the_state_of_the_best_round_is_kept_if_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("strategy=fedper", "rounds=8", "training.lr=1.5", "checkpoint.every=3")
    folder = run(tmp_path / "run", *settings, "checkpoint.best=true")
    summary = json.loads((folder / "summary.json").read_text())
    best = summary["selected_round"]
    assert best != 8, "a case in which the last round is not the best"
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [f"best_{best:06d}", "round_000008"]
    data, measured = data_of(folder), pd.read_parquet(folder / "clients.parquet")["test_accuracy_selected"]
    for client in range(data.num_clients):
        assert accuracy(fedpers.load_client(folder, client, "best"), data, client) == measured[client]
    without = run(tmp_path / "without", *settings)
    assert (without / "clients.parquet").read_bytes() == (folder / "clients.parquet").read_bytes()
    capsys.readouterr()
    assert _main(["export", str(without), "--client", "0", "--round", "best"]) == 2
    assert capsys.readouterr().err == (
        f"fedpers: {without}: the state of the selected round, {best}, is not kept "
        "(the run had checkpoint.best=false); round=last takes the last checkpoint.\n"
    )


def test_keeping_the_best_needs_scores_to_choose_by(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["checkpoint.best=true", "split.validation=0"]) == 2
    sentence = "checkpoint.best=True: expected false, for no client has samples for validation."
    assert sentence in capsys.readouterr().err


def test_keeping_the_best_needs_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main([*SMALL, "checkpoint.best=true", "checkpoint.every=0"]) == 2
    assert "checkpoint.best=True: expected false with checkpoint.every=0" in capsys.readouterr().err
