"""Kinds of layers and networks: how they run, and that they train as a plain loop of PyTorch trains them."""

from __future__ import annotations

import logging
from typing import Any

import flwr.app as flower
import pytest
import torch
from flwr.serverapp import Grid, ServerApp
from torch import nn
from torch.nn import functional as F

from fedpers import simulate
from fedpers.cohort import Network, Training, entries
from fedpers.cohort.modules import prepare
from fedpers.flower_private import server_identity
from fedpers.randomness import derive
from fedpers.records import from_record
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import FedAvg, FedPer
from tests.cohort.helpers import cross_entropy, make_cohort
from tests.layers import CLIENTS, KINDS, REFUSED, STACKED, Kind, how_it_runs

RUN = [kind for kind in KINDS if kind.expected != REFUSED]
DRAW = (
    "LSTM, two layers with dropout",
    "attention with dropout",
    "transformer encoder, default dropout",
    "alpha dropout",
    "noise drawn in forward",
)
OURS = ("dropout layers", "transformer encoder, default dropout")  # whose masks are this package's own


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_how_a_kind_of_network_runs(kind: Kind) -> None:
    mode, sentence = how_it_runs(kind)
    assert mode == kind.expected
    if mode == REFUSED:
        assert sentence.startswith("model=")
        assert "\n" not in sentence


def trained(kind: Kind, clients_at_once: int | str, workers: int = 1, rounds: int = 2) -> dict[str, torch.Tensor]:
    """The server's arrays after some rounds of FedAvg."""
    app, strategy = kind.app(), FedAvg(seed=1)
    grid = LocalGrid(app, CLIENTS, clients_at_once=clients_at_once, workers=workers)
    arrays, config = app.initial_arrays(), flower.ConfigRecord()
    strategy.begin()
    with server_identity(1):
        for r in range(1, rounds + 1):
            replies = grid.send_and_receive(strategy.configure_train(r, arrays, config, grid))
            arrays, _ = strategy.aggregate_train(r, replies)
            assert not strategy.report.failures
    grid.close()
    return entries(from_record(arrays))


def plain(kind: Kind, rounds: int = 2) -> dict[str, torch.Tensor]:
    """The same with PyTorch's own optimizer, one client after the other."""
    network, data = kind.network(), kind.data()
    prepared = prepare(network) if kind.name in OURS else network
    arrays = {name: value.clone() for name, value in network.state_dict().items()}
    names = [name for name, p in network.named_parameters() if p.requires_grad]
    for r in range(1, rounds + 1):
        results = []
        for client in range(CLIENTS):
            prepared.load_state_dict(arrays)
            prepared.train()
            optimizer = torch.optim.SGD([p for p in prepared.parameters() if p.requires_grad], 0.1)
            for step in range(6):
                rows = data.train[client][5 * (step % 3) : 5 * (step % 3) + 5]
                key = derive(1, "dropout", client, r) + step
                torch.manual_seed(key)
                if kind.name in OURS:
                    tensors = {**dict(prepared.named_parameters()), **dict(prepared.named_buffers())}
                    out = Network(prepared, tensors, key=torch.tensor(key))(data.x[rows])
                else:
                    out = prepared(data.x[rows])
                optimizer.zero_grad()
                F.cross_entropy(out, data.y[rows]).backward()
                optimizer.step()
            results.append({name: value.clone() for name, value in prepared.state_dict().items()})
        arrays = {
            n: torch.stack([values[n] for values in results]).mean(0) if v.is_floating_point() else v
            for n, v in arrays.items()
        }
    return {name: arrays[name] for name in [*names, *(n for n, _ in network.named_buffers() if n in arrays)]}


