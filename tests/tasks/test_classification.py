"""Class scores and labels to losses and metrics, with the numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from fedpers.tasks import CLASSIFICATION, Classification, Ranking
from fedpers.tasks.classification import class_counts

# client 0: right, right, wrong, wrong; client 1 has no samples; client 2: twice wrong
OUTPUTS = [
    torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]),
    torch.zeros(0, 3),
    torch.tensor([[0.0, -2, 0], [0, 0, -3]]),
]
LABELS = [torch.tensor([0, 1, 1, 2]), torch.zeros(0, dtype=torch.int64), torch.tensor([1, 2])]


def test_scores_counted_by_hand() -> None:
    counts = class_counts(OUTPUTS, LABELS, 3)
    assert counts["examples"].tolist() == [4, 0, 2]
    assert counts["correct"].tolist() == [2, 0, 0]
    assert counts["class_examples"].tolist() == [[1, 2, 1], [0, 0, 0], [0, 1, 1]]
    assert counts["class_correct"].tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 0]]
    right, wrong = math.log(1 + 2 / math.e), math.log(2 + math.e)
    two, three = math.log(2 + math.exp(-2)) + 2, math.log(2 + math.exp(-3)) + 3
    assert counts["loss"].tolist() == pytest.approx([2 * right + 2 * wrong, 0, two + three])


def test_metrics_follow_from_the_counts() -> None:
    metrics = CLASSIFICATION.measure(OUTPUTS, LABELS, 3)
    assert list(metrics) == ["examples", "accuracy", "balanced-accuracy", "loss"]
    assert all(column.dtype == torch.float64 and column.device.type == "cpu" for column in metrics.values())
    assert metrics["examples"].tolist() == [4, 0, 2]
    assert metrics["accuracy"].tolist() == pytest.approx([2 / 4, math.nan, 0], nan_ok=True)
    assert metrics["balanced-accuracy"].tolist() == pytest.approx([(1 + 1 / 2 + 0) / 3, math.nan, 0], nan_ok=True)
    assert metrics["loss"][1].isnan()


def test_every_client_is_measured_by_itself() -> None:
    together = CLASSIFICATION.measure(OUTPUTS, LABELS, 3, auc=True)
    for k, (outputs, labels) in enumerate(zip(OUTPUTS, LABELS, strict=True)):
        alone = CLASSIFICATION.measure([outputs], [labels], 3, auc=True)
        for name, column in together.items():
            assert torch.equal(column[k].nan_to_num(-1), alone[name][0].nan_to_num(-1))


def test_more_scores_than_classes() -> None:
    wide = [torch.cat([outputs, torch.full((len(outputs), 1), 9.0)], 1) for outputs in OUTPUTS]
    assert CLASSIFICATION.measure(wide, LABELS, 3)["accuracy"][[0, 2]].tolist() == [0, 0]  # the fourth is never right


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_predictions_that_are_not_finite_are_wrong_ones_of_infinite_loss(bad: float) -> None:
    outputs = [torch.tensor([[5.0, 0], [bad, 0], [0, bad]]), torch.full((2, 2), bad)]
    labels = [torch.tensor([0, 0, 1]), torch.tensor([0, 1])]
    metrics = CLASSIFICATION.measure(outputs, labels, 2, auc=True)
    assert metrics["accuracy"].tolist() == pytest.approx([1 / 3, 0])
    assert metrics["balanced-accuracy"].tolist() == pytest.approx([1 / 4, 0])
    assert metrics["loss"].tolist() == [math.inf, math.inf]
    assert metrics["auc"][1] == 0.5  # says nothing
    assert not metrics["auc"].isnan().any()


def test_area_under_the_curve_by_hand() -> None:
    # probabilities 0.9 0.1 | 0.4 0.6 | 0.8 0.2, right ones 0.9, 0.4 and 0.2; of 9 pairs with a wrong one, 0.9 is above
    # all three (0.1, 0.6, 0.8), 0.4 above 0.1 and 0.2 above 0.1
    outputs = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.8, 0.2]]).log()
    metrics = CLASSIFICATION.measure([outputs], [torch.tensor([0, 0, 1])], 2, auc=True)
    assert metrics["auc"].tolist() == pytest.approx([5 / 9])
    assert metrics["auc"].dtype == torch.float64


def test_losses_of_class_ids() -> None:
    outputs, y = torch.randn(3, 5, 4, dtype=torch.float64), torch.randint(0, 4, (3, 5))
    expected = F.cross_entropy(outputs.flatten(0, 1), y.flatten(), reduction="none").view(3, 5)
    torch.testing.assert_close(vmap(CLASSIFICATION.losses)(outputs, y), expected)
    torch.testing.assert_close(CLASSIFICATION.losses(outputs[0], y[0]), expected[0])


def test_losses_of_events() -> None:
    logits, y = torch.tensor([[0.0], [2.0], [-1.0]], dtype=torch.float64), torch.tensor([1.0, 0.0, 0.25])

    def softplus(value: float) -> float:
        return math.log1p(math.exp(value))

    expected = [math.log(2), softplus(2), 0.25 * softplus(1) + 0.75 * softplus(-1)]
    losses: Tensor = Ranking().losses(logits, y)
    assert losses.tolist() == pytest.approx(expected)
    assert losses.dtype == torch.float64
    torch.testing.assert_close(vmap(Ranking().losses)(logits[None], y[None])[0], losses)


def test_what_a_run_reads() -> None:
    task = Classification()
    assert (task.headline, task.also, task.selected_on, task.latest_wins) == ("accuracy", (), "validation", False)
    assert task.protocol == "validation-selected"
    assert task.classes
    assert task.spread
