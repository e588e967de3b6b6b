"""Statistics over seeds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np


def paired_p(best: Mapping[int, float], other: Mapping[int, float]) -> float:
    """P-value of a two-sided paired t-test over common seeds; NaN for fewer than two."""
    from scipy.stats import ttest_rel

    common = sorted(best.keys() & other.keys())
    a, b = np.array([best[seed] for seed in common]), np.array([other[seed] for seed in common])
    if len(common) < 2 or np.isnan(a - b).any():
        return math.nan
    if np.ptp(a - b) == 0:  # the statistic is 0/0 or infinite
        return 1.0 if a[0] == b[0] else 0.0
    with warnings.catch_warnings():  # that the differences are nearly equal says nothing to a reader of a table
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(ttest_rel(a, b).pvalue)


def half_interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % confidence interval of a mean (Student's t); NaN for one value."""
    from scipy.stats import t

    n = len(values)
    return math.nan if n < 2 else float(t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
