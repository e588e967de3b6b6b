"""FedCAC: clients share uncritical parameters with all others, and critical ones with those that have the same.

X. Wu et al., Bold but Cautious: Unlocking the Potential of Personalized Federated Learning through Cautiously
Aggressive Collaboration, ICCV 2023, arXiv:2309.11103.

For each tensor of parameters, with masks M_k of the share tau of its entries to which the client's loss is most
sensitive, and round t:

    v_k <- u_k, then SGD on f_k
    M_k  = 1 where |(v_k - u_k) * v_k| is among the largest                     entries that did not move have none
    w   <- sum_k n_k / n * v_k
    O_kl = 1 - |M_k - M_l|_1 / (2 |M_k|_1)                                      over all tensors
    c_k <- mean of v_k and all v_l with  O_kl >= mean O + t / beta * (max O - mean O),        l != k
    u_k  = M_k * c_k + (1 - M_k) * w
    prediction: u_k

Shared: parameters, and masks of the critical ones. The server keeps M_k and c_k of each client
(:class:`~fedpers.server.tools.ClientTable`) and sends it u_k; in the authors' code clients put c_k and w together
themselves. Personal: the buffers, as in the authors' code. After round beta nobody collaborates on critical parameters.

The paper's clients all take part. Here O is that of the clients of a round, the others keep their M_k and c_k, and a
client that has none is sent w. ``variant: pfllib`` repeats a common implementation, in which after the first round c_k
is the initial network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedpers.cohort import Cohort, Collect, Records, Reply, Tree, WeightedMean, entries, tree
from fedpers.cohort.fold import REPLIES
from fedpers.cohort.tree import flat_rows
from fedpers.records import ARRAYS
from fedpers.server.collect import Schema, schema_of
from fedpers.server.tools import ClientTable
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, method

CRITICAL, CUSTOMIZED = "critical", "customized"
"""Record of the masks M_k; roles of the server's state: M_k and c_k of each client."""


@dataclass(kw_only=True)
class FedCACUpdate(LocalUpdate):
    """Train the received network, and say which entries were critical."""

    shared = "parameters"
    personal = "buffers"
    settles_parts = True
    tau: Annotated[
        float, Field(gt=0, le=1, description="share of the entries of each tensor of parameters that are critical")
    ] = 0.5

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train, then find the critical entries."""
        params = cohort.assemble(received[ARRAYS])
        before = params.clone()
        cohort.fit(params, self.loss)
        masks = {n: critical(params[n] - before[n], params[n], self.tau) for n in cohort.names(self.shared)}
        return cohort.reply(params, critical=tree(masks, cohort.size))


def critical(change: Tensor, value: Tensor, tau: float) -> Tensor:
    """Mask ``[K, ...]``, bool, of the share `tau` of each client's entries ``[K, ...]`` that are most sensitive."""
    sensitivity = flat_rows((change * value).abs())
    count = int(tau * sensitivity.shape[1])
    if not count:
        return torch.zeros_like(value, dtype=torch.bool)
    least = sensitivity.topk(count, 1).values[:, -1:]
    return ((sensitivity >= least) & (sensitivity > 0)).reshape(value.shape)


def collaborators(masks: Mapping[str, Tensor], strictness: float) -> Tensor:
    """Whose critical entries each client averages, ``[n, n]``, float64 of 0 and 1: its own and those of similar masks.

    Parameters
    ----------
    masks : mapping of name to Tensor ``[n, ...]``
    strictness : float
        Where between mean and largest overlap it takes to be similar, t / beta; above 1 nobody is. A mask without an
        entry is similar to none, and does not count in mean and largest overlap.
    """
    flat = torch.cat([flat_rows(mask) for mask in masks.values()], 1).double()
    counts = flat.sum(1)
    differing = counts[:, None] + counts - 2 * flat @ flat.T
    overlap = 1 - differing / (2 * counts.clamp(min=1)[:, None])
    same = torch.eye(len(flat), dtype=flat.dtype, device=flat.device)
    critical = counts > 0
    both = critical[:, None] & critical & (same == 0)
    others = overlap[both]
    if not len(others) or strictness > 1:
        return same
    threshold = torch.lerp(others.mean(), others.max(), strictness)
    # overlaps that are all equal reach their mean, which rounding may put above them
    return ((both & (overlap >= threshold - 1e-9)) | (same == 1)).to(same)


@method("fedcac")
@dataclass(kw_only=True)
class FedCAC(PersonalizedStrategy):
    """Averages the networks, and their critical parts among clients that agree on them."""

    update = FedCACUpdate
    client_update: FedCACUpdate = field(default_factory=FedCACUpdate)
    beta: Annotated[int, Field(ge=1, description="round after which nobody collaborates on critical parameters")] = 170
    variant: Annotated[Literal["paper", "pfllib"], Field(description="see the module")] = "paper"

    def send(self, round: int, arrays: Tree, clients: list[int]) -> Records | Sequence[Records]:
        """Send each client its u_k; before the first training, all the same."""
        if CUSTOMIZED not in self.state:
            return {ARRAYS: arrays}
        masks, customized = (self._table(role, arrays).rows(clients) for role in (CRITICAL, CUSTOMIZED))
        mixed = {name: torch.where(mask, customized[name], arrays[name]) for name, mask in masks.items()}
        return [{ARRAYS: tree({name: value[k] for name, value in mixed.items()})} for k in range(len(clients))]

    def reply_schema(self, clients: list[int]) -> Schema:
        """Parameters and their masks."""
        arrays = entries(self.sent_arrays)
        masks = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in arrays.items()}
        return {**schema_of(ARRAYS, arrays), **schema_of(CRITICAL, masks)}

    def _table(self, role: str, arrays: Tree) -> ClientTable:
        """Masks or customized networks; other clients have no critical entries."""
        dtype = torch.bool if role == CRITICAL else None
        first = {name: torch.zeros_like(value, dtype=dtype) for name, value in entries(arrays).items()}
        return ClientTable(lambda client: first, self.state.get(role))

    def fold(self) -> Collect:
        """Keep the replies apart."""
        return Collect()

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """Average all networks, and for each client those of its collaborators."""
        networks, masks = entries(means[ARRAYS]), entries(means[CRITICAL])
        chosen = collaborators(masks, self.report.round / self.beta)
        weights = chosen / chosen.sum(1, keepdim=True)
        customized = {name: torch.tensordot(weights.to(networks[name]), networks[name], 1) for name in masks}
        if self.variant == "pfllib" and self.report.round == 1:
            customized = {name: arrays[name].expand_as(value) for name, value in customized.items()}
        for role, rows in ((CRITICAL, masks), (CUSTOMIZED, customized)):
            table = self._table(role, arrays)
            table.put(clients, rows)
            self.state[role] = table.values
        average = WeightedMean()
        average.add_stack({ARRAYS: means[ARRAYS]}, means[REPLIES]["weight"])
        return average.result()[ARRAYS]
