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
from typing import Annotated, Any

from pydantic import Field

from fedpers.cohort import Cohort, Reply, proximal
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, method

MU_KEY = "proximal-mu"
"""Key in a message's configuration that takes the place of ``mu``: what Flower's own FedProx sends."""


@dataclass(kw_only=True)
class FedProxUpdate(LocalUpdate):
    """Train near the received network."""

    config_keys = (MU_KEY,)
    mu: Annotated[float, Field(ge=0, description="strength of the pull to the received network; 0 is fedavg")] = 0.1

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Minimize the loss plus ``mu/2 * ||w_k - w||^2``."""
        params = cohort.assemble(received["arrays"])
        mu = config.get(MU_KEY, self.mu)
        cohort.fit(params, self.loss, adjust=proximal(mu, params.clone()))
        return cohort.reply(params)


@method("fedprox")
@dataclass(kw_only=True)
class FedProx(PersonalizedStrategy):
    """FedAvg's server."""

    update = FedProxUpdate
