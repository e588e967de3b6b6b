"""kNN-Per: a common network, corrected by the labels of the client's training samples with similar features.

O. Marfoq et al., Personalized Federated Learning through Local Memorization, ICML 2022, arXiv:2111.09360.

With features phi(x) (``[F]``) and class probabilities h(x) of the common network w, and N(x), the k training samples of
the client whose features are nearest to phi(x):

    w       <- FedAvg
    u_i(x)   = exp(-||phi(x) - phi(x_i)|| / scale)
    h_k(x)_j = sum over i in N(x) with y_i = j of u_i(x)  /  sum over i in N(x) of u_i(x)
    prediction: share_k * h_k(x) + (1 - share_k) * h(x)

Shared: the whole network, buffers averaged. Personal: nothing that has to be kept; the memory of features and labels is
made anew of the received network, also by clients that have never trained. ``capacity`` below 1 leaves a client only
some of its samples, the same in each round.

share_k is lambda in the paper, which tunes it for each client on samples that it does not train on: here it is the one
of 0, 0.1, ..., 1 with the lowest loss on the client's validation samples (0.5 without any), whose metrics are
optimistic for that; ``share`` sets one for all. Scores are logarithms, so that their softmax is the prediction.

``variant: official`` is the authors' code: u_i(x) = exp(-||phi(x) - phi(x_i)||^2 / (F * scale)). There all similarities
may underflow, which makes the prediction NaN; here h_k is as if they did not. There samples that a loader dropped with
the last batch are remembered as zeros of class 0; here every sample is remembered as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from fedpers.client.requirements import body_and_head, check_classes
from fedpers.cohort import Batch, Cohort, Given, Network, Tree, View
from fedpers.data.federated import FederatedData
from fedpers.randomness import generator
from fedpers.records import ARRAYS
from fedpers.strategies.base import PersonalizedStrategy, Received, method
from fedpers.strategies.fedavg import FedAvgUpdate

MEMORY, LABELS, KNOWN, SHARE = "memory", "labels", "known", "share"
"""What predictions are given: features ``[M, F]``, their labels ``[M]``, which of them are no padding, and share_k."""
SHARES = tuple(tenth / 10 for tenth in range(11))


@dataclass(kw_only=True)
class KNNPerUpdate(FedAvgUpdate):
    """FedAvg's training; neighbours in a memory before each prediction."""

    can_finetune = False
    neighbours: Annotated[int, Field(ge=1, description="nearest samples that count, k in the paper")] = 10
    capacity: Annotated[
        float, Field(gt=0, le=1, description="share of a client's training samples that it remembers, at least one")
    ] = 1.0
    share: Annotated[
        float | None,
        Field(ge=0, le=1, description="of the neighbours in a prediction; null: each client's best on validation"),
    ] = None
    scale: Annotated[float, Field(gt=0, description="of distances")] = 1.0
    mixture: Annotated[
        Literal["probabilities", "logits"], Field(description="what of the common network is mixed with the neighbours")
    ] = "probabilities"
    variant: Annotated[Literal["paper", "official"], Field(description="how similar samples are, see the module")] = (
        "paper"
    )

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Refuse networks without features and data without classes."""
        check_classes("knnper", data)
        body_and_head("knnper", model)
        return model, data

    def example_given(self, template: Tree, data: FederatedData) -> Given:
        """A memory of one sample."""
        memory = torch.zeros_like(template["head.weight"][:1])
        return {MEMORY: memory, LABELS: data.y[:1], KNOWN: memory[:, 0] == 0, SHARE: memory.new_tensor(0.5)}

    def loss(self, network: Network, batch: Batch) -> Tensor:
        """Loss of the common network."""
        return batch.mean(batch.losses(network(batch.x)))

    def personalize(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> View:
        """The received network with the client's memory."""
        view = cohort.view(received[ARRAYS])
        memories, labels = [], []
        for client, rows, y in zip(
            cohort.clients, cohort.logits(view, "train", _features), cohort.labels("train"), strict=True
        ):
            kept = torch.from_numpy(self.remembered(cohort, client, len(y))).to(y.device)
            memories.append(rows[kept])
            labels.append(y[kept])
        given = {
            MEMORY: pad_sequence(memories, batch_first=True),
            LABELS: pad_sequence(labels, batch_first=True),
            KNOWN: pad_sequence([torch.ones_like(y, dtype=torch.bool) for y in labels], batch_first=True),
        }
        given[SHARE] = self._shares(cohort, replace(view, given=given))
        return replace(view, given=given)

    def remembered(self, cohort: Cohort, client: int, size: int) -> NDArray[np.int64]:
        """Which of a client's `size` training samples it remembers."""
        if self.capacity == 1:
            return np.arange(size)
        count = max(1, int(self.capacity * size))
        return generator(cohort.seed, "memory", client).permutation(size)[:count]

    def _shares(self, cohort: Cohort, view: View) -> Tensor:
        """share_k ``[K]``."""
        like = cast(Tensor, view.given[MEMORY])
        shares = like.new_full((cohort.size,), 0.5 if self.share is None else self.share)
        if self.share is not None:
            return shares

        def all_mixtures(network: Network, x: Tensor) -> Tensor:
            return torch.stack([self._mixed(network, x, like.new_tensor(share)) for share in SHARES], 1)

        scores = cohort.logits(view, "validation", all_mixtures)
        for k, (rows, y) in enumerate(zip(scores, cohort.labels("validation"), strict=True)):
            if len(y):
                losses = [cohort.data.task.losses(rows[:, i], y).mean() for i in range(len(SHARES))]
                shares[k] = SHARES[int(torch.stack(losses).argmin())]
        return shares

    def predict(self, network: Network, x: Tensor) -> Tensor:
        """Scores ``[B, C]``."""
        return self._mixed(network, x, cast(Tensor, network.given[SHARE]))

    def _mixed(self, network: Network, x: Tensor, share: Tensor) -> Tensor:
        rows = network.part("body")(x)
        logits = network.part("head")(rows)
        neighbours = self.vote(rows.flatten(1), network.given, logits.shape[1])
        if self.mixture == "logits":
            return torch.lerp(logits, neighbours, share)
        mixture = torch.lerp(torch.softmax(logits, 1), neighbours, share)
        return mixture.clamp(min=torch.finfo(mixture.dtype).tiny).log()

    def vote(self, features: Tensor, given: Given, classes: int) -> Tensor:
        """Class probabilities h_k ``[B, C]`` by the labels nearest to features ``[B, F]``."""
        squares, positions = nearest(features, given[MEMORY], given[KNOWN], self.neighbours)
        distances = squares / features.shape[1] if self.variant == "official" else squares.sqrt()
        weights = torch.softmax(-distances / self.scale, 1)
        labels = F.one_hot(given[LABELS][positions], classes)
        return (weights[:, :, None] * labels).sum(1)


def nearest(features: Tensor, memory: Tensor, known: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Squared distances and positions ``[B, k]`` of the `count` nearest of a memory ``[M, F]``, at most M."""
    squares = torch.cdist(features, memory, compute_mode="donot_use_mm_for_euclid_dist").square()
    squares, positions = squares.masked_fill(~known, torch.inf).sort(dim=1, stable=True)  # of equals the first wins
    return squares[:, :count], positions[:, :count]


def _features(network: Network, x: Tensor) -> Tensor:
    return network.part("body")(x).flatten(1)


@method("knnper")
@dataclass(kw_only=True)
class KNNPer(PersonalizedStrategy):
    """FedAvg's server."""

    update = KNNPerUpdate
