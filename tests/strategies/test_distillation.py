"""Methods in which two networks teach each other, as their papers have them, against plain loops over clients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from fedpers.errors import ConfigError
from fedpers.strategies import FMLUpdate
from tests.cohort.helpers import assert_same
from tests.strategies.helpers import (
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


def under(part: str, values: Values) -> Values:
    return {name.removeprefix(part): value for name, value in values.items() if name.startswith(part)}


def test_fml_as_written() -> None:
    alpha, beta, rounds, fraction = 0.3, 0.6, 3, 0.5
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
    for client in range(4):  # one of them has not trained: it holds, and predicts with, the initial network
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
