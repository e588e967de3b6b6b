"""A stack of clients moves as each would with an optimizer of ``torch.optim`` of its own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedpers.cohort import Batch, Cohort, Network, Training
from tests.cohort.helpers import assert_same, batches, by_size, cross_entropy, make_cohort, train_alone
from tests.problems import SmallNetwork, gaussian_data

Make = Callable[[nn.Module], torch.optim.Optimizer]


def sgd(**options: Any) -> Make:
    return lambda module: torch.optim.SGD(module.parameters(), lr=0.1, **options)


def grouped(module: nn.Module) -> torch.optim.Optimizer:
    head = [p for n, p in module.named_parameters() if n.startswith("head")]
    norm = [p for n, p in module.named_parameters() if n.startswith("body.1")]
    body = [p for n, p in module.named_parameters() if n.startswith("body.0")]
    groups: list[dict[str, Any]] = [
        {"params": head, "lr": 0.3, "weight_decay": 0.0},
        {"params": norm, "weight_decay": 0.2},
        {"params": body},
    ]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01)


def linear(t: int, steps: int) -> float:
    return 1 - t / steps


def cosine(t: int, steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * t / steps))


CASES: dict[str, tuple[dict[str, Any], Make, dict[str, Any]]] = {
    "sgd": ({}, sgd(), {}),
    "momentum": ({"momentum": 0.9}, sgd(momentum=0.9), {}),
    "nesterov": ({"momentum": 0.8, "nesterov": True}, sgd(momentum=0.8, nesterov=True), {}),
    "decay": ({"momentum": 0.9, "weight_decay": 0.05}, sgd(momentum=0.9, weight_decay=0.05), {}),
    "adam": (
        {"optimizer": "adam", "lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.02},
        lambda m: torch.optim.Adam(m.parameters(), lr=0.01, betas=(0.8, 0.95), eps=1e-5, weight_decay=0.02),
        {},
    ),
    "adamw": (
        {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
        lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1),
        {},
    ),
    "clip": ({"clip": 0.5, "momentum": 0.5}, sgd(momentum=0.5), {"clip": 0.5}),
    "linear": ({"schedule": "linear"}, sgd(), {"factor": linear}),
    "cosine": ({"schedule": "cosine", "momentum": 0.9}, sgd(momentum=0.9), {"factor": cosine}),
    "cosine adamw": (
        {"schedule": "cosine", "optimizer": "adamw", "weight_decay": 0.1},
        lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.1),
        {"factor": cosine},
    ),
    "groups": (
        {
            "momentum": 0.9,
            "weight_decay": 0.01,
            "groups": {"head": {"lr": 0.3, "weight_decay": 0.0}, "body.1": {"weight_decay": 0.2}},
        },
        grouped,
        {},
    ),
}


def fitted(cohort: Cohort, **options: Any) -> Any:
    params = cohort.assemble(cohort.template)
    cohort.fit(params, cross_entropy, **options)
    return params


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_unequal_clients(case: str, dtype: torch.dtype) -> None:
    settings, make, extra = CASES[case]
    network, data = SmallNetwork(dropout=0.0).to(dtype), gaussian_data(dtype=dtype)
    training = Training(**{"lr": 0.1, "batch_size": 8, "epochs": 2, **settings})
    cohort = make_cohort(network, data, training=training)
    params = fitted(cohort)
    assert cohort.steps_taken.tolist() == [2 * -(-len(data.train[c]) // 8) for c in by_size(data)]
    for row, client in enumerate(by_size(data)):
        steps = int(cohort.steps_taken[row])
        assert_same(params, train_alone(network, data, client, make, steps=steps, size=8, **extra), row)


@pytest.mark.parametrize("case", ["momentum", "adam", "linear", "clip"])
def test_own_numbers_of_steps_in_any_order(case: str) -> None:
    settings, make, extra = CASES[case]
    network, data = SmallNetwork(dropout=0.0).double(), gaussian_data(dtype=torch.float64)
    cohort = make_cohort(network, data, training=Training(**{"lr": 0.1, "batch_size": 8, **settings}))
    steps = [2, 9, 0, 4, 1, 6, 3]
    params = fitted(cohort, steps=steps)
    assert cohort.steps_taken.tolist() == steps
    for row, client in enumerate(by_size(data)):
        assert_same(params, train_alone(network, data, client, make, steps=steps[row], size=8, **extra), row)


def test_drop_last_with_batch_norm_buffers() -> None:
    network, data = SmallNetwork(dropout=0.0).double(), gaussian_data((25, 17, 9, 5), dtype=torch.float64)
    cohort = make_cohort(network, data, training=Training(lr=0.1, batch_size=8, epochs=2, drop_last=True))
    params = fitted(cohort)  # remainders of one sample, on which batch normalization could not train
    assert cohort.steps_taken.tolist() == [6, 4, 2, 2]
    assert cohort.samples_seen.tolist() == [48, 32, 16, 10]
    for row, steps in enumerate([6, 4, 2, 2]):
        alone = train_alone(network, data, row, sgd(), steps=steps, size=8, drop_last=True)
        assert alone["body.1.num_batches_tracked"] == steps
        assert_same(params, alone, row)


def test_one_client_needs_no_stack() -> None:
    network, data = SmallNetwork(dropout=0.0).double(), gaussian_data(dtype=torch.float64)
    cohort = make_cohort(network, data, [2], training=Training(lr=0.1, batch_size=8, momentum=0.9))
    assert_same(fitted(cohort), train_alone(network, data, 2, sgd(momentum=0.9), steps=6, size=8), 0)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_a_parameter_that_is_used_late_begins_then(optimizer: str) -> None:
    """As in ``torch.optim``, which counts the steps of each parameter."""
    network = SmallNetwork(norm=False, dropout=0.0).double()
    data = gaussian_data(dtype=torch.float64)
    cohort = make_cohort(network, data, [0], training=Training(optimizer=optimizer, lr=0.1, batch_size=8))
    params, steps, calls = cohort.assemble(cohort.template), 0, 0

    def loss(network: Network, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        features = network.part("body")(batch.x)
        head = network.tensors["head.weight"] if calls > 2 else network.tensors["head.weight"].detach()
        return batch.mean((features @ head.T).square().sum(1))

    cohort.fit(params, loss)
    alone = copy.deepcopy(network)
    make = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer]
    theirs = make(alone.parameters(), lr=0.1, weight_decay=0.0)
    for steps, (x, _, _) in enumerate(islice(batches(data, 0, size=8), int(cohort.steps_taken[0])), 1):
        theirs.zero_grad()
        head = alone.head.weight if steps > 2 else alone.head.weight.detach()
        (alone.body(x) @ head.T).square().sum(1).mean().backward()
        theirs.step()
    assert steps > 2
    assert_same(params, {n: v.detach() for n, v in alone.state_dict().items()}, 0)
