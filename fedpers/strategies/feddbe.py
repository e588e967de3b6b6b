"""FedDBE: clients keep the bias of their features in a vector of their own, so that the body need not learn it.

J. Zhang et al., Eliminating Domain Bias for Federated Learning in Representation Space, NeurIPS 2023, arXiv:2311.14975
(FedAvg with the Domain Bias Eliminator).

With features b(x) (``[F]``), a memory z_k (``[F]``, at first 0) of the client's bias, a running mean m_k of features
and the mean feature g on which clients agree before the first round, in each step of a client's training:

    m_k <- (1 - mu) m_k + mu * mean of b_k(x) over the batch       0 before the client's first step of a round
    (b_k, h_k, z_k) <- a step of SGD on  loss of h_k(b_k(x) + z_k) + kappa * mean over F of (m_k - g)^2 / 2

    (b, h) <- sum_k n_k / n * (b_k, h_k)
    prediction of client k: h(b(x) + z_k)

Shared: the network, buffers averaged, and g, the mean of all clients' features. Personal: the memory z_k, the bias of
the client's features.

No gradient reaches the m_k of former steps. As in the authors' code, g is the mean of all clients' m_k, weighted by
samples, after each has trained the initial network once without memory and penalty; what they trained is forgotten, and
none of it counts as a step of the run. Clients that do not answer then are not in g, and g stays as it is. The factor
1/2 is that of the code, too.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Unpack

import torch
from flwr.serverapp import Grid
from pydantic import Field
from torch import Tensor, nn

from fedpers.client.requirements import body_and_head
from fedpers.cohort import Batch, Cohort, Given, Network, Records, Reply, Tree, tree
from fedpers.cohort.plan import PlanOptions
from fedpers.data.federated import FederatedData
from fedpers.records import ARRAYS
from fedpers.server.collect import schema_of
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Phase, Received, method

MEAN = "mean"
"""Record and entry of g and of the m_k it is made of, role of g in the server's state."""
RUNNING, SEEN = "running", "seen"
"""m_k before a step; zeros that the loss multiplies by the batch's mean feature, which so is their gradient."""
MEMORY = "memory"


class RemembersBias(nn.Module):
    """A network that adds a vector to the features.

    Parameters
    ----------
    body : nn.Module
        Samples to features ``[B, ..., F]``.
    head : nn.Linear
        Features to scores.
    """

    def __init__(self, body: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.body = body
        self.head = head
        self.memory = nn.Parameter(head.weight.new_zeros(head.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the features with the vector."""
        scores: Tensor = self.head(self.body(x) + self.memory)
        return scores


@dataclass(kw_only=True)
class FedDBEUpdate(LocalUpdate):
    """Train network and memory with features whose mean is near the common one."""

    shared = ("all", f"-{MEMORY}")
    personal = MEMORY
    settles_parts = True
    kappa: Annotated[float, Field(ge=0, description="strength of the pull of mean features to the common mean")] = 50.0
    mu: Annotated[float, Field(gt=0, le=1, description="share of a batch in the running mean of features")] = 1.0

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Add the memory; refuse networks without a linear head."""
        body, head = body_and_head("feddbe", model)
        return RemembersBias(copy.deepcopy(body), copy.deepcopy(head)), data

    def example_given(self, template: Tree, data: FederatedData) -> Given:
        """Both means are 0."""
        return {MEAN: torch.zeros_like(template[MEMORY]), RUNNING: torch.zeros_like(template[MEMORY])}

    def query_mean(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train the network once for the running mean that this gives."""
        params = cohort.as_received(received[ARRAYS])
        names = [name for name in cohort.trainable() if name != MEMORY]
        return Reply({MEAN: tree({MEAN: self._fit(cohort, params, names, {}, purpose=MEAN)}, cohort.size)})

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train network and memory."""
        params = cohort.assemble(received[ARRAYS])
        self._fit(cohort, params, cohort.trainable(), {MEAN: cohort.per_client(received[MEAN])[MEAN]})
        return cohort.reply(params)

    def _fit(
        self, cohort: Cohort, params: Tree, names: Sequence[str], given: Given, **options: Unpack[PlanOptions]
    ) -> Tensor:
        """Train the parameters `names`; return the running means ``[K, F]`` after the last step."""
        running = torch.zeros_like(params[MEMORY])
        walk = cohort.walk(params, **options)
        optimizer = walk.optimizer(names)
        for step, rows in walk:
            with_zeros = {**rows, SEEN: torch.zeros_like(rows[MEMORY])}
            losses, grads = cohort.gradients(
                step, with_zeros, self.loss, (*names, SEEN), given={**given, RUNNING: running}
            )
            clients = step.places(cohort.device)
            running[clients] = torch.lerp(running[clients], grads.pop(SEEN), self.mu)
            optimizer.update(rows, grads)
            cohort.count_loss(step, losses)
        return running

    def loss(self, network: Network, batch: Batch) -> Tensor:
        """Loss of the task, and the distance from g where that is known."""
        features, memory = network.part("body")(batch.x), network.tensors[MEMORY]
        total = batch.mean(batch.losses(network.part("head")(features + memory)))
        by_sample = features.reshape(len(features), -1, len(memory)).mean(1)
        if batch.weight is not None:  # padding must not count
            by_sample = by_sample * (batch.weight * len(features) / batch.weight.sum())[:, None]
        mean = by_sample.mean(0)
        if MEAN in batch.given:
            distances = torch.lerp(batch.given[RUNNING], mean, self.mu) - batch.given[MEAN]
            total = total + self.kappa * distances.square().mean() / 2
        if SEEN in network.tensors:
            total = total + (network.tensors[SEEN] * mean.detach()).sum()
        return total


@method("feddbe")
@dataclass(kw_only=True)
class FedDBE(PersonalizedStrategy):
    """Average of the networks by number of training samples; the common mean feature."""

    update = FedDBEUpdate

    @classmethod
    def plain_mean(cls) -> bool:
        """No: before the first round clients tell their mean features, which nothing clips or robustly averages."""
        return False

    def prepare(self, round: int, arrays: Tree, clients: list[int], grid: Grid, phase: Phase) -> list[int]:
        """Before the first training, agree on the mean feature with all clients that may train."""
        if phase == "evaluate" or MEAN in self.state:
            return clients
        asked = self.trainable_clients
        schema = schema_of(MEAN, {MEAN: arrays["head.weight"][0]})
        answers = self.query_clients(grid, "mean", round, asked, {ARRAYS: arrays}, phase, schema)
        total = sum(metrics["num-examples"] for _, metrics in answers.values())
        if answers:
            parts = (m["num-examples"] / total * records[MEAN][MEAN].double() for records, m in answers.values())
            self.state[MEAN] = tree({MEAN: torch.stack(list(parts)).sum(0).to(arrays["head.weight"])})
        return [client for client in clients if client in answers]

    def send(self, round: int, arrays: Tree, clients: list[int]) -> Records:
        """Send g too, once there is one."""
        return {ARRAYS: arrays, **({MEAN: self.state[MEAN]} if MEAN in self.state else {})}
