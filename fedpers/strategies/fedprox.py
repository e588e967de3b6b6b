"""FedProx: a pull towards the received network.

T. Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020, arXiv:1812.06127.

    w_k <- w, then SGD on f_k(w_k) + mu/2 * ||w_k - w||^2
    w   <- sum_k n_k / n * w_k

Shared: the whole network, buffers averaged. Personal: nothing.

The paper samples clients in proportion to n_k and averages them uniformly; here, as in common implementations, clients
are sampled uniformly and averaged by n_k, so that all methods see the same clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedpers.cohort import Cohort, Reply, proximal
from fedpers.errors import check
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received


@dataclass(kw_only=True)
class FedProxUpdate(LocalUpdate):
    """Train near the received network.

    Parameters
    ----------
    mu : float
        Strength of the pull, >= 0; 0 is FedAvg.
    """

    mu: float = 0.1

    def __post_init__(self) -> None:
        check(self.mu >= 0, "strategy.mu", self.mu, "a number >= 0")

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Minimize the loss plus ``mu/2 * ||w_k - w||^2``."""
        params = cohort.assemble(received["arrays"])
        cohort.fit(params, self.loss, adjust=proximal(self.mu, params.clone()))
        return cohort.reply(params)


@dataclass(kw_only=True)
class FedProx(PersonalizedStrategy):
    """FedAvg's server."""

    update = FedProxUpdate
