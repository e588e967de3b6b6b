"""FedNCF: neural collaborative filtering in which a user's vectors stay with the user.

V. Perifanis, P. S. Efraimidis, Federated Neural Collaborative Filtering, Knowledge-Based Systems 2022,
arXiv:2106.04405.

The network is NeuMF (X. He et al., Neural Collaborative Filtering, WWW 2017). User k has vectors p_k, p'_k; item j has
q_j, q'_j (a row of each of two tables); h is a linear layer, T a tower of linear layers with ReLU:

    score(k, j) = sigmoid(h([p_k * q_j, T([p'_k, q'_j])]))                  elementwise product; [.] concatenation
    all         <- E passes on the binary cross-entropy of the user's positives and drawn negatives, jointly
    T, h        <- sum_k n_k / n * (T_k, h_k)
    q_j, q'_j   <- mean over the users that updated item j of theirs        not weighted; as it was if there is none

The last two lines are the paper's MF-FedAvg. A user updated the items of its samples in the round, liked or drawn, and
says which they are; what weight decay does to its other rows is dropped.

Shared: the item tables, tower and last layer. Personal: the user's vectors. They start equal for all users.

With D = ``model.dim``, p and q have length D, p' and q' 2D, and the tower's widths are 4D, 2D, D, D/2. The paper's
settings as far as they were at hand (from summaries): D = 12, so 48, 24, 12, 6, Xavier initialization, Adam with rate
0.001, 2 local passes, 4 negatives. All parts are trained from the start: neither is pretrained alone. Nothing is
encrypted, where the paper adds secure aggregation, which hides from the server also who updated an item.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fedpers.cohort import Cohort, Fold, Records, Reply, Tree, WeightedMean, entries, tree
from fedpers.data.federated import FederatedData
from fedpers.models.factorization import ItemTable, require_factorization
from fedpers.models.initial import drawing
from fedpers.records import ARRAYS
from fedpers.server.collect import Entry, Schema, schema_of
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, method

TABLES = ("items.product.weight", "items.tower.weight")
UPDATED = "updated"
"""Record that says which items a client updated, ``items`` ``[m]``: 1 or 0."""


class NeuMF(nn.Module):
    """Generalized matrix factorization and a tower of layers under one last layer, seen from one user.

    Parameters
    ----------
    num_items : int
        Number of items m, >= 1.
    dim : int
        D.
    """

    def __init__(self, num_items: int, dim: int) -> None:
        super().__init__()
        widths = (4 * dim, 2 * dim, dim, max(1, dim // 2))
        self.items = nn.ModuleDict({"product": ItemTable(num_items, dim), "tower": ItemTable(num_items, 2 * dim)})
        self.user = nn.ModuleDict({"product": ItemTable(1, dim), "tower": ItemTable(1, 2 * dim)})
        layers = [(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)]
        self.tower = nn.Sequential(*(layer for pair in layers for layer in pair))
        self.head = nn.Linear(dim + widths[-1], 1)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (logits) ``[B, 1]`` of items `x`, int64 ids ``[B]`` from 0 to m - 1."""
        user = torch.zeros_like(x)  # the only row
        product = self.user["product"](user) * self.items["product"](x)
        pair = torch.cat([self.user["tower"](user), self.items["tower"](x)], dim=1)
        scores: Tensor = self.head(torch.cat([product, self.tower(pair)], dim=1))
        return scores


@dataclass(kw_only=True)
class FedNCFUpdate(LocalUpdate):
    """Train the whole network; the user's vectors stay."""

    shared = ("all", "-user")
    personal = "user"
    settles_parts = True

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Replace the factorization by NeuMF with vectors of its length.

        Raises
        ------
        ConfigError
            If the network is no factorization, or the data are no ratings.
        """
        network, data = require_factorization(model, data)
        table = network.body.get_parameter("weight")
        with drawing(seed, "fedncf"):
            return NeuMF(*table.shape).to(table), data

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train, and say which items were updated."""
        params = cohort.assemble(received[ARRAYS])
        cohort.fit(params, self.loss)
        updated = torch.zeros(cohort.size, cohort.data.num_items, dtype=torch.uint8, device=cohort.device)
        for k, client in enumerate(cohort.clients):
            updated[k, cohort.data.x[torch.from_numpy(cohort.samples(client)).to(cohort.device)]] = 1
        return cohort.reply(params, **{UPDATED: tree({"items": updated}, cohort.size)})


@method("fedncf")
@dataclass(kw_only=True)
class FedNCF(PersonalizedStrategy):
    """Average of tower and last layer by number of training samples, of an item's vectors over those who updated it."""

    update = FedNCFUpdate

    def reply_schema(self, clients: list[int]) -> Schema:
        """The shared entries, and a number for each item."""
        arrays = entries(self.sent_arrays)
        return {**schema_of(ARRAYS, arrays), (UPDATED, "items"): Entry((len(arrays[TABLES[0]]),), "uint8")}

    def fold(self) -> Fold:
        """Sums of what clients sent, and of how many updated an item."""
        return ItemMean()

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """Divide the tables by the share of clients that updated an item; where there are none it stays as it was."""
        new, share = entries(means[ARRAYS]), means[UPDATED]["items"].unsqueeze(1)
        tables = {name: torch.where(share > 0, new[name] / share, arrays[name]) for name in TABLES}
        return tree({**new, **tables})


class ItemMean(WeightedMean):
    """Weighted mean of tower and last layer; plain ones of who updated an item, and of tables with 0 elsewhere."""

    def add(self, records: Records, weight: float, client: int = -1) -> None:
        """Take in the records of one client; any number but 0 says that it updated an item."""
        network, updated = entries(records[ARRAYS]), records[UPDATED]["items"] > 0
        tables = {name: torch.where(updated.unsqueeze(1), network.pop(name), 0.0) for name in TABLES}
        super().add({ARRAYS: tree(network)}, weight)
        counted = updated.to(tables[TABLES[0]].dtype)
        super().add({ARRAYS: tree(tables), UPDATED: tree({"items": counted})}, 1.0)

    def add_stack(self, records: Records, weights: Tensor, clients: Sequence[int] = ()) -> None:
        """Take in the records of K clients, one by one."""
        for k, weight in enumerate(weights.tolist()):
            self.add({record: values[k] for record, values in records.items()}, weight)
