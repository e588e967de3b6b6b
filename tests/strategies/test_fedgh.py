"""FedGH as its paper has it, against plain loops over clients, batches and mean features."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from fedpers.errors import ConfigError
from fedpers.strategies import FedGHUpdate
from tests.cohort.helpers import assert_same
from tests.problems import SmallNetwork
from tests.strategies.helpers import DATA, NETWORK, NUMBERS, copied, drawn, initial, run, sgd

HEAD = ("head.weight", "head.bias")


def test_the_server_trains_the_head_on_mean_features_one_by_one() -> None:
    result = run("fedgh", {"server_lr": 0.3}, rounds=3, fraction=0.5, shuffle=False)
    head, bodies = {n: initial()[n] for n in HEAD}, {}
    for r in range(1, 4):
        means = []
        for client in drawn(r, 0.5):
            values = {**copied(bodies.get(client, initial())), **copied(head)}
            index = DATA.train[client]
            batches = torch.split(index, 5)
            sgd(values, ((DATA.x[b], DATA.y[b]) for _ in range(2) for b in batches))
            bodies[client] = {n: v for n, v in values.items() if n not in HEAD}
            inside = {n.removeprefix("body."): v for n, v in bodies[client].items()}
            features = functional_call(NETWORK.body.eval(), inside, (DATA.x[index],))
            means += [(features[DATA.y[index] == j].mean(0), j) for j in DATA.y[index].unique().tolist()]
        for feature, j in means:
            free = {n: v.detach().requires_grad_() for n, v in head.items()}
            scores = F.linear(feature[None], free["head.weight"], free["head.bias"])
            slopes = torch.autograd.grad(F.cross_entropy(scores, torch.tensor([j])), list(free.values()))
            head = {n: v.detach() - 0.3 * slope for (n, v), slope in zip(free.items(), slopes, strict=True)}
    assert_same(result.arrays, head)
    for client, values in enumerate(result.predictors()):
        assert_same(values, {**initial(), **bodies.get(client, {}), **head})


def test_the_server_draws_its_batches() -> None:
    options = {"server_batch_size": 3, "server_epochs": 2}
    shuffled, again = (run("fedgh", options, rounds=1).arrays for _ in range(2))
    in_order = run("fedgh", options, rounds=1, shuffle=False).arrays
    assert_same(shuffled, again)
    assert not torch.equal(shuffled["head.weight"], in_order["head.weight"])


def test_what_has_no_features_or_classes_is_refused() -> None:
    cases = ((nn.Linear(6, 4).double(), DATA, "model"), (SmallNetwork().double(), NUMBERS, "strategy"))
    for network, data, key in cases:
        with pytest.raises(ConfigError, match=rf"^{key}=\w+: expected "):
            FedGHUpdate().client_app(network, data)
    deep = SmallNetwork().double()
    deep.head = nn.Sequential(nn.Linear(8, 4)).double()
    with pytest.raises(ConfigError, match="a linear 'head' for strategy=fedgh"):
        FedGHUpdate().client_app(deep, DATA)


def test_the_servers_rate_counts_before_that_of_a_group() -> None:
    options = {"server_lr": 0.5, "server_epochs": 1}
    plain = run("fedgh", options, rounds=1).arrays
    grouped = run("fedgh", options, rounds=1, groups={"head": {"lr": 1e-9}}).arrays
    first = plain.keys() & grouped.keys()
    assert first
    for name in first:
        assert (plain[name] - grouped[name]).abs().max() < 1
        assert not torch.allclose(grouped[name], initial()[name], atol=1e-6)
