"""LG-FedAvg: private representations under a shared head.

P. P. Liang et al., Think Locally, Act Globally: Federated Learning with Local and Global Representations,
arXiv:2001.01523.

    (b_k, h_k) <- (b_k, h), then E passes of SGD on f_k over body and head together
    h          <- sum_k n_k / n * h_k

Shared: the head. Personal: the body, its BatchNorm statistics with it. So clients may have different bodies with
features of one width.

The paper lets several last layers be shared and local representations have auxiliary losses; here the shared part is
whatever the network calls ``head``, and there is the task's loss alone. For new clients the paper averages the
predictions of all clients' networks; here they have the initial body under the shared head until they train.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, method


@dataclass(kw_only=True)
class LGFedAvgUpdate(LocalUpdate):
    """Train body and head together; the body stays."""

    shared = "head"
    personal = "body"
    mixes_networks = True


@method("lg_fedavg")
@dataclass(kw_only=True)
class LGFedAvg(PersonalizedStrategy):
    """Average of the heads by number of training samples."""

    update = LGFedAvgUpdate
