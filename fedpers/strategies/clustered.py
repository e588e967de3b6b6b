"""Clustered federated learning: clients whose networks are drawn the same way go on together.

C. Briggs, Z. Fan, P. Andras, Federated learning with hierarchical clustering of local updates to improve training on
non-IID data, IJCNN 2020, arXiv:2004.11791 (FL+HC). With n = ``common_rounds``

    rounds 1..n     theta   <- FedAvg over the sampled clients
    round n + 1     d_k     <- (E passes of SGD on f_k, from theta) - theta               all clients
                    C_1..   <- agglomerative clustering of the d_k, by a linkage of their distances
                    theta_c <- theta + mean of d_k over k in C_c
    later rounds    theta_c <- FedAvg over the sampled clients of C_c

    prediction: theta_c of the client's cluster, theta before there are clusters

Shared: the network; the server keeps one for each cluster. Personal: nothing. The d_k are all trained parameters in a
row; BatchNorm statistics are averaged, but not compared. Clusters are merged as long as they are nearer than
``threshold`` (T in the paper), or until ``clusters`` are left: how long updates are depends on network and rates, so
that there is no good threshold for all.

Read so, where the paper leaves it open: the training of round n + 1 is not thrown away, it is the first of the
clusters. Who trains in a later round does not depend on clusters, so that all methods see the same clients (in the
paper every cluster draws its own); a cluster of which nobody trains stays as it is. Of the cosine, a client that has
not moved is as far as if it were orthogonal.

A client that has no cluster (it never trains, or its reply in round n + 1 was lost) has theta as it was after round n.
Once it trains from that, it joins the cluster whose mean d_k is nearest, and that training is not averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from fedpers.cohort import Collect, Fold, GroupedMean, Records, Tree, WeightedMean, entries, tree
from fedpers.cohort.fold import GROUPS, REPLIES
from fedpers.cohort.tree import flat_rows
from fedpers.errors import check
from fedpers.records import ARRAYS
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, method

NETWORKS, CENTERS, MEMBERS = "networks", "centers", "members"
"""Roles of the server's state: networks and mean updates of clusters ``[c, ...]``; ``client``, ``cluster`` ``[n]``."""


@dataclass(kw_only=True)
class ClusteredUpdate(LocalUpdate):
    """Train the received network."""


