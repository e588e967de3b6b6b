"""FedPHP: an average over a client's former networks predicts, and supervises the training of the received one.

X.-C. Li et al., FedPHP: Federated Personalization with Inherited Private Models, ECML PKDD 2021.

With features phi(x), what the head sees, under the trained network w_k and the inherited private model H_k:

    w_k <- w, then SGD on  (1 - lam) * cross-entropy + lam * MMD(phi_w, phi_H)        no gradient reaches phi_H
    H_k <- m_k * H_k + (1 - m_k) * w_k          m_k = momentum * min(1, former trainings of the client / ramp)
    w   <- sum_k n_k / n * w_k
    prediction: H_k

    MMD = mean k(phi_w, phi_w') + mean k(phi_H, phi_H') - 2 mean k(phi_w, phi_H')     over all pairs of a batch
    k   = sum over i = -2..2 of exp(-d^2 / (2^i * b)),  d the distance of two features, b the mean d^2 of unequal ones

Shared: the whole network, buffers averaged. Personal: H_k, an average over the client's former networks; its buffers
are averaged with it, but counts are those of w_k.

The authors let m_k reach its largest value after the trainings a client can expect, ``ramp = fraction * rounds``. As
in their code H_k computes features as in an evaluation, and b is that of the batch, held fixed; the paper also
transfers predictions instead of features, which is not here. A batch of one sample has no b: MMD is left out of it. A
client that has not trained has no H_k, and the received network stands in for it; in the authors' code it is the
initial one.

``variant: pfllib`` repeats a common implementation: k = sum over a = 10, 15, 20, 50 of exp(-d^2 / (2 a)); m_k counts
all rounds before, not those of the client; H_k is the initial network until the client trains. There the network w_k
is measured as it was trained, before the average, and H_k never.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedpers.cohort import Batch, Cohort, Given, Network, Reply, Tree, View, entries, mixed
from fedpers.data.federated import FederatedData
from fedpers.errors import ConfigError
from fedpers.records import ARRAYS
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, method

INHERITED = "inherited"
FACTORS, WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0), (20.0, 30.0, 40.0, 100.0)
"""What the kernel divides squared distances by: multiples of b; and in ``pfllib``, 2 a."""


@dataclass(kw_only=True)
class FedPHPUpdate(LocalUpdate):
    """Train the received network with features near those of the inherited one."""

    lam: Annotated[
        float, Field(ge=0, le=1, description="weight of the transfer from the inherited network; 0 trains as fedavg")
    ] = 0.05
    momentum: Annotated[
        float, Field(ge=0, le=1, description="largest share of the inherited network that a training keeps")
    ] = 0.9
    ramp: Annotated[
        int,
        Field(ge=1, description="trainings of a client (pfllib: rounds) over which that share grows from 0"),
    ] = 50
    variant: Annotated[Literal["paper", "pfllib"], Field(description="see the module")] = "paper"

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Refuse a network without the part that computes features."""
        if not all(isinstance(getattr(model, part, None), nn.Module) for part in ("body", "head")):
            raise ConfigError("model", type(model).__name__, "a network with a 'body' and a 'head' for strategy=fedphp")
        return model, data

    def initial_state(self, template: Tree, module: nn.Module) -> Tree:
        """H_k is the initial network."""
        return super().initial_state(template, module).set(INHERITED, template.clone())

    def example_given(self, template: Tree, data: FederatedData) -> Given:
        """The inherited network is the initial one."""
        return {INHERITED: entries(template)}

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train the received network, then let the inherited one follow."""
        params = cohort.assemble(received[ARRAYS])
        inherited = cohort.state[INHERITED]
        if self.variant == "paper":  # of clients that have not trained, assemble takes what was received instead
            inherited = cohort.assemble(received[ARRAYS], personal=inherited)
        cohort.fit(params, self.loss, given={INHERITED: inherited})
        floats = [name for name, value in entries(params).items() if value.is_floating_point()]
        share = 1 - self.momentum * self._before(cohort).div(self.ramp).clamp(max=1)
        return cohort.reply(params, state={INHERITED: mixed(share, params, inherited, floats)})

    def _before(self, cohort: Cohort) -> Tensor:
        """Trainings of each client before this one, in ``pfllib`` rounds, ``[K]``."""
        counts = cohort.trainings if self.variant == "paper" else torch.full_like(cohort.trainings, cohort.round - 1)
        return counts.to(next(cohort.module.parameters()).dtype)

    def loss(self, network: Network, batch: Batch) -> Tensor:
        """Loss of the task and that of the transfer, lam of the latter."""
        features = network.part("body")(batch.x)
        target = network.replace(batch.given[INHERITED]).part("body").as_frozen()(batch.x)
        task = batch.mean(batch.losses(network.part("head")(features)))
        return (1 - self.lam) * task + self.lam * self._discrepancy(features.flatten(1), target.flatten(1), batch)

    def _discrepancy(self, features: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """MMD of two sets of features ``[B, F]``; padding does not count."""
        size = len(features)
        weight = features.new_ones(size) if batch.weight is None else batch.weight
        count = weight.sum()
        both, counted = torch.cat([features, target]), torch.cat([weight, weight])
        squares = (both[:, None] - both).square().sum(2)
        if self.variant == "pfllib":
            kernels = sum(torch.exp(-squares / width) for width in WIDTHS)
        else:
            total = (counted[:, None] * counted * squares.detach()).sum()
            mean = total / (2 * count * (2 * count - 1)) + 1e-8
            kernels = sum(torch.exp(-squares / (factor * mean)) for factor in FACTORS)
        signed = torch.cat([weight, -weight]) / count
        discrepancy = signed @ kernels @ signed
        return discrepancy if self.variant == "pfllib" else torch.where(count > 1, discrepancy, 0.0)

    def personalize(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Tree | View:
        """The inherited network."""
        if self.variant == "pfllib":
            inherited: Tree = cohort.state[INHERITED]
            return inherited
        return cohort.view(received[ARRAYS], personal=cohort.state[INHERITED])


@method("fedphp")
@dataclass(kw_only=True)
class FedPHP(PersonalizedStrategy):
    """FedAvg's server."""

    update = FedPHPUpdate
