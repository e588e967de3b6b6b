"""Whether a method differs from a fixed reference: tests over seeds or over clients, corrected for many methods."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

LEVEL = 0.05
"""Rate of false claims that the tests of a table, against one reference, keep to together."""
MIN_SEEDS = 3
"""With fewer seeds in common clients carry the claim: two differences say next to nothing of how they vary."""
MIN_CLIENTS = 5
"""With fewer clients nothing is tested over them."""
RESAMPLES = 10_000
"""Of the bootstrap. The smallest p-value is 1 / (RESAMPLES + 1), which Holm's correction over 100 methods still lets
pass."""
_CHUNK = 4_000_000
"""So many numbers of a resample are held at once."""


@dataclass(frozen=True)
class Comparison:
    """One method against a fixed reference (Local, FedAvg, or what the task calls its baselines).

    Parameters
    ----------
    reference : str
        Strategy of the reference row.
    difference : float
        Mean over common seeds of (method - reference), in the unit of the score; NaN if there is none.
    low, high : float
        95 % interval of the difference by itself, not corrected for the other methods of the table; NaN if untested,
        and over clients where so few of them differ that more than one resample in twenty has none of those.
    p_value : float
        Two-sided, after Holm's correction over all methods of the table that are compared with this reference; NaN if
        untested.
    over : ``"seeds"`` or ``"clients"``
        What carries the claim. ``"seeds"``: a paired t-test over at least :data:`MIN_SEEDS` common seeds, which speaks
        of other seeds. ``"clients"``: a paired bootstrap over the clients of one or two seeds, which speaks of other
        clients like these, not of other seeds.
    seeds : int
        Seeds that method and reference have in common, over which or over whose clients is tested.
    effect : float
        Difference in standard deviations: mean over standard deviation of the paired differences (Cohen's d_z), of
        seeds or, over clients, of the clients within a seed. NaN if untested or if the differences are all the same.
    verdict : ``"better"``, ``"worse"``, ``"undecided"`` or ``"untested"``
        At 5 %. ``"undecided"`` does not mean equal.
    """

    reference: str
    difference: float
    low: float
    high: float
    p_value: float
    over: Literal["seeds", "clients"]
    seeds: int
    effect: float
    verdict: Literal["better", "worse", "undecided", "untested"]


@dataclass(frozen=True)
class Estimate:
    """A paired difference, and how sure it is: see :class:`Comparison`, before the correction."""

    difference: float
    low: float = math.nan
    high: float = math.nan
    p_value: float = math.nan
    effect: float = math.nan


def paired_t(method: ArrayLike, reference: ArrayLike) -> Estimate:
    """Two-sided paired t-test.

    Parameters
    ----------
    method, reference : array_like, shape [n]
        Scores of the same seeds.

    Returns
    -------
    Estimate
        Without a p-value for fewer than two seeds, a score that is NaN, or differences that do not vary (beyond the
        rounding of floats): how sure such a difference is, seeds cannot say. All of them zero: p is 1.
    """
    a, b = np.asarray(method, float), np.asarray(reference, float)
    d = a - b
    mean = float(np.mean(d)) if len(d) else math.nan
    if len(d) < 2 or math.isnan(mean):
        return Estimate(mean)
    rounding = 1e-12 * max(1.0, float(np.max(np.abs([a, b]))))
    if float(np.ptp(d)) <= rounding:
        return Estimate(mean, mean, mean, 1.0) if abs(mean) <= rounding else Estimate(mean)
    from scipy.special import stdtr, stdtrit  # much faster than the distribution of scipy.stats

    deviation = float(np.std(d, ddof=1))
    error = deviation / math.sqrt(len(d))
    half = float(stdtrit(len(d) - 1, 1 - LEVEL / 2)) * error
    p_value = 2 * float(stdtr(len(d) - 1, -abs(mean) / error))
    return Estimate(mean, mean - half, mean + half, p_value, mean / deviation)


def paired_bootstrap(differences: Sequence[Floats], resamples: int = RESAMPLES) -> list[Estimate]:
    """Two-sided paired hierarchical bootstrap: seeds are drawn, then clients within each.

    The mean difference is measured in standard errors over clients, in each resample in its own (bootstrap-t, Efron and
    Tibshirani 1993, section 12.5). All methods are resampled alike. It speaks of other clients of the same seeds: of
    few seeds no resampling can learn how others would vary.

    Parameters
    ----------
    differences : sequence of arrays, shape [K_s, M]
        Of each seed, (method - reference) of its K_s clients for M methods.
    resamples : int

    Returns
    -------
    list of Estimate
        One for each method; without a p-value where a seed has fewer than :data:`MIN_CLIENTS` clients, a difference is
        NaN, or no client's differs from another's.
    """
    means = np.mean([d.mean(0) for d in differences], axis=0)
    usable = min(len(d) for d in differences) >= MIN_CLIENTS and np.isfinite(means)
    deviation = np.mean([d.std(0, ddof=1) if len(d) > 1 else np.zeros_like(means) for d in differences], axis=0)
    error = _standard_error([d.var(0) for d in differences], [len(d) for d in differences])
    varying = usable & (error > 1e-12)
    estimates = [
        Estimate(float(m), float(m), float(m), 1.0) if ok and m == 0 else Estimate(float(m))
        for m, ok in zip(means, np.broadcast_to(usable, means.shape), strict=True)
    ]
    chosen = np.flatnonzero(varying)
    if len(chosen):
        drawn, alike = _studentized([d[:, chosen] for d in differences], means[chosen], resamples)
        observed = np.abs(means[chosen]) / error[chosen]
        p_values = (1 + np.sum(drawn >= observed * (1 - 1e-12), axis=0)) / (resamples + 1)
        half = np.where(alike > LEVEL, math.nan, np.quantile(drawn, 1 - LEVEL, axis=0) * error[chosen])
        for j, i in enumerate(chosen):
            mean = float(means[i])
            low, high = mean - float(half[j]), mean + float(half[j])
            estimates[i] = Estimate(mean, low, high, float(p_values[j]), mean / float(deviation[i]))
    return estimates


def _standard_error(variances: Sequence[Floats], sizes: Sequence[int]) -> Floats:
    """Of a mean over seeds of means over clients, the seeds given."""
    parts = [variance / max(size - 1, 1) for variance, size in zip(variances, sizes, strict=True)]
    return np.asarray(np.sqrt(np.sum(parts, axis=0)) / len(parts))


def _studentized(differences: Sequence[Floats], means: Floats, resamples: int) -> tuple[Floats, Floats]:
    """Distances of resampled means from the `means`, in standard errors of the resample: [resamples, M].

    And the share of resamples in which all drawn clients are alike, [M], so that there is no standard error.
    """
    rng = np.random.default_rng(0)  # a table shows the same whenever it is printed
    seeds, widest = len(differences), max(len(d) for d in differences)
    step = max(1, _CHUNK // (widest * seeds))
    chunks, alike = [], np.zeros(len(means))
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn_seeds = rng.integers(seeds, size=(count, seeds))
        total, variance = np.zeros((count, len(means))), np.zeros((count, len(means)))
        for seed, d in enumerate(differences):
            size = len(d)
            both = np.concatenate([d, d**2], axis=1)
            for position in range(seeds):
                rows = np.flatnonzero(drawn_seeds[:, position] == seed)
                index = rng.integers(size, size=(len(rows), size)) + size * np.arange(len(rows))[:, None]
                counts = np.bincount(index.ravel(), minlength=len(rows) * size).reshape(len(rows), size)
                first, second = np.split(counts.astype(float) @ both / size, 2, axis=1)
                total[rows] += first
                variance[rows] += np.maximum(second - first**2, 0) / (size - 1)
        error = np.sqrt(variance) / seeds
        distance = np.abs(total / seeds - means)
        alike += np.sum(error < 1e-12, axis=0)
        error[error < 1e-12] = 1e-12  # as far from the mean as can be
        chunks.append(distance / error)
    return np.concatenate(chunks), alike / resamples


def holm(p_values: ArrayLike) -> Floats:
    """Holm's step-down correction (Holm 1979); NaN stays, and does not count as a test.

    Parameters
    ----------
    p_values : array_like, shape [m]

    Returns
    -------
    ndarray, shape [m]
        Of the i-th smallest p the largest of (m - j + 1) p_j over j <= i, at most 1.
    """
    p = np.asarray(p_values, float)
    corrected = np.full(p.shape, math.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return corrected


def verdict(difference: float, p_value: float) -> Literal["better", "worse", "undecided", "untested"]:
    """What a corrected p-value says at :data:`LEVEL`."""
    if math.isnan(p_value):
        return "untested"
    if p_value > LEVEL or difference == 0:
        return "undecided"
    return "better" if difference > 0 else "worse"


def half_interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % confidence interval of a mean (Student's t).

    NaN for fewer than :data:`MIN_SEEDS` values: of two it is 12.7 standard errors, which tells a reader nothing.
    """
    from scipy.special import stdtrit

    n = len(values)
    return math.nan if n < MIN_SEEDS else float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(n))


