"""FedDBE against a plain loop over clients and batches, and the mean feature that clients agree on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedpers.cohort import Cohort, Reply, Training
from fedpers.errors import ConfigError
from fedpers.flower_private import server_identity
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import FedDBE, FedDBEUpdate, make_strategy
from tests.cohort.helpers import assert_same
from tests.strategies.helpers import (
    DATA,
    NETWORK,
    NUMBERS,
    SEED,
    Values,
    average,
    copied,
    drawn,
    initial,
    passes,
    run,
    sizes,
    weights_of,
)

CLIENTS = range(DATA.num_clients)


def fitted(values: Values, client: int, mean: Tensor | None, *, kappa: float, mu: float, round: int) -> Tensor:
    """Train in place, for the common mean without memory and penalty; the running mean after the last step."""
    running = torch.zeros(8, dtype=torch.float64)
    for x, y in passes(client, 2, round, purpose="mean" if mean is None else "batches"):
        names = [*weights_of(), *(() if mean is None else ("memory",))]
        free = {name: values[name].requires_grad_() for name in names}
        at = {name.removeprefix("body."): v for name, v in {**values, **free}.items() if name.startswith("body.")}
        rows = functional_call(NETWORK.body.train(), at, (x,))
        running = (1 - mu) * running.detach() + mu * rows.mean(0)
        loss = F.cross_entropy(F.linear(rows + values["memory"], free["head.weight"], free["head.bias"]), y)
        if mean is not None:
            loss = loss + kappa * (0.5 * (running - mean) ** 2).mean()
        for name, slope in zip(names, torch.autograd.grad(loss, list(free.values())), strict=True):
            values[name] = (values[name] - 0.1 * slope).detach()
    return running.detach()


def agreed(mu: float, clients: Any = CLIENTS) -> Tensor:
    """The mean feature of some clients."""
    fresh = [{**initial(), "memory": torch.zeros(8, dtype=torch.float64)} for _ in clients]
    means = [fitted(values, c, None, kappa=0.0, mu=mu, round=1) for values, c in zip(fresh, clients, strict=True)]
    return average([{"mean": mean} for mean in means], sizes(clients))["mean"]


@pytest.mark.parametrize(("kappa", "mu"), [(2.0, 0.3), (50.0, 1.0)])
def test_means_are_agreed_on_and_the_bias_is_remembered(kappa: float, mu: float) -> None:
    result = run("feddbe", {"kappa": kappa, "mu": mu}, fraction=0.5)
    mean = agreed(mu)
    assert_same(result.strategy.state["mean"], {"mean": mean})
    server = initial()
    memories = [torch.zeros(8, dtype=torch.float64) for _ in CLIENTS]
    for r in (1, 2, 3):
        parts = []
        for client in drawn(r, 0.5):
            values = {**copied(server), "memory": memories[client].clone()}
            fitted(values, client, mean, kappa=kappa, mu=mu, round=r)
            memories[client] = values.pop("memory")
            parts.append(values)
        server = average(parts, sizes(drawn(r, 0.5)))
    assert_same(result.arrays, server)
    for client, values in enumerate(result.predictors()):
        assert_same(values, {**server, "memory": memories[client]})
    assert not any(bool((m == 0).all()) for c, m in enumerate(memories) if c in drawn(1, 0.5))


def test_clients_that_never_train_are_not_asked_but_can_adapt() -> None:
    result = run("feddbe", {"mu": 1.0}, rounds=1, data=replace(DATA, unseen=(1,)))
    assert_same(result.strategy.state["mean"], {"mean": agreed(1.0, [0, 2, 3])})
    assert result.strategy.report.adapted.keys() == {1}


class SilentUpdate(FedDBEUpdate):
    def query_mean(self, cohort: Cohort, received: Any, config: Mapping[str, Any]) -> Reply:
        reply = super().query_mean(cohort, received, config)
        reply.records["mean"]["mean"][torch.tensor(cohort.clients) == 2] = torch.nan
        return reply


def test_who_does_not_answer_is_not_in_the_mean_and_does_not_train() -> None:
    training = Training(lr=0.1, batch_size=5, epochs=2)
    strategy, update = make_strategy("feddbe", server={"seed": SEED}, training=training)
    update.__class__ = SilentUpdate
    app = update.client_app(NETWORK, DATA, seed=SEED)
    with server_identity(1):
        strategy.start(LocalGrid(app, DATA.num_clients, clients_at_once=2), app.initial_arrays(), num_rounds=1)
    assert_same(strategy.state["mean"], {"mean": agreed(1.0, [0, 1, 3])})
    assert strategy.report.failures.keys() == {2}


def test_what_it_works_with() -> None:
    _, update = make_strategy("feddbe")
    with pytest.raises(ConfigError, match=r"^model=Sequential: expected a network with a 'body' and a linear 'head'"):
        update.client_app(nn.Sequential(nn.Linear(6, 4)).double(), DATA)
    assert not FedDBE.plain_mean()
    numbers = nn.Module()
    numbers.body, numbers.head = NETWORK.body, nn.Linear(8, 1).double()
    update.client_app(numbers, NUMBERS)
