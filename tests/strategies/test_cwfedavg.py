"""cwFedAvg against plain loops over clients and classes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fedpers.cohort import entries, tree
from fedpers.errors import ConfigError
from fedpers.strategies import CwFedAvgUpdate
from fedpers.strategies.cwfedavg import class_shares
from tests.cohort.helpers import assert_same
from tests.problems import SmallNetwork
from tests.strategies.helpers import (
    DATA,
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

HEAD = "head.weight"


def test_a_head_stands_for_classes_by_the_lengths_of_its_rows() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -15.0]])
    assert class_shares(weight).tolist() == [0.25, 0.0, 0.75]
    assert class_shares(torch.stack([weight, torch.ones(3, 2)]))[1].tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(("fraction", "class_wise"), [(1.0, "all"), (0.5, "all"), (0.5, "head")])
def test_clients_are_sent_mixtures_of_averages_by_class(fraction: float, class_wise: str) -> None:
    lam, names = 2.0, weights_of()
    result = run("cwfedavg", {"lam": lam, "class_wise": class_wise}, rounds=3, fraction=fraction)
    start = initial()
    mean = {n: start[n] for n in names}
    buffers = [{n: v for n, v in start.items() if n not in names} for _ in range(DATA.num_clients)]
    by_class: list[Values] = []
    shares: dict[int, list[float]] = {}

    def sent(client: int) -> Values:
        if client not in shares:
            return mean
        parts = average(by_class, shares[client])
        return {**mean, **parts}

    def pull(client: int, weight: Tensor) -> Tensor:
        y = DATA.y[DATA.train[client]].tolist()
        free = weight.clone().requires_grad_()
        lengths = [(row**2).sum().sqrt() for row in free]
        total = sum(lengths)
        distance = sum((n / total - y.count(j) / len(y)) ** 2 for j, n in enumerate(lengths)) ** 0.5
        (slope,) = torch.autograd.grad(lam / 2 * distance, free)
        return slope

    for r in range(1, 4):
        trained = {}
        for client in drawn(r, fraction):
            values = {**copied(sent(client)), **copied(buffers[client])}
            sgd(
                values, passes(client, 2, r),
                add=lambda name, value, client=client: pull(client, value) if name == HEAD else 0.0,
            )  # fmt: skip
            trained[client] = {n: values[n] for n in names}
            buffers[client] = {n: values[n] for n in buffers[client]}
        for client, values in trained.items():
            lengths = [math.sqrt(sum(v * v for v in row)) for row in values[HEAD].tolist()]
            shares[client] = [length / sum(lengths) for length in lengths]
        kept = names if class_wise == "all" else [n for n in names if n.startswith("head")]
        counts = {client: len(DATA.train[client]) for client in trained}
        by_class = [
            average([{n: v[n] for n in kept} for v in trained.values()], [counts[k] * shares[k][j] for k in trained])
            for j in range(DATA.num_classes)
        ]
        mean = average(list(trained.values()), list(counts.values()))
    assert_same(result.arrays, mean)
    for client, records in enumerate(result.strategy.send(4, tree(result.arrays), list(range(DATA.num_clients)))):
        assert_same(entries(records["arrays"]), sent(client))
        state = {n.removeprefix("model/"): v for n, v in result.state(client).items() if n.startswith("model/")}
        assert_same(state, buffers[client])


def test_what_has_no_linear_head_or_classes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^strategy=cwfedavg: expected another method"):
        CwFedAvgUpdate().client_app(SmallNetwork().double(), NUMBERS)
    deep = SmallNetwork().double()
    deep.head = nn.Sequential(nn.Linear(8, 4)).double()
    with pytest.raises(ConfigError, match="a linear 'head' for strategy=cwfedavg"):
        CwFedAvgUpdate().client_app(deep, DATA)