@method("clustered")
@dataclass(kw_only=True)
class Clustered(PersonalizedStrategy):
    """Average over all clients at first, then within clusters of them.

    Which entries are parameters, it knows from the app that is attached.
    """

    update = ClusteredUpdate
    common_rounds: Annotated[int, Field(ge=0, description="rounds over all clients before they are clustered, n")] = 5
    clusters: Annotated[int, Field(ge=1, description="how many at most; without meaning where threshold is set")] = 3
    threshold: Annotated[
        float | None, Field(gt=0, description="distance up to which clusters are merged; null: strategy.clusters")
    ] = None
    metric: Annotated[Literal["l1", "l2", "cosine"], Field(description="distance of two clients' updates")] = "l2"
    linkage: Annotated[
        Literal["ward", "complete", "average", "single"], Field(description="distance of two clusters of clients")
    ] = "ward"

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = "l2 where strategy.linkage is ward"
        check(self.linkage != "ward" or self.metric == "l2", "strategy.metric", self.metric, allowed)

    def sample(self, round: int) -> list[int]:
        """All clients that may train where they are clustered."""
        return self.trainable_clients if round == self.common_rounds + 1 else super().sample(round)

    def send(self, round: int, arrays: Tree, clients: list[int]) -> Records | Sequence[Records]:
        """Send each client its cluster's network, or that of all."""
        if NETWORKS not in self.state:
            return {ARRAYS: arrays}
        cluster_of, networks = self._clusters(), entries(self.state[NETWORKS])
        sent: dict[int | None, Tree] = {None: arrays}
        for c in {cluster_of[client] for client in clients if client in cluster_of}:
            sent[c] = tree({name: networks[name][c] for name in entries(arrays)})
        return [{ARRAYS: sent[cluster_of.get(client)]} for client in clients]

    def fold(self) -> Fold:
        """Mean over all clients; all replies, where clients are clustered; then a mean for each cluster."""
        if NETWORKS in self.state:
            return GroupedMean(self._groups())
        return WeightedMean() if self.report.round <= self.common_rounds else Collect()

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """Take the mean, or cluster the clients, or take the means of the clusters."""
        if NETWORKS in self.state:
            self._continue(arrays, means)
        elif self.report.round <= self.common_rounds:
            return means[ARRAYS]
        else:
            self._cluster(arrays, means)
        self.report.extra["clusters"] = float(len(next(iter(entries(self.state[NETWORKS]).values()))))
        return arrays

    def _cluster(self, arrays: Tree, replies: Mapping[str, Tree]) -> None:
        """Cluster the clients by all their replies; the clusters' networks are their means."""
        clients: list[int] = replies[REPLIES]["client"].tolist()
        numbers = self.cluster(self._updates(arrays, replies[ARRAYS]))
        fold = GroupedMean(dict(zip(clients, numbers, strict=True)))
        fold.add_stack({ARRAYS: replies[ARRAYS]}, replies[REPLIES]["weight"], clients)
        networks = entries(fold.result()[ARRAYS])
        self.state[NETWORKS] = tree(networks)
        self.state[CENTERS] = tree({CENTERS: torch.from_numpy(self._updates(arrays, tree(networks)))})
        self._remember(dict(zip(clients, numbers, strict=True)))

    def cluster(self, updates: NDArray[np.float64]) -> list[int]:
        """Cluster of each of n updates ``[n, D]``, numbered in the order of their first clients."""
        from scipy.cluster.hierarchy import fcluster, linkage

        if len(updates) == 1:
            return [0]
        merges = linkage(self._distances(updates, updates)[np.triu_indices(len(updates), 1)], self.linkage)
        rule = ("maxclust", self.clusters) if self.threshold is None else ("distance", self.threshold)
        labels: list[int] = fcluster(merges, rule[1], rule[0]).tolist()
        number_of = {label: number for number, label in enumerate(dict.fromkeys(labels))}
        return [number_of[label] for label in labels]

    def _continue(self, arrays: Tree, means: Mapping[str, Tree]) -> None:
        """Put the clusters' means into their places; clients that had no cluster join the nearest."""
        networks = {name: value.clone() for name, value in entries(self.state[NETWORKS]).items()}
        numbers = means[GROUPS]["group"]
        inside = numbers < len(self.state[CENTERS][CENTERS])
        for name, value in entries(means[ARRAYS]).items():
            networks[name][numbers[inside]] = value[inside]
        self.state[NETWORKS] = tree(networks)
        if not bool(inside.all()):
            client_of = {group: client for client, group in self._groups().items()}
            new = tree({name: value[~inside] for name, value in entries(means[ARRAYS]).items()})
            distances = self._distances(self._updates(arrays, new), self.state[CENTERS][CENTERS].cpu().numpy())
            joined = [client_of[group] for group in numbers[~inside].tolist()]
            nearest: list[int] = distances.argmin(1).tolist()
            self._remember({**self._clusters(), **dict(zip(joined, nearest, strict=True))})

    def _clusters(self) -> dict[int, int]:
        """Cluster of each client that has one."""
        members = self.state[MEMBERS]
        return dict(zip(members["client"].tolist(), members["cluster"].tolist(), strict=True))

    def _groups(self) -> dict[int, int]:
        """Clusters, and for each client of this round that has none a number above theirs."""
        cluster_of = self._clusters()
        new = [client for client in self.training_clients if client not in cluster_of]
        return {**cluster_of, **{client: len(self.state[CENTERS][CENTERS]) + i for i, client in enumerate(new)}}

    def _remember(self, cluster_of: Mapping[int, int]) -> None:
        clients = sorted(cluster_of)
        numbers = [cluster_of[client] for client in clients]
        self.state[MEMBERS] = tree({"client": torch.tensor(clients), "cluster": torch.tensor(numbers)})

    def _updates(self, arrays: Tree, networks: Tree) -> NDArray[np.float64]:
        """By how much the parameters of networks ``[n, ...]`` differ from the server's, ``[n, D]``."""
        parameters = {name for name, _ in self.work.module.named_parameters()}
        changes = [flat_rows(value - arrays[name]) for name, value in entries(networks).items() if name in parameters]
        flat: NDArray[np.float64] = torch.cat(changes, 1).double().cpu().numpy()
        return flat

    def _distances(self, first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
        """Distances ``[n, m]`` of updates ``[n, D]`` and ``[m, D]``; the cosine of an update of 0 is 0."""
        from scipy.spatial.distance import cdist

        metric = {"l1": "cityblock", "l2": "euclidean", "cosine": "cosine"}[self.metric]
        distances: NDArray[np.float64] = np.nan_to_num(cdist(first, second, metric), nan=1.0)
        return distances
