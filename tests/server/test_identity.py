"""Halves of two methods, and settings that nobody reads, are refused before anything is trained."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flwr.app as flower
import flwr.serverapp.strategy as flwr_strategies
import pytest
import torch
from flwr.clientapp.mod import arrays_size_mod
from flwr.serverapp import Grid, ServerApp

import fedpers
from fedpers import flower_app
from fedpers.cohort import Cohort, Reply
from fedpers.errors import ConfigError
from fedpers.flower_private import server_identity
from fedpers.identity import READS, check_halves
from fedpers.runtime.grid import RUN_ID
from fedpers.runtime.local import LocalGrid
from fedpers.server.postprocessors import TopK
from fedpers.strategies import (
    STRATEGIES,
    CohortApp,
    FedAvg,
    FedAvgUpdate,
    FedJETs,
    FedJETsUpdate,
    FedRep,
    FedRepUpdate,
    LocalUpdate,
    PersonalizedStrategy,
    make_strategy,
)
from tests.problems import SmallNetwork, gaussian_data, problem
from tests.runtime.wire import WireGrid

DATA = gaussian_data((12, 9, 13))
NETWORK = SmallNetwork(norm=False)


def app_of(method: str) -> CohortApp:
    given = problem(method)
    _, update = make_strategy(method, given.options, training=given.training)
    return update.client_app(given.network, given.data)


@functools.cache
def server_of(method: str) -> PersonalizedStrategy:
    given = problem(method)
    return make_strategy(method, given.options, training=given.training)[0]


@pytest.mark.parametrize("clients", STRATEGIES)
def test_every_wrong_pair_of_halves_is_refused(clients: str) -> None:
    """All servers beside these clients: the right one is accepted, no other is."""
    identity = app_of(clients).identity
    for servers in STRATEGIES:
        if servers == clients:
            check_halves(server_of(servers), identity)
            continue
        with pytest.raises(ConfigError) as caught:
            check_halves(server_of(servers), identity)
        update, half = STRATEGIES[servers].update.__name__, STRATEGIES[servers].__name__
        assert str(caught.value) == (
            f"client_app={STRATEGIES[clients].update.__name__}: expected clients made by {update}, the client half of "
            f"{half}."
        )


class CountingGrid(LocalGrid):
    """Counts what clients are asked to do."""

    trained = 0

    def push_messages(self, messages: Any) -> Any:
        accepted = list(messages)
        self.trained += sum(message.metadata.message_type.startswith("train") for message in accepted)
        return super().push_messages(accepted)


@pytest.mark.parametrize("grid_of", [CountingGrid, WireGrid])
def test_a_wrong_pair_is_refused_before_anybody_trains(grid_of: type[LocalGrid]) -> None:
    app = FedAvgUpdate().client_app(NETWORK, DATA)
    grid = grid_of(app, 3)
    before = app.initial_arrays()
    expected = "^client_app=FedAvgUpdate: expected clients made by FedRepUpdate, the client half of FedRep.$"
    with server_identity(RUN_ID), pytest.raises(ConfigError, match=expected):
        FedRep().start(grid, before, num_rounds=1)
    assert getattr(grid, "trained", 0) == 0


@pytest.mark.parametrize(
    ("servers", "clients", "sentence"),
    [
        ({"experts": 7, "top_k": 2}, {"experts": 5, "top_k": 2}, "strategy.experts=7: expected 5, as"),
        ({"experts": 5, "top_k": 3}, {"experts": 5, "top_k": 2}, "strategy.top_k=3: expected 2, as"),
    ],
)
def test_an_option_that_both_halves_read_must_agree(
    servers: dict[str, int], clients: dict[str, int], sentence: str
) -> None:
    app = FedJETsUpdate(**clients).client_app(NETWORK, gaussian_data())  # type: ignore[arg-type]
    strategy = FedJETs(client_update=FedJETsUpdate(**servers))  # type: ignore[arg-type]
    with server_identity(RUN_ID), pytest.raises(ConfigError, match=f"^{sentence}"):
        strategy.start(LocalGrid(app, 7), app.initial_arrays(), num_rounds=1)
    with pytest.raises(ConfigError, match=f"^{sentence}"):
        strategy.attach(app)


@dataclass(kw_only=True)
class Smoothed(FedRepUpdate):
    """FedRep with a loss of its own: still FedRep."""

    smoothing: float = 0.1


@dataclass(kw_only=True)
class MineUpdate(LocalUpdate):
    """A method of somebody's own."""


