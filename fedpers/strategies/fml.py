"""FML: a network of the client and a shared one teach each other.

T. Shen et al., Federated Mutual Learning, arXiv:2006.16765 (Algorithm 1).

With p_k and q_k the class probabilities under the client's network w_k and its copy m_k of the shared network, which
the paper calls meme:

    m_k <- m
    w_k <- SGD on  alpha * cross-entropy(p_k) + (1 - alpha) * mean KL(q_k || p_k)       no gradient reaches q_k
    m_k <- SGD on  beta  * cross-entropy(q_k) + (1 - beta)  * mean KL(p_k || q_k)       no gradient reaches p_k
    m   <- mean_k m_k
    prediction of client k: w_k

Shared: the network ``shared``. Personal: the network ``local``. Both have the form and the initial values of the given
one, buffers included, and are parts of one network: names in ``training.groups`` begin with ``shared.`` and ``local.``,
and ``training.clip`` bounds both gradients together. The paper allows every client a form of its own.

Both networks move in every batch, by gradients at the values before it. A client that has never trained predicts with
the initial w_k, for nothing of it comes from the server.

``variant: pfllib`` repeats a common implementation: KL is divided by the number of classes too, and both networks
follow the gradient of the sum of the four terms, so that a teacher also moves towards its student.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedpers.client.requirements import check_classes
from fedpers.cohort import Batch, Cohort, Network, Reply
from fedpers.cohort.modules import copy_network
from fedpers.data.federated import FederatedData
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, Weighting, method

LOCAL, SHARED = "local", "shared"


class MutualNetworks(nn.Module):
    """The client's network and the shared one; the output is that of the client's.

    Parameters
    ----------
    network : nn.Module
        What both are copies of.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.local = copy_network(network)
        self.shared = copy_network(network)

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``[B, C]`` of the client's network."""
        scores: Tensor = self.local(x)
        return scores


@dataclass(kw_only=True)
class FMLUpdate(LocalUpdate):
    """Train both networks on the labels and on what the other predicts."""

    shared = SHARED
    personal = LOCAL
    settles_parts = True
    alpha: Annotated[
        float, Field(ge=0, le=1, description="weight of the labels for the client's network; 1 is local training")
    ] = 0.5
    beta: Annotated[
        float, Field(ge=0, le=1, description="weight of the labels for the shared network; 1 is fedavg")
    ] = 0.5
    variant: Annotated[Literal["paper", "pfllib"], Field(description="see the module")] = "paper"

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Put two networks in the place of one; refuse data without classes."""
        check_classes("fml", data)
        return MutualNetworks(model), data

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train both networks in the same steps, each of which computes the gradients of both."""
        reply = super().train(cohort, received, config)
        cohort.gradients_taken *= 2
        return reply

    def loss(self, network: Network, batch: Batch) -> Tensor:
        """Sum of both networks' losses; each network sees the gradient of its part alone."""
        local, shared = (network.part(name)(batch.x) for name in (LOCAL, SHARED))
        to_local, to_shared = divergence(local, shared.detach()), divergence(shared, local.detach())
        if self.variant == "pfllib":
            to_local, to_shared = (divergence(*pair) / local.shape[1] for pair in ((local, shared), (shared, local)))
        of_local = self.alpha * batch.losses(local) + (1 - self.alpha) * to_local
        of_shared = self.beta * batch.losses(shared) + (1 - self.beta) * to_shared
        return batch.mean(of_local + of_shared)

    def predict(self, network: Network, x: Tensor) -> Tensor:
        """Scores ``[B, C]`` of the client's network."""
        return network.part(LOCAL)(x)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax teacher || softmax student) ``[B]`` of scores ``[B, C]``."""
    target = F.log_softmax(teacher, 1)
    return (target.exp() * (target - F.log_softmax(student, 1))).sum(1)


@method("fml")
@dataclass(kw_only=True)
class FML(PersonalizedStrategy):
    """Uniform average of the shared networks."""

    update = FMLUpdate
    weighting: Weighting = "uniform"
