"""FedCP against a plain loop over clients and batches."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedpers.cohort import entries
from fedpers.errors import ConfigError
from fedpers.randomness import generator
from fedpers.strategies import FedCPUpdate
from fedpers.strategies.fedcp import discrepancy
from tests.cohort.helpers import assert_same
from tests.problems import gaussian_data
from tests.strategies.helpers import DATA, NETWORK, NUMBERS, SEED, Values, average, copied, drawn, passes, run, sizes

KEPT = ("head.weight", "head.bias", "context")


def features(values: Mapping[str, Tensor], x: Tensor, *, training: bool = False) -> Tensor:
    """Features under other values; in training buffers among them are updated in place."""
    inside = {name.removeprefix("body."): value for name, value in values.items() if name.startswith("body.")}
    out: Tensor = functional_call(NETWORK.body.train(training), inside, (x,))
    return out


def scores(values: Mapping[str, Tensor], rows: Tensor, noise: Tensor | float = 0.0) -> Tensor:
    """What both heads make of features; one pair of policy outputs after the other."""
    v = values["context"]
    hidden = F.linear(rows * v / v.norm(), values["policy.0.weight"], values["policy.0.bias"])
    pairs = F.relu(F.layer_norm(hidden, [16], values["policy.1.weight"], values["policy.1.bias"])).view(-1, 2, 8)
    shares = torch.softmax(torch.stack([pairs[:, 0] + noise, pairs[:, 1]], 1), 1)
    mine = F.linear(rows * shares[:, 0], values["head.weight"], values["head.bias"])
    return mine + F.linear(rows * shares[:, 1], values["global_head.weight"], values["global_head.bias"])


def kernel(u: Tensor, v: Tensor) -> Tensor:
    """Mean over all pairs."""
    squares = torch.cdist(u, v).square()
    return sum(torch.exp(-squares / (2 * width)).mean() for width in (10, 15, 20, 50))  # type: ignore[return-value]


def train(values: Values, client: int, round: int, lam: float) -> None:
    received = copied(values)
    draws = generator(SEED, "policy", client, round)
    names = [n for n, v in values.items() if v.is_floating_point() and "running" not in n]
    names = [n for n in names if n != "context" and not n.startswith("global_head.")]
    for x, y in passes(client, 2, round):
        noise = torch.from_numpy(draws.logistic(size=(len(y), 8)))
        free = {name: values[name].detach().requires_grad_() for name in names}
        rows, before = features({**values, **free}, x, training=True), features(received, x)
        loss = F.cross_entropy(scores({**values, **free}, rows, noise), y)
        distance = kernel(rows, rows) + kernel(before, before) - 2 * kernel(rows, before)
        slopes = torch.autograd.grad(loss + lam * distance, list(free.values()))
        for name, slope in zip(names, slopes, strict=True):
            values[name] = values[name] - 0.1 * slope
    for part in ("weight", "bias"):
        values[f"global_head.{part}"] = (values[f"global_head.{part}"] + values[f"head.{part}"]) / 2
    values["context"] = values["head.weight"].sum(0)


def test_a_policy_divides_features_between_two_heads() -> None:
    lam = 2.0
    result = run("fedcp", {"lam": lam}, rounds=4, fraction=0.5)
    start = {name: value.clone() for name, value in entries(result.app.template).items()}
    assert_same({"context": start["context"]}, {"context": start["head.weight"].sum(0)})
    server = {name: value for name, value in start.items() if name not in KEPT}
    kept = [{name: start[name] for name in KEPT} for _ in range(DATA.num_clients)]
    for r in range(1, 5):
        parts = []
        for client in drawn(r, 0.5):
            values = copied({**server, **kept[client]})
            train(values, client, r, lam)
            kept[client] = {name: values[name] for name in KEPT}
            parts.append({name: values[name] for name in server})
        server = average(parts, sizes(drawn(r, 0.5)))
    assert_same(result.arrays, server)
    for client, values in enumerate(result.predictors()):
        assert_same(values, {**server, **kept[client]})
        index = DATA.test[client]
        right = scores(values, features(values, DATA.x[index])).argmax(1) == DATA.y[index]
        accuracy = result.strategy.report.clients[client]["test-accuracy"]
        assert accuracy == pytest.approx(float(right.double().mean()))


def test_padding_has_no_part_in_the_discrepancy() -> None:
    u, v = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor([1.0, 1, 1, 0, 0], dtype=torch.float64)
    assert_same({"padded": discrepancy(u, v, weight)}, {"padded": discrepancy(u[:3], v[:3])})
    assert_same({"all": discrepancy(u, v)}, {"all": kernel(u, u) + kernel(v, v) - 2 * kernel(u, v)})


def test_what_it_cannot_work_with_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^strategy=fedcp: expected another method for gaussian"):
        FedCPUpdate().client_app(NETWORK, NUMBERS)
    network = nn.Module()
    network.head = nn.Linear(6, 4)
    with pytest.raises(ConfigError, match=r"^model=Module: expected a network with a 'body' and a linear 'head' for"):
        FedCPUpdate().client_app(network, gaussian_data())
