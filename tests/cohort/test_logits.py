"""Predictions of a cohort: the right network for each sample, and nothing computed in vain."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

from fedpers.cohort import Network, View, prediction, tree
from fedpers.data.federated import FederatedData
from tests.cohort.helpers import make_cohort
from tests.problems import SmallNetwork, gaussian_data


def predict(network: Network, x: Tensor) -> Tensor:
    return network(x)


class Scaled(nn.Module):
    """Scores are the inputs times one factor."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.head.weight[0]


def listed(*sizes: int) -> list[Tensor]:
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return [torch.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def test_logits_stand_in_the_order_of_the_list() -> None:
    data = FederatedData(torch.arange(12.0).view(6, 2), torch.zeros(6, dtype=torch.int64),
                         [torch.tensor([5, 0, 3]), torch.tensor([1])], listed(0, 0), listed(0, 0), 2)  # fmt: skip
    cohort = make_cohort(Scaled(), data, [0, 1])
    stacked = tree({"head.weight": torch.tensor([[[1.0]], [[10.0]]])}, 2)
    first, second = cohort.logits(stacked, "train", predict)
    assert first.tolist() == [[10, 11], [0, 1], [6, 7]]
    assert second.tolist() == [[20, 30]]


@pytest.mark.parametrize("samples_at_once", [2048, 20])  # all in one piece, or in several
def test_shared_stacked_and_mixed_views_agree(samples_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "EVALUATION_SAMPLES", samples_at_once)
    network = SmallNetwork().double()
    data = gaussian_data(dtype=torch.float64)
    cohort = make_cohort(network, data)
    one = cohort.template
    stack = cohort.per_client(one)
    mixed = View({n: stack[n] if n.startswith("head") else one[n] for n in cohort.names("all")},
                 frozenset(cohort.names("head")))  # fmt: skip
    network.eval()
    for client, *rows in zip(
        cohort.clients,
        cohort.logits(cohort.view(one), "train", predict),
        cohort.logits(stack, "train", predict),
        cohort.logits(mixed, "train", predict),
        strict=True,
    ):
        expected = network(data.x[data.train[client]])
        for row in rows:
            torch.testing.assert_close(row, expected, rtol=1e-10, atol=1e-10)


def test_each_client_predicts_with_its_own_tensors() -> None:
    network, data = SmallNetwork(norm=False).double(), gaussian_data((9, 7, 4), dtype=torch.float64)
    cohort = make_cohort(network, data)
    stack = cohort.per_client(cohort.template)
    for row in range(3):
        stack["head.bias"][row] += row
    shared = cohort.logits(cohort.view(cohort.template), "test", predict)
    for row, logits in enumerate(cohort.logits(stack, "test", predict)):
        torch.testing.assert_close(logits, shared[row] + row, rtol=1e-10, atol=1e-10)
    alone = make_cohort(network, data, [2])
    (logits,) = alone.logits(stack[2:3], "test", predict)
    torch.testing.assert_close(logits, shared[2] + 2, rtol=1e-10, atol=1e-10)


def unequal(sizes: Sequence[int]) -> FederatedData:
    """Clients with two training samples each and test sets of these sizes."""
    x = torch.randn(sum(sizes), 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tests = listed(*sizes)
    return FederatedData(x, torch.zeros(len(x), dtype=torch.int64), [positions[:2] for positions in tests],
                         listed(*[0] * len(sizes)), [positions[2:] for positions in tests], 4)  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        ([6] * 20 + [90] * 2, 1.1),  # few large ones last, as clients that never train may be
        ([90] * 2 + [6] * 20, 1.1),
        ([6, 90, 6, 6, 6, 6, 90, 6], 1.1),
        ([6, 90, 90, 90], 1.1),
        ([90, 70, 50, 30, 10], 1.1),
        ([10, 70, 30, 90, 50], 1.5),  # a row in vain may be cheaper than a copy of the others
        ([2, 2, 60, 2, 2], 1.1),  # no test samples
        ([50] * 7, 1.1),
    ],
    ids=str,
)
def test_rows_that_are_through_are_not_computed(sizes: list[int], most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "EVALUATION_SAMPLES", 4 * len(sizes))
    computed = []

    def counting(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(values: dict[str, Tensor], x: Tensor) -> Tensor:
            computed.append(x.shape[0] * x.shape[1])
            return vmap(function)(values, x)

        return run

    monkeypatch.setattr(prediction, "vmap", counting)
    data = unequal(sizes)
    cohort = make_cohort(SmallNetwork().double(), data, range(len(sizes)))
    stack = cohort.per_client(cohort.template)
    for row in range(len(sizes)):
        stack["head.bias"][row] += row
    logits = cohort.logits(stack, "test", predict)
    needed = sum(sizes) - 2 * len(sizes)
    assert needed <= sum(computed) <= most * needed
    assert max(computed) <= 4 * len(sizes)
    for row in range(len(sizes)):
        (expected,) = make_cohort(SmallNetwork().double(), data, [row]).logits(stack[row : row + 1], "test", predict)
        assert logits[row].shape == expected.shape == (sizes[row] - 2, 4)
        torch.testing.assert_close(logits[row], expected, rtol=1e-12, atol=1e-12)
