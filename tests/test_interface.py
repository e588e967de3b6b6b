"""What people have written against this package goes on working: this file is not to be changed.

A Flower app with a strategy of this package, a method of one's own on the command line, and imported names.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

APP = """
from flwr.serverapp import ServerApp
from fedpers import simulate
from fedpers.data import DatasetConfig, PartitionConfig, SplitConfig, load_federated
from fedpers.models import ModelConfig, build_model
from fedpers.strategies import FedRep, FedRepUpdate

data = load_federated(DatasetConfig("digits"), PartitionConfig("dirichlet"), SplitConfig(), seed=0)
model = build_model(ModelConfig("mlp"), data.x.shape[1:], data.num_classes, seed=0)  # or any nn.Module with a `head`
client_app = FedRepUpdate(head_epochs=2).client_app(model, data)  # a flwr ClientApp
server_app = ServerApp()


@server_app.main()
def main(grid, context):
    result = FedRep(fraction=0.5).start(grid, client_app.initial_arrays(), num_rounds=10)  # a flwr Strategy
    print(result.evaluate_metrics_clientapp[10]["test-accuracy"])


simulate(server_app, client_app, num_supernodes=10)  # takes what Flower's run_simulation takes
"""

MINE = '''
from dataclasses import dataclass
from fedpers.cohort import proximal
from fedpers.strategies import LocalUpdate, PersonalizedStrategy


@dataclass(kw_only=True)
class AnchoredUpdate(LocalUpdate):
    """Client half, for K clients at once: fit the own head, then everything near what was received."""

    shared = "body"  # averaged by the server
    personal = "head"  # stays with the client, and is kept from round to round
    mu: float = 0.1

    def train(self, cohort, received, config):
        params = cohort.assemble(received["arrays"])  # K networks: received bodies, own heads
        cohort.fit(params, self.loss, only="head", epochs=1)
        cohort.fit(params, self.loss, adjust=proximal(self.mu, params.clone()))
        return cohort.reply(params)


@dataclass(kw_only=True)
class Anchored(PersonalizedStrategy):
    """Server half: sampling, weights, checks and averaging are inherited."""

    update = AnchoredUpdate
'''

NAMES = """
APFL APFLUpdate CohortApp Ditto DittoUpdate Ensemble EnsembleUpdate FedAvg FedAvgFT FedAvgFTUpdate FedAvgUpdate FedBN
FedBNUpdate FedJETs FedJETsUpdate FedMF FedMFUpdate FedPer FedPerUpdate FedProx FedProxUpdate FedRAP FedRAPUpdate FedRep
FedRepUpdate FedSelect FedSelectUpdate FedVPT FedVPTUpdate GPFL GPFLUpdate HeadOnly HeadOnlyUpdate Local LocalOnlyUpdate
LocalUpdate NoLearning NoLearningUpdate PFedMe PFedMeUpdate PFedPG PFedPGUpdate PFedRec PFedRecUpdate PerFedAvg
PerFedAvgUpdate PersonalizedStrategy Pretrained PretrainedUpdate Received RoundReport STRATEGIES Scaffold ScaffoldUpdate
make_strategy option_types options_of strategy_class
"""


@pytest.mark.slow
def test_an_app_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    done = subprocess.run(
        [sys.executable, "app.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert 0.5 < float(done.stdout.strip()) <= 1


@pytest.mark.slow
def test_a_method_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    typed = ["strategy.name=mine:Anchored", "+strategy.mu=0.5", "rounds=3", "partition.num_clients=5", "output=runs"]
    done = subprocess.run(
        [sys.executable, "-m", "fedpers", *typed],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (summary,) = (tmp_path / "runs").rglob("summary.json")
    assert json.loads(summary.read_text())["rounds_done"] == 3


def test_names_that_are_imported() -> None:
    strategies = importlib.import_module("fedpers.strategies")
    assert [name for name in NAMES.split() if not hasattr(strategies, name)] == []
    halves = [getattr(strategies, name) for name in NAMES.split() if name.endswith("Update") and name != "LocalUpdate"]
    for half in halves:
        assert isinstance(half(), strategies.LocalUpdate)
