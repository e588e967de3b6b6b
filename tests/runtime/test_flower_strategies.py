"""Every strategy that Flower ships, around this package's clients: it runs, or says in a sentence why not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flwr.app as flower
import flwr.serverapp.strategy as shipped
import numpy as np
import pytest
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Result, Strategy

from fedpers import simulate
from fedpers.cohort import Training
from fedpers.errors import ConfigError
from fedpers.models import ModelConfig, build_model
from fedpers.strategies import FedAvgUpdate, FedProxUpdate, LocalUpdate
from tests.problems import gaussian_data

SIZES = (40, 34, 30, 28, 26, 24, 22, 20)
DATA = gaussian_data(SIZES)
NAMES = sorted(
    name for name, kind in vars(shipped).items() if isinstance(kind, type) and kind not in (Strategy, Result)
)
MADE: dict[str, Callable[[], Strategy]] = {
    "Bulyan": partial(shipped.Bulyan, num_malicious_nodes=1),
    "DifferentialPrivacyClientSideAdaptiveClipping": lambda: shipped.DifferentialPrivacyClientSideAdaptiveClipping(
        FedAvg(), 0.01, len(SIZES)
    ),
    "DifferentialPrivacyClientSideFixedClipping": lambda: shipped.DifferentialPrivacyClientSideFixedClipping(
        FedAvg(), 0.01, 1.0, len(SIZES)
    ),
    "DifferentialPrivacyServerSideAdaptiveClipping": lambda: shipped.DifferentialPrivacyServerSideAdaptiveClipping(
        FedAvg(), 0.01, len(SIZES)
    ),
    "DifferentialPrivacyServerSideFixedClipping": lambda: shipped.DifferentialPrivacyServerSideFixedClipping(
        FedAvg(), 0.01, 1.0, len(SIZES)
    ),
    "FedProx": partial(shipped.FedProx, proximal_mu=0.1),
    "Krum": partial(shipped.Krum, num_malicious_nodes=1),
    "MultiKrum": partial(shipped.MultiKrum, num_malicious_nodes=1, num_nodes_to_select=3),
    "QFedAvg": partial(shipped.QFedAvg, client_learning_rate=0.1, train_loss_key="train-loss"),
}
MODS = {
    "DifferentialPrivacyClientSideAdaptiveClipping": [adaptiveclipping_mod],
    "DifferentialPrivacyClientSideFixedClipping": [fixedclipping_mod],
}
REFUSED = {"FedXgbBagging": "Expected exactly one Array in ArrayRecord"}
"""What a strategy says of clients that are none of its own: this one adds up trees."""


def result_of(strategy: Strategy, update: LocalUpdate, mods: Any = ()) -> Result:
    network = build_model(ModelConfig("mlp"), DATA.x.shape[1:], DATA.num_classes, seed=0)
    app = update.client_app(network, DATA, mods=mods)
    server, results = ServerApp(), []

    @server.main()
    def main(grid: Grid, context: flower.Context) -> None:
        results.append(strategy.start(grid, app.initial_arrays(), num_rounds=4))

    simulate(server, app, num_supernodes=len(SIZES))
    return results[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_of_flower_around_clients_of_this_package(name: str) -> None:
    strategy = MADE.get(name, getattr(shipped, name))()
    training = Training(lr=0.1, batch_size=8)
    update = (FedProxUpdate if name == "FedProx" else FedAvgUpdate)(training=training)
    if name in REFUSED:
        with pytest.raises(Exception, match=REFUSED[name]):
            result_of(strategy, update)
        return
    result = result_of(strategy, update, MODS.get(name, ()))
    losses = [result.evaluate_metrics_clientapp[r]["test-loss"] for r in (1, 2, 3, 4)]
    assert np.isfinite(losses).all()
    assert all(np.isfinite(array.numpy()).all() for array in result.arrays.values())


def test_the_strength_of_the_pull_is_what_flowers_fedprox_sends() -> None:
    update = partial(FedProxUpdate, training=Training(lr=0.1, batch_size=8))
    sent = result_of(shipped.FedProx(proximal_mu=3.0), update()).arrays
    set_here = result_of(FedAvg(), update(mu=3.0)).arrays
    other = result_of(FedAvg(), update(mu=0.0)).arrays
    for name, array in sent.items():
        np.testing.assert_allclose(array.numpy(), set_here[name].numpy(), atol=1e-5)
    assert any(not np.allclose(array.numpy(), other[name].numpy(), atol=1e-3) for name, array in sent.items())


def test_clients_that_read_no_pull_refuse_one() -> None:
    with pytest.raises(ConfigError, match=r"^proximal-mu=0\.1: expected no such key in a message's configuration"):
        result_of(shipped.FedProx(proximal_mu=0.1), FedAvgUpdate())


def test_arrays_are_taken_in_the_networks_dtype() -> None:
    """Flower's FedAdam returns float64, an ordinary PyTorch client casts them when it loads its state."""
    result = result_of(shipped.FedAdam(), FedAvgUpdate(training=Training(lr=0.1, batch_size=8)))
    assert {array.dtype for array in result.arrays.values()} == {"float64"}
    assert sorted(result.evaluate_metrics_clientapp) == [1, 2, 3, 4]
