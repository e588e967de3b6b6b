"""FedAvg: the average of whole networks.

B. McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data,
AISTATS 2017, arXiv:1602.05629.

    w_k <- w, then E passes of SGD on f_k
    w   <- sum_k n_k / n * w_k             over the sampled clients

Shared: the whole network, BatchNorm statistics included (averaged with the same weights). Personal: nothing.

Common implementations average parameters only and leave BatchNorm statistics at their initial values on the server.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, method


@dataclass(kw_only=True)
class FedAvgUpdate(LocalUpdate):
    """Train what was received; all of it is shared."""


@method("fedavg")
@dataclass(kw_only=True)
class FedAvg(PersonalizedStrategy):
    """Average of whole networks by number of training samples."""

    update = FedAvgUpdate
