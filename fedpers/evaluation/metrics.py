"""Metrics of one client and their distribution over clients: pure functions of arrays or tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = Tensor | NDArray[Any]


def distribution(values: Array, weights: Array) -> dict[str, float]:
    """Describe one metric over clients, where higher is better.

    Parameters
    ----------
    values : Tensor or ndarray ``[n]``
        The metric of each client; NaN for a client that has no samples to measure it on.
    weights : Tensor or ndarray ``[n]``
        Samples per client, >= 0.

    Returns
    -------
    dict
        ``mean`` (each client counts the same), ``weighted`` (each sample counts the same), ``std`` (population
        standard deviation over clients), ``worst_decile`` (mean over the ``ceil(n / 10)`` lowest clients), ``min``,
        and ``missing``, the number of NaN clients, which are left out of all the others. NaN where nothing is left.

    Raises
    ------
    ValueError
        If the shapes differ or are not one-dimensional, or a weight is negative or not finite.
    """
    v, w = _array(values).astype(np.float64), _array(weights).astype(np.float64)
    if v.ndim != 1 or v.shape != w.shape:
        raise ValueError(f"expected values and weights of one shape [n], got {v.shape} and {w.shape}.")
    if not (np.isfinite(w) & (w >= 0)).all():
        raise ValueError("expected finite weights >= 0.")
    valid = ~np.isnan(v)
    missing = float(len(v) - valid.sum())
    v, w = np.sort(v[valid]), w[valid][np.argsort(v[valid])]
    if len(v) == 0:
        return dict.fromkeys(("mean", "weighted", "std", "worst_decile", "min"), math.nan) | {"missing": missing}
    return {
        "mean": float(v.mean()),
        "weighted": float(v @ w / w.sum()) if w.sum() > 0 else math.nan,
        "std": float(v.std()) if np.isfinite(v).all() else math.nan,
        "worst_decile": float(v[: math.ceil(len(v) / 10)].mean()),
        "min": float(v[0]),
        "missing": missing,
    }


def balanced_accuracy(correct_per_class: Array, total_per_class: Array) -> NDArray[np.float64]:
    """Mean recall over the classes that are present.

    Parameters
    ----------
    correct_per_class, total_per_class : Tensor or ndarray ``[..., C]``
        Correctly classified and all samples of each class, e.g. one row per client.

    Returns
    -------
    ndarray ``[...]``
        NaN where no class has a sample.

    Raises
    ------
    ValueError
        If the shapes differ or more samples are correct than there are.
    """
    correct, total = _array(correct_per_class), _array(total_per_class)
    if correct.shape != total.shape:
        raise ValueError(f"expected equal shapes [..., C], got {correct.shape} and {total.shape}.")
    if ((correct < 0) | (correct > total)).any():
        raise ValueError("expected 0 <= correct_per_class <= total_per_class.")
    recall_sum = (correct / np.maximum(total, 1)).sum(-1)
    present = (total > 0).sum(-1)
    return np.asarray(np.where(present > 0, recall_sum / np.maximum(present, 1), math.nan), dtype=np.float64)


def auc(scores: Array, labels: Array) -> float:
    """Area under the ROC curve of one client, one class against the rest, micro-averaged.

    All ``n * C`` (sample, class) pairs are ranked together; the result is the chance that a pair with the
    right class scores above one with a wrong class, ties counting one half.

    Parameters
    ----------
    scores : Tensor or ndarray ``[n, C]``
        Class scores that can be compared between samples, e.g. probabilities.
    labels : Tensor or ndarray ``[n]``
        Class ids, ``0 <= label < C``.

    Returns
    -------
    float
        NaN where it is undefined: no samples, a single class, or a NaN score.

    Raises
    ------
    ValueError
        If the shapes do not fit or a label is out of range.
    """
    from scipy.stats import rankdata

    s, y = _array(scores), _array(labels)
    if s.ndim != 2 or y.shape != s.shape[:1]:
        raise ValueError(f"expected scores [n, C] and labels [n], got {s.shape} and {y.shape}.")
    n, classes = s.shape
    if n and (y.min() < 0 or y.max() >= classes):
        raise ValueError(f"expected labels in 0..{classes - 1}.")
    if n == 0 or classes < 2 or np.isnan(s).any():
        return math.nan
    ranks = rankdata(s).reshape(n, classes)
    right = float(ranks[np.arange(n), y.astype(np.int64)].sum())
    wrong_count = n * (classes - 1)
    return float((right - n * (n + 1) / 2) / (n * wrong_count))


def _array(values: Array) -> NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
