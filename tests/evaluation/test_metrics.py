"""Metrics against hand-computed cases, scikit-learn, and properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from fedpers.evaluation.metrics import auc, balanced_accuracy, distribution

NAMES = ["mean", "weighted", "std", "worst_decile", "min", "missing"]


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_distribution_by_hand(kind):
    got = distribution(kind([1.0, 0.0, math.nan, 0.5]), kind([1, 2, 50, 1]))
    assert list(got) == NAMES
    expected = {"mean": 0.5, "weighted": 1.5 / 4, "std": math.sqrt(0.5 / 3), "worst_decile": 0, "min": 0, "missing": 1}
    assert got == pytest.approx(expected)


def test_worst_decile_takes_the_lowest_ceil_of_a_tenth():
    values = torch.arange(20, 0, -1).float()  # 20 .. 1
    assert distribution(values, torch.ones(20))["worst_decile"] == 1.5
    assert distribution(torch.arange(21).float(), torch.ones(21))["worst_decile"] == 1.0  # 3 of 21: 0, 1, 2


def test_distribution_of_nothing_is_nan_and_counted():
    got = distribution(torch.tensor([math.nan, math.nan]), torch.ones(2))
    assert got["missing"] == 2
    assert all(math.isnan(got[name]) for name in NAMES[:-1])
    assert math.isnan(distribution(np.array([0.5]), np.array([0]))["weighted"])


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 100)), min_size=1, max_size=40), st.randoms())
@settings(max_examples=60, deadline=None)
def test_distribution_is_ordered_and_ignores_the_order_of_clients(pairs, random):
    values, weights = (np.array(column) for column in zip(*pairs, strict=True))
    got = distribution(values, weights)
    assert got["min"] <= got["worst_decile"] + 1e-12
    assert got["worst_decile"] <= got["mean"] + 1e-12
    assert got["min"] - 1e-12 <= got["weighted"] <= values.max() + 1e-12
    random.shuffle(pairs)
    values, weights = (np.array(column) for column in zip(*pairs, strict=True))
    assert distribution(values, weights) == pytest.approx(got)
    assert distribution(values, np.full(len(values), 3))["weighted"] == pytest.approx(got["mean"])


@pytest.mark.parametrize(
    ("values", "weights"), [([1.0, 2.0], [1.0]), ([[1.0]], [[1.0]]), ([1.0], [-1.0]), ([1.0], [math.nan])]
)
def test_distribution_refuses_what_does_not_fit(values, weights):
    with pytest.raises(ValueError, match="expected"):
        distribution(np.array(values), np.array(weights))


def test_balanced_accuracy_by_hand():
    correct = torch.tensor([[9, 1, 0], [0, 0, 5], [0, 0, 0]])
    total = torch.tensor([[10, 2, 0], [3, 0, 5], [0, 0, 0]])
    got = balanced_accuracy(correct, total)
    np.testing.assert_allclose(got, [(0.9 + 0.5) / 2, 0.5, math.nan])
    with pytest.raises(ValueError, match="equal shapes"):
        balanced_accuracy(correct, total[:1])
    with pytest.raises(ValueError, match="correct_per_class"):
        balanced_accuracy(total + 1, total)


def test_balanced_accuracy_equals_sklearn():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 50)
    guesses = np.where(rng.random(50) < 0.6, labels, 0)
    correct, total = np.bincount(labels[labels == guesses], minlength=6), np.bincount(labels, minlength=6)
    assert balanced_accuracy(correct, total) == pytest.approx(balanced_accuracy_score(labels, guesses))


def test_auc_by_hand():
    # right pairs score 0.8 and 0.4, wrong pairs 0.2 and 0.6: 3 of 4 comparisons won
    assert auc(torch.tensor([[0.8, 0.2], [0.6, 0.4]]), torch.tensor([0, 1])) == 0.75
    assert auc(torch.full((4, 3), 0.3), torch.tensor([0, 1, 2, 0])) == 0.5
    assert auc(torch.eye(3), torch.arange(3)) == 1.0
    assert auc(1 - torch.eye(3), torch.arange(3)) == 0.0


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("decimals", [1, 8])  # with one decimal most scores are tied
def test_auc_equals_sklearn_micro_average(classes, decimals):
    rng = np.random.default_rng(classes)
    scores = rng.dirichlet(np.ones(classes), 60).round(decimals)
    labels = rng.integers(0, max(2, classes - 1), 60)  # with 5 classes the last one is absent
    expected = roc_auc_score(np.eye(classes, dtype=int)[labels], scores, average="micro")
    assert auc(scores, labels) == pytest.approx(expected, abs=1e-12)
    assert auc(torch.tensor(scores), torch.tensor(labels)) == pytest.approx(expected, abs=1e-12)


def test_auc_is_nan_where_undefined_and_refuses_what_does_not_fit():
    assert math.isnan(auc(np.zeros((0, 3)), np.zeros(0, dtype=int)))
    assert math.isnan(auc(np.zeros((2, 1)), np.zeros(2, dtype=int)))
    assert math.isnan(auc(np.array([[0.1, math.nan]]), np.array([0])))
    with pytest.raises(ValueError, match=r"labels in 0\.\.1"):
        auc(np.zeros((1, 2)), np.array([2]))
    with pytest.raises(ValueError, match="scores"):
        auc(np.zeros((2, 2)), np.array([1]))
