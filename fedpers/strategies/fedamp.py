"""FedAMP: each client is drawn to a mixture of all clients' networks, of which similar ones count more.

Y. Huang et al., Personalized Cross-Silo Federated Learning on Non-IID Data, AAAI 2021, arXiv:2007.03797.

The attention-inducing function is A(x) = 1 - exp(-x / sigma), so A'(x) = exp(-x / sigma) / sigma, and on the server

    xi_kj = alpha * A'(||w_k - w_j||^2) for j != k,     xi_kk = 1 - sum_j xi_kj
    u_k   = sum_j xi_kj * w_j                            one step of size alpha down the sum of all A

    w_k <- SGD on f_k(w_k) + mu/2 * ||w_k - u_k||^2      from the w_k before; mu is the paper's lambda / alpha
    prediction: w_k

Shared: the parameters, which the server keeps of each client (:class:`~fedpers.server.tools.ClientTable`) and of which
it sends each client its own mixture. Personal: the whole network w_k, buffers included. HeurFedAMP, the paper's variant
by cosines, is not included.

The paper's clients all take part from the start. Here the mixtures are over the clients that have trained; the server's
arrays are the mean of their networks, and the w_k of a client that is not among them, which starts from its u_k and
predicts with it. ``alpha: null`` is sigma over the number of networks: where they agree the mixture is their mean, and
no weight is negative.

``variant: pfllib`` repeats a common implementation: the term that draws w_k to u_k has no gradient, so that clients
train alone; mixtures are over the clients of the last round; the w_k of a client that has not trained is the initial
network, which it predicts with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedpers.cohort import Cohort, Collect, Records, Reply, Tree, entries, proximal, tree
from fedpers.cohort.tree import expand_rows, flat_rows
from fedpers.records import ARRAYS
from fedpers.server.tools import ClientTable
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, method

NETWORKS, LAST = "networks", "last"
"""Roles of the server's state: the clients' networks, and whose came in the last round."""


@dataclass(kw_only=True)
class FedAMPUpdate(LocalUpdate):
    """Train the client's network near its mixture."""

    shared = "parameters"
    personal = "all"
    settles_parts = True
    mu: Annotated[
        float, Field(ge=0, description="strength of the attraction, lambda / alpha in the paper; 0 is local training")
    ] = 0.1
    variant: Annotated[Literal["paper", "pfllib"], Field(description="see the module")] = "paper"

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Minimize the loss plus ``mu/2 * ||w_k - u_k||^2``."""
        params = self.personalize(cohort, received, config)
        pull = [proximal(self.mu, cohort.per_client(received[ARRAYS]))] if self.variant == "paper" else []
        cohort.fit(params, self.loss, adjust=pull)
        return cohort.reply(params)

    def personalize(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Tree:
        """The client's network w_k."""
        return cohort.state["model"] if self.variant == "pfllib" else cohort.assemble(received[ARRAYS])


@method("fedamp")
@dataclass(kw_only=True)
class FedAMP(PersonalizedStrategy):
    """Keeps the clients' networks and mixes them anew for each client."""

    update = FedAMPUpdate
    common_options = ("variant",)
    client_update: FedAMPUpdate = field(default_factory=FedAMPUpdate)
    weighting: Annotated[
        Literal["samples", "uniform"], Field(description="counts for nothing: networks are weighted by attention")
    ] = "samples"
    alpha: Annotated[
        float | None, Field(gt=0, description="step towards similar networks; null: sigma over their number")
    ] = None
    sigma: Annotated[float, Field(gt=0, description="squared distance at which the attention has fallen to 1/e")] = 10.0

    def send(self, round: int, arrays: Tree, clients: list[int]) -> Records | Sequence[Records]:
        """Send each client its mixture; before the first training, all the same."""
        if NETWORKS not in self.state:
            return {ARRAYS: arrays}
        table = self._table(arrays)
        peers = self.state[LAST]["client"].tolist() if self.client_update.variant == "pfllib" else table.clients
        others, networks = table.rows(peers), table.rows(clients)  # a client without one gets a row of this table only
        weights = self.attention(networks, others, torch.tensor(clients)[:, None] == torch.tensor(peers))
        self_weights = 1 - weights.sum(1)
        mixtures = {
            name: expand_rows(self_weights, value) * value + torch.tensordot(weights, others[name], 1)
            for name, value in networks.items()
        }
        return [{ARRAYS: tree({name: value[k] for name, value in mixtures.items()})} for k in range(len(clients))]

    def attention(self, networks: Mapping[str, Tensor], others: Mapping[str, Tensor], same: Tensor) -> Tensor:
        """Weights xi ``[n, m]`` of m networks for n clients, 0 where `same` ``[n, m]`` says that it is the client's."""
        flat, flat_others = (torch.cat([flat_rows(v) for v in rows.values()], 1) for rows in (networks, others))
        squares = torch.cdist(flat, flat_others, compute_mode="donot_use_mm_for_euclid_dist").square()
        alpha = self.sigma / same.shape[1] if self.alpha is None else self.alpha
        return (alpha / self.sigma * torch.exp(-squares / self.sigma)).masked_fill(same.to(squares.device), 0)

    def fold(self) -> Collect:
        """Keep the replies apart."""
        return Collect()

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """Store the networks of this round."""
        table = self._table(arrays)
        table.put(clients, entries(means[ARRAYS]))
        self.state.update({NETWORKS: table.values, LAST: tree({"client": torch.tensor(clients)})})
        return arrays if self.client_update.variant == "pfllib" else tree(table.mean())

    def _table(self, arrays: Tree) -> ClientTable:
        """The stored networks and, for other clients, the server's arrays."""
        return ClientTable(lambda client: entries(arrays), self.state.get(NETWORKS))