@dataclass(frozen=True)
class AverageRanks:
    """Methods ranked within each of several tables (Demšar 2006).

    Parameters
    ----------
    ranks : dict
        Average rank of each method, 1 being the best, in ascending order; ties share the mean of their ranks.
    tables : int
    p_value : float
        Friedman's test that all methods rank alike.
    critical_difference : float
        Nemenyi's: average ranks that are closer than this cannot be told apart at 5 %, all pairs considered.
    """

    ranks: dict[str, float]
    tables: int
    p_value: float
    critical_difference: float


def average_ranks(scores: Mapping[str, Sequence[float]]) -> AverageRanks:
    """Rank methods over tables, with Friedman's test and Nemenyi's critical difference.

    Parameters
    ----------
    scores : mapping
        Of each method (three or more) its score in every table, higher being better; finite.
    """
    from scipy.stats import friedmanchisquare, rankdata, studentized_range

    names = list(scores)
    values = np.array([scores[name] for name in names], float).T
    tables, methods = values.shape
    means = rankdata(-values, axis=1).mean(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all tied in all tables is 0/0
        p_value = float(friedmanchisquare(*values.T).pvalue)
    quantile = float(studentized_range.ppf(1 - LEVEL, methods, math.inf)) / math.sqrt(2)
    critical = quantile * math.sqrt(methods * (methods + 1) / (6 * tables))
    order = sorted(range(methods), key=lambda i: (means[i], names[i]))
    ranks = {names[i]: float(means[i]) for i in order}
    return AverageRanks(ranks, tables, 1.0 if math.isnan(p_value) else p_value, critical)
