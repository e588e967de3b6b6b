"""Epsilon against closed forms."""

from __future__ import annotations

import logging
import math
import sys

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from fedpers.server.postprocessors import Privacy
from fedpers.server.postprocessors.accounting import epsilon


def exact(deviation: float, delta: float) -> float:
    """Epsilon of the Gaussian mechanism of sensitivity 1: B. Balle, Y.-X. Wang, ICML 2018, Theorem 8."""

    def excess(value: float) -> float:
        shift = value * deviation
        first = norm.cdf(1 / (2 * deviation) - shift)
        return float(first - math.exp(value + norm.logcdf(-1 / (2 * deviation) - shift)) - delta)

    return float(brentq(excess, 0.0, 1e4))


def renyi(deviation: float, rounds: int, delta: float) -> float:
    """The least epsilon of some Rényi orders: C. Canonne, G. Kamath, T. Steinke, NeurIPS 2020, Proposition 12."""

    def bound(order: float) -> float:
        spent = rounds * order / (2 * deviation**2)
        return spent + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)

    return min(bound(order) for order in (*(1 + k / 10 for k in range(1, 100)), *range(11, 64), 128, 256, 512, 1024))


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-8])
@pytest.mark.parametrize("rounds", [1, 50, 1000])
@pytest.mark.parametrize("noise", [1.0, 3.0, 10.0, 30.0])
def test_all_clients_in_every_round(noise: float, rounds: int, delta: float) -> None:
    """Rounds compose to one Gaussian mechanism; a replaced client moves the sum by two norms."""
    spent = epsilon(noise, 20, 20, rounds, delta)
    deviation = noise / 2
    least = exact(deviation / math.sqrt(rounds), delta)
    assert spent is not None
    assert least <= spent <= 1.25 * least
    assert spent == pytest.approx(renyi(deviation, rounds, delta), rel=1e-6)


@pytest.mark.slow
def test_sampling_spends_less_and_never_more() -> None:
    values = [epsilon(2.0, sampled, 100, 50, 1e-5) for sampled in (1, 5, 20, 50, 99, 100)]
    assert all(value is not None for value in values)
    assert values == sorted(values, key=lambda value: value or 0.0)
    assert values[0] < 0.1 * values[-1]  # type: ignore[operator]
    assert values[-2] == values[-1]


@pytest.mark.parametrize(("noise", "share", "delta"), [(1.0, 0.1, 1e-3), (3.0, 0.5, 1e-4), (0.7, 0.9, 1e-5)])
def test_never_less_than_two_sums_can_be_told_apart(noise: float, share: float, delta: float) -> None:
    """A client whose change is 1 or -1 is sampled by chance, all others' changes are 0."""
    x = np.linspace(-12 * noise, 12 * noise, 200_001)
    one, other = ((1 - share) * norm.pdf(x, 0, noise) + share * norm.pdf(x, move, noise) for move in (1, -1))

    def excess(value: float) -> float:
        return float(np.trapezoid(np.maximum(one - math.exp(value) * other, 0.0), x) - delta)

    least = brentq(excess, 0.0, 100.0)
    spent = epsilon(noise, round(1000 * share), 1000, 1, delta)
    assert spent is not None
    assert 0 < least <= spent


@pytest.mark.slow
def test_more_rounds_spend_more_and_no_noise_everything() -> None:
    values = [epsilon(5.0, 5, 20, rounds, 1e-5) for rounds in (0, 1, 10, 100)]
    assert values[0] == 0.0
    assert values == sorted(values, key=lambda value: value or 0.0)
    assert epsilon(0.0, 5, 20, 10, 1e-5) == math.inf


@pytest.mark.slow
@pytest.mark.parametrize("noise", [1e-300, 1e-6, 1e-3, 1e6, 1e300])
@pytest.mark.parametrize("delta", [1e-300, 0.999])
def test_extreme_settings(noise: float, delta: float) -> None:
    for sampled, clients in ((1, 1), (1, 10**7), (99, 100)):
        spent = epsilon(noise, sampled, clients, 1000, delta)
        assert spent is not None
        assert spent >= 0.0
        assert math.isfinite(spent) == (noise >= 1e-6)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with caplog.at_level(logging.WARNING):
        summary = Privacy(noise=1.0).summary(10, 5, 20)
    assert summary == {"privacy_epsilon": None, "privacy_delta": 1e-5}
    assert [record.getMessage() for record in caplog.records] == [
        "Epsilon is not known without the library that accounts for privacy: pip install 'fedpers[privacy]'."
    ]


def test_what_a_run_states() -> None:
    assert Privacy(noise=0.0).summary(10, 5, 20) == {"privacy_epsilon": None, "privacy_delta": 1e-5}
    adaptive = Privacy(name="adaptive", noise=2.0, delta=1e-4, count_noise=5.0).summary(10, 5, 20)
    assert adaptive == {"privacy_epsilon": epsilon(2.0, 5, 20, 10, 1e-4), "privacy_delta": 1e-4}
