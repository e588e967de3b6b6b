"""From predictions to each client's metrics: classification, and ranking of held-out items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpers.data.federated import Part
from fedpers.data.ratings import RankingData
from fedpers.evaluation.metrics import auc, balanced_accuracy

if TYPE_CHECKING:
    from fedpers.cohort.cohort import Cohort


def measure(cohort: Cohort, outputs: Sequence[Tensor], part: Part, *, with_auc: bool = False) -> dict[str, Tensor]:
    """Metrics of each client on one part, NaN where it has no samples.

    Parameters
    ----------
    cohort : Cohort
    outputs : sequence of Tensor ``[n_k, C]``
        From :meth:`Cohort.logits`.
    part : {"train", "validation", "test"}
    with_auc : bool
        Also the area under the ROC curve, micro-averaged; classification only.

    Returns
    -------
    dict of name to Tensor ``[K]``
        ``examples``; for class labels ``accuracy``, ``balanced-accuracy`` (mean recall over the classes a client has)
        and ``loss`` (mean cross-entropy); for held-out items ``hr@K`` and ``ndcg@K``.
    """
    if isinstance(cohort.data, RankingData):
        return ranking(outputs, cohort.data.top_k)
    found = class_counts(cohort, outputs, part)
    balanced = balanced_accuracy(found["class_correct"].numpy(), found["class_examples"].numpy())
    columns = {
        "examples": found["examples"],
        "accuracy": found["correct"] / found["examples"],
        "balanced-accuracy": torch.from_numpy(balanced),
        "loss": found["loss"] / found["examples"],
    }
    if with_auc:
        pairs = zip(outputs, cohort.labels(part), strict=True)
        columns["auc"] = torch.tensor([auc(_probabilities(scores), y.cpu()) for scores, y in pairs])
    return columns


def class_counts(cohort: Cohort, outputs: Sequence[Tensor], part: Part) -> dict[str, Tensor]:
    """Counts from which accuracy, balanced accuracy and loss follow, on the CPU.

    A prediction that is not finite is a wrong one, of infinite loss.

    Parameters
    ----------
    cohort : Cohort
    outputs : sequence of Tensor ``[n_k, C]``
        From :meth:`Cohort.logits`.
    part : {"train", "validation", "test"}

    Returns
    -------
    dict
        ``examples`` ``[K]``, ``correct`` ``[K]``, ``loss`` ``[K]`` (sum of cross-entropies),
        ``class_correct`` and ``class_examples`` ``[K, C]``.
    """
    sizes = cohort.sizes(part)
    classes = cohort.data.num_classes
    scores, y = torch.cat(list(outputs)), torch.cat(cohort.labels(part))
    finite = scores.isfinite().all(1)
    right = ((scores.argmax(1) == y) & finite).double().cpu()
    losses = right
    if len(y):
        losses = F.cross_entropy(scores.double(), y, reduction="none").masked_fill(~finite, math.inf).cpu()
    owner, y = torch.repeat_interleave(torch.arange(cohort.size), sizes), y.cpu()
    cell = owner * classes + y

    def by_client(values: Tensor) -> Tensor:
        return torch.zeros(cohort.size, dtype=torch.float64).index_add_(0, owner, values)

    def by_class(values: Tensor) -> Tensor:
        flat = torch.zeros(cohort.size * classes, dtype=torch.float64)
        return flat.index_add_(0, cell, values).view(cohort.size, classes)

    return {
        "examples": sizes.double(),
        "correct": by_client(right),
        "loss": by_client(losses),
        "class_correct": by_class(right),
        "class_examples": by_class(torch.ones_like(right)),
    }


def ranking(outputs: Sequence[Tensor], top_k: int) -> dict[str, Tensor]:
    """Hit rate and gain of one held-out item among negatives, see :func:`hit_and_gain`.

    Logits are compared as float32 probabilities, as in the authors' code of FedRAP: saturated ones tie.

    Parameters
    ----------
    outputs : sequence of Tensor ``[n_k, 1]``
        Logits of each client's candidates, the held-out item first.
    top_k : int
    """
    return hit_and_gain([torch.sigmoid(scores.float()).flatten().cpu() for scores in outputs], top_k)


def hit_and_gain(scores: Sequence[Tensor], top_k: int) -> dict[str, Tensor]:
    """Hit rate and normalized gain of one held-out item among negatives.

    A tie counts against the held-out item. A held-out item with a NaN score is a miss; a negative with one is not
    counted.

    Parameters
    ----------
    scores : sequence of Tensor ``[n_k]``
        Of each client's candidates, the held-out item first.
    top_k : int
        Length of the list a hit must be in, >= 1.

    Returns
    -------
    dict of name to Tensor ``[K]``
        ``examples`` (held-out items, 1), ``hr@K`` (1 if the rank is <= K) and ``ndcg@K`` (``ln 2 / ln(1 + rank)``
        if so, else 0).
    """
    ranks = torch.full((len(scores),), math.inf, dtype=torch.float64)
    for k, own in enumerate(scores):
        if not bool(own[0].isnan()):
            ranks[k] = 1 + float((own[1:] >= own[0]).sum())
    hit = (ranks <= top_k).double()
    gain = torch.where(hit > 0, math.log(2) / torch.log(1 + ranks), 0.0)
    return {"examples": torch.ones_like(hit), f"hr@{top_k}": hit, f"ndcg@{top_k}": gain}


def _probabilities(logits: Tensor) -> Tensor:
    """Probabilities ``[n, C]`` on the CPU; a prediction that is not finite says nothing."""
    return torch.softmax(logits.cpu().double(), 1).nan_to_num(1.0 / max(1, logits.shape[1]))
