"""Classification: each sample is of one class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpers.errors import DataError
from fedpers.evaluation import metrics
from fedpers.tasks.base import Task, sum_by_client


@dataclass(frozen=True)
class Classification(Task):
    """Cross-entropy of class scores ``[B, C]``, measured by accuracy."""

    name: ClassVar[str] = "classification"
    classes: ClassVar[bool] = True

    @property
    def headline(self) -> str:
        """Share of samples whose highest score is that of their class."""
        return "accuracy"

    def prepare_labels(self, y: Tensor, num_classes: int, name: str) -> Tensor:
        """Class ids ``[N]`` as int64.

        Raises
        ------
        DataError
            If they are no whole numbers ``[N]``, or one is outside ``0 <= y < num_classes``.
        """
        if y.dim() != 1 or y.is_floating_point() or y.is_complex():
            raise DataError(
                f"{name}: y is {str(y.dtype).removeprefix('torch.')} {list(y.shape)}, expected class ids, whole "
                f"numbers [N]; targets of a regression, floats [N] or [N, D], need task=Regression()."
            )
        y = y.long()
        if len(y) and not y.is_meta and (int(y.min()) < 0 or int(y.max()) >= num_classes):
            raise DataError(
                f"{name}: labels run from {int(y.min())} to {int(y.max())}, expected 0 to {num_classes - 1}, because "
                f"num_classes={num_classes}."
            )
        return y

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy ``[B]`` of class scores `outputs` ``[B, C]`` and class ids `y` ``[B]``."""
        return class_losses(outputs, y)

    def measure(
        self, outputs: Sequence[Tensor], labels: Sequence[Tensor], num_classes: int, *, auc: bool = False
    ) -> dict[str, Tensor]:
        """Measure K clients: ``accuracy``, ``balanced-accuracy``, ``loss`` and, if asked for, ``auc``.

        ``balanced-accuracy`` is the mean recall over the classes a client has, ``loss`` the mean cross-entropy, ``auc``
        the area under the ROC curve, micro-averaged. See :meth:`Task.measure`.
        """
        counts = class_counts(outputs, labels, num_classes)
        balanced = metrics.balanced_accuracy(counts["class_correct"], counts["class_examples"])
        columns = {
            "examples": counts["examples"],
            "accuracy": counts["correct"] / counts["examples"],
            "balanced-accuracy": torch.from_numpy(balanced),
            "loss": counts["loss"] / counts["examples"],
        }
        if auc:
            pairs = zip(outputs, labels, strict=True)
            areas = [metrics.auc(_probabilities(scores), y) for scores, y in pairs]
            columns["auc"] = torch.tensor(areas, dtype=torch.float64)
        return columns


CLASSIFICATION = Classification()
"""The task of data that name none."""


def class_losses(outputs: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy ``[B]`` of class scores ``[B, C]`` and class ids ``[B]``.

    ``F.cross_entropy`` gives the same numbers; mapped over clients it is decomposed in Python, at each call.
    """
    return -F.log_softmax(outputs, 1).gather(1, y[:, None]).squeeze(1)


def binary_losses(outputs: Tensor, y: Tensor) -> Tensor:
    """Binary cross-entropy ``[B]`` of logits ``[B, 1]`` and targets ``[B]`` in [0, 1]."""
    return F.binary_cross_entropy_with_logits(outputs.squeeze(1), y.to(outputs.dtype), reduction="none")


def class_counts(outputs: Sequence[Tensor], labels: Sequence[Tensor], num_classes: int) -> dict[str, Tensor]:
    """Counts from which accuracy, balanced accuracy and loss follow, float64 on the CPU.

    A prediction that is not finite is a wrong one, of infinite loss.

    Parameters
    ----------
    outputs : sequence of Tensor ``[n_k, C]``
    labels : sequence of Tensor ``[n_k]``
    num_classes : int
        At most C.

    Returns
    -------
    dict
        ``examples`` ``[K]``, ``correct`` ``[K]``, ``loss`` ``[K]`` (sum of cross-entropies),
        ``class_correct`` and ``class_examples`` ``[K, num_classes]``.
    """
    sizes = torch.tensor([len(y) for y in labels])
    scores, y = torch.cat(list(outputs)), torch.cat(list(labels))
    finite = scores.isfinite().all(1)
    right = ((scores.argmax(1) == y) & finite).double().cpu()
    losses = right
    if len(y):
        losses = F.cross_entropy(scores.double(), y, reduction="none").masked_fill(~finite, math.inf).cpu()
    cell = torch.repeat_interleave(torch.arange(len(sizes)), sizes) * num_classes + y.cpu()

    def by_class(values: Tensor) -> Tensor:
        flat = torch.zeros(len(sizes) * num_classes, dtype=torch.float64)
        return flat.index_add_(0, cell, values).view(len(sizes), num_classes)

    return {
        "examples": sizes.double(),
        "correct": sum_by_client(right, sizes),
        "loss": sum_by_client(losses, sizes),
        "class_correct": by_class(right),
        "class_examples": by_class(torch.ones_like(right)),
    }


def _probabilities(logits: Tensor) -> Tensor:
    """Probabilities ``[n, C]`` on the CPU; a prediction that is not finite says nothing."""
    return torch.softmax(logits.cpu().double(), 1).nan_to_num(1.0 / max(1, logits.shape[1]))
