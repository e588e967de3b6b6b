"""``training.logit_adjustment``: class shares of a client are added to its scores in training, whatever the method."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedpers.cohort import Batch, Network, Training
from fedpers.data import FederatedData
from fedpers.errors import ConfigError
from fedpers.strategies import STRATEGIES, FedAvgUpdate, make_strategy
from fedpers.tasks import Regression
from tests.problems import SmallNetwork, gaussian_data, problem
from tests.strategies.helpers import run

DATA = gaussian_data(dtype=torch.float64)
NETWORK = SmallNetwork(norm=False, dropout=0.0).double()
OTHER_LOSSES = {"fedjets", "fedrod", "fedmf", "fedncf", "fedrap", "no_learning", "pfedrec"}
"""Of ratings, of a mixture, or with an adjustment of its own."""


def test_offsets_change_the_odds_of_classes_by_their_shares() -> None:
    scores, labels = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([1])
    shares = torch.tensor([0.5, 0.25, 0.25])
    batch = Batch(torch.zeros(1, 1), labels, offsets=2.0 * shares.log())
    powers = scores.exp() * shares**2
    torch.testing.assert_close(batch.losses(scores), -(powers[:, 1] / powers.sum()).log())
    more = F.pad(scores, (0, 2), value=9.0)  # outputs that stand for no class
    torch.testing.assert_close(batch.losses(more), batch.losses(scores))
    torch.testing.assert_close(replace(batch, offsets=None).losses(scores), F.cross_entropy(scores, labels)[None])


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("clients_at_once", [1, 3, 100])
def test_fedavg_with_it_trains_what_fedrod_shares(strength: float, clients_at_once: int) -> None:
    """Fed-RoD's body and common head learn from balanced softmax alone: the same steps."""
    by_method = run("fedrod", {"gamma": strength}, network=NETWORK, data=DATA)
    by_setting = run("fedavg", network=NETWORK, data=DATA, cohort=clients_at_once, logit_adjustment=strength)
    without = run("fedavg", network=NETWORK, data=DATA)
    for name, value in by_setting.arrays.items():
        torch.testing.assert_close(value, by_method.arrays[name], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(without.arrays["head.weight"], by_setting.arrays["head.weight"])


def test_a_class_that_no_client_has_keeps_its_weights() -> None:
    few = replace(DATA, y=DATA.y % 2)
    result = run("fedavg", network=NETWORK, data=few, logit_adjustment=1.0)
    head = NETWORK.head.weight
    assert torch.equal(result.arrays["head.weight"][2:], head[2:])
    assert not torch.equal(result.arrays["head.weight"][:2], head[:2])


@pytest.mark.parametrize("method", sorted(STRATEGIES))
def test_every_method_takes_it_or_says_why_not(method: str) -> None:
    given = problem(method)
    training = replace(given.training, logit_adjustment=1.0)
    _, update = make_strategy(method, given.options, training=training)
    if method in OTHER_LOSSES:
        with pytest.raises(ConfigError, match=r"logit_adjustment=1.0: expected 0"):
            update.client_app(given.network, given.data)
    else:
        update.client_app(given.network, given.data)


def test_data_without_classes_are_refused() -> None:
    rows = [torch.arange(2)], [torch.tensor([2])], [torch.tensor([3])]
    data = FederatedData(torch.ones(4, 6), torch.ones(4, 1), *rows, 1, task=Regression())
    with pytest.raises(ConfigError, match=r"logit_adjustment=1.0: expected 0, .*regression"):
        FedAvgUpdate(training=Training(logit_adjustment=1.0)).client_app(SmallNetwork(classes=1, norm=False), data)


def test_a_loss_of_ones_own_that_would_ignore_it_is_refused() -> None:
    @dataclass(kw_only=True)
    class Own(FedAvgUpdate):
        def loss(self, network: Network, batch: Batch) -> Tensor:
            return batch.mean(F.cross_entropy(network(batch.x), batch.y, reduction="none"))

    with pytest.raises(ConfigError, match=r"logit_adjustment=1.0: expected 0, .*Own"):
        Own(training=Training(logit_adjustment=1.0)).client_app(NETWORK, DATA)
