"""IFCA: several networks, of which every client trains and uses the one that fits its samples best.

A. Ghosh, J. Chung, D. Yin, K. Ramchandran, An Efficient Framework for Clustered Federated Learning, NeurIPS 2020,
arXiv:2006.04088 (Algorithm 1). With k networks theta_j and the empirical loss F_i of client i, a round is

    j_i      <- arg min_j F_i(theta_j)                       over all training samples; of equal ones the first
    theta~_i <- E passes of SGD on F_i, from theta_{j_i}
    theta_j  <- mean of theta~_i over the clients with j_i = j                                  (``averaging: models``)
    theta_j  <- theta_j + 1/m * sum of (theta~_i - theta_j) over the same, m clients in all  (``averaging: gradients``)

    prediction: theta_{j_i}, chosen by the training samples

With one plain step of all samples, ``gradients`` is the paper's step ``theta_j - lr/m * sum_i grad F_i(theta_j)``; with
more it averages changes. A network that nobody chose stays as it is.

Shared: the k networks, BatchNorm statistics averaged with them; a client is sent all, and answers with one and its
number. Personal: nothing; it chooses anew each time, also one that never trains.

Networks start from values of their own: the first from those it comes with, the others drawn anew. The paper's random
restarts are runs with other seeds; its layers that all clusters have in common are not included. ``weighting: uniform``
is the paper's, whose clients have equally many samples. The authors' code lets clients choose by their test samples,
labels included, when it measures the accuracy on these; here nothing is chosen by what is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from fedpers.cohort import (
    Cohort,
    GroupedMean,
    Records,
    Reply,
    Tree,
    View,
    WeightedMean,
    entries,
    model_tree,
    select,
    tree,
)
from fedpers.cohort.fold import GROUPS
from fedpers.cohort.modules import copy_network
from fedpers.data.federated import FederatedData, Part
from fedpers.errors import check
from fedpers.models.initial import fresh
from fedpers.records import ARRAYS
from fedpers.server.collect import Entry, Schema, schema_of
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, Weighting, method

CLUSTERS, CHOICE = "clusters", "choice"
"""Records of all networks ``[k, ...]``, as they are sent, and of the number of the one that comes back."""


@dataclass(kw_only=True)
class IFCAUpdate(LocalUpdate):
    """Choose the network of the lowest loss and train it."""

    clusters: Annotated[int, Field(ge=1, description="networks, k in the paper")] = 2

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Draw the other networks.

        Raises
        ------
        ConfigError
            If data are ratings, or a layer cannot be drawn anew.
        """
        allowed = f"another method for {data.name}, whose losses depend on drawn negatives"
        check(not data.num_items, "strategy", "ifca", allowed)
        network = copy_network(model)
        cast(Any, network).others = [model_tree(fresh(model, seed, j)) for j in range(1, self.clusters)]
        return network, data

    def initial_arrays(self, template: Tree, module: nn.Module) -> Tree:
        """The shared entries of all networks, ``[k, ...]``."""
        networks = [template, *cast(Any, module).others]
        names = select(module, self.shared)
        return tree({n: torch.stack([network[n].to(template[n].device) for network in networks]) for n in names})

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train the chosen network; the reply says which it is."""
        chosen = self.choose(cohort, received[CLUSTERS])
        params = cohort.assemble(self._networks(cohort, received, chosen))
        cohort.fit(params, self.loss)
        return cohort.reply(params, **{CHOICE: tree({CHOICE: chosen}, cohort.size)})

    def personalize(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> View:
        """The chosen network."""
        return cohort.view(self._networks(cohort, received, self.choose(cohort, received[CLUSTERS])))

    def choose(self, cohort: Cohort, clusters: Tree) -> Tensor:
        """Number of the network of the lowest mean training loss, int64 ``[K]``."""
        return self.losses(cohort, clusters, "train").argmin(1)

    def losses(self, cohort: Cohort, clusters: Tree, part: Part) -> Tensor:
        """Mean loss of each client under each network ``[K, k]``, in float64; infinite where it is not a number."""
        columns = []
        for j in range(self.clusters):
            rows = (slice(None), j) if clusters.batch_size else j
            network = tree({n: v[rows] for n, v in entries(clusters).items()}, *clusters.batch_size)
            outputs = cohort.logits(cohort.view(network), part, self.predict)
            pairs = zip(outputs, cohort.labels(part), strict=True)
            columns.append(torch.stack([cohort.data.task.losses(scores, y).double().mean() for scores, y in pairs]))
        return torch.stack(columns, 1).nan_to_num(nan=torch.inf, posinf=torch.inf)

    def _networks(self, cohort: Cohort, received: Received, chosen: Tensor) -> Tree:
        """The chosen networks ``[K]``, or what clients that never trained have made of them."""
        if ARRAYS in received:
            return received[ARRAYS]
        clusters = received[CLUSTERS]
        rows = (torch.arange(cohort.size, device=chosen.device), chosen) if clusters.batch_size else chosen
        return tree({n: v.to(cohort.device)[rows] for n, v in entries(clusters).items()}, cohort.size)


@method("ifca")
@dataclass(kw_only=True)
class IFCA(PersonalizedStrategy):
    """Average of each network over the clients that chose it."""

    update = IFCAUpdate
    common_options = ("clusters",)
    client_update: IFCAUpdate = field(default_factory=IFCAUpdate)
    weighting: Weighting = "uniform"
    averaging: Annotated[
        Literal["models", "gradients"], Field(description="gradients: over all clients, not over those of a network")
    ] = "models"

    def send(self, round: int, arrays: Tree, clients: list[int]) -> Records:
        """Send all networks to everybody."""
        return {CLUSTERS: arrays}

    def reply_schema(self, clients: list[int]) -> Schema:
        """One network and its number."""
        network = {name: value[0] for name, value in entries(self.sent_arrays).items()}
        return {**schema_of(ARRAYS, network), (CHOICE, CHOICE): Entry((), "int64")}

    def fold(self) -> ClusterMean:
        """Mean of each network over the clients that trained it."""
        return ClusterMean(self.client_update.clusters)

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """Replace the networks that were trained, or move them by the share of their clients."""
        groups = means[GROUPS]
        numbers, weights, members = (groups[name].tolist() for name in ("group", "weight", "members"))
        for j in range(self.client_update.clusters):
            self.report.extra[f"clients_of_cluster_{j}"] = float(dict(zip(numbers, members, strict=True)).get(j, 0))
        new = {name: value.clone() for name, value in entries(arrays).items()}
        for name, trained in entries(means[ARRAYS]).items():
            for j, mean, weight in zip(numbers, trained, weights, strict=True):
                share = weight / sum(weights) if self.averaging == "gradients" and mean.is_floating_point() else 1.0
                new[name][j] = mean if share == 1 else torch.lerp(new[name][j], mean, share)
        return tree(new)


class ClusterMean(GroupedMean):
    """A weighted mean for each network; replies say to which they belong.

    Parameters
    ----------
    clusters : int
        Networks there are.
    """

    def __init__(self, clusters: int) -> None:
        super().__init__({})
        self.clusters = clusters
        self.members: dict[int, int] = {}

    def add(self, records: Records, weight: float, client: int) -> None:
        """Take in one client's network; ValueError if it is none of those there are."""
        j = int(records[CHOICE][CHOICE])
        if not 0 <= j < self.clusters:
            raise ValueError(f"network {j} is none of 0 to {self.clusters - 1}")
        self.means.setdefault(j, WeightedMean()).add({ARRAYS: records[ARRAYS]}, weight)
        self.members[j] = self.members.get(j, 0) + 1

    def merge(self, other: Self) -> None:
        """Merge network by network."""
        super().merge(other)
        for j, count in other.members.items():
            self.members[j] = self.members.get(j, 0) + count

    def result(self) -> dict[str, Tree]:
        """As inherited; ``groups`` also holds their weights ``weight`` ``[n]`` and clients ``members`` ``[n]``."""
        means = super().result()
        if not means:
            return {}
        weights = [next(iter(self.means[j].weights[ARRAYS].values())) for j in sorted(self.means)]
        members = torch.tensor([self.members[j] for j in sorted(self.means)])
        return {**means, GROUPS: tree({**entries(means[GROUPS]), "weight": torch.tensor(weights), "members": members})}
