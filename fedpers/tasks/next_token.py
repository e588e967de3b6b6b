"""Language modelling: which token comes next, at each position of a sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpers.errors import DataError, check
from fedpers.tasks.base import Task

if TYPE_CHECKING:
    from fedpers.data.federated import FederatedData

PADDING = -1
"""Label of a position where nothing is predicted, as after the end of a short sequence."""


@dataclass(frozen=True)
class NextToken(Task):
    """Cross-entropy of scores ``[B, T, V]`` for the token after each position, measured by the share predicted.

    Labels are ids of tokens ``[N, T]``, :data:`PADDING` where nothing is to be predicted; ``num_classes`` of the data
    is the vocabulary's size V.

    Parameters
    ----------
    unknown : int or None
        Token that stands for all that the vocabulary lacks: to predict it is never right, as in LEAF.
    """

    name: ClassVar[str] = "next_token"
    per_token: ClassVar[bool] = True
    unknown: int | None = None

    @property
    def headline(self) -> str:
        """Share of tokens that had the highest score."""
        return "accuracy"

    def prepare_labels(self, y: Tensor, num_classes: int, name: str) -> Tensor:
        """Ids of tokens ``[N, T]`` as int64.

        Raises
        ------
        DataError
            If they are no whole numbers ``[N, T]``, one is outside ``-1 <= y < num_classes``, or all are -1.
        """
        if y.dim() != 2 or y.is_floating_point() or y.is_complex():
            raise DataError(
                f"{name}: y is {str(y.dtype).removeprefix('torch.')} {list(y.shape)}, expected the next token at each "
                f"position, whole numbers [N, T]."
            )
        y = y.long()
        if y.numel() and not y.is_meta:
            low, high = int(y.min()), int(y.max())
            if low < PADDING or high >= num_classes or high == PADDING:
                raise DataError(
                    f"{name}: next tokens run from {low} to {high}, expected ids 0 to {num_classes - 1}, because "
                    f"num_classes={num_classes}, and {PADDING} where nothing is predicted."
                )
        return y

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy ``[B]`` of each sequence, the mean over its tokens; 0 for one without any.

        Parameters
        ----------
        outputs : Tensor ``[B, T, V]``
        y : Tensor ``[B, T]``
        """
        real = y != PADDING
        of_tokens = -F.log_softmax(outputs, -1).gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return torch.where(real, of_tokens, 0.0).sum(1) / real.sum(1).clamp(min=1)

    def check_outputs(self, outputs: Tensor, data: FederatedData, network: str = "network") -> None:
        """Refuse a network that does not score each token at each position: ``[B, T, V]``.

        Raises
        ------
        ConfigError
            If it does not.
        """
        shape = list(outputs.shape[1:])
        fits = outputs.dim() == 3 and shape[0] == data.y.shape[1] and shape[1] >= data.num_classes
        allowed = f"a network with outputs {[data.y.shape[1], data.num_classes]} for each sequence, not {shape}"
        check(fits, "model", network, allowed)

    def measure(
        self, outputs: Sequence[Tensor], labels: Sequence[Tensor], num_classes: int, *, auc: bool = False
    ) -> dict[str, Tensor]:
        """Measure K clients: ``accuracy``, ``perplexity`` and ``loss``, over all tokens of a client.

        ``loss`` is the mean cross-entropy of a token in nats, ``perplexity`` its exponential, ``examples`` the number
        of tokens to predict. See :meth:`Task.measure`.

        Parameters
        ----------
        outputs : sequence of Tensor ``[n_k, T, V]``
        labels : sequence of Tensor ``[n_k, T]``
        num_classes : int
            V.
        auc : bool
            Not used.
        """
        rows = torch.zeros(len(labels), 3, dtype=torch.float64)  # tokens, predicted ones, sum of losses
        for k, (scores, y) in enumerate(zip(outputs, labels, strict=True)):
            if len(y) == 0:
                continue
            real = y != PADDING
            scores, y = scores[real], y[real]
            finite = scores.isfinite().all(1)
            losses = F.cross_entropy(scores.double(), y, reduction="none").masked_fill(~finite, math.inf)
            right = (scores.argmax(1) == y) & finite
            if self.unknown is not None:
                right &= y != self.unknown
            rows[k] = torch.stack([finite.new_tensor(len(y), dtype=torch.float64),
                                   right.double().sum(), losses.sum()]).cpu()  # fmt: skip
        tokens, right, loss = rows.unbind(1)
        return {
            "examples": tokens,
            "accuracy": right / tokens,
            "perplexity": (loss / tokens).exp(),
            "loss": loss / tokens,
        }
