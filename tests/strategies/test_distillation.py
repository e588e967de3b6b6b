"""Methods in which one network teaches another, as their papers have them, against plain loops over clients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from fedpers.cohort import Batch
from fedpers.errors import ConfigError
from fedpers.strategies import FedPHPUpdate, FMLUpdate
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
    weights_of,
)

SAMPLED = pytest.mark.parametrize(("rounds", "fraction"), [(3, 0.5), (1, 0.25)])
"""All clients train, two of them twice; and one of them once."""


def scores(values: Values, x: Tensor) -> Tensor:
    """In training mode; buffers are updated in place."""
    NETWORK.train()
    out: Tensor = functional_call(NETWORK, values, (x,))
    return out


def free(values: Values) -> Values:
    """The same with parameters to differentiate by."""
    return {n: v.detach().requires_grad_() if n in weights_of() else v for n, v in values.items()}


def descend(values: Values, tracked: Values, loss: Tensor, lr: float = 0.1) -> None:
    names = weights_of()
    for name, slope in zip(names, torch.autograd.grad(loss, [tracked[n] for n in names]), strict=True):
        values[name] = values[name] - lr * slope


def features(values: Values, x: Tensor, *, training: bool = True) -> Tensor:
    NETWORK.train(training)
    out: Tensor = functional_call(NETWORK.body, under("body.", values), (x,))
    return out


def under(part: str, values: Values) -> Values:
    return {name.removeprefix(part): value for name, value in values.items() if name.startswith(part)}


@SAMPLED
def test_fml_as_written(rounds: int, fraction: float) -> None:
    alpha, beta = 0.3, 0.6
    locals_, server = {client: initial() for client in range(4)}, initial()
    for round in range(1, rounds + 1):
        sent = {}
        for client in drawn(round, fraction):
            mine, meme = locals_[client], copied(server)
            for x, y in passes(client, 2, round):
                mine_tracked, meme_tracked = free(mine), free(meme)
                z, z_meme = scores(mine_tracked, x), scores(meme_tracked, x)
                p, q = z.softmax(1).detach(), z_meme.softmax(1).detach()
                pull = (q * (q.log() - z.log_softmax(1))).sum(1).mean()
                push = (p * (p.log() - z_meme.log_softmax(1))).sum(1).mean()
                descend(mine, mine_tracked, alpha * F.cross_entropy(z, y) + (1 - alpha) * pull)
                descend(meme, meme_tracked, beta * F.cross_entropy(z_meme, y) + (1 - beta) * push)
            sent[client] = meme
        server = average(list(sent.values()), [1.0] * len(sent))
    result = run("fml", {"alpha": alpha, "beta": beta}, rounds=rounds, fraction=fraction)
    assert_same(under("shared.", result.arrays), server)
    for client in range(4):  # who has not trained holds, and predicts with, the initial network
        assert_same(under("model/local.", result.state(client)), locals_[client])
        assert_same(under("local.", result.predictors()[client]), locals_[client])


def test_fml_without_teaching_is_local_training_beside_fedavg() -> None:
    result = run("fml", {"alpha": 1.0, "beta": 1.0})
    assert_same(under("shared.", result.arrays), run("fedavg", {"weighting": "uniform"}).arrays)
    alone = run("local")
    for client in range(4):
        assert_same(under("model/local.", result.state(client)), under("model/", alone.state(client)))


def test_classes_are_needed_to_teach() -> None:
    with pytest.raises(ConfigError, match=r"^strategy=fml: expected another method for gaussian, whose samples have"):
        FMLUpdate().client_app(NETWORK, NUMBERS)


def discrepancy(a: Tensor, b: Tensor) -> Tensor:
    def squares(one: Tensor, other: Tensor) -> Tensor:
        return torch.stack([(x - other).square().sum(1) for x in one])

    both = torch.cat([a, b]).detach()
    mean = squares(both, both)[~torch.eye(2 * len(a), dtype=torch.bool)].mean() + 1e-8

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        return torch.stack([torch.exp(-squares(one, other) / (mean * 2.0**i)).mean() for i in range(-2, 3)]).sum()

    return kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)


@SAMPLED
def test_fedphp_as_written(rounds: int, fraction: float) -> None:
    lam, momentum, ramp = 0.4, 0.8, 3
    server: Values = initial()
    inherited: dict[int, Values] = {}
    trainings = dict.fromkeys(range(4), 0)
    for round in range(1, rounds + 1):
        sent = {}
        for client in drawn(round, fraction):
            network, teacher = copied(server), inherited.get(client, server)
            for x, y in passes(client, 1, round):
                tracked = free(network)
                z = features(tracked, x)
                target = features(copied(teacher), x, training=False)
                logits = functional_call(NETWORK.head, under("head.", tracked), (z,))
                loss = (1 - lam) * F.cross_entropy(logits, y) + lam * discrepancy(z, target)
                descend(network, tracked, loss)
            share = momentum * trainings[client] / ramp
            inherited[client] = {
                n: share * teacher[n] + (1 - share) * v if v.is_floating_point() else v for n, v in network.items()
            }
            trainings[client] += 1
            sent[client] = network
        server = average(list(sent.values()), [float(len(DATA.train[client])) for client in sent])
    options = {"lam": lam, "momentum": momentum, "ramp": ramp}
    result = run("fedphp", options, rounds=rounds, fraction=fraction, epochs=1)
    assert_same(result.arrays, server)
    for client in range(4):  # who has not trained has inherited nothing, and predicts with what it is sent
        assert_same(under("inherited/", result.state(client)), inherited.get(client, initial()))
        assert_same(result.predictors()[client], inherited.get(client, server))


def test_a_batch_of_one_sample_has_no_discrepancy() -> None:
    update = FedPHPUpdate()
    one, other = torch.randn(1, 3, generator=torch.manual_seed(0)), torch.zeros(1, 3)
    batch = Batch(one, torch.zeros(1, dtype=torch.int64))
    assert float(update._discrepancy(one, other, batch)) == 0
