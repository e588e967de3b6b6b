"""What clients answer to an evaluation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedpers.cohort import tree
from fedpers.data import FederatedData
from fedpers.strategies import FedAvgUpdate, LocalOnlyUpdate
from fedpers.tasks import Regression
from fedpers.tasks.regression import WORST


class Scaled(nn.Module):
    """Outputs are the inputs times one factor."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.head.weight[0]


class NoEmptyBatch(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x).view(len(x), -1)  # fails on an empty batch
        return out


class Flat(Scaled):
    """The same without an axis of outputs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 0]


def listed(*sizes: int) -> list[Tensor]:
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return [torch.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def of_parts(x: Tensor, y: Tensor, num_classes: int, **more: Any) -> FederatedData:
    """Each part has all samples, as copies."""
    parts = [
        [positions + 6 * place for positions in lists]
        for place, lists in enumerate((listed(2, 2, 2), listed(4, 0, 2), listed(0, 0, 6)))
    ]
    return FederatedData(torch.cat([x] * 3), torch.cat([y] * 3), *parts, num_classes, **more)


@pytest.fixture
def data() -> FederatedData:
    x = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 2, 0], [0, 0, 3]])
    y = torch.tensor([0, 1, 1, 2, 1, 2])
    return of_parts(x, y, 3)


@pytest.fixture
def numbers() -> FederatedData:
    """Targets are twice the inputs."""
    x = torch.tensor([[1.0], [2], [3], [4], [5], [6]])
    return of_parts(x, 2 * x[:, 0], 1, task=Regression())


@pytest.mark.parametrize("clients", [[0, 1, 2], [1], [0, 1]])
@pytest.mark.parametrize("update", [FedAvgUpdate(), LocalOnlyUpdate()])
def test_a_part_without_samples_has_no_metrics(
    data: FederatedData, clients: list[int], update: FedAvgUpdate | LocalOnlyUpdate
) -> None:
    app = update.client_app(NoEmptyBatch(), data)
    state = app.initial_state.expand(len(clients)).clone()
    received = {"arrays": app.template.select(*app.initial_arrays())}
    result, _, _ = app.run("evaluate", clients, state, received, {})
    for client, answer in zip(clients, result.rows(), strict=True):
        assert answer.content is not None, answer.error
        metrics = dict(answer.content.metric_records["metrics"])
        for part in ("validation", "test"):
            size = len(data.part(part)[client])  # type: ignore[arg-type]
            assert metrics[f"{part}-examples"] == size
            names = {f"{part}-{name}" for name in ("accuracy", "balanced-accuracy", "loss")}
            assert names & metrics.keys() == (names if size else set())
        assert metrics["num-examples"] == len(data.validation[client]) + len(data.test[client])


def evaluated(network: nn.Module, data: FederatedData, weight: float, clients: list[int]) -> list[dict[str, float]]:
    app = FedAvgUpdate().client_app(network, data)
    app.template["head.weight"].fill_(weight)
    result, _, _ = app.run("evaluate", clients, tree({}, len(clients)), {"arrays": app.template}, {})
    return [dict(answer.content.metric_records["metrics"]) for answer in result.rows() if answer.content is not None]


def test_metrics_follow_from_the_predictions(data: FederatedData) -> None:
    (metrics,) = evaluated(Scaled(), data, 1.0, [0])
    assert metrics["validation-accuracy"] == pytest.approx(2 / 4)
    assert metrics["validation-balanced-accuracy"] == pytest.approx((1 + 1 / 2 + 0) / 3)


def test_predictions_that_are_not_finite_are_wrong_ones_of_infinite_loss(data: FederatedData) -> None:
    rows = evaluated(Scaled(), data, math.nan, [0, 1, 2])
    assert len(rows) == 3  # a client whose network diverged must not vanish from the means
    assert [row.get("validation-accuracy") for row in rows] == [0.0, None, 0.0]  # the second has no such samples
    assert rows[0]["validation-loss"] == math.inf


@pytest.mark.parametrize("network", [Scaled(), Flat()])
def test_numbers_are_measured_whatever_the_shape_of_outputs(numbers: FederatedData, network: nn.Module) -> None:
    exact = evaluated(network, numbers, 2.0, [0, 1, 2])
    assert [row.get("validation-r2") for row in exact] == [1.0, None, 1.0]
    assert [row.get("validation-mse") for row in exact] == [0.0, None, 0.0]
    (half, _, _) = evaluated(network, numbers, 1.0, [0, 1, 2])
    # targets 2, 4, 6, 8 around 5: 9 + 1 + 1 + 9; errors 1, 2, 3, 4: 1 + 4 + 9 + 16
    assert half["validation-r2"] == pytest.approx(1 - 30 / 20)
    assert half["validation-mse"] == pytest.approx(30 / 4)
    diverged = evaluated(network, numbers, math.nan, [0, 1, 2])
    assert [row.get("validation-r2") for row in diverged] == [WORST, None, WORST]
