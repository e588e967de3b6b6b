"""Ensemble of FedAvg networks: trained each for itself, their predictions averaged.

The row "Avg ensembles" beside FedJETs (C. Dun et al., arXiv:2306.08586), there with two networks.

    for each member i = 1..E, with sampled clients of its own:   w_i <- FedAvg
    prediction: the mean over i of softmax f(w_i)

Shared: all members, BatchNorm statistics averaged with them. Personal: nothing. Evaluation needs all members; a message
of training carries only those the client trains. A round costs E times what one of FedAvg costs, and the tables say so.

What the paper leaves open: members start all from the given network, pretrained where ``model.pretrained=public`` says
so (``init: common``), or from values of their own (``init: random``). The first member samples, starts and trains as
``strategy=fedavg`` does.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from flwr.serverapp import Grid
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedpers.cohort import Batch, Cohort, Loss, Network, Records, Reply, Tree, entries, tree
from fedpers.data.federated import FederatedData
from fedpers.errors import check
from fedpers.models.initial import fresh
from fedpers.randomness import derive, sample_clients
from fedpers.records import ARRAYS
from fedpers.server.collect import Schema, schema_of
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Phase, Received, method


class Members(nn.Module):
    """Networks side by side; the output is the logarithm of their mean class probabilities ``[B, C]``."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        """Logarithm of the mean of the members' class probabilities."""
        log_probs = torch.stack([F.log_softmax(member(x), 1) for member in self.members])
        return torch.logsumexp(log_probs, 0) - torch.tensor(float(len(self.members))).log().item()


@dataclass(kw_only=True)
class EnsembleUpdate(LocalUpdate):
    """Train those members that were sent."""

    settles_parts = True
    members: Annotated[int, Field(ge=1, description="networks, each with sampled clients of its own")] = 2
    init: Annotated[Literal["common", "random"], Field(description="what they start from: all the same, or not")] = (
        "common"
    )

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Put as many networks as there are members in the place of one; the first keeps its values.

        Raises
        ------
        ConfigError
            If there are no classes to average probabilities of.
        """
        classes = data.task.classes
        check(classes, "dataset", data.name, "samples with class labels for strategy=ensemble")
        others = [fresh(model, seed, i) if self.init == "random" else model for i in range(1, self.members)]
        return Members([copy.deepcopy(member) for member in (model, *others)]), data

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train the members that are in the message, one after another."""
        sent = entries(received[ARRAYS])
        params = cohort.assemble(received[ARRAYS])
        sent_members = [i for i in range(self.members) if any(name.startswith(_under(i)) for name in sent)]
        for i in sent_members:
            cohort.fit(params, _loss_of(i), only=_under(i).rstrip("."))
        return cohort.reply(params, share=[_under(i).rstrip(".") for i in sent_members])


@method("ensemble")
@dataclass(kw_only=True)
class Ensemble(PersonalizedStrategy):
    """FedAvg's server, once for each member."""

    update = EnsembleUpdate
    common_options = ("members",)
    client_update: EnsembleUpdate = field(default_factory=EnsembleUpdate)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._trained: dict[int, list[int]] = {}  # members of each client that was addressed last

    def sample(self, round: int) -> list[int]:
        """Clients of any member."""
        return sorted({client for i in range(self.client_update.members) for client in self.sample_of(i, round)})

    def most_sampled(self, trainable: int) -> int:
        """As many as FedAvg's for each member, if no client trains two."""
        return min(trainable, self.client_update.members * super().most_sampled(trainable))

    def sample_of(self, member: int, round: int) -> list[int]:
        """Clients of one member, ascending; those of the first are FedAvg's."""
        seed = self.seed if member == 0 else derive(self.seed, "member", member)
        seen = self.trainable_clients
        return [seen[i] for i in sample_clients(seed, round, len(seen), self.fraction)]

    def prepare(self, round: int, arrays: Tree, clients: list[int], grid: Grid, phase: Phase) -> list[int]:
        """Settle who trains which members; in an evaluation everybody gets all."""
        all_members = list(range(self.client_update.members))
        if phase == "train":
            clients_of = [set(self.sample_of(i, round)) for i in all_members]
            self._trained = {client: [i for i in all_members if client in clients_of[i]] for client in clients}
        else:
            self._trained = dict.fromkeys(clients, all_members)
        return clients

    def send(self, round: int, arrays: Tree, clients: list[int]) -> Records | Sequence[Records]:
        """Send each client the members it trains."""
        if all(len(self._trained[client]) == self.client_update.members for client in clients):
            return {ARRAYS: arrays}
        return [{ARRAYS: tree(self._part(arrays, client))} for client in clients]

    def _part(self, arrays: Tree, client: int) -> dict[str, Tensor]:
        prefixes = tuple(_under(i) for i in self._trained[client])
        return {name: value for name, value in entries(arrays).items() if name.startswith(prefixes)}

    def reply_schema(self, clients: list[int]) -> Sequence[Schema]:
        """The members each was sent."""
        lists = {tuple(self._trained[client]): client for client in clients}
        schemas = {members: schema_of(ARRAYS, self._part(self.sent_arrays, c)) for members, c in lists.items()}
        return [schemas[tuple(self._trained[client])] for client in clients]

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """Each member is the mean over its own clients; one whose clients all failed stays as it is."""
        return tree({**entries(arrays), **entries(means[ARRAYS])})


def _under(member: int) -> str:
    return f"members.{member}."


def _loss_of(member: int) -> Loss:
    def loss(network: Network, batch: Batch) -> Tensor:
        return batch.mean(batch.losses(network.part(f"members.{member}")(batch.x)))

    return loss
