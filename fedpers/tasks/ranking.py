"""Ranking: what a user will like comes before what nobody knows the user to like."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fedpers.settings import DatasetConfig, options
from fedpers.tasks.base import Task
from fedpers.tasks.classification import binary_losses

if TYPE_CHECKING:
    from fedpers.data.federated import Part


@dataclass(frozen=True)
class Ranking(Task):
    """Binary cross-entropy of scores ``[B, 1]``, measured by where one held-out item stands among negatives.

    Parameters
    ----------
    top_k : int
        Length of the recommended list, >= 1.
    protocol_name : {"clean", "symmetric", "official"}
        ``official`` selects the latest of equally good rounds, on test, or where a method's authors do
        (``PersonalizedStrategy.published_selection``); what else differs see :class:`fedpers.data.ratings.RankingData`.

    Raises
    ------
    ConfigError
        If a value is out of its range.
    """

    name: ClassVar[str] = "ranking"
    spread: ClassVar[bool] = False  # of one held-out item for each user
    parts_overlap: ClassVar[bool] = True
    baselines: ClassVar[tuple[str, ...]] = (*Task.baselines, "no_learning")
    top_k: int = 10
    protocol_name: str = "clean"

    def __post_init__(self) -> None:
        known = options(DatasetConfig)
        known["protocol"].check(self.protocol_name)
        known["top_k"].check(self.top_k)

    @property
    def headline(self) -> str:
        """``hr@K``: share of users whose held-out item is among the first K."""
        return f"hr@{self.top_k}"

    @property
    def also(self) -> tuple[str, ...]:
        """``ndcg@K``."""
        return (f"ndcg@{self.top_k}",)

    @property
    def selected_on(self) -> Part:
        """``validation``; ``test`` in the official protocol."""
        return "test" if self.protocol_name == "official" else "validation"

    @property
    def latest_wins(self) -> bool:
        """True in the official protocol."""
        return self.protocol_name == "official"

    @property
    def protocol(self) -> str:
        """``official`` or ``validation-selected``."""
        return "official" if self.protocol_name == "official" else "validation-selected"

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Binary cross-entropy ``[B]`` of logits ``[B, 1]``; `y` is 1 for a positive and 0 for a negative."""
        return binary_losses(outputs, y)

    def measure(
        self, outputs: Sequence[Tensor], labels: Sequence[Tensor], num_classes: int, *, auc: bool = False
    ) -> dict[str, Tensor]:
        """Measure K users: ``hr@K`` and ``ndcg@K``, see :func:`hit_and_gain`.

        Logits are compared as float32 probabilities, as in the authors' code of FedRAP: saturated ones tie.

        Parameters
        ----------
        outputs : sequence of Tensor ``[n_k, 1]``
            Logits of each user's candidates, the held-out item first.
        labels, num_classes, auc
            Not used.
        """
        return hit_and_gain([torch.sigmoid(scores.float()).flatten().cpu() for scores in outputs], self.top_k)


def hit_and_gain(scores: Sequence[Tensor], top_k: int) -> dict[str, Tensor]:
    """Hit rate and normalized gain of one held-out item among negatives.

    A tie counts against the held-out item. A held-out item with a NaN score is a miss; a negative with one is not
    counted.

    Parameters
    ----------
    scores : sequence of Tensor ``[n_k]``
        Of each client's candidates, the held-out item first; none if the client has no such item.
    top_k : int
        Length of the list a hit must be in, >= 1.

    Returns
    -------
    dict of name to Tensor ``[K]``
        ``examples`` (held-out items, 1 or 0), ``hr@K`` (1 if the rank is <= K) and ``ndcg@K`` (``ln 2 / ln(1 + rank)``
        if so, else 0); the last two NaN without a held-out item.
    """
    ranks = torch.full((len(scores),), math.inf, dtype=torch.float64)
    for k, candidates in enumerate(scores):
        if len(candidates) and not bool(candidates[0].isnan()):
            ranks[k] = 1 + float((candidates[1:] >= candidates[0]).sum())
    hit = (ranks <= top_k).double()
    gain = torch.where(hit > 0, math.log(2) / torch.log(1 + ranks), 0.0)
    held_out = torch.tensor([len(candidates) > 0 for candidates in scores])
    columns = {f"hr@{top_k}": hit, f"ndcg@{top_k}": gain}
    return {"examples": held_out.double(), **{name: value.where(held_out, math.nan) for name, value in columns.items()}}