@dataclass(kw_only=True)
class Mine(PersonalizedStrategy):
    """Its server half."""

    update = MineUpdate


def test_subclasses_belong_to_their_method() -> None:
    check_halves(FedRep(), Smoothed().client_app(NETWORK, DATA).identity)
    check_halves(Mine(), MineUpdate().client_app(NETWORK, DATA).identity)
    with pytest.raises(ConfigError, match="client_app=MineUpdate: expected clients made by FedAvgUpdate"):
        check_halves(FedAvg(), MineUpdate().client_app(NETWORK, DATA).identity)


def test_what_is_attached_serves_the_server() -> None:
    app = FedAvgUpdate().client_app(NETWORK, DATA)
    strategy = FedAvg(seed=4)
    with pytest.raises(RuntimeError, match=r"^FedAvg computes on the server: call attach\(client_app\) before start.$"):
        _ = strategy.work
    strategy.attach(app)
    assert strategy.work.module is app.module
    assert strategy.work.task is DATA.task
    cohort = strategy.work.cohort(gaussian_data((30,), seed=1), round=2)
    params = cohort.assemble(app.template)
    before = params.clone()
    cohort.fit(params, app.update.loss)
    assert not torch.equal(params["head.weight"], before["head.weight"])
    assert cohort.samples_seen.tolist() == [30]


# ------------------------------------------------------------------- configurations


