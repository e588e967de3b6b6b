"""pFedHN: its steps against autograd through generated networks; heads that stay; clients that never train."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedpers.cohort import entries
from fedpers.errors import ConfigError
from fedpers.strategies import make_strategy
from fedpers.strategies.pfedhn import EMBEDDINGS, HYPERNETWORK, MOMENTS, generate
from tests.problems import SmallNetwork
from tests.strategies.helpers import DATA, NETWORK, Finished, Values, drawn, passes, run, sgd
from tests.strategies.test_parts import Classifier

LINEAR = SmallNetwork(norm=False, dropout=0.0).double()
NAMES = [name for name, _ in LINEAR.named_parameters()]
SMALL: dict[str, Any] = {"hidden": 6, "hidden_layers": 1, "server_lr": 0.5}


def hypernetwork(result: Finished) -> tuple[Values, Tensor]:
    biases = {f"bias.{name}": value for name, value in result.arrays.items()}
    return {**entries(result.strategy.state[HYPERNETWORK]), **biases}, result.strategy.state[EMBEDDINGS]["value"]


def initial() -> tuple[Values, Tensor]:
    """Before the first round: of a run whose clients take no step."""
    return hypernetwork(run("pfedhn", SMALL, rounds=1, epochs=0, network=LINEAR))


def test_networks_are_an_mlp_under_linear_layers_around_the_initial_network() -> None:
    phi, embeddings = initial()
    networks, v = generate(phi, embeddings), embeddings[2]
    assert set(networks) == set(NAMES)
    assert embeddings.shape == (4, 2)  # 1 + 4 // 4 numbers for each of 4 clients
    features = phi["mlp.1.weight"] @ torch.relu(phi["mlp.0.weight"] @ v + phi["mlp.0.bias"]) + phi["mlp.1.bias"]
    for name in NAMES:
        expected = LINEAR.get_parameter(name) + phi[f"weight.{name}"] @ features
        torch.testing.assert_close(networks[name][2], expected, msg=name)


def test_rounds_are_the_plain_loop() -> None:
    """Steps down ``0.5 * mean_i ||theta~_i - theta_i||^2`` with theta~_i fixed, for v_i without the mean."""
    result = run("pfedhn", SMALL, rounds=2, fraction=0.5, network=LINEAR)
    phi, embeddings = initial()
    for r in (1, 2):
        clients = drawn(r, 0.5)
        free = {name: value.clone().requires_grad_() for name, value in phi.items()}
        rows = embeddings.clone().requires_grad_()
        networks = generate(free, rows)
        total = torch.zeros((), dtype=torch.float64)
        for client in clients:
            trained = {name: value[client].detach().clone() for name, value in networks.items()}
            sgd(trained, passes(client, 2, r), network=LINEAR)
            total = total + sum(0.5 * (trained[n] - networks[n][client]).square().sum() for n in NAMES) / len(clients)
        *slopes, of_rows = torch.autograd.grad(total, [*free.values(), rows])
        phi = {name: value - 0.5 * slope for (name, value), slope in zip(phi.items(), slopes, strict=True)}
        embeddings = embeddings - 0.5 * len(clients) * of_rows
    ours, our_embeddings = hypernetwork(result)
    torch.testing.assert_close(our_embeddings, embeddings, rtol=1e-9, atol=1e-11)
    for name, value in phi.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-11, msg=name)
    assert MOMENTS not in result.strategy.state


def test_momentum_moves_embeddings_of_clients_that_did_not_train() -> None:
    embeddings = []
    for rounds in (1, 2):
        result = run("pfedhn", {**SMALL, "server_optimizer": "momentum"}, rounds=rounds, fraction=0.25, network=LINEAR)
        embeddings.append(hypernetwork(result)[1])
    (first,), (second,) = drawn(1, 0.25), drawn(2, 0.25)
    moved = (embeddings[0] != embeddings[1]).any(1)
    assert moved.tolist() == [client in {first, second} for client in range(4)]
    assert first != second


@pytest.mark.parametrize("local_head", [False, True])
def test_what_is_not_generated_stays(local_head: bool) -> None:
    result = run("pfedhn", {**SMALL, "local_head": local_head}, rounds=2)
    kept = {name.removeprefix("model/") for name in result.state(0) if name.startswith("model/")}
    buffers = {name for name, _ in NETWORK.named_buffers()}
    heads = {"head.weight", "head.bias"} if local_head else set()
    assert kept == buffers | heads
    assert set(result.arrays) == {name for name, _ in NETWORK.named_parameters()} - heads


def test_a_client_that_never_trains_moves_its_embedding_only_if_it_adapts() -> None:
    data = replace(DATA, unseen=(1,))
    options = {**SMALL, "adapt_rounds": 2}
    reports = [run("pfedhn", options, data=data, network=LINEAR, epochs=epochs).strategy.report for epochs in (0, 2)]
    losses = [(report.unseen[1]["test-loss"], report.adapted[1]["test-loss"]) for report in reports]
    assert losses[0][0] == pytest.approx(losses[0][1])
    assert losses[1][0] != pytest.approx(losses[1][1])


def test_adapting_leaves_the_server_as_it_is() -> None:
    data = replace(DATA, unseen=(1,))
    with_newcomer = run("pfedhn", SMALL, data=data, network=LINEAR)
    phi, embeddings = hypernetwork(with_newcomer)
    assert with_newcomer.strategy.state[EMBEDDINGS]["client"].tolist() == [0, 2, 3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(with_newcomer.strategy), "adapt", lambda self, *_: ([], []))
        others, other_embeddings = hypernetwork(run("pfedhn", SMALL, data=data, network=LINEAR))
    assert torch.equal(embeddings, other_embeddings)
    assert all(torch.equal(value, others[name]) for name, value in phi.items())


def test_a_local_head_needs_a_head() -> None:
    _, update = make_strategy("pfedhn", {"local_head": True})
    with pytest.raises(ConfigError, match="expected a network whose last layer is named 'head'"):
        update.client_app(Classifier(), DATA)
