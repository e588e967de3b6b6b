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
from torch import Tensor

from fedpers.cohort import Collect, Fold, GroupedMean, Records, Tree, WeightedMean, entries, tree
from fedpers.cohort.fold import GROUPS, REPLIES
from fedpers.cohort.tree import flat_rows
from fedpers.errors import check
from fedpers.records import ARRAYS
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, method

NETWORKS, CENTERS, MEMBERS = "networks", "centers", "members"
"""Roles of the server's state: networks and mean updates of the clusters ``[c, ...]``; ``client``, ``cluster`` ``[n]``."""
