"""What is shared and what stays, overridden; heads by another name; what is kept of a client that never trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import flwr.app as flower
import pytest
import torch
from torch import Tensor, nn

from fedpers.cohort import leaves
from fedpers.data import DatasetConfig, PartitionConfig, SplitConfig, load_federated
from fedpers.errors import ConfigError, TrainingError
from fedpers.flower_private import server_identity
from fedpers.models import ModelConfig, build_model
from fedpers.records import from_record
from fedpers.run import run_rounds
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import STRATEGIES, CohortApp, FedRep, FedRepUpdate, PersonalizedStrategy, make_strategy
from tests.problems import SmallNetwork, gaussian_data, problem
from tests.strategies.helpers import run

SETTLED = [name for name, method in STRATEGIES.items() if method.update.settles_parts]
"""Methods that settle themselves what is shared and what is personal."""
FROZEN = ("head_only", "fedvpt", "pfedpg")
"""Methods whose networks have other parts than body and head to share."""
MORE = {"gpfl": {"gce", "cov"}}
"""Parts that methods add to the network."""


@pytest.fixture(autouse=True)
def _server() -> Iterator[None]:
    with server_identity(1):
        yield


def divided(method: str, **selections: Any) -> tuple[PersonalizedStrategy, CohortApp]:
    """A method on its small problem, with its client half subclassed."""
    given = problem(method)
    strategy, update = make_strategy(method, given.options, server={"fraction": 0.7}, training=given.training)
    strategy.unseen = given.data.unseen
    update.__class__ = type("Divided", (type(update),), selections)
    app = update.client_app(given.network, given.data)
    strategy.attach(app)
    return strategy, app


def started(strategy: PersonalizedStrategy, app: CohortApp, rounds: int = 2) -> tuple[set[str], set[str], LocalGrid]:
    """Parts of the network that the server holds, and that clients keep, after some rounds."""
    grid = LocalGrid(app, app.data.num_clients, clients_at_once=3, workers=1)
    result = strategy.start(grid, app.initial_arrays(), num_rounds=rounds)
    assert strategy.report.failures == strategy.report.evaluation_failures == {}
    kept = {name.split("/")[1].split(".")[0] for name in leaves(app.initial_state) if name.startswith("model/")}
    return {name.split(".")[0] for name in from_record(result.arrays).keys()}, kept, grid  # noqa: SIM118


@pytest.mark.parametrize("method", ["fedper", "fedrep", "fedas", "fedbabu", "fedpac", "fedgh"])
def test_a_frozen_body_is_refused_where_it_is_what_is_shared(method: str) -> None:
    given = problem(method)
    given.network.body.requires_grad_(False)
    _, update = make_strategy(method, given.options, training=given.training)
    if method == "fedgh":  # its server trains the head
        assert set(update.client_app(given.network, given.data).initial_arrays()) == {"head.weight", "head.bias"}
        return
    with pytest.raises(ConfigError, match=r"^model=SmallNetwork: expected a network (with param|whose body is not)"):
        update.client_app(given.network, given.data)


def test_a_server_that_begins_with_the_whole_network_is_told_with_what_it_begins() -> None:
    given = problem("fedper")
    strategy, update = make_strategy("fedper", given.options, training=given.training)
    app = update.client_app(given.network, given.data)
    strategy.attach(app)
    arrays = flower.ArrayRecord(given.network.state_dict())
    with pytest.raises(TrainingError, match=r"missing in its reply; a server begins .* client_app\.initial_arrays\(\)"):
        strategy.start(LocalGrid(app, app.data.num_clients), arrays, num_rounds=1)


@pytest.mark.parametrize("variant", ["paper", "pfllib"])
def test_apfl_mixes_what_is_personal_with_a_personal_head(variant: str) -> None:
    given = problem("apfl")
    strategy, update = make_strategy(
        "apfl", {"variant": variant, "personal_layers": ("head",)}, training=given.training
    )
    parts, kept, grid = started(strategy, update.client_app(given.network, given.data))
    assert (parts, kept) == ({"body"}, {"head"})
    grid.close()


@pytest.mark.parametrize(
    ("method", "layers", "same_as"),
    [("fedavg", ("head",), "fedper"), ("fedper", (), "fedavg"), ("fedbn", ("head",), "fedper")],
)
def test_personal_layers_make_one_method_of_another(method: str, layers: tuple[str, ...], same_as: str) -> None:
    given = problem(method)
    results = []
    for name, options in ((method, {"personal_layers": layers}), (same_as, {})):
        strategy, update = make_strategy(name, {"weighting": "samples", **options}, training=given.training)
        app = update.client_app(given.network, given.data)
        arrays = strategy.start(
            LocalGrid(app, app.data.num_clients, workers=1), app.initial_arrays(), num_rounds=2
        ).arrays
        results.append((dict(from_record(arrays)), {name.partition("/")[2] for name in leaves(app.initial_state)}))
    (arrays, kept), (expected, expected_kept) = results
    assert kept == expected_kept
    assert arrays.keys() == expected.keys()
    for name, value in arrays.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", SETTLED)
def test_personal_layers_of_methods_that_settle_them_are_refused(method: str) -> None:
    with pytest.raises(
        ConfigError, match=r"strategy\.personal_layers=\('head',\): expected null, for the method itself"
    ):
        make_strategy(method, {"personal_layers": ("head",)})


def test_personal_layers_that_a_network_lacks_are_named() -> None:
    _, update = make_strategy("fedavg", {"personal_layers": ("hed",)}, training=problem("fedavg").training)
    with pytest.raises(ConfigError, match=r"strategy\.personal_layers=hed: expected one of .*did you mean 'head'"):
        update.client_app(SmallNetwork(), gaussian_data((20, 9, 13))).initial_arrays()


@pytest.mark.parametrize("method", [m for m in STRATEGIES if m not in (*SETTLED, *FROZEN)])
def test_what_is_shared_and_what_stays_can_be_overridden(method: str) -> None:
    strategy, app = divided(method, shared="body", personal="head")
    sent, kept, grid = started(strategy, app)
    assert sent - MORE.get(method, set()) == {"body"}
    assert kept == {"head"}
    assert grid.engine is not None
    state = leaves(grid.engine.store.gather(range(app.data.num_clients)))
    trained = state["trained"] > 0
    heads = state["model/head.weight"].flatten(1)
    start = leaves(app.initial_state)["model/head.weight"].flatten()
    assert ((heads != start).any(1) == trained).all()  # the head is trained, and kept


@pytest.mark.parametrize("method", SETTLED)
def test_methods_that_settle_it_themselves_say_so(method: str) -> None:
    for name in ("shared", "personal"):
        expected = (
            rf"^Divided\.{name}=body: expected no override: \w+ itself settles what is shared and what is personal"
        )
        with pytest.raises(ConfigError, match=expected):
            divided(method, **{name: "body"})


def test_fedrep_trains_what_it_is_told_is_personal_first() -> None:
    """Without passes over the shared part, only what is personal has moved."""
    update = FedRepUpdate(head_epochs=1, body_epochs=0)
    update.__class__ = type("Deeper", (FedRepUpdate,), {"shared": "body.0", "personal": ("head", "body.1")})
    app = update.client_app(SmallNetwork(), gaussian_data((16, 12)))
    grid = LocalGrid(app, 2, clients_at_once=2, workers=1)
    result = FedRep().start(grid, app.initial_arrays(), num_rounds=1)
    assert torch.equal(from_record(result.arrays)["body.0.weight"], app.template["body.0.weight"])
    assert grid.engine is not None
    state = leaves(grid.engine.store.gather([0, 1]))
    for name in ("model/head.weight", "model/body.1.weight"):
        assert (state[name] != leaves(app.initial_state)[name]).any(), name


# ---------------------------------------------------------------------- other heads


class Classifier(nn.Module):
    """Calls its head `classifier`."""

    def __init__(self, alias: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.features = nn.Linear(6, 8)
            self.classifier = nn.Linear(8, 4)
        if alias:
            self.head = self.classifier

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.classifier(torch.relu(self.features(x)))
        return scores


@pytest.mark.parametrize("method", ["fedper", "fedrep", "ditto", "moon", "gpfl"])
def test_a_head_by_another_name_is_a_head(method: str) -> None:
    data = gaussian_data((20, 9, 13))
    strategy, update = make_strategy(method)
    app = update.client_app(Classifier(), data, head="classifier")
    started(strategy, app)
    names = set(app.template.keys())
    assert {"head.weight", "head.bias", "body.features.weight"} <= names
    assert torch.equal(app.template["head.weight"], Classifier().classifier.weight)


def test_a_head_under_two_names_is_one() -> None:
    data = gaussian_data((20, 9, 13))
    finished = []
    for head, network in (("classifier", Classifier()), (None, Classifier(alias=True))):
        strategy, update = make_strategy("fedper", server={"seed": 3})
        app = update.client_app(network, data, seed=3, head=head)
        _, _, grid = started(strategy, app)
        assert grid.engine is not None
        state = grid.engine.store.gather([0, 1, 2])
        finished.append({name.rsplit(".", 1)[1]: value for name, value in leaves(state).items() if "." in name})
    assert finished[0].keys() == finished[1].keys() == {"weight", "bias"}
    for name, value in finished[0].items():
        assert torch.equal(value, finished[1][name])


def test_a_head_that_is_not_there_or_not_last() -> None:
    data = gaussian_data((20, 9, 13))
    with pytest.raises(ConfigError, match=r"^model\.head=clasifier: .*did you mean 'classifier'"):
        FedRepUpdate().client_app(Classifier(), data, head="clasifier")
    with pytest.raises(ConfigError, match=r"^model\.head=features: "):
        FedRepUpdate().client_app(Classifier(), data, head="features")


# ------------------------------------------------------------ clients that never trained


@pytest.mark.slow
@pytest.mark.parametrize(("method", "least"), [("ditto", 0.7), ("apfl", 0.7), ("pfedme", 0.7)])
def test_unseen_clients_predict_with_what_the_server_sends(method: str, least: float) -> None:
    """A network of one's own that was never trained guesses one of ten classes."""
    split, partition = SplitConfig(unseen=3), PartitionConfig("dirichlet", num_clients=12, alpha=1.0)
    data = load_federated(DatasetConfig("digits"), partition, split, seed=0)
    strategy, update = make_strategy(method, server={"unseen": data.unseen, "evaluate_every": 15})
    network = build_model(ModelConfig("mlp"), data.x.shape[1:], 10, seed=0)
    app = update.client_app(network, data)
    grid = LocalGrid(app, data.num_clients)
    *_, report = run_rounds(strategy, grid, app.initial_arrays(), 15)
    grid.close()
    as_they_come = sum(row["test-accuracy"] for row in report.unseen.values()) / 3
    adapted = sum(row["test-accuracy"] for row in report.adapted.values()) / 3
    assert as_they_come > least
    assert adapted > as_they_come - 0.05


