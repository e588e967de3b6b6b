"""Fed-RoD against a plain loop over clients and batches, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from fedpers.errors import ConfigError
from fedpers.strategies import make_strategy
from tests.cohort.helpers import assert_same
from tests.strategies.helpers import (
    DATA,
    NETWORK,
    NUMBERS,
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

HEAD = ("weight", "bias")
CLIENTS = range(DATA.num_clients)
COUNTS = [torch.bincount(DATA.y[DATA.train[client]], minlength=4).double() for client in CLIENTS]


def features(values: Values, x: torch.Tensor) -> torch.Tensor:
    """Features in training mode; buffers among the values are updated in place."""
    inside = {name.removeprefix("body."): value for name, value in values.items() if name.startswith("body.")}
    out: torch.Tensor = functional_call(NETWORK.body.train(), inside, (x,))
    return out


def scores(values: Values, prefix: str, rows: torch.Tensor) -> torch.Tensor:
    return F.linear(rows, values[f"{prefix}.weight"], values[f"{prefix}.bias"])


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_the_network_learns_by_balanced_softmax_and_the_private_head_what_is_missing(gamma: float) -> None:
    assert any(bool((counts == 0).any()) for counts in COUNTS)
    result = run("fedrod", {"gamma": gamma}, fraction=0.5)
    server = initial()
    private = [{f"private_head.{n}": server[f"head.{n}"] for n in HEAD} for _ in CLIENTS]
    for r in (1, 2, 3):
        parts = []
        for client in drawn(r, 0.5):
            values = {**copied(server), **copied(private[client])}
            for x, y in passes(client, 2, r):
                shared = {n: values[n].requires_grad_() for n in weights_of()}
                added = {n: values[n].requires_grad_() for n in private[client]}
                rows = features({**values, **shared}, x)
                common = scores(shared, "head", rows)
                exps = COUNTS[client].pow(gamma) * common.exp()
                balanced = -(exps[range(len(y)), y] / exps.sum(1)).log().mean()
                both = F.cross_entropy(common.detach() + scores(added, "private_head", rows.detach()), y)
                for loss, names in ((balanced, shared), (both, added)):
                    slopes = torch.autograd.grad(loss, list(names.values()))
                    for name, slope in zip(names, slopes, strict=True):
                        values[name] = (names[name] - 0.1 * slope).detach()
            private[client] = {n: values.pop(n) for n in private[client]}
            parts.append(values)
        server = average(parts, sizes(drawn(r, 0.5)))
    assert_same(result.arrays, server)
    for client, values in enumerate(result.predictors()):
        assert_same(values, {**server, **private[client]})


def test_the_common_head_is_evaluated_alone() -> None:
    result = run("fedrod", rounds=2)
    network = NETWORK.eval()
    for client, metrics in result.strategy.report.clients.items():
        rows = DATA.test[client]
        loss = F.cross_entropy(functional_call(network, result.arrays, (DATA.x[rows],)), DATA.y[rows])
        assert metrics["test-generic-loss"] == pytest.approx(float(loss), rel=1e-9)
        assert metrics["test-generic-loss"] != metrics["test-loss"]


def test_what_it_cannot_work_with_is_refused() -> None:
    _, update = make_strategy("fedrod")
    with pytest.raises(ConfigError, match=r"^strategy=fedrod: expected another method for .* no class labels"):
        update.client_app(NETWORK, NUMBERS)
    with pytest.raises(ConfigError, match=r"^model=Sequential: expected a network with a 'body' and a linear 'head'"):
        update.client_app(nn.Sequential(nn.Linear(6, 4)).double(), DATA)