def started(strategy: Any, app: CohortApp, **options: Any) -> None:
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: flower.Context) -> None:
        strategy.start(grid, app.initial_arrays(), num_rounds=1, **options)

    fedpers.simulate(server, app, num_supernodes=3, clients_at_once=3, workers=1)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a rate": (FedAvg, {"train_config": flower.ConfigRecord({"lr": 1e-9})}, "lr=1e-09"),
    "epochs": (FedAvg, {"train_config": flower.ConfigRecord({"local-epochs": 50})}, "local-epochs=50"),
    "evaluation": (FedAvg, {"evaluate_config": flower.ConfigRecord({"batch-size": 5})}, "batch-size=5"),
    "Flower's FedProx": (lambda: flwr_strategies.FedProx(proximal_mu=1000.0), {}, "proximal-mu=1000.0"),
    "Flower's FedAvg": (flwr_strategies.FedAvg, {"train_config": flower.ConfigRecord({"lr": 0.5})}, "lr=0.5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_configuration_that_no_client_reads_is_refused_by_name(case: str) -> None:
    make, options, named = REFUSED[case]
    expected = f"^{named}: expected no such key in a message's configuration: FedAvgUpdate reads none, and its options"
    with pytest.raises(ConfigError, match=expected):
        started(make(), FedAvgUpdate().client_app(NETWORK, DATA), **options)


@dataclass(kw_only=True)
class ReadingUpdate(FedAvgUpdate):
    """Takes its number of passes from the message."""

    config_keys = ("passes",)

    def train(self, cohort: Cohort, received: Any, config: Mapping[str, Any]) -> Reply:
        params = cohort.assemble(received["arrays"])
        cohort.fit(params, self.loss, epochs=int(config.get("passes", 1)))
        return cohort.reply(params)


def test_a_method_may_read_keys_that_it_declares() -> None:
    app = ReadingUpdate().client_app(NETWORK, DATA)
    assert "passes" in app.identity[READS]  # type: ignore[operator]
    strategy = FedAvg()
    started(strategy, app, train_config=flower.ConfigRecord({"passes": 3}))
    assert strategy.report.samples == 3 * (12 + 9 + 13)
    with pytest.raises(ConfigError, match=r"^lr=0\.1: .*reads passes,"):
        started(FedAvg(), app, train_config=flower.ConfigRecord({"passes": 3, "lr": 0.1}))


def test_client_mods_may_read_any_key() -> None:
    app = FedAvgUpdate().client_app(NETWORK, DATA, mods=[arrays_size_mod])
    started(FedAvg(), app, train_config=flower.ConfigRecord({"anything": 1}))


def test_a_loop_of_ones_own_begins_first() -> None:
    app = FedAvgUpdate().client_app(NETWORK, DATA)
    grid, strategy, config = LocalGrid(app, 3), FedAvg(), flower.ConfigRecord()
    with server_identity(RUN_ID):
        with pytest.raises(RuntimeError, match=r"configure_train was called without start or begin: .*within"):
            strategy.configure_train(1, app.initial_arrays(), config, grid)
        strategy.begin()
        assert len(list(strategy.configure_train(1, app.initial_arrays(), config, grid))) == 3


@pytest.mark.slow
def test_clients_of_the_command_under_flower_say_what_they_are(tmp_path: Any) -> None:
    """Without data: a node answers the first question before it makes anything."""
    settings = f"strategy=fedrep strategy.head_epochs=3 dataset=npz dataset.root={tmp_path / 'missing.npz'}"
    grid = LocalGrid(flower_app.client_app(), 3, run_config={"settings": settings})
    with server_identity(RUN_ID):
        assert FedRep().nodes(grid).keys() == {0, 1, 2}
        with pytest.raises(ConfigError, match=r"^client_app=FedRepUpdate: expected clients made by FedAvgUpdate"):
            FedAvg().nodes(grid)
        assert grid.client_app.identify is not None  # type: ignore[attr-defined]
        identity = grid.client_app.identify({"settings": settings})  # type: ignore[attr-defined]
    assert identity["option.head_epochs"] == "3"


def test_a_strategy_that_is_started_again_looks_at_its_clients_again() -> None:
    strategy = FedRep()
    app, other = FedRepUpdate().client_app(NETWORK, DATA), FedAvgUpdate().client_app(NETWORK, DATA)
    with server_identity(RUN_ID):
        strategy.start(LocalGrid(app, 3), app.initial_arrays(), num_rounds=1)
        with pytest.raises(ConfigError, match=r"^client_app=FedAvgUpdate"):
            strategy.start(LocalGrid(other, 3), other.initial_arrays(), num_rounds=1)
        with pytest.raises(RuntimeError, match="without start or begin"):  # a start that is over allows nothing
            strategy.configure_train(1, app.initial_arrays(), flower.ConfigRecord(), LocalGrid(app, 3))


def test_equal_numbers_are_equal_options() -> None:
    with server_identity(RUN_ID):
        for share in (1, 1.0):
            update = FedAvgUpdate().client_app(NETWORK, DATA, postprocessors=[TopK(share=share)])
            check_halves(FedAvg(postprocessors=[TopK(share=1.0)]), update.identity)
    expected = r"^postprocessors=\['TopK\(share=1, .*'\]: expected \['TopK\(share=0\.5, "
    with pytest.raises(ConfigError, match=expected):
        check_halves(
            FedAvg(postprocessors=[TopK(share=1)]),
            FedAvgUpdate().client_app(NETWORK, DATA, postprocessors=[TopK(share=0.5)]).identity,
        )


def test_a_method_that_the_server_does_not_know_is_no_variation() -> None:
    """Its client says that where it lives it is a method of its own."""
    identity = Smoothed().client_app(NETWORK, DATA).identity
    check_halves(FedRep(), identity)
    identity["methods"] = [identity["method"][0], *identity["methods"]]  # type: ignore[index,misc]
    with pytest.raises(ConfigError, match=r"^client_app=Smoothed"):
        check_halves(FedRep(), identity)


class Different(FedAvg):
    """Sends each client arrays of its own."""

    def send(self, round: int, arrays: Any, clients: list[int]) -> Any:
        return [{"arrays": arrays * 2} for _ in clients]


def test_postprocessors_need_clients_that_are_sent_the_servers_arrays() -> None:
    postprocessors = [TopK(share=1.0)]
    app = FedAvgUpdate().client_app(NETWORK, DATA, postprocessors=postprocessors)
    expected = r"^postprocessors=\['compression'\]: expected none for Different, which sends clients other arrays"
    with server_identity(RUN_ID), pytest.raises(ConfigError, match=expected):
        Different(postprocessors=postprocessors).start(LocalGrid(app, 3), app.initial_arrays(), num_rounds=1)
