"""Fed-RoD: one body under two heads, a common one for all classes and, added to it, a private one for the own classes.

H.-Y. Chen, W.-L. Chao, On Bridging Generic and Personalized Federated Learning for Image Classification, ICLR 2022,
arXiv:2107.00778 (Algorithm 1, the linear private head).

With features z = b(x), the common head h, the private head p_k and n_kc samples of class c at client k:

    (b_k, h_k) <- (b, h), then SGD on  cross-entropy of h(z) + gamma * log n_k       balanced softmax
    p_k        <- at the same time SGD on  cross-entropy of h(z) + p_k(z)            no gradient reaches h(z) and z
    (b, h)     <- sum_k n_k / n * (b_k, h_k)
    prediction of client k: h(z) + p_k(z)

Shared: the network, buffers averaged. Personal: the private head. The common head alone is evaluated as ``generic``.

A class that a client lacks is no alternative in its balanced softmax (log 0): its weights in the common head do not
move there. The private head starts as a copy of the initial common head, as in common implementations; a client that
has never trained predicts with that. The paper's other private head, which a shared hypernetwork makes of the client's
class shares, is not here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from fedpers.client.requirements import body_and_head, check_classes
from fedpers.cohort import Batch, Cohort, Given, Network, Reply, Tree, View, tree
from fedpers.data.federated import FederatedData
from fedpers.errors import check
from fedpers.records import ARRAYS
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, method

PRIOR = "prior"
"""What the loss is given: the logarithms of a client's class counts to the power of gamma, ``[C]``."""
PRIVATE = "private_head"


class TwoHeads(nn.Module):
    """A body under a common and a private head.

    Parameters
    ----------
    body : nn.Module
        Samples to features ``[B, F]``.
    head : nn.Linear
        Features to scores ``[B, C]``; the private head starts as a copy of it.
    """

    def __init__(self, body: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.body = body
        self.head = head
        self.private_head = copy.deepcopy(head)

    def forward(self, x: Tensor) -> Tensor:
        """Sum ``[B, C]`` of the scores of both heads."""
        features = self.body(x)
        scores: Tensor = self.head(features) + self.private_head(features)
        return scores


@dataclass(kw_only=True)
class FedRoDUpdate(LocalUpdate):
    """Train body and common head with balanced softmax, the private head with what they give."""

    shared = ("all", f"-{PRIVATE}")
    personal = PRIVATE
    settles_parts = True
    gamma: Annotated[
        float, Field(ge=0, description="power of the class counts in balanced softmax; 0 is plain cross-entropy")
    ] = 1.0

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Add the private head; refuse networks without a linear head and data without classes."""
        check_classes("fedrod", data)
        strength = self.training.logit_adjustment
        check(not strength, "training.logit_adjustment", strength, "0 with fedrod, which has strategy.gamma for it")
        body, head = body_and_head("fedrod", model)
        return TwoHeads(copy.deepcopy(body), copy.deepcopy(head)), data

    def example_given(self, template: Tree, data: FederatedData) -> Given:
        """All classes are equally frequent."""
        return {PRIOR: template["head.weight"].new_zeros(len(template["head.weight"]))}

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train the network and the private head in the same steps."""
        params = cohort.assemble(received[ARRAYS])
        cohort.fit(params, self.loss, given={PRIOR: self._prior(cohort, params["head.weight"])})
        return cohort.reply(params)

    def _prior(self, cohort: Cohort, weights: Tensor) -> Tensor:
        """``gamma * log n_kc`` ``[K, C]``, for heads with `weights` ``[K, C, F]``; -inf for a class a client lacks."""
        return cohort.class_counts(weights.shape[1]).to(weights).pow(self.gamma).log()

    def loss(self, network: Network, batch: Batch) -> Tensor:
        """Balanced softmax of the common head, plus the loss of both heads' sum, which moves the private one alone."""
        features = network.part("body")(batch.x)
        common = network.part("head")(features)
        both = common.detach() + network.part(PRIVATE)(features.detach())
        return batch.mean(batch.losses(common + batch.given[PRIOR]) + batch.losses(both))

    def extra_models(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Mapping[str, Tree | View]:
        """``generic``: the received network under a private head that adds nothing."""
        silent = {name: torch.zeros_like(cohort.template[name]) for name in cohort.names(PRIVATE)}
        shared = cohort.view(received[ARRAYS], personal=tree({}, cohort.size))
        return {"generic": View({**shared.tensors, **silent}, shared.stacked)}


@method("fedrod")
@dataclass(kw_only=True)
class FedRoD(PersonalizedStrategy):
    """Average of body and common head by number of training samples."""

    update = FedRoDUpdate
