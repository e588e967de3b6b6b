"""Tests, corrections and ranks worked out by hand, and how often equal methods are told apart."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from benchmarks.false_claims import Setting, against_the_best, over_clients, over_seeds, rates, simulate
from fedpers.evaluation.statistics import average_ranks, half_interval, holm, paired_bootstrap, paired_t, verdict


def test_paired_t_by_hand():
    # differences 0.10, 0.09, 0.11: mean 0.1, standard deviation 0.01, t = 17.32 with 2 degrees of freedom
    found = paired_t([0.90, 0.91, 0.92], [0.80, 0.82, 0.81])
    assert found.difference == pytest.approx(0.1)
    assert found.p_value == pytest.approx(0.003317, abs=1e-6)
    assert found.high - found.difference == pytest.approx(4.302653 * 0.01 / math.sqrt(3))
    assert found.difference - found.low == pytest.approx(4.302653 * 0.01 / math.sqrt(3))
    assert found.effect == pytest.approx(10)


@pytest.mark.parametrize(
    ("method", "reference"),
    [
        ([0.9, 0.8], [0.8, 0.7]),  # the same difference, but for rounding: of two seeds no proof
        ([0.9, 0.8, 0.7], [0.8, 0.7, 0.6]),
        ([0.9], [0.5]),
        ([0.9, math.nan, 0.8], [0.5, 0.5, 0.4]),
        ([], []),
    ],
)
def test_what_seeds_cannot_say_has_no_p_value(method, reference):
    found = paired_t(method, reference)
    assert math.isnan(found.p_value)
    assert math.isnan(found.low)
    assert verdict(found.difference, found.p_value) == "untested"


def test_equal_scores_have_p_one():
    found = paired_t([0.5, 0.6], [0.5, 0.6])
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_holm_by_hand():
    # 0.01 * 3, 0.03 * 2, then 0.04 * 1, which may not be less than the one before
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, math.nan]), [0.03, 0.06, 0.06, math.nan])
    np.testing.assert_allclose(holm([0.5, 0.9]), [1, 1])
    assert holm([]).shape == (0,)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_between_no_correction_and_bonferroni_and_keeps_the_order(values):
    p = np.array(values)
    corrected = holm(p)
    assert (corrected >= p).all()
    assert (corrected <= np.minimum(1, len(p) * p) + 1e-12).all()
    assert (np.diff(corrected[np.argsort(p, kind="stable")]) >= 0).all()


def test_average_ranks_by_hand():
    # a is always first; b and c tie once: ranks 1, (2 * 4 + 2.5) / 5 = 2.1, (3 * 4 + 2.5) / 5 = 2.9
    scores = {"c": [0.1, 0.2, 0.1, 0.2, 0.5], "a": [0.9, 0.8, 0.9, 0.8, 0.9], "b": [0.5, 0.5, 0.5, 0.5, 0.5]}
    found = average_ranks(scores)
    assert found.ranks == {"a": 1.0, "b": pytest.approx(2.1), "c": pytest.approx(2.9)}
    assert list(found.ranks) == ["a", "b", "c"]
    # Friedman: 12 * 5 / 12 * (1 + 2.1^2 + 2.9^2 - 12) = 9.1, over 1 - 6 / 120 for the tie; 2 degrees of freedom
    assert found.p_value == pytest.approx(math.exp(-9.1 / 0.95 / 2))
    assert found.critical_difference == pytest.approx(2.343 * math.sqrt(3 * 4 / (6 * 5)), rel=1e-3)  # Demšar's table 5
    assert average_ranks({name: [0.5] * 5 for name in "abc"}).p_value == 1


def test_with_many_clients_the_bootstrap_agrees_with_the_t_test():
    rng = np.random.default_rng(3)
    d = rng.normal([0.02, 0.0, -0.03], [0.1, 0.2, 0.1], size=(200, 3))
    for column, found in zip(d.T, paired_bootstrap([d]), strict=True):
        expected = ttest_1samp(column, 0)
        interval = expected.confidence_interval()
        assert found.difference == pytest.approx(column.mean())
        assert found.p_value == pytest.approx(expected.pvalue, abs=0.012)
        assert found.low == pytest.approx(interval.low, abs=0.002)
        assert found.high == pytest.approx(interval.high, abs=0.002)
        assert found.effect == pytest.approx(column.mean() / column.std(ddof=1))


def test_seeds_that_contradict_each_other_decide_nothing():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.01, size=(2, 50, 1))
    (agreeing,) = paired_bootstrap([0.1 + noise[0], 0.2 + noise[1]])
    (contrary,) = paired_bootstrap([-0.1 + noise[0], 0.2 + noise[1]])
    assert agreeing.p_value < 0.001
    assert contrary.p_value > 0.2
    assert contrary.difference == pytest.approx(0.05, abs=0.01)


def test_clients_that_cannot_say_are_not_tested():
    few, alike, equal = np.array([[0.1], [0.2], [0.3], [0.4]]), np.full((20, 1), 0.1), np.zeros((20, 1))
    assert math.isnan(paired_bootstrap([few])[0].p_value)
    assert math.isnan(paired_bootstrap([alike])[0].p_value)
    assert math.isnan(paired_bootstrap([few[[0, 1, 2, 3, 0]] * math.nan])[0].p_value)
    assert paired_bootstrap([equal])[0].p_value == 1
    assert paired_bootstrap([np.full((20, 1), 0.1), equal])[0].difference == pytest.approx(0.05)


def test_where_few_clients_differ_there_is_a_p_value_but_no_interval():
    d = np.zeros((100, 2))
    d[:2, 0], d[:20, 1] = 0.1, 0.1
    few, many = paired_bootstrap([d])
    assert (few.difference, many.difference) == pytest.approx((0.002, 0.02))
    assert few.p_value > 0.05  # one resample in seven has neither of the two
    assert math.isnan(few.low)
    assert math.isnan(few.high)
    assert 0 < many.low < 0.02 < many.high < 0.1


def test_a_table_says_the_same_whenever_it_is_made_whatever_else_stands_in_it():
    d = np.random.default_rng(0).normal(0.01, 0.1, size=(30, 2))
    assert paired_bootstrap([d]) == paired_bootstrap([d])
    (alone,), (first, _) = paired_bootstrap([d[:, :1]]), paired_bootstrap([d])
    assert asdict(alone) == pytest.approx(asdict(first))


@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("seeds", [3, 5])
def test_equal_methods_are_seldom_called_better(seeds, unequal):
    setting = Setting(methods=7, seeds=seeds, unequal=unequal, gap=0.35 if seeds == 3 else 0.12)
    false, seen, picked = rates(setting, tables=100)
    assert false <= 0.05
    assert seen >= 0.8
    assert picked > 0.2  # the rule that this one replaces


def test_clients_of_one_seed_seldom_claim_too_much():
    rng = np.random.default_rng(0)
    setting = Setting(methods=3, seeds=1, clients=12, by_seed=0.0)
    assert sum("better" in over_clients(simulate(setting, rng)) for _ in range(100)) <= 5
    assert sum(over_clients(simulate(setting, rng, gap=0.3))[-1] == "better" for _ in range(20)) >= 16


def test_a_gap_is_seen_in_the_method_that_has_it():
    accuracies = simulate(Setting(methods=3, seeds=5), np.random.default_rng(0), gap=0.2)
    assert over_seeds(accuracies) == ["undecided", "undecided", "better"]
    assert over_seeds(accuracies[::-1])[-1] == "worse"
    assert against_the_best(accuracies)


def test_two_seeds_have_no_interval() -> None:
    assert math.isnan(half_interval([0.7, 0.9]))
    assert half_interval([0.7, 0.8, 0.9]) == pytest.approx(4.302653 * 0.1 / math.sqrt(3))
