"""A server optimizer around the mean of any method, and the proximal term of any method's training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedpers.cohort import entries
from fedpers.errors import ConfigError, TrainingError
from fedpers.flower_private import server_identity
from fedpers.records import from_record
from fedpers.runtime.local import LocalGrid
from fedpers.server.postprocessors import ServerStep
from fedpers.server.tools import ServerOptimizer
from fedpers.settings import ServerOptimizerConfig
from fedpers.strategies import PersonalizedStrategy, make_strategy
from tests.problems import SmallNetwork, gaussian_data, problem
from tests.strategies.helpers import run

DATA = gaussian_data((27, 11, 46, 22))


@pytest.fixture(autouse=True)
def _server() -> Iterator[None]:
    with server_identity(1):
        yield


def trained(rounds: int, method: str = "fedavg", **server: Any) -> tuple[dict[str, torch.Tensor], PersonalizedStrategy]:
    """Arrays of the server after some rounds on networks with batch normalization."""
    strategy, update = make_strategy(method, server=server, training=problem(method).training)
    app = update.client_app(SmallNetwork(dropout=0.0), DATA)
    strategy.attach(app)
    result = strategy.start(LocalGrid(app, 4, workers=1), app.initial_arrays(), num_rounds=rounds)
    assert strategy.report.failures == {}
    return entries(from_record(result.arrays)), strategy


def step(name: str, **settings: Any) -> ServerStep:
    return ServerStep(optimizer=ServerOptimizer(name=name, **settings))  # type: ignore[arg-type]


def test_half_a_step_goes_half_way_and_buffers_are_the_mean() -> None:
    start = SmallNetwork(dropout=0.0).state_dict()
    mean, _ = trained(1)
    half, _ = trained(1, postprocessors=(step("sgd", lr=0.5),))
    for name, value in mean.items():
        moves = value.is_floating_point() and "running" not in name
        expected = torch.lerp(start[name], value, 0.5) if moves else value
        torch.testing.assert_close(half[name], expected, rtol=1e-5, atol=1e-6)


def test_moments_stay_on_the_server() -> None:
    _, strategy = trained(1, postprocessors=(step("adam"),))
    assert entries(strategy.state["server_optimizer"])
    assert not strategy.reply_rules([0, 1]).postprocessors


@pytest.mark.parametrize("method", ["fedavg", "fedper", "ditto", "fedbn"])
def test_a_whole_step_changes_nothing(method: str) -> None:
    mean, _ = trained(2, method)
    stepped, _ = trained(2, method, postprocessors=(step("sgd"),))
    for name, value in mean.items():
        torch.testing.assert_close(stepped[name], value, rtol=1e-5, atol=1e-5)


def test_the_first_step_of_adam_has_the_size_of_its_rate() -> None:
    """m^ / (sqrt(v^) + eps) is the sign of the change, but for eps."""
    start = SmallNetwork(dropout=0.0).state_dict()
    mean, _ = trained(1)
    adam, strategy = trained(1, postprocessors=(step("adam", lr=0.01, eps=1e-12),))
    for name in ("body.0.weight", "head.weight"):
        torch.testing.assert_close(adam[name] - start[name], 0.01 * torch.sign(mean[name] - start[name]))
    assert "head.weight.second" in entries(strategy.state["server_optimizer"])


def test_only_means_and_only_with_the_network_at_hand() -> None:
    with pytest.raises(ConfigError, match="server_optimizer=adam: expected none for Scaffold"):
        trained(1, "scaffold", postprocessors=(step("adam"),))
    strategy, update = make_strategy(
        "fedavg", server={"postprocessors": (step("adam"),)}, training=problem("fedavg").training
    )
    app = update.client_app(SmallNetwork(), DATA)
    with pytest.raises(TrainingError, match="call attach"):
        strategy.start(LocalGrid(app, 4, workers=1), app.initial_arrays(), num_rounds=1)


def test_settings_name_it() -> None:
    assert ServerStep.of(ServerOptimizerConfig()) is None
    made = ServerStep.of(ServerOptimizerConfig(name="yogi", lr=0.1))
    assert made is not None
    assert (made.label, made.optimizer.lr, made.optimizer.betas) == ("yogi", 0.1, (0.9, 0.99))
    with pytest.raises(ConfigError, match=r"server_optimizer\.lr=0"):
        ServerOptimizerConfig(lr=0.0)


def test_a_proximal_term_of_training_is_fedprox() -> None:
    given = problem("fedprox")
    plain = {"lr": 0.05, "epochs": 2, "batch_size": 8}
    by_method = run("fedprox", {"mu": 0.7}, rounds=2, network=given.network, data=given.data, **plain)
    by_setting = run("fedavg", rounds=2, network=given.network, data=given.data, **plain, proximal=0.7)
    without = run("fedavg", rounds=2, network=given.network, data=given.data, **plain)
    for name, value in by_method.arrays.items():
        torch.testing.assert_close(by_setting.arrays[name], value, rtol=1e-5, atol=1e-6)
    assert not torch.equal(without.arrays["head.weight"], by_setting.arrays["head.weight"])


@pytest.mark.parametrize("clients_at_once", [1, 7])
def test_a_proximal_term_does_not_depend_on_who_is_computed_together(clients_at_once: int) -> None:
    given = problem("fedper")
    training = replace(given.training, proximal=0.5)
    results = []
    for size in (3, clients_at_once):
        strategy, update = make_strategy("fedper", training=training)
        app = update.client_app(given.network, given.data)
        grid = LocalGrid(app, given.data.num_clients, clients_at_once=size, workers=1)
        results.append(entries(from_record(strategy.start(grid, app.initial_arrays(), num_rounds=2).arrays)))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-5)
