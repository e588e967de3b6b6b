"""FedCP: a policy divides the features of each sample between the client's head and a common one.

J. Zhang et al., FedCP: Separating Feature Information for Personalized Federated Learning via Conditional Policy, KDD
2023, arXiv:2307.01217.

With features f = phi(x) (``[F]``), the received body phi^ and head psi^, which stay as they are, the client's head
psi_k and v_k, the sum over the classes of the rows of psi_k's weight before the training:

    (a, b) = P(f * v_k / ||v_k||)                         the policy, ReLU(LayerNorm(Linear)) with 2 F outputs
    s      = exp(a + g) / (exp(a + g) + exp(b + g'))      g, g' Gumbel noise, drawn for each sample in each pass
    z      = psi_k(s * f) + psi^((1 - s) * f)
    phi, psi_k, P   <- SGD on  cross-entropy(z, y) + lam * MMD(f, phi^(x))
    phi, (psi_k + psi^) / 2, P   of the clients           averaged by training samples into phi, psi, P
    prediction: z without noise, with the received phi, psi and P

MMD(f, f^) is the mean over all pairs of a batch of k(f, f) + k(f^, f^) - 2 k(f, f^) with
k(u, v) = sum_w exp(-||u - v||^2 / (2 w)) for w = 10, 15, 20 and 50.

Shared: body (its buffers averaged with it), policy and the common head (module ``global_head``). Personal: the head,
and v_k (``context``), the sum of its weights. phi^ works as in an evaluation. The noise is that of the authors' code.

``variant: pfllib`` repeats a common implementation: only the clients of a round are sent the new policy and common
head, with which they predict and train until they take part again; before its first training a client has the initial
ones and a random v_k. There predictions are as noisy as trainings; here they are not.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedpers.client.requirements import body_and_head, check_classes
from fedpers.cohort import Batch, Cohort, Given, Network, Records, Reply, Selection, Step, Tree, entries, tree
from fedpers.data.federated import FederatedData
from fedpers.errors import check
from fedpers.models.initial import drawing
from fedpers.randomness import generator
from fedpers.records import ARRAYS
from fedpers.server.tools import ClientTable
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, method

CONTEXT = "context"
RECEIVED, NOISE = "received", "noise"
"""What the loss is given: the received body, and g - g' ``[B, F]`` for the samples of a batch."""
INITIAL, LAST = "initial", "last"
"""Roles of the server's state in ``pfllib``: policy and common head at first, and those each client was sent last."""
WIDTHS = (10.0, 15.0, 20.0, 50.0)


class SeparatingNetwork(nn.Module):
    """Body and head of a network, a common head and a policy; :class:`FedCPUpdate` applies them.

    Parameters
    ----------
    body : nn.Module
        Samples to features ``[B, F]``.
    head : nn.Linear
        Features to scores ``[B, C]``.
    context : Tensor ``[F]``
        v_k before the first training.
    """

    def __init__(self, body: nn.Module, head: nn.Linear, context: Tensor) -> None:
        super().__init__()
        self.body = body
        self.head = head
        self.global_head = copy.deepcopy(head)
        width = 2 * head.in_features
        self.policy = nn.Sequential(nn.Linear(head.in_features, width), nn.LayerNorm(width), nn.ReLU()).to(head.weight)
        self.register_buffer(CONTEXT, context)


@dataclass(kw_only=True)
class FedCPUpdate(LocalUpdate):
    """Train body, head and policy; the common head takes in half of the client's afterwards."""

    shared = ("all", "-head", f"-{CONTEXT}")
    personal = ("head", CONTEXT)
    settles_parts = True
    lam: Annotated[
        float, Field(ge=0, description="weight of the distance between the received body's features and the new ones")
    ] = 5.0
    variant: Annotated[Literal["paper", "pfllib"], Field(description="see the module")] = "paper"

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Add policy and common head.

        Raises
        ------
        ConfigError
            If the network is not a body under a linear head, or samples have no class labels.
        """
        body, head = body_and_head("fedcp", model)
        check_classes("fedcp", data)
        with drawing(seed, "fedcp"):
            weight = head.weight.detach()
            context = torch.rand(head.in_features).to(weight) if self.variant == "pfllib" else weight.sum(0)
            return SeparatingNetwork(copy.deepcopy(body), copy.deepcopy(head), context), data

    def example_given(self, template: Tree, data: FederatedData) -> Given:
        """The initial body, and no noise."""
        return {RECEIVED: _body(entries(template)), NOISE: torch.zeros_like(template[CONTEXT])[None]}

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train under noise, then mix the heads."""
        params = cohort.assemble(received[ARRAYS])
        before = {name: value.clone() for name, value in _body(entries(params)).items()}
        draws = [self.draws(cohort, client) for client in cohort.clients]
        names = cohort.trainable(("parameters", "-global_head"))
        walk = cohort.walk(params)
        optimizer = walk.optimizer(names)
        for step, rows in walk:
            given = {RECEIVED: before, NOISE: _noise(step, draws, params[CONTEXT])}
            losses, grads = cohort.gradients(step, rows, self.loss, names, given=given)
            optimizer.update(rows, grads)
            cohort.count_loss(step, losses)
        for name in cohort.names("head"):
            params[f"global_{name}"].lerp_(params[name], 0.5)
        params[CONTEXT].copy_(params["head.weight"].sum(1))
        return cohort.reply(params)

    @property
    def finetuned_parts(self) -> Selection:
        """All but the common head, which clients do not train."""
        return ("parameters", "-global_head")

    def draws(self, cohort: Cohort, client: int) -> np.random.Generator:
        """What a client's noise in a round is drawn from, sample after sample."""
        return generator(cohort.seed, "policy", client, cohort.round)

    def loss(self, network: Network, batch: Batch) -> Tensor:
        """Loss of the task and ``lam`` times the distance from the received body's features."""
        features = network.part("body")(batch.x)
        received = network.replace(batch.given[RECEIVED]).part("body").as_frozen()(batch.x)
        scores = _separated(network, features, cast(Tensor, batch.given[NOISE]))
        return batch.mean(batch.losses(scores)) + self.lam * discrepancy(features, received, batch.weight)

    def predict(self, network: Network, x: Tensor) -> Tensor:
        """Scores ``[B, C]`` of both heads for their parts of the features."""
        return _separated(network, network.part("body")(x), cast(Tensor, network.given.get(NOISE, torch.zeros(()))))


