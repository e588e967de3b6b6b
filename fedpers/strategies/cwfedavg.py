"""cwFedAvg: an average for each class, of which every client is sent the mixture that its classes call for.

G. Lee, D. Choi, Class-Wise Federated Averaging for Efficient Personalization, ICCV 2025, arXiv:2406.07800; authors'
code: github.com/regulationLee/cwFedAvg, commit 4b8d634.

With classes j, q_k the shares of the classes among k's training samples, and those that the head of its network (weight
``[C, F]``, rows h_kj) stands for, which the server takes from what it receives:

    p_kj = ||h_kj|| / sum_i ||h_ki||
    w_k  <- SGD on  f_k(w_k) + lam/2 * ||p_k - q_k||           from the u_k that was sent
    W_j   = sum_k n_k p_kj w_k / sum_k n_k p_kj                over the clients of the round
    u_k   = sum_j p_kj W_j
    prediction: u_k

Shared: the parameters, of which the server keeps W_j, one network for each class, and p_k. Personal: the buffers, as in
the authors' code. A client sends and is sent one network. ``class_wise: head`` averages the body as FedAvg does.

The paper's clients all take part. Here a client that has not trained is sent the mean of the networks of a round, and
the p_k of one that did not take part stays as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from fedpers.client.requirements import body_and_head, check_classes
from fedpers.cohort import Batch, Cohort, Collect, Given, Network, Records, Reply, Tree, WeightedMean, entries, tree
from fedpers.cohort.fold import REPLIES
from fedpers.data.federated import FederatedData
from fedpers.records import ARRAYS
from fedpers.server.tools import ClientTable
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, method

WEIGHT = "head.weight"
SHARES = "shares"
"""What the loss is given, q_k ``[C]``; role of the server's state: p_k of each client."""
CLASSES = "classes"
"""Role of the server's state: W_j, tensors ``[C, ...]``."""


@dataclass(kw_only=True)
class CwFedAvgUpdate(LocalUpdate):
    """Train the received network so that the rows of its head are as long as their classes are frequent."""

    shared = "parameters"
    personal = "buffers"
    settles_parts = True
    lam: Annotated[float, Field(ge=0, description="weight of the distance between head and class shares")] = 10.0

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Refuse networks without a linear head and data without classes."""
        check_classes("cwfedavg", data)
        body_and_head("cwfedavg", model)
        return model, data

    def example_given(self, template: Tree, data: FederatedData) -> Given:
        """No class is there."""
        return {SHARES: template[WEIGHT].new_zeros(len(template[WEIGHT]))}

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train everything."""
        params = cohort.assemble(received[ARRAYS])
        counts = cohort.class_counts(params[WEIGHT].shape[1]).to(params[WEIGHT])
        cohort.fit(params, self.loss, given={SHARES: counts / counts.sum(1, keepdim=True)})
        return cohort.reply(params)

    def loss(self, network: Network, batch: Batch) -> Tensor:
        """Loss of the samples, and the distance of the shares that the head stands for from those of the classes."""
        away = class_shares(network.tensors[WEIGHT]) - cast(Tensor, batch.given[SHARES])
        distance: Tensor = torch.linalg.vector_norm(away)
        return batch.mean(batch.losses(network(batch.x))) + self.lam / 2 * distance


def class_shares(weight: Tensor) -> Tensor:
    """Shares p ``[..., C]`` of the classes that a head with `weight` ``[..., C, F]`` stands for."""
    lengths: Tensor = torch.linalg.vector_norm(weight, dim=-1)
    return lengths / lengths.sum(-1, keepdim=True)


@method("cwfedavg")
@dataclass(kw_only=True)
class CwFedAvg(PersonalizedStrategy):
    """Averages networks for each class, and mixes these averages for each client."""

    update = CwFedAvgUpdate
    class_wise: Annotated[
        Literal["all", "head"], Field(description="what is averaged for each class: the network, or its head alone")
    ] = "all"

    def send(self, round: int, arrays: Tree, clients: list[int]) -> Records | Sequence[Records]:
        """Send each client its u_k; before the first training, all the same."""
        if CLASSES not in self.state:
            return {ARRAYS: arrays}
        table = self._shares(arrays)
        mixed = {client: dict(entries(arrays)) for client in clients}
        for client, shares in zip(table.clients, table.rows(table.clients)[SHARES], strict=True):
            if client in mixed:
                for name, averages in entries(self.state[CLASSES]).items():
                    mixed[client][name] = torch.tensordot(shares.to(averages), averages, 1)
        return [{ARRAYS: tree(mixed[client])} for client in clients]

    def fold(self) -> Collect:
        """Keep the replies apart."""
        return Collect()

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """Average the networks of this round, and for each class those of the parts that are averaged so."""
        networks, counts = entries(means[ARRAYS]), means[REPLIES]["weight"]
        shares = class_shares(networks[WEIGHT].double())
        table = self._shares(arrays)
        table.put(clients, {SHARES: shares})
        weights = counts.to(shares)[:, None] * shares  # [n, C]
        weights = weights / weights.sum(0).clamp(min=torch.finfo(weights.dtype).tiny)  # no client may have a class
        self.state[SHARES] = table.values
        self.state[CLASSES] = tree(
            {
                name: torch.tensordot(weights.T.to(rows), rows, 1)
                for name, rows in networks.items()
                if self.class_wise == "all" or name.startswith("head.")
            }
        )
        average = WeightedMean()
        average.add_stack({ARRAYS: means[ARRAYS]}, counts)
        return average.result()[ARRAYS]

    def _shares(self, arrays: Tree) -> ClientTable:
        """The p_k ``[C]`` of all clients that have trained."""
        none = arrays[WEIGHT].new_zeros(len(arrays[WEIGHT]), dtype=torch.float64)
        return ClientTable(lambda client: {SHARES: none}, self.state.get(SHARES))
