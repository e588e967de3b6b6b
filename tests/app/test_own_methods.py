"""Mistakes in a method of the user's: file, line and frames on the screen, the whole traceback in ``run.log``."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from uuid import uuid4

import flwr.app as flower
import pytest
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

import fedpers
from fedpers.app import _main
from fedpers.cohort import select
from fedpers.errors import ConfigError
from fedpers.failures import described, sentence_of, with_traceback
from fedpers.strategies import LocalUpdate, PersonalizedStrategy
from fedpers.strategies.registry import strategy_class

METHOD = """
from dataclasses import dataclass
from fedpers.strategies import LocalUpdate, PersonalizedStrategy


def helper(value):
    return value / 0  # the mistake


@dataclass(kw_only=True)
class MyUpdate(LocalUpdate):
{client}


@dataclass(kw_only=True)
class Mine(PersonalizedStrategy):
    update = MyUpdate
{server}
"""
CLIENT = {
    "train": "def train(self, cohort, received, config):\n        return helper(1)",
    "loss": "def loss(self, network, batch):\n        return helper(1)",
    "initial_state": "def initial_state(self, template, module):\n        return helper(1)",
    "predict": "def predict(self, network, x):\n        return helper(1)",
}
SERVER = {
    "combine": "def combine(self, arrays, means, clients):\n        return helper(1)",
    "send": "def send(self, round, arrays, clients):\n        return helper(1)",
    "fold": "def fold(self):\n        return helper(1)",
}
SMALL = ["dataset=digits", "partition.num_clients=4", "rounds=2", "output=runs"]
PLACE = "ZeroDivisionError: division by zero (at mine.py:{line} in {where}, mine.py:7 in helper: return value / 0"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a method written in a file of the current folder: exit status, what the screen shows, ``run.log``."""

    def run(client: str = "", server: str = "", *settings: str) -> tuple[int, str, str]:
        name = f"mine_{uuid4().hex}"  # modules stay imported from test to test
        (tmp_path / f"{name}.py").write_text(
            METHOD.format(client=f"    {client or 'pass'}", server=f"    {server}" if server else "")
        )
        monkeypatch.chdir(tmp_path)
        code = _main([f"strategy={name}:Mine", *SMALL, *settings])
        log = "".join(path.read_text() for path in tmp_path.rglob("run.log"))  # none where it is refused at once
        return code, capsys.readouterr().err.replace(name, "mine"), log.replace(name, "mine")

    return run


@pytest.mark.parametrize("where", CLIENT)
def test_a_mistake_in_a_client_half_is_named_with_its_place(run, where: str) -> None:
    code, screen, log = run(CLIENT[where])
    assert code == 1
    assert PLACE.format(line=13, where=where) in screen
    assert screen.strip().splitlines()[-1].startswith("fedpers: ")
    assert "Traceback" not in screen
    assert "Traceback (most recent call last)" in log
    assert 'mine.py", line 7, in helper' in log


@pytest.mark.parametrize("where", SERVER)
def test_a_mistake_in_a_server_half_is_named_with_its_place(run, where: str) -> None:
    code, screen, log = run("", SERVER[where])
    assert code == 1
    assert PLACE.format(line=19, where=where) in screen
    assert "Traceback" not in screen
    assert 'mine.py", line 7, in helper' in log


def test_the_same_mistake_of_many_clients_fills_no_log(run) -> None:
    answer = "helper(1) if 2 in cohort.clients else super().train(cohort, received, config)"
    _, screen, log = run(
        f"def train(self, cohort, received, config):\n        return {answer}",
        "",
        "rounds=6",
        "runtime.clients_at_once=4",
    )
    assert screen.count("its clients are computed one by one") == 1
    assert log.count("Traceback (most recent call last)") == 2  # of the cohort, and of the client


@pytest.mark.parametrize("returned", ["None", "3"])
def test_a_client_half_that_returns_no_reply_is_told(run, returned: str) -> None:
    code, screen, _ = run(f"def train(self, cohort, received, config):\n        return {returned}")
    assert code == 1
    assert f"TypeError: MyUpdate.train returned {returned}: expected cohort.reply(...)" in screen