def test_apfl_predicts_with_the_head_that_it_keeps() -> None:
    options = {"personal_layers": ("head",), "adaptive": False, "alpha": 0.25}
    result = run("apfl", options, rounds=2)
    for client, network in enumerate(result.predictors()):
        kept = result.state(client)
        for name in ("head.weight", "head.bias"):
            torch.testing.assert_close(network[name], kept[f"model/{name}"])
            assert not torch.equal(network[name], result.app.template[name])


def test_dittos_pull_leaves_a_personal_head_alone() -> None:
    moved = []
    for mu in (0.0, 20.0):
        result = run("ditto", {"personal_layers": ("head",), "mu": mu}, rounds=3, lr=0.03)
        first = result.app.template["head.weight"]
        moved.append(sum(float((result.state(c)["model/head.weight"] - first).norm()) for c in range(4)))
    assert moved[1] > 0.5 * moved[0]
    run("ditto", {"personal_layers": ("head",), "variant": "pfllib"})


@pytest.mark.parametrize("method", ["pfedme", "scaffold", "moon", "ditto"])
def test_all_of_a_network_may_be_personal(method: str) -> None:
    options = {"personal_layers": ("body", "head")}
    result = run(method, options, rounds=2)
    assert not result.strategy.report.failures
    assert result.strategy.report.bytes_up == 0


@pytest.mark.parametrize("layers", [(), ("body", "head")])
def test_fedrep_skips_what_it_does_not_have(layers: tuple[str, ...]) -> None:
    assert not run("fedrep", {"personal_layers": layers}, rounds=2).strategy.report.failures
