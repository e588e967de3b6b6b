"""FedProto: clients agree on the mean feature of each class and share nothing else.

Y. Tan et al., FedProto: Federated Prototype Learning across Heterogeneous Clients, AAAI 2022, arXiv:2105.00243.

With features f_k(x) (``[F]``) and a global prototype C_j (``[F]``) of each class j:

    c_kj = mean of f_k(x) over the batch's samples of class j
    w_k <- SGD on  cross-entropy + lam * sum_j ||c_kj - C_j||        over the classes in the batch that have a C_j
    C_j <- sum_k n_kj / n_j * (mean of f_k(x) over all of k's training samples of class j, f_k as trained)
    prediction: argmin_j ||f_k(x) - C_j||

Shared: the prototypes, a table ``[C, F + 1]`` whose last column is 1 where a class has one; replies hold sums of
features and, in the last column, counts. Personal: the whole network.

A factor in the paper's equation of C_j, one over the number of clients with class j, would shrink the prototypes; like
the authors' code this has none. There all clients take part; here C_j stays as it is in a round in which nobody has
class j. A class without C_j draws nobody and is not predicted (its score is one below the lowest of the others, which
are negative distances); while no class has one, the head predicts.

``variant: pfllib`` repeats a common implementation: the penalty is the mean over samples and features of
(f_k(x) - C_y)^2; a client's prototypes are the means of the features seen while it trains, in all passes; C_j is the
mean of the clients' prototypes, each counting the same, and is forgotten in a round in which nobody has class j.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedpers.client.requirements import body_and_head, check_classes
from fedpers.cohort import Batch, Cohort, Given, Network, Records, Reply, Tree, View, entries, tree
from fedpers.cohort.classes import class_sums
from fedpers.data.federated import FederatedData
from fedpers.server.collect import Schema, schema_of
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, method

TABLE, PROTOTYPES, SUMS = "table", "prototypes", "sums"
"""Name of the table, and the records in which it is sent and its sums come back."""


@dataclass(kw_only=True)
class FedProtoUpdate(LocalUpdate):
    """Train the whole network with features near the global prototypes."""

    shared = "none"
    personal = "all"
    settles_parts = True
    mixes_networks = True
    lam: Annotated[
        float,
        Field(ge=0, description="strength of the attraction to the global prototypes; 0 is local; about 1 with pfllib"),
    ] = 0.1
    variant: Annotated[Literal["paper", "pfllib"], Field(description="see the module")] = "paper"

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Refuse networks without features and data without classes."""
        check_classes("fedproto", data)
        body_and_head("fedproto", model)
        return model, data

    def initial_arrays(self, template: Tree, module: nn.Module) -> Tree:
        """No class has a prototype."""
        return tree({TABLE: F.pad(torch.zeros_like(template["head.weight"]), (0, 1))})

    def example_given(self, template: Tree, data: FederatedData) -> Given:
        """Every class has one."""
        return {TABLE: F.pad(torch.zeros_like(template["head.weight"]), (0, 1), value=1.0)}

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train, then sum up the features of each class."""
        params, prototypes = cohort.state["model"], cohort.per_client(received[PROTOTYPES])
        if self.variant == "pfllib":
            sums = self._fit(cohort, params, prototypes)
            sums = sums / sums[:, :, -1:].clamp(min=1)
        else:
            cohort.fit(params, self.loss, given=entries(prototypes))
            features = cohort.logits(params, "train", lambda network, x: network.part("body")(x))
            pairs = zip(features, cohort.labels("train"), strict=True)
            sums = torch.stack([class_sums(rows, y, prototypes[TABLE].shape[1]) for rows, y in pairs])
        return cohort.reply(params, sums=tree({TABLE: sums}, cohort.size))

    def _fit(self, cohort: Cohort, params: Tree, prototypes: Tree) -> Tensor:
        """Train; return the sums ``[K, C, F + 1]`` of what was seen: the gradient by zeros that the loss multiplies."""
        seen, names = torch.zeros_like(prototypes[TABLE]), cohort.trainable()
        walk = cohort.walk(params, {SUMS: seen})
        optimizer = walk.optimizer(names)
        for step, (rows, sums) in walk:
            with_zeros = {**rows, SUMS: torch.zeros_like(sums[SUMS])}
            losses, grads = cohort.gradients(step, with_zeros, self.loss, (*names, SUMS), given=entries(prototypes))
            sums[SUMS] += grads.pop(SUMS)
            optimizer.update(rows, grads)
            cohort.count_loss(step, losses)
        return seen

    def loss(self, network: Network, batch: Batch) -> Tensor:
        """Cross-entropy and ``lam`` times the distance from the global prototypes."""
        features, table = network.part("body")(batch.x), cast(Tensor, batch.given[TABLE])
        total = batch.mean(batch.losses(network.part("head")(features)))
        sums = class_sums(features, batch.y, len(table), batch.weight)
        if self.variant == "pfllib":
            if SUMS in network.tensors:
                total = total + (network.tensors[SUMS] * sums).sum()
            away = (features - table[batch.y, :-1]).square().mean(1)
            return total + self.lam * batch.mean(away * table[batch.y, -1])
        means = sums / sums[:, -1:].clamp(min=1)
        distances: Tensor = torch.linalg.vector_norm((means - table)[:, :-1], dim=1)
        return total + self.lam * (distances * means[:, -1] * table[:, -1]).sum()

    def personalize(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> View:
        """The client's network, given the global prototypes."""
        tensors = entries(cohort.state["model"])
        return View(tensors, frozenset(tensors), entries(cohort.per_client(received[PROTOTYPES])))

    def predict(self, network: Network, x: Tensor) -> Tensor:
        """Scores ``[B, C]``: negative distances from the prototypes, those of the head while there are none."""
        features, table = network.part("body")(x), cast(Tensor, network.given[TABLE])
        has_prototype = table[:, -1] > 0
        scores = -torch.cdist(features, table[:, :-1])
        lowest = scores.masked_fill(~has_prototype, math.inf).amin(1, keepdim=True)
        return torch.where(
            has_prototype.any(), torch.where(has_prototype, scores, lowest - 1), network.part("head")(features)
        )


@method("fedproto")
@dataclass(kw_only=True)
class FedProto(PersonalizedStrategy):
    """Averages prototypes class by class."""

    update = FedProtoUpdate
    common_options = ("variant",)
    client_update: FedProtoUpdate = field(default_factory=FedProtoUpdate)
    weighting: Annotated[Literal["uniform"], Field(description="replies hold counts of their own")] = "uniform"

    def send(self, round: int, arrays: Tree, clients: list[int]) -> Records:
        """Send the table; no network travels."""
        return {PROTOTYPES: arrays}

    def reply_schema(self, clients: list[int]) -> Schema:
        """Sums of the form of the table."""
        return schema_of(SUMS, entries(self.sent_arrays))

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """Divide features by counts, which makes 1 of the counts."""
        sums = means[SUMS][TABLE]
        fresh = sums[:, -1:] > 0
        before = arrays[TABLE] if self.client_update.variant == "paper" else torch.zeros_like(sums)
        return tree({TABLE: torch.where(fresh, sums / torch.where(fresh, sums[:, -1:], 1.0), before)})