def test_a_client_of_a_plain_flower_app_that_raises_is_named_with_its_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app, server = ClientApp(), ServerApp()

    @app.train()
    def train(message: flower.Message, context: flower.Context) -> flower.Message:
        raise LookupError("no such sample")

    @server.main()
    def main(grid: Grid, context: flower.Context) -> None:
        FedAvg(fraction_evaluate=0.0).start(grid, flower.ArrayRecord(), num_rounds=2)

    with caplog.at_level(logging.INFO, "fedpers"):
        fedpers.simulate(server, app, num_supernodes=2)
    ours = [record for record in caplog.records if record.name.startswith("fedpers")]
    (warning,) = [record.getMessage() for record in ours if record.levelno == logging.WARNING]
    assert "raised LookupError: no such sample (at " in warning
    assert "test_own_methods.py:" in warning
    assert sum("Traceback (most recent call last)" in record.getMessage() for record in ours) == 1


def test_what_is_said_of_an_exception() -> None:
    with pytest.raises(ValueError, match="two") as raised:
        raise ValueError("two\n lines")
    said = described(raised.value)
    assert said.startswith("ValueError: two lines (at ")
    assert said.endswith('in test_what_is_said_of_an_exception: raise ValueError("two\\n lines"))')
    assert sentence_of(with_traceback(raised.value)) == said
    assert "Traceback" in with_traceback(raised.value)
    assert described(ValueError()) == "ValueError"
    assert described(ConfigError("key", 1, "2")) == "key=1: expected 2."
    with pytest.raises(ConfigError) as refused:
        select(nn.Linear(1, 1), "bodyy")  # ours says what is wrong, and where it was asked for
    said = described(refused.value)
    assert said.startswith(str(refused.value).removesuffix("."))
    assert re.search(r'test_own_methods\.py:\d+ in test_what_is_said_of_an_exception: select\(.*"bodyy"\)', said)


class WithoutClientHalf(PersonalizedStrategy):
    updates = LocalUpdate  # a typing error


def test_a_method_that_names_no_client_half_is_refused() -> None:
    sentence = "expected a class that names its client half: update = ..., a LocalUpdate of yours, or FedAvgUpdate."
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        strategy_class(f"{__name__}:WithoutClientHalf")


@pytest.mark.parametrize(
    ("client", "server", "warning"),
    [
        ("def personalise(self, cohort, received, config):\n        ...", "", "MyUpdate.personalise is never called"),
        (
            "def personalise(self, cohort, received, config):\n"
            "        return super().personalise(cohort, received, config)",
            "",
            "MyUpdate.personalise is never called",
        ),
        ("", "def combined(self, arrays, means, clients):\n        ...", "Mine.combined is never called"),
        ("shard = 'body'", "", "MyUpdate.shard is never read"),
    ],
)
def test_a_misspelled_function_or_attribute_is_said(
    run, caplog: pytest.LogCaptureFixture, client: str, server: str, warning: str
) -> None:
    code, _, _ = run(client, server)
    assert code == 0
    assert f"{warning} (did you mean '" in caplog.text


@pytest.mark.parametrize(
    "client",
    [
        "def losses(self, network):\n        ...\n    def loss(self, network, batch):\n"
        "        self.losses(network)\n        return super().loss(network, batch)",
        "def _loss(self, network):\n        ...",
        "def temperature(self):\n        ...",
        "share: float = 0.5  # an option",
        "SHARED = 'body'",
        "def losses(self, network):\n        ...\n    def loss(self, network, batch):\n"
        "        (lambda: self.losses(network))()\n        return super().loss(network, batch)",
    ],
)
def test_helpers_of_a_method_are_no_misspelling(run, caplog: pytest.LogCaptureFixture, client: str) -> None:
    code, _, _ = run(client)
    assert code == 0
    assert "never" not in caplog.text


