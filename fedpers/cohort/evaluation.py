"""Metrics of a cohort's predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fedpers.data.federated import Part
from fedpers.tasks.ranking import hit_and_gain

if TYPE_CHECKING:
    from fedpers.cohort.cohort import Cohort


def measure(cohort: Cohort, outputs: Sequence[Tensor], part: Part, *, with_auc: bool = False) -> dict[str, Tensor]:
    """Metrics ``[K]`` of each client on one part, see :meth:`fedpers.tasks.Task.measure`.

    Parameters
    ----------
    cohort : Cohort
    outputs : sequence of Tensor ``[n_k, ...]``
        From :meth:`Cohort.logits`.
    part : {"train", "validation", "test"}
    with_auc : bool
        Also the area under the ROC curve, where that is defined.
    """
    return cohort.data.task.measure(outputs, cohort.labels(part), cohort.data.num_classes, auc=with_auc)


__all__ = ["hit_and_gain", "measure"]
