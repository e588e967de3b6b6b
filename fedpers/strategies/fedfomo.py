"""FedFomo: each client weighs other clients' networks by how much better they do on samples it holds out.

M. Zhang et al., Personalized Federated Learning with First Order Model Optimization, ICLR 2021, arXiv:2012.08565.

With v_k the network that k trained last, o_k the one that training began with, f_k the loss on the samples that k holds
out, and a row P_k of affinities (that of the unit matrix at first), k is sent the v_j of M others and computes for
them and itself

    w_kj = (f_k(o_k) - f_k(v_j)) / ||v_j - o_k||
    o_k <- o_k + sum_j max(w_kj, 0) / (sum_i max(w_ki, 0)) * (v_j - o_k)            o_k as it is if no w_kj is positive
    v_k <- o_k, then SGD on the samples that k does not hold out
    P_k <- P_k + w_k
    prediction: v_k

Of the clients that trained in the round before, each of the M is drawn at random with probability `epsilon`, which
falls by `epsilon_decay` a round, and else the one of largest affinity.

Shared: the whole network, which the server keeps of the clients of a round and sends to others, and w_k. Personal: the
network that predicts, v_k, and the one that training began with, o_k, buffers included; those of a mixture are mixed
too. P stands on the server. The paper's clients all take part from the start; here the server's arrays are the mean of
a round's networks, which a client that has not trained takes for o_k and v_k and predicts with. Samples are held out
once and for all.

``variant: pfllib`` repeats a common implementation: k is one of the M only if its affinity says so, and keeps v_k if no
w_kj is positive; there is no exploration, and those that did not train in the round before may be among the M, of which
there are no more than clients that did; f_k is a mean over batches of the mean of each; 1e-5 is added to distances; a
client that has not trained has the initial network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedpers.cohort import Cohort, Collect, Records, Reply, Tree, View, WeightedMean, entries, tree
from fedpers.cohort.fold import REPLIES
from fedpers.cohort.prediction import predictions
from fedpers.cohort.tree import expand_rows, flat_rows
from fedpers.randomness import generator
from fedpers.records import ARRAYS
from fedpers.server.collect import Entry, Schema, schema_of
from fedpers.server.tools import ClientTable
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, method

BEFORE, NETWORKS, CHOSEN, WEIGHTS = "before", "networks", "chosen", "weights"
"""Role of o_k; records of other clients' networks ``[M, ...]``, of their numbers ``[M]`` (-1: none), and of w_k."""
LAST, AFFINITY = "last", "affinity"
"""Roles of the server's state: the round of the networks, and P; ``networks`` holds them."""