def _separated(network: Network, features: Tensor, noise: Tensor) -> Tensor:
    """Scores ``[B, C]`` for features ``[B, F]``; with Gumbel noise the share s is a sigmoid of a - b + (g - g')."""
    direction = F.normalize(network.tensors[CONTEXT], dim=0)
    personal, common = network.part("policy")(features * direction).chunk(2, dim=1)
    share = torch.sigmoid(personal - common + noise.to(features))
    return network.part("head")(features * share) + network.part("global_head")(features * (1 - share))


def discrepancy(u: Tensor, v: Tensor, weight: Tensor | None = None) -> Tensor:
    """MMD of the rows of `u` and `v`, both ``[B, F]``; those of weight 0 are padding."""
    both = torch.cat([u, v])
    squares = both.square().sum(1)
    distances = squares[:, None] + squares - 2 * both @ both.T
    kernel = torch.stack([torch.exp(-distances / (2 * width)) for width in WIDTHS]).sum(0)
    share = torch.ones_like(squares[: len(u)]) if weight is None else weight
    share = share / share.sum()
    signed = torch.cat([share, -share])
    return signed @ kernel @ signed


def _body(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if name.startswith("body.")}


def _noise(step: Step, draws: Sequence[np.random.Generator], like: Tensor) -> Tensor:
    """Noise ``[K, B, F]`` of a step, where `like` is ``[K, F]``: the difference of two Gumbel draws is logistic."""
    noise = np.zeros((len(draws), step.index.shape[1], like.shape[1]))
    rows = range(step.active) if step.rows is None else step.rows.tolist()
    for k, count in zip(rows, step.count.long().tolist(), strict=True):
        noise[k, :count] = draws[k].logistic(size=(count, like.shape[1]))
    return torch.from_numpy(noise).to(like)


@method("fedcp")
@dataclass(kw_only=True)
class FedCP(PersonalizedStrategy):
    """Average by training samples."""

    update = FedCPUpdate
    common_options = ("variant",)
    client_update: FedCPUpdate = field(default_factory=FedCPUpdate)

    def check_arrays(self, arrays: Tree, sampled: int) -> None:
        """Refuse postprocessors in ``pfllib``, where clients are sent others than the server's arrays."""
        names = [postprocessor.setting for postprocessor in self.postprocessors]
        allowed = "none for strategy=fedcp strategy.variant=pfllib, which sends clients other arrays than the server's"
        check(not names or self.client_update.variant != "pfllib", "postprocessors", names, allowed)
        super().check_arrays(arrays, sampled)

    def send(self, round: int, arrays: Tree, clients: list[int]) -> Records | Sequence[Records]:
        """Send the averages; in ``pfllib`` each client gets the policy and common head of when it last took part."""
        if INITIAL not in self.state:
            return {ARRAYS: arrays}
        last = self._table().rows(clients)
        return [
            {ARRAYS: tree({n: last[n][k] if n in last else v for n, v in entries(arrays).items()})}
            for k in range(len(clients))
        ]

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """Take the averages; in ``pfllib`` remember who took part."""
        if self.client_update.variant == "pfllib":
            names = [name for name in entries(arrays) if not name.startswith("body.")]
            self.state.setdefault(INITIAL, arrays.select(*names))
            table = self._table()
            table.put(clients, {name: means[ARRAYS][name].expand(len(clients), *arrays[name].shape) for name in names})
            self.state[LAST] = table.values
        return means[ARRAYS]

    def _table(self) -> ClientTable:
        """Policy and common head that each client was sent last."""
        return ClientTable(lambda client: entries(self.state[INITIAL]), self.state.get(LAST))
