"""Predicted numbers and targets to losses and metrics, with the numbers worked out by hand."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_squared_error, r2_score
from torch import Tensor
from torch.func import vmap

from fedpers.cohort import Batch
from fedpers.data import FederatedData
from fedpers.errors import ConfigError
from fedpers.evaluation.metrics import distribution
from fedpers.strategies import perfedavg
from fedpers.tasks import Regression
from fedpers.tasks.regression import WORST

TASK = Regression()
NONE = torch.zeros(0, 1)


def measured(outputs: list[list[float]], labels: list[list[float]]) -> dict[str, list[float]]:
    """Metrics of clients with one target."""
    metrics = TASK.measure([torch.tensor(row) for row in outputs], [torch.tensor(row) for row in labels], 1)
    assert all(column.dtype == torch.float64 and column.device.type == "cpu" for column in metrics.values())
    return {name: column.tolist() for name, column in metrics.items()}


def test_metrics_by_hand() -> None:
    metrics = measured([[1, 2, 4], [2, 2, 2], [3, 2, 1], []], [[1, 2, 3], [1, 2, 3], [1, 2, 3], []])
    assert list(metrics) == ["examples", "r2", "mse"]
    assert metrics["examples"] == [3, 3, 3, 0]
    # around the mean 2 the squares are 1 + 0 + 1; errors: 1, then 1 + 0 + 1, then 4 + 0 + 4: 1 - 8 / 2 = -3
    assert metrics["r2"] == pytest.approx([1 - 1 / 2, 0, WORST, math.nan], nan_ok=True)
    assert metrics["mse"] == pytest.approx([1 / 3, 2 / 3, 8 / 3, math.nan], nan_ok=True)


def test_labels_that_do_not_vary_leave_nothing_to_explain() -> None:
    metrics = measured([[5], [4.5], [7, 7, 7], [7, 7, 6]], [[5], [5], [7, 7, 7], [7, 7, 7]])
    assert metrics["r2"] == [1, 0, 1, 0]  # never NaN: such a client would be taken for a missing one
    assert metrics["mse"] == pytest.approx([0, 0.25, 0, 1 / 3])
    assert measured([[0.2] * 3], [[0.1] * 3])["r2"] == [0]  # 0.1 is no number of float64


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e200])
def test_predictions_that_are_not_finite_are_the_worst_not_missing(bad: float) -> None:
    outputs = [torch.tensor(row, dtype=torch.float64) for row in ([1, bad, 3], [bad], [bad, bad], [1, 3, 3])]
    labels = [torch.tensor([1.0, 2, 3]), torch.tensor([1.0]), torch.tensor([4.0, 4]), torch.tensor([1.0, 2, 3])]
    metrics = TASK.measure(outputs, labels, 1)
    assert metrics["r2"].tolist() == [WORST, WORST, WORST, 0.5]
    assert metrics["mse"].tolist() == pytest.approx([math.inf] * 3 + [1 / 3])
    described = distribution(metrics["r2"], metrics["examples"])
    assert described["missing"] == 0
    assert described["mean"] == pytest.approx((3 * WORST + 0.5) / 4)


@pytest.mark.parametrize(("targets", "flat"), [(1, True), (1, False), (3, False)])
def test_as_scikit_learn_has_it(targets: int, flat: bool) -> None:
    rng = np.random.default_rng(0)
    labels = [rng.normal(size=(size, targets)) * rng.uniform(0.5, 3, targets) for size in (2, 9, 40)]
    outputs = [y + 0.4 * rng.normal(size=y.shape) for y in labels]
    metrics = TASK.measure(
        [torch.from_numpy(values[:, 0] if flat else values) for values in outputs],
        [torch.from_numpy(y[:, 0] if flat else y) for y in labels],
        targets,
    )
    for k, (y, values) in enumerate(zip(labels, outputs, strict=True)):
        assert metrics["r2"][k] == pytest.approx(max(WORST, r2_score(y, values, multioutput="variance_weighted")))
        assert metrics["mse"][k] == pytest.approx(mean_squared_error(y, values))


def test_targets_are_measured_around_their_own_means() -> None:
    y = torch.tensor([[0.0, 100.0], [2.0, 104.0]])
    outputs = torch.tensor([[0.0, 102.0], [2.0, 102.0]])  # the first exact, the second at its mean
    metrics = TASK.measure([outputs], [y], 2)
    assert metrics["r2"].item() == pytest.approx(1 - 8 / (2 + 8))
    assert metrics["mse"].item() == pytest.approx(8 / 4)


def test_no_client_has_samples() -> None:
    metrics = TASK.measure([NONE, NONE], [torch.zeros(0), torch.zeros(0)], 1)
    assert metrics["examples"].tolist() == [0, 0]
    assert metrics["r2"].isnan().all()
    assert metrics["mse"].isnan().all()


def test_outputs_of_either_shape_and_clients_without_samples() -> None:
    y = [torch.tensor([1.0, 2, 4]), torch.zeros(0)]
    outputs = torch.tensor([1.0, 2, 3])
    flat, column = TASK.measure([outputs, NONE], y, 1), TASK.measure([outputs[:, None], NONE], y, 1)
    for name, values in flat.items():
        assert torch.equal(values.nan_to_num(-9), column[name].nan_to_num(-9))
    assert flat["r2"][1].isnan()
    assert flat["mse"][1].isnan()


@pytest.mark.parametrize(
    ("outputs", "y"),
    [
        (torch.tensor([1.0, 4.0]), torch.tensor([0.0, 2.0])),
        (torch.tensor([[1.0], [4.0]]), torch.tensor([0.0, 2.0])),
        (torch.tensor([1.0, 4.0]), torch.tensor([[0.0], [2.0]])),
        (torch.tensor([[1.0, 1.0], [4.0, 2.0]]), torch.tensor([[0.0, 2.0], [2.0, 4.0]])),  # means of (1, 1) and (4, 4)
    ],
    ids=lambda values: str(list(values.shape)),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_are_squared_errors(outputs: Tensor, y: Tensor, dtype: torch.dtype) -> None:
    losses = TASK.losses(outputs.to(dtype), y)
    assert losses.tolist() == [1, 4]
    assert losses.dtype == dtype
    stacked = vmap(TASK.losses)(torch.stack([outputs, 2 * outputs]).to(dtype), torch.stack([y, 2 * y]))
    assert stacked.tolist() == [[1, 4], [4, 16]]


def made(targets: int) -> FederatedData:
    y = torch.linspace(-1, 1, 4 * targets).view(4, targets)
    lists = [[torch.tensor([k])] for k in (0, 1, 2)]
    return FederatedData(torch.zeros(4, 2), y, *lists, num_classes=targets, task=TASK)


def test_networks_that_fit() -> None:
    TASK.check_outputs(torch.zeros(2), made(1))
    TASK.check_outputs(torch.zeros(2, 1), made(1))
    TASK.check_outputs(torch.zeros(2, 3), made(3))
    for outputs, targets in ((torch.zeros(2, 3), 2), (torch.zeros(2, 1), 2), (torch.zeros(2), 2), (torch.zeros(()), 1)):
        message = f"model=Net: expected a network with {targets} outputs, not {list(outputs.shape[1:])}."
        with pytest.raises(ConfigError, match=re.escape(message)):
            TASK.check_outputs(outputs, made(targets), "Net")


def test_checksum_covers_targets() -> None:
    data = made(2)
    assert data.checksum == made(2).checksum != replace(data, y=data.y + 1).checksum


def test_what_a_run_reads() -> None:
    assert (TASK.headline, TASK.also, TASK.selected_on, TASK.latest_wins) == ("r2", (), "validation", False)
    assert TASK.protocol == "validation-selected"
    assert not TASK.classes


def test_perfedavg_adapts_to_targets_by_their_squared_error() -> None:
    batch = Batch(torch.zeros(5, 2), torch.linspace(-1, 1, 5), task=TASK)
    for weight in (None, torch.tensor([1.0, 1, 1, 1, 0])):
        for half in perfedavg._halves(replace(batch, weight=weight, given={"a": torch.ones(1)})):
            assert half.task is TASK
            assert "a" in half.given
