"""No learning: what a leave-one-out protocol gives away by itself.

It ranks an item the higher the more seldom it was drawn as a training negative of this user so far. Where training
negatives spare the held-out items while the items they are ranked among may be drawn (``dataset.protocol=official``,
as published), the held-out item wins in the long run, though nobody looked at what the user likes: with 4 negatives
for each of a user's positives on MovieLens-100K, nearly always after 100 rounds. With ``dataset.protocol=clean`` it
guesses. A method has to beat it to have shown anything.

Shared: nothing. Personal: how often each item was drawn. Items drawn equally often stand in random order, drawn anew
in each round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedpers.cohort import Cohort, Reply, Tree, View, tree
from fedpers.data.federated import FederatedData, Part
from fedpers.models.factorization import rated
from fedpers.randomness import generator
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, method

DRAWN = "drawn"


class Counts(nn.Module):
    """How often each item was drawn, ``[m]``."""

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.register_buffer(DRAWN, torch.zeros(num_items))
        self.head = nn.Identity()  # settings of training may name a head and a body, though nothing is trained

    def forward(self, x: Tensor) -> Tensor:
        """Minus the counts ``[B, 1]`` of items ``[B]``."""
        assert isinstance(self.drawn, Tensor)
        return -self.drawn[x].unsqueeze(1)


@dataclass(kw_only=True)
class NoLearningUpdate(LocalUpdate):
    """Count the negatives of each round."""

    shared = "none"
    personal = "all"
    settles_parts = True
    can_finetune = False
    cohort_size = 64  # there is no step to be measured

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Replace the network by counts."""
        return Counts(rated(data).num_items), data

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Draw this round's samples as any method does, and count the negatives among them."""
        counts = cohort.state["model"][DRAWN].clone()
        items = counts.shape[1]
        for k, client in enumerate(cohort.clients):
            drawn = torch.from_numpy(cohort.samples(client))
            negatives = torch.bincount(drawn[drawn < items], minlength=items)
            counts[k] += negatives.to(counts.device, counts.dtype)
            cohort.samples_seen[k] += len(drawn)
        return cohort.reply(tree({DRAWN: counts}, cohort.size))

    def personalize(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Tree | View:
        """The user's own counts."""
        return cohort.view(tree({}))

    def measure(
        self, cohort: Cohort, outputs: Sequence[Tensor], part: Part, config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Rank with random order among items drawn equally often."""
        mixed = []
        for client, scores in zip(cohort.clients, outputs, strict=True):
            noise = generator(cohort.seed, f"ties {part}", client, cohort.round).random(len(scores))
            ties = torch.from_numpy(noise).to(scores.device, scores.dtype).unsqueeze(1)
            # counts differ by at least 1; divided, so that float32 probabilities tell them apart
            mixed.append((scores + ties) / (1 + scores.abs().max()))
        return super().measure(cohort, mixed, part, config)


@method("no_learning")
@dataclass(kw_only=True)
class NoLearning(PersonalizedStrategy):
    """Server: nothing to average."""

    update = NoLearningUpdate