@pytest.mark.parametrize(
    ("client", "server", "sentence"),
    [
        (
            "def personalize(self, cohort, received):\n        ...",
            "",
            "MyUpdate.personalize=(self, cohort, received): expected the parameters it is called with, (self, cohort, "
            "received, config).",
        ),
        (
            "def loss(self, network, x, y):\n        ...",
            "",
            "MyUpdate.loss=(self, network, x, y): expected the parameters it is called with, (self, network, batch).",
        ),
        (
            "",
            "def combine(self, arrays, means):\n        ...",
            "Mine.combine=(self, arrays, means): expected the parameters it is called with, (self, arrays, means, "
            "clients).",
        ),
        ("shared = 'bdy'", "", "MyUpdate.shared=bdy: expected one of"),
        ("personal = 'hed'", "", "MyUpdate.personal=hed: expected one of"),
    ],
)
def test_what_a_method_cannot_be_used_with_is_refused_before_a_round(
    run, client: str, server: str, sentence: str
) -> None:
    code, screen, _ = run(client, server)
    assert code == 2
    assert screen.startswith(f"fedpers: {sentence}")


@pytest.mark.parametrize(
    "parameters",
    ["self, cohort, received, config, extra=None", "self, *given", "self, cohort, received, config, **more"],
)
def test_further_parameters_of_an_override_are_allowed(run, parameters: str) -> None:
    cohort = "given[0].view(given[1]" if "given" in parameters else "cohort.view(received"
    code, _, _ = run(f"def personalize({parameters}):\n        return {cohort}['arrays'])")
    assert code == 0


def test_networks_that_are_none_are_named(run) -> None:
    _, screen, _ = run("def personalize(self, cohort, received, config):\n        pass")
    assert "TypeError: MyUpdate.personalize returned None: expected networks, as cohort.view(" in screen


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ("nn.Softmax(1)", "probabilities, rows that sum to 1"),
        ("nn.Sigmoid()", "values from 0 to 1"),
        ("nn.LogSoftmax(1)", ""),
        ("nn.ReLU()", ""),
        ("nn.Identity()", ""),
    ],
)
def test_a_network_that_ends_in_a_softmax_or_sigmoid_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], last: str, said: str
) -> None:
    name = f"net_{uuid4().hex}"
    (tmp_path / f"{name}.py").write_text(
        f"from torch import nn\n\n\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), {last})\n"
    )
    monkeypatch.chdir(tmp_path)
    assert _main([f"model={name}:build", "strategy=fedavg", *SMALL]) == 0
    shown = capsys.readouterr().err
    assert f"returns {said};" in shown if said else "returns" not in shown


@pytest.mark.parametrize(
    ("model", "data", "sentence"),
    [
        (lambda: nn.Linear(2, 2), None, "model=<lambda>: expected a torch.nn.Module: call it."),
        (nn.ReLU, None, "model=ReLU: expected a torch.nn.Module: call it."),
        (nn.Linear(2, 2), [], "data=list: expected fedpers.data.FederatedData, which FederatedData.from_clients makes"),
    ],
)
def test_arguments_of_a_client_app(model: object, data: object, sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        LocalUpdate().client_app(model, data)  # type: ignore[arg-type]


def test_a_mapping_in_place_of_settings_is_said() -> None:
    with pytest.raises(ConfigError, match=r"expected Training\(\.\.\.\), not a mapping"):
        LocalUpdate(training={"lr": 0.1})  # type: ignore[arg-type]


def test_one_hot_labels_of_a_users_function_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"data_{uuid4().hex}"
    (tmp_path / f"{name}.py").write_text(
        "import numpy as np\n\n\ndef load():\n    y = np.arange(90) % 3\n"
        "    return np.random.default_rng(0).normal(size=(90, 5)).astype('f'), np.eye(3)[y]\n"
    )
    monkeypatch.chdir(tmp_path)
    assert _main([f"dataset={name}:load", "partition=iid", *SMALL[1:]]) == 2
    assert "y is one-hot [90, 3], expected the numbers of the classes [N]." in capsys.readouterr().err


@pytest.mark.parametrize(("returned", "kind"), [("None", "a NoneType"), ("1.0", "a float")])
@pytest.mark.parametrize(("function", "arguments"), [("loss", "network, batch"), ("predict", "network, x")])
def test_a_function_that_returns_no_tensor_is_refused(
    run, function: str, arguments: str, returned: str, kind: str
) -> None:
    code, screen, _ = run(f"def {function}(self, {arguments}):\n        return {returned}")
    assert code == 2
    assert f"strategy=MyUpdate.{function}: expected a {function} that returns a tensor, not {kind}." in screen
