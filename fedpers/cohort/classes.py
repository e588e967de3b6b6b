"""Features by class, of which several methods make means."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def class_sums(features: Tensor, labels: Tensor, classes: int, weight: Tensor | None = None) -> Tensor:
    """Sum of the features and number of the samples of each class.

    Parameters
    ----------
    features : Tensor ``[n, F]``
    labels : Tensor ``[n]``
    classes : int
    weight : Tensor ``[n]``, optional
        0 for padding, which does not count.

    Returns
    -------
    Tensor ``[C, F + 1]``
        The last column holds the numbers.
    """
    member = F.one_hot(labels, classes).to(features)
    counted = member if weight is None else member * weight[:, None]
    return counted.T @ F.pad(features, (0, 1), value=1.0)
