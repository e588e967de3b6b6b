"""Flower's privacy wrappers around every method: they work through one call, or one sentence says why not."""

from __future__ import annotations

from typing import Any

import flwr.app as flower
import pytest
import torch
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedMedian,
    Strategy,
)
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from torch import Tensor, nn

import fedpers
from fedpers.cohort import entries, leaves
from fedpers.errors import ConfigError, TrainingError
from fedpers.flower_private import server_identity
from fedpers.records import from_record
from fedpers.runtime.local import LocalGrid
from fedpers.server.postprocessors import Privacy, Robust, TopK, within
from fedpers.strategies import STRATEGIES, CohortApp, PersonalizedStrategy
from tests.cohort.helpers import assert_same
from tests.problems import SmallNetwork
from tests.server.helpers import MORE, NOTHING, PLAIN, both, finite, trained

Wrapper = type[
    DifferentialPrivacyServerSideFixedClipping
    | DifferentialPrivacyServerSideAdaptiveClipping
    | DifferentialPrivacyClientSideFixedClipping
    | DifferentialPrivacyClientSideAdaptiveClipping
]
WRAPPERS: dict[Wrapper, list[Any]] = {
    DifferentialPrivacyServerSideFixedClipping: [],
    DifferentialPrivacyServerSideAdaptiveClipping: [],
    DifferentialPrivacyClientSideFixedClipping: [fixedclipping_mod],
    DifferentialPrivacyClientSideAdaptiveClipping: [adaptiveclipping_mod],
}
"""Flower's wrappers and the mods they need."""
FIXED = DifferentialPrivacyServerSideFixedClipping
FEW = ("fedavg", "fedrep", "gpfl")
"""Methods around which all wrappers are tried; around the others the fixed ones."""


def sends_more(method: str) -> bool:
    """Whether clients are sent more than the arrays."""
    return STRATEGIES[method].send is not PersonalizedStrategy.send


def wrapped(wrapper: Wrapper, strategy: Strategy, noise: float = 0.1) -> Strategy:
    if wrapper in (DifferentialPrivacyServerSideFixedClipping, DifferentialPrivacyClientSideFixedClipping):
        return wrapper(strategy, noise, 0.3, 7)
    return wrapper(strategy, noise, 7, initial_clipping_norm=0.3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "wrapper"),
    [
        (method, wrapper)
        for method in STRATEGIES
        for wrapper in WRAPPERS
        if "Fixed" in wrapper.__name__ or method in FEW
    ],
)
def test_flowers_wrappers_work_or_are_refused(method: str, wrapper: Wrapper) -> None:
    strategy, app = both(method, mods=WRAPPERS[wrapper])
    results: list[Any] = []
    server = ServerApp()

    @server.main()
    def main(grid: Any, context: flower.Context) -> None:
        results.append(within(wrapped(wrapper, strategy)).start(grid, app.initial_arrays(), num_rounds=2))

    name = STRATEGIES[method].__name__
    refused = {
        **dict.fromkeys(MORE, f"none around {name}, whose aggregate is more than a mean of the server's arrays."),
        **dict.fromkeys(NOTHING, f"none around {name}, whose clients send nothing."),
    }
    if WRAPPERS[wrapper] and method not in refused and sends_more(method):
        refused[method] = f"a ServerSide one around {name}, which sends its clients more than its arrays."
    if method in refused:
        with pytest.raises(ConfigError) as caught:
            fedpers.simulate(server, app, app.data.num_clients, clients_at_once=3, workers=1)
        assert str(caught.value) == f"wrapper={wrapper.__name__}: expected {refused[method]}"
        assert strategy.report.round == 0  # before anybody was asked for anything
        return
    fedpers.simulate(server, app, app.data.num_clients, clients_at_once=3, workers=1)
    (result,) = results
    assert finite(entries(from_record(result.arrays)))
    assert list(result.train_metrics_clientapp) == [1, 2]
    assert list(result.evaluate_metrics_clientapp) == [1, 2]
    assert not strategy.report.failures
    assert not strategy.report.evaluation_failures
    assert len(strategy.report.clients) == app.data.num_clients - len(app.data.unseen)


@pytest.mark.slow
@pytest.mark.parametrize("method", PLAIN)
def test_ours_and_both_of_flowers_clip_alike(method: str) -> None:
    """Flower pairs arrays by their order, so this also says that replies keep the server's."""
    expected = trained(*both(method, Privacy(noise=0.0, norm=0.3)), rounds=1)
    for wrapper in (DifferentialPrivacyServerSideFixedClipping, DifferentialPrivacyClientSideFixedClipping):
        if sends_more(method) and WRAPPERS[wrapper]:
            continue
        strategy, app = both(method, mods=WRAPPERS[wrapper])
        grid = LocalGrid(app, app.data.num_clients, clients_at_once=3, workers=1)
        with server_identity(1):
            result = within(wrapped(wrapper, strategy, noise=0.0)).start(grid, app.initial_arrays(), num_rounds=1)
        assert_same(entries(from_record(result.arrays)), expected.arrays)
        if grid.engine is not None:  # nothing that a wrapper did to a reply is seen in the clients' own state
            seen = sorted(set(range(app.data.num_clients)) - set(app.data.unseen))  # the others adapted at the end
            assert_same(leaves(grid.engine.store.gather(seen)), leaves(expected.state(seen)), float64=1e-8)


