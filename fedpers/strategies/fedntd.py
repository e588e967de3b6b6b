"""FedNTD: not-true distillation, which keeps what the received network knows of the classes a sample is not of.

G. Lee et al., Preservation of the Global Knowledge by Not-True Distillation in Federated Learning, NeurIPS 2022,
arXiv:2106.03097 (Algorithm 1).

With q and q_w the softmax of logits / tau over all classes but a sample's own, of the trained and the received network:

    w_k <- w, then SGD on  cross-entropy + beta * tau^2 * mean KL(q_w || q)       no gradient reaches q_w
    w   <- sum_k n_k / n * w_k

Shared: the whole network, buffers averaged. Personal: nothing.

The received network works as in an evaluation, without dropout and by its own statistics, as in common
implementations. They average uniformly (``weighting: uniform``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedpers.client.requirements import check_classes
from fedpers.cohort import Batch, Cohort, Given, Network, Reply, Tree, entries
from fedpers.data.federated import FederatedData
from fedpers.records import ARRAYS
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, method

RECEIVED = "received"


@dataclass(kw_only=True)
class FedNTDUpdate(LocalUpdate):
    """Train the whole network with the received one as the teacher of not-true classes."""

    beta: Annotated[float, Field(ge=0, description="weight of the distillation; 0 is fedavg")] = 1.0
    temperature: Annotated[float, Field(gt=0, description="of the logits in it, tau in the paper")] = 1.0

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Refuse data without classes."""
        check_classes("fedntd", data)
        return model, data

    def example_given(self, template: Tree, data: FederatedData) -> Given:
        """The teacher is the initial network."""
        return {RECEIVED: entries(template)}

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train the received network beside a copy of it."""
        params = cohort.assemble(received[ARRAYS])
        cohort.fit(params, self.loss, given={RECEIVED: params.clone()})
        return cohort.reply(params)

    def loss(self, network: Network, batch: Batch) -> Tensor:
        """Loss of the task and ``beta * tau^2 * KL(q_w || q)``."""
        logits = network(batch.x)
        teacher = network.replace(batch.given[RECEIVED]).as_frozen()(batch.x)
        student, target = (not_true(z, batch.y) / self.temperature for z in (logits, teacher))
        target = F.log_softmax(target, 1)
        divergence = (target.exp() * (target - F.log_softmax(student, 1))).sum(1)
        return batch.mean(batch.losses(logits) + self.beta * self.temperature**2 * divergence)


def not_true(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits ``[B, C - 1]`` of all classes but the true one, from ``[B, C]`` and labels ``[B]``."""
    classes = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, classes + (classes >= labels[:, None]))


@method("fedntd")
@dataclass(kw_only=True)
class FedNTD(PersonalizedStrategy):
    """FedAvg's server."""

    update = FedNTDUpdate
