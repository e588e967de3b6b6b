"""Regression: each sample has one number or several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fedpers.errors import DataError, check
from fedpers.tasks.base import Task, sum_by_client

if TYPE_CHECKING:
    from fedpers.data.federated import FederatedData

WORST = -1.0
"""Least r2 of a client: R² has no lower bound, and one client that diverged would outweigh all others in a mean."""


@dataclass(frozen=True)
class Regression(Task):
    """Mean squared error of predicted numbers, measured by the share of a client's variance that they explain.

    Labels are floats ``[N]`` or ``[N, D]``; outputs are ``[B]``, ``[B, 1]`` or ``[B, D]``, and ``num_classes`` of the
    data is D.
    """

    name: ClassVar[str] = "regression"

    @property
    def headline(self) -> str:
        """``r2``, see :meth:`measure`."""
        return "r2"

    def prepare_labels(self, y: Tensor, num_classes: int, name: str) -> Tensor:
        """Targets ``[N]`` or ``[N, D]`` as floats; whole numbers become float32.

        Raises
        ------
        DataError
            If they have another shape, `num_classes` is not D, or one is not finite.
        """
        if y.dim() not in (1, 2) or y.is_complex() or y[:1].numel() not in (0, num_classes):
            raise DataError(
                f"{name}: y is {str(y.dtype).removeprefix('torch.')} {list(y.shape)}, expected numbers [N] or [N, D] "
                f"with num_classes={num_classes} for D."
            )
        targets = y if y.is_floating_point() else y.float()
        if not targets.is_meta and not bool(targets.isfinite().all()):
            raise DataError(f"{name}: y is not finite (nan or infinite).")
        return targets

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Squared error ``[B]`` of each sample, the mean over its D numbers."""
        squares = (outputs.reshape(y.shape) - y.to(outputs.dtype)) ** 2
        return squares if y.dim() == 1 else squares.flatten(1).mean(1)

    def check_outputs(self, outputs: Tensor, data: FederatedData, network: str = "network") -> None:
        """Refuse a network that does not give as many numbers for each sample as there are targets.

        Raises
        ------
        ConfigError
            If it does not.
        """
        shape = outputs.shape[1:]
        fits = outputs.dim() > 0 and shape.numel() == data.num_classes
        check(fits, "model", network, f"a network with {data.num_classes} outputs, not {list(shape)}")

    def measure(
        self, outputs: Sequence[Tensor], labels: Sequence[Tensor], num_classes: int, *, auc: bool = False
    ) -> dict[str, Tensor]:
        """Measure K clients: ``r2``, and ``mse``, the mean squared error over samples and targets.

        ``r2`` is the coefficient of determination, ``1 - sum (y - prediction)² / sum (y - mean of y)²``, with both sums
        over the client's samples and all targets, and the mean that of this client and target. It is at least
        :data:`WORST`, which is what predictions that are not finite get; their ``mse`` is infinite. A client whose
        labels do not vary, as a single one does not, has a variance of 0, of which nothing can be explained: 0, or 1 if
        every prediction is exact (scikit-learn's convention).

        Parameters
        ----------
        outputs, labels : sequence of Tensor ``[n_k]`` or ``[n_k, D]``
        num_classes : int
            D.
        auc : bool
            Not used: there are no classes.
        """
        sizes = torch.tensor([len(y) for y in labels])
        y = torch.cat([y.reshape(len(y), num_classes) for y in labels]).cpu().double()
        predicted = torch.cat([values.reshape(len(values), num_classes) for values in outputs]).cpu().double()
        finite = predicted.isfinite().all(1)
        errors = sum_by_client(((y - predicted) ** 2).sum(1).masked_fill(~finite, math.inf), sizes)
        begins = (sizes.cumsum(0) - sizes).clamp(max=len(y) - 1)
        first = y[begins] if len(y) else y.new_zeros(len(sizes), num_classes)
        y = y - first.repeat_interleave(sizes, 0)  # labels that are all the same have a variance of exactly 0
        means = sum_by_client(y, sizes) / sizes[:, None]
        variances = sum_by_client(((y - means.repeat_interleave(sizes, 0)) ** 2).sum(1), sizes)
        r2 = torch.where(variances > 0, 1 - errors / variances, (errors == 0).double())
        r2 = torch.where(errors.isinf(), WORST, r2.clamp(min=WORST))
        return {
            "examples": sizes.double(),
            "r2": r2.masked_fill(sizes == 0, math.nan),
            "mse": errors / (sizes * num_classes),
        }
