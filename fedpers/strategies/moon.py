"""MOON: model-contrastive learning, towards the received network's features and away from one's former ones.

Q. Li, B. He, D. Song, Model-Contrastive Federated Learning, CVPR 2021, arXiv:2103.16257 (Algorithm 1).

With z, z_w, z_p the features of a sample under the trained network, the received network w and the network p_k that
the client trained before, and cos the cosine of two vectors:

    L_con = -log(exp(cos(z, z_w) / tau) / (exp(cos(z, z_w) / tau) + exp(cos(z, z_p) / tau)))
    w_k <- w, then SGD on  cross-entropy + mu * mean L_con          no gradient reaches z_w and z_p
    p_k <- w_k
    w   <- sum_k n_k / n * w_k

Shared: the whole network, buffers averaged. Personal: the body of p_k, the network after the last training. Prediction:
the received network.

Features are what the head sees. The paper's networks have a projection of two layers there, and so have those of all
methods it compares: it is a matter of the network, not of the method. As in the authors' code z_w and z_p are computed
as in an evaluation, without dropout and by the statistics of each network. A client that has not trained has no p_k:
the received network stands in for it, for which L_con has no gradient (the authors' code leaves L_con out of round 1).
``variant: pfllib`` takes the initial network instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedpers.cohort import Batch, Cohort, Given, Network, Reply, Tree, entries, select
from fedpers.data.federated import FederatedData
from fedpers.errors import ConfigError, check
from fedpers.records import ARRAYS
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, method

PREVIOUS, RECEIVED = "previous", "received"


@dataclass(kw_only=True)
class MOONUpdate(LocalUpdate):
    """Train the whole network with a contrastive term on its features."""

    mu: Annotated[float, Field(ge=0, description="weight of the contrastive term; 0 is fedavg")] = 1.0
    temperature: Annotated[float, Field(gt=0, description="of the cosines in it, tau in the paper")] = 0.5
    variant: Annotated[
        Literal["paper", "pfllib"], Field(description="what p_k is before a client has trained, see the module")
    ] = "paper"

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Refuse a network without the part that computes features."""
        if not all(isinstance(getattr(model, part, None), nn.Module) for part in ("body", "head")):
            raise ConfigError("model", type(model).__name__, "a network with a 'body' and a 'head' for strategy=moon")
        trains = any(name.startswith("body.") and p.requires_grad for name, p in model.named_parameters())
        check(trains, "model", type(model).__name__, "a network whose body trains, for strategy=moon compares features")
        return model, data

    def initial_state(self, template: Tree, module: nn.Module) -> Tree:
        """p_k is the initial body."""
        return super().initial_state(template, module).set(PREVIOUS, template.select(*select(module, "body")))

    def example_given(self, template: Tree, data: FederatedData) -> Given:
        """Both other networks are the initial one."""
        return {PREVIOUS: entries(template), RECEIVED: entries(template)}

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train the received network between itself and the client's previous one."""
        body, previous = cohort.names("body"), cohort.state[PREVIOUS]
        params = cohort.assemble(received[ARRAYS])
        if self.variant == "paper":  # of clients that have not trained, assemble takes what was received instead
            previous = cohort.assemble(received[ARRAYS], personal=previous).select(*body)
        cohort.fit(params, self.loss, given={PREVIOUS: previous, RECEIVED: params.select(*body).clone()})
        return cohort.reply(params, state={PREVIOUS: params.select(*body)})

    def loss(self, network: Network, batch: Batch) -> Tensor:
        """Loss of the task and ``mu * L_con``."""
        features = network.part("body")(batch.x)
        towards, away = (
            F.cosine_similarity(features.flatten(1), _features(network, batch, name)) / self.temperature
            for name in (RECEIVED, PREVIOUS)
        )
        losses = batch.losses(network.part("head")(features)) + self.mu * F.softplus(away - towards)
        return batch.mean(losses)


def _features(network: Network, batch: Batch, name: str) -> Tensor:
    """Features ``[B, F]`` of another network, as in an evaluation."""
    return network.replace(batch.given[name]).part("body").as_frozen()(batch.x).flatten(1)


@method("moon")
@dataclass(kw_only=True)
class MOON(PersonalizedStrategy):
    """FedAvg's server."""

    update = MOONUpdate