@dataclass(kw_only=True)
class FedFomoUpdate(LocalUpdate):
    """Mix the networks of others by weights, then train the mixture."""

    personal = "all"
    settles_parts = True
    held_out: Annotated[
        float, Field(gt=0, lt=1, description="share of a client's samples that it does not train on, but weighs with")
    ] = 0.2
    variant: Annotated[Literal["paper", "pfllib"], Field(description="see the module")] = "paper"

    def smallest_batch(self, size: int) -> int:
        """Only a part of the samples is trained on."""
        return super().smallest_batch(size - self.count_held_out(size))

    def initial_state(self, template: Tree, module: nn.Module) -> Tree:
        """v_k and o_k are the initial network."""
        return super().initial_state(template, module).set(BEFORE, template.clone())

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Mix, then train."""
        parts = [self.split(cohort, client) for client in cohort.clients]
        params, records = cohort.assemble(received[ARRAYS]), {}
        if NETWORKS in received:
            weights = self._mix(cohort, received, params, [held_out for _, held_out in parts])
            chosen = cohort.per_client(received[CHOSEN])["client"]
            records = {WEIGHTS: tree({"client": chosen, "weight": weights}, cohort.size)}
        before = params.clone()
        cohort.fit(params, self.loss, samples=[trained for trained, _ in parts])
        return cohort.reply(params, state={BEFORE: before}, **records)

    def count_held_out(self, size: int) -> int:
        """How many of a client's samples are held out."""
        return min(max(1, int(self.held_out * size)), size - 1)

    def split(self, cohort: Cohort, client: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Samples of a client to train on and to weigh with; a single one serves both."""
        samples = cohort.samples(client)
        if len(samples) == 1:
            return samples, samples
        order = generator(cohort.seed, "held out", client, 0).permutation(len(samples))
        count = self.count_held_out(len(samples))
        return samples[np.sort(order[count:])], samples[np.sort(order[:count])]

    def _mix(self, cohort: Cohort, received: Received, params: Tree, held_out: list[NDArray[np.int64]]) -> Tensor:
        """Replace v_k in `params` by o_k as it is after the mixture; return the weights ``[K, M]`` of the networks."""
        paper, names = self.variant == "paper", cohort.names("parameters")
        former = entries(cohort.assemble(received[ARRAYS], personal=cohort.state[BEFORE]))
        others, client = entries(cohort.per_client(received[NETWORKS])), cohort.per_client(received[CHOSEN])["client"]
        networks = [{n: value[:, j] for n, value in others.items()} for j in range(client.shape[1])]
        if paper:
            networks.append({name: value.clone() for name, value in entries(params).items()})
            client = F.pad(client, (0, 1))
        start = self._losses(cohort, former, held_out)
        columns = []
        for network in networks:
            away = torch.cat([flat_rows(network[name] - former[name]) for name in names], 1)
            distance = torch.linalg.vector_norm(away, dim=1).double()
            gain = start - self._losses(cohort, network, held_out)
            weight = gain / distance.clamp(min=1e-12) if paper else gain / (distance + 1e-5)
            columns.append(torch.nan_to_num(weight, 0.0, 0.0, 0.0))  # networks that have diverged count nothing
        weights = torch.stack(columns, 1).masked_fill(client < 0, 0)
        shares = weights.clamp(min=0)
        total = shares.sum(1)
        shares = shares / torch.where(total > 0, total, 1)[:, None]
        for name, value in entries(params).items():
            if value.is_floating_point():
                mixture = sum(
                    expand_rows(shares[:, j].to(value), value) * network[name] for j, network in enumerate(networks)
                )
                unmixed = former[name] if paper else value
                value.copy_(torch.where(expand_rows(total > 0, value), mixture, unmixed))
        return weights[:, :-1] if paper else weights

    def _losses(self, cohort: Cohort, network: Mapping[str, Tensor], held_out: list[NDArray[np.int64]]) -> Tensor:
        """Loss ``[K]``, float64, of each client's network on the samples that it holds out."""
        cohort.module.eval()
        lists = [torch.from_numpy(positions) for positions in held_out]
        view = View(dict(network), frozenset(network))
        outputs = predictions(cohort.module, cohort.data, view, lists, self.predict)
        size = self.training.batch_size if self.variant == "pfllib" else 0
        means = []
        for rows, positions in zip(outputs, lists, strict=True):
            losses = cohort.data.task.losses(rows, cohort.data.y[positions.to(cohort.device)]).double()
            means.append(torch.stack([batch.mean() for batch in torch.split(losses, size or len(losses))]).mean())
        return torch.stack(means)


@method("fedfomo")
@dataclass(kw_only=True)
class FedFomo(PersonalizedStrategy):
    """Keeps the networks of a round and chooses for each client which it is sent."""

    update = FedFomoUpdate
    common_options = ("variant",)
    client_update: FedFomoUpdate = field(default_factory=FedFomoUpdate)
    models: Annotated[int, Field(ge=1, description="networks of others that a client is sent, M")] = 4
    epsilon: Annotated[float, Field(ge=0, le=1, description="probability to draw one of them at random")] = 0.3
    epsilon_decay: Annotated[float, Field(ge=0, description="by which it falls in each round")] = 0.05

    def send(self, round: int, arrays: Tree, clients: list[int]) -> Records | Sequence[Records]:
        """Send each client that is to train the networks chosen for it; who is evaluated needs none."""
        if NETWORKS not in self.state or round <= int(self.state[LAST]["round"]):
            return {ARRAYS: arrays}
        chosen = [self.choose(round, client) for client in clients]
        width = max(len(numbers) for numbers in chosen)
        if not width:
            return {ARRAYS: arrays}
        needed = sorted({number for numbers in chosen for number in numbers})
        networks = self._networks(arrays).rows(needed)
        records = []
        for numbers in chosen:
            padding = [-1] * (width - len(numbers))
            rows = torch.tensor([needed.index(number) for number in numbers] + [0] * len(padding))
            picked = tree({name: value[rows.to(value.device)] for name, value in networks.items()})
            records.append(
                {ARRAYS: arrays, NETWORKS: picked, CHOSEN: tree({"client": torch.tensor(numbers + padding)})}
            )
        return records

    def choose(self, round: int, client: int) -> list[int]:
        """Clients whose networks a client is sent."""
        affinity, last = self._affinity()[client], self.state[LAST]["client"].tolist()
        if self.client_update.variant == "pfllib":
            count = min(self.models, len(last))
            return sorted(self.trainable_clients, key=lambda other: -float(affinity[other]))[:count]
        rng = generator(self.seed, "networks", client, round)
        at_random = [int(other) for other in rng.permutation([other for other in last if other != client])]
        by_affinity = sorted(at_random, key=lambda other: -float(affinity[other]))  # ties as they were drawn
        chosen: list[int] = []
        for draw in rng.random(min(self.models, len(at_random))).tolist():
            order = at_random if draw < self.epsilon - self.epsilon_decay * (round - 1) else by_affinity
            chosen.append(next(other for other in order if other not in chosen))
        return chosen

    def reply_schema(self, clients: list[int]) -> Schema:
        """The network, and weights where others were sent."""
        weights = {(WEIGHTS, "client"): Entry((-1,), "int64", True), (WEIGHTS, "weight"): Entry((-1,), "float64", True)}
        return {**schema_of(ARRAYS, entries(self.sent_arrays)), **weights}

    def fold(self) -> Collect:
        """Keep the replies apart."""
        return Collect()

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """Store the networks, and add the weights to the affinities."""
        matrix = self._affinity()
        if WEIGHTS in means:
            numbers, weights = means[WEIGHTS]["client"].cpu(), means[WEIGHTS]["weight"].cpu()
            for client, others, row in zip(clients, numbers, weights, strict=True):
                valid = (others >= 0) & (others < len(matrix))
                matrix[client, others[valid]] += row[valid]
        paper = self.client_update.variant == "paper"
        table = self._networks(arrays, fresh=paper)
        table.put(clients, entries(means[ARRAYS]))
        last = {"client": torch.tensor(clients), "round": torch.tensor(self.report.round)}
        self.state.update({NETWORKS: table.values, LAST: tree(last), AFFINITY: tree({"matrix": matrix})})
        if not paper:
            return arrays
        average = WeightedMean()
        average.add_stack({ARRAYS: means[ARRAYS]}, means[REPLIES]["weight"])
        return average.result()[ARRAYS]

    def _networks(self, arrays: Tree, *, fresh: bool = False) -> ClientTable:
        """The clients' networks, or none yet."""
        return ClientTable(lambda client: entries(arrays), None if fresh else self.state.get(NETWORKS))

    def _affinity(self) -> Tensor:
        """Copy of P, float64 on the CPU, with rows of the unit matrix for clients that it lacks."""
        matrix = torch.eye(1 + max(self.exchange.node_of), dtype=torch.float64)
        if AFFINITY in self.state:
            known = self.state[AFFINITY]["matrix"].cpu()
            matrix[: len(known), : len(known)] = known
        return matrix
