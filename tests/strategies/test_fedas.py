"""FedAS against a plain loop over clients and batches."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedpers.cohort import tree
from fedpers.errors import ConfigError
from fedpers.strategies import FedASUpdate
from fedpers.strategies.fedas import FisherMean
from tests.cohort.helpers import assert_same
from tests.problems import gaussian_data
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
    sgd,
    weights_of,
)

CLIENTS = range(DATA.num_clients)
BODY = [name for name in initial() if name.startswith("body.")]


def features(values: Mapping[str, Tensor], x: Tensor) -> Tensor:
    inside = {name.removeprefix("body."): value for name, value in values.items() if name.startswith("body.")}
    out: Tensor = functional_call(NETWORK.body.eval(), inside, (x,))
    return out


def aligned(received: Values, former: Values, client: int, round: int) -> Values:
    """The received body after its alignment, under the former head."""
    index = DATA.train[client]
    before, y = features(former, DATA.x[index]), DATA.y[index]
    values = {**former, **{name: received[name].clone() for name in BODY}}
    names = [name for name in weights_of() if name.startswith("body.")]
    for x, labels in passes(client, 1, round, size=4):
        free = {name: values[name].detach().requires_grad_() for name in names}
        rows = features({**values, **free}, x)
        loss = sum(((rows[labels == j] - before[y == j].mean(0)) ** 2).mean() for j in labels.unique().tolist())
        for name, slope in zip(names, torch.autograd.grad(loss, list(free.values())), strict=True):
            values[name] = values[name] - 0.3 * slope
    return values


def fisher(values: Values, client: int) -> float:
    total = 0.0
    for i in DATA.train[client].tolist():
        free = {name: values[name].detach().requires_grad_() for name in weights_of()}
        scores = functional_call(NETWORK.eval(), {**values, **free}, (DATA.x[i : i + 1],))
        slopes = torch.autograd.grad(F.cross_entropy(scores, DATA.y[i : i + 1]), list(free.values()))
        total += sum(float(slope.square().sum()) for slope in slopes)
    return total / len(DATA.train[client])


def test_bodies_are_aligned_and_weighted_by_fisher_information() -> None:
    result = run("fedas", {"align_lr": 0.3, "align_batch_size": 4}, rounds=4, fraction=0.5)
    server, networks = initial(), {}
    late = set()
    for r in range(1, 5):
        parts, weights = [], []
        for client in drawn(r, 0.5):
            late |= {client} - networks.keys() if r > 1 else set()
            former = networks.get(client, {**initial(), **{name: server[name] for name in BODY}})
            values = copied(aligned(server, former, client, r))
            sgd(values, passes(client, 2, r, first=1))
            networks[client] = values
            parts.append({name: values[name] for name in BODY})
            weights.append(fisher(values, client))
        server = average(parts, weights)
    assert late  # clients that trained first when the server's body was no longer the initial one
    assert_same(result.arrays, server)
    for client, values in enumerate(result.predictors()):
        assert_same(values, networks.get(client, {**initial(), **server}))


def test_clients_without_information_count_the_same() -> None:
    fold = FisherMean()
    for value in (1.0, 3.0):
        trace = tree({"trace": torch.zeros((), dtype=torch.float64)})
        fold.add({"arrays": tree({"w": torch.tensor(value)}), "fisher": trace}, 1.0)
    assert_same(dict(fold.result()["arrays"].items()), {"w": torch.tensor(2.0)})


def test_what_it_cannot_work_with_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^strategy=fedas: expected another method for gaussian"):
        FedASUpdate().client_app(NETWORK, NUMBERS)
    network = nn.Module()
    network.head = nn.Linear(6, 4)
    with pytest.raises(ConfigError, match=r"^model=Module: expected a network with a 'body' and a 'head' for"):
        FedASUpdate().client_app(network, gaussian_data())