class Counting(Strategy):
    """A wrapper of one's own that changes nothing."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.rounds = 0

    def configure_train(self, *arguments: Any) -> Any:
        self.rounds += 1
        return self.strategy.configure_train(*arguments)

    def aggregate_train(self, *arguments: Any) -> Any:
        return self.strategy.aggregate_train(*arguments)

    def configure_evaluate(self, *arguments: Any) -> Any:
        return self.strategy.configure_evaluate(*arguments)

    def aggregate_evaluate(self, *arguments: Any) -> Any:
        return self.strategy.aggregate_evaluate(*arguments)

    def summary(self) -> None:
        self.strategy.summary()


@pytest.mark.parametrize("method", ["fedrep", "scaffold", "fedjets"])
def test_a_wrapper_of_ones_own_may_be_around_any_method(method: str) -> None:
    def run(make: Any) -> dict[str, Tensor]:
        strategy, app = both(method)
        grid = LocalGrid(app, app.data.num_clients, clients_at_once=3, workers=1)
        with server_identity(1):
            return entries(from_record(make(strategy).start(grid, app.initial_arrays(), num_rounds=2).arrays))

    outer: list[Counting] = []

    def counted(strategy: Strategy) -> Strategy:
        outer.append(within(Counting(Counting(strategy))))
        return outer[0]

    assert_same(run(counted), run(lambda strategy: strategy))
    assert outer[0].rounds == 2


def refused(strategy: PersonalizedStrategy, app: CohortApp, wrap: Any = lambda strategy: strategy) -> str:
    """What Flower's wrapper around a strategy ends in."""
    outer = wrap(FIXED(strategy, 0.1, 1.0, 7))
    with server_identity(1), pytest.raises(ConfigError) as caught:
        within(outer).start(LocalGrid(app, 7, clients_at_once=7, workers=1), app.initial_arrays(), num_rounds=1)
    assert strategy.report.round == 0
    return str(caught.value)


class OneNumber(SmallNetwork):
    """A network with a parameter that has no dimension, which Flower's clipping (flwr 1.41) passes by."""

    def __init__(self) -> None:
        super().__init__(norm=False)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


def test_what_flowers_wrappers_do_not_go_with() -> None:
    name = FIXED.__name__
    assert refused(*both("fedavg", Privacy(noise=0.0, norm=0.3))) == (
        f"wrapper={name}: expected none around a FedAvg that has privacy of its own."
    )
    assert refused(*both("fedavg", TopK())) == (
        f"wrapper={name}: expected none around a FedAvg that has compression of its own."
    )
    assert refused(*both("fedavg", weighting="samples")) == (
        "strategy.weighting=samples: expected uniform with privacy, whose noise is sized for clients of equal weight."
    )
    assert refused(*both("fedavg", Robust(FedMedian()))) == (
        "aggregation=FedMedian: expected mean with privacy, whose noise is sized for a mean."
    )
    assert refused(*both("fedavg", network=SmallNetwork())) == (
        f"privacy={name} with 'body.1.num_batches_tracked' of int64: expected a network whose shared entries are no "
        "batch statistics: another one, or strategy=fedbn."
    )
    assert refused(*both("fedavg", network=OneNumber())) == (
        f"wrapper={name}: expected none around arrays like 'scale', a single number, which it does not clip."
    )
    assert refused(*both("scaffold"), wrap=Counting).startswith(f"wrapper={name}: expected none around Scaffold, ")


def test_what_needs_no_arrays_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"^wrapper=DifferentialPrivacyServerSideFixedClipping: expected none around"):
        within(FIXED(both("scaffold")[0], 0.1, 1.0, 7))


@pytest.mark.parametrize("wrapper", [FlowerFedAvg(), FIXED(FlowerFedAvg(), 0.1, 1.0, 7), Counting(FlowerFedAvg())])
def test_there_must_be_a_method_inside(wrapper: Strategy) -> None:
    with pytest.raises(ConfigError) as caught:
        within(wrapper)
    assert str(caught.value) == (
        f"wrapper={type(wrapper).__name__}: expected a strategy that wraps a method of this package, such as "
        "DifferentialPrivacyServerSideFixedClipping."
    )


def test_a_method_is_no_wrapper_of_itself() -> None:
    strategy, _ = both("fedavg")
    with pytest.raises(ConfigError, match=r"^wrapper=FedAvg: expected a strategy that wraps a method of this package"):
        within(strategy)


@pytest.mark.parametrize("wrapper", [FIXED, Counting])
def test_without_the_call_nothing_is_trained(wrapper: Any) -> None:
    strategy, app = both("fedavg")
    outer = Counting(strategy) if wrapper is Counting else FIXED(strategy, 0.1, 1.0, 7)
    with server_identity(1), pytest.raises(TrainingError, match=r"fedpers\.server\.within"):
        outer.start(LocalGrid(app, 7, clients_at_once=7, workers=1), app.initial_arrays(), num_rounds=1)


def test_a_wrapper_that_is_not_calling_matters_to_nobody() -> None:
    strategy, app = both("scaffold")
    FIXED(strategy, 0.1, 1.0, 7)
    assert finite(trained(strategy, app).arrays)