@pytest.mark.parametrize("kind", RUN, ids=lambda kind: kind.name)
def test_a_kind_of_network_trains_as_in_a_plain_loop(kind: Kind) -> None:
    with torch.random.fork_rng():
        expected = plain(kind)
    actual = trained(kind, "auto")
    start = entries(kind.app().template)
    moving = [name for name, value in expected.items() if value.is_floating_point()]
    assert set(moving) <= actual.keys()
    for name in moving:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-7, atol=1e-9)
    moved = {name for name in moving if not torch.equal(actual[name], start[name])}
    assert moved == {name for name in moving if not torch.equal(expected[name], start[name])}
    assert moved


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUN, ids=lambda kind: kind.name)
def test_cohort_size_and_workers_change_nothing(kind: Kind) -> None:
    first = trained(kind, 1)
    settings = ((CLIENTS, 1), (1, 3), (2, 2)) if kind.expected == STACKED else ((CLIENTS, 3),)
    for clients_at_once, workers in settings:
        for name, value in trained(kind, clients_at_once, workers).items():
            torch.testing.assert_close(value, first[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("active", [1, CLIENTS])
@pytest.mark.parametrize("kind", [k for k in KINDS if k.expected == STACKED], ids=lambda kind: kind.name)
def test_gradients_lie_in_memory_as_parameters_do(kind: Kind, active: int) -> None:
    cohort = make_cohort(kind.network(), kind.data(), training=Training(batch_size=4))
    params = cohort.assemble(cohort.template)
    walk = cohort.walk(params, steps=[2] * active + [1] * (CLIENTS - active))
    for step, rows in walk:
        _, grads = cohort.gradients(step, rows, cross_entropy, cohort.trainable())
        for name, grad in grads.items():
            assert grad.shape == rows[name].shape
            assert all(a == b for a, b, n in zip(grad.stride(), rows[name].stride(), grad.shape, strict=True) if n > 1)


@pytest.mark.parametrize("kind", [k for k in KINDS if k.name in DRAW], ids=lambda kind: kind.name)
def test_a_network_that_draws_leaves_the_global_generator_alone(kind: Kind) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = trained(kind, "auto")
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(6)
    for name, value in trained(kind, "auto").items():
        assert torch.equal(value, first[name])


@pytest.mark.parametrize("clients_at_once", ["auto", CLIENTS])
def test_networks_that_cannot_be_stacked_are_computed_one_by_one_without_a_warning(
    clients_at_once: Any, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    kind = next(kind for kind in KINDS if kind.name == "LSTM")
    app, server = FedPer.update().client_app(kind.network(), kind.data()), ServerApp()

    @server.main()
    def main(grid: Grid, context: flower.Context) -> None:
        FedPer().start(grid, app.initial_arrays(), num_rounds=3)

    with caplog.at_level(logging.INFO, "fedpers"):
        simulate(server, app, CLIENTS, clients_at_once=clients_at_once)
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("fedpers")]
    assert sum("one at a time" in line for line in lines) == 1
    assert not [r for r in caplog.records if r.name.startswith("fedpers") and r.levelno >= logging.WARNING]
    assert not [w for w in recwarn if "batching rule" in str(w.message)]


class Tied(nn.Module):
    """Two layers whose weights are one parameter, and two norms whose statistics are one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.norms = nn.ModuleList([nn.BatchNorm1d(8), nn.BatchNorm1d(8)])
        self.norms[1].running_mean = self.norms[0].running_mean
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norms[1](self.second(self.norms[0](self.first(x)).relu())))


def test_tied_weights_and_buffers_stay_tied() -> None:
    kind = Kind("tied", Tied, (8,))
    with torch.random.fork_rng():
        expected = plain(kind)
    actual = trained(kind, CLIENTS)
    assert "second.weight" not in actual
    for name, value in actual.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-9)


def test_a_network_that_draws_in_an_evaluation_is_refused() -> None:
    class Always(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x + torch.randn_like(x))

    kind = Kind("always noisy", Always, (8,), REFUSED)
    mode, sentence = how_it_runs(kind)
    assert mode == REFUSED
    assert sentence == "model=Always: expected a network that draws no random numbers in an evaluation."
