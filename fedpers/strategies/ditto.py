"""Ditto: fair and robust personalization.

T. Li et al., Ditto: Fair and Robust Federated Learning Through Personalization,
ICML 2021, arXiv:2012.04221 (Algorithm 1).

    w_k <- w, then E passes of SGD on f_k                              the copy that is averaged
    v_k <- E_p passes of SGD on f_k(v_k) + mu/2 * ||v_k - w||^2        the network of the client
    w   <- mean_k w_k

Shared: the whole network w. Personal: a second whole network v_k, buffers included.

The paper averages uniformly (``weighting: uniform``); common implementations weight by samples. The two trainings do
not touch each other, so their order does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedpers.cohort import Cohort, Reply, proximal
from fedpers.errors import check
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received


@dataclass(kw_only=True)
class DittoUpdate(LocalUpdate):
    """Train the common network and, tied to it, an own one.

    Parameters
    ----------
    mu : float
        Strength of the tie (lambda in the paper), >= 0; 0 is local training.
    personal_epochs : int, optional
        Passes for the own network, >= 0; default ``training.epochs``.
    """

    personal = "all"
    mu: float = 0.1
    personal_epochs: int | None = None

    def __post_init__(self) -> None:
        check(self.mu >= 0, "strategy.mu", self.mu, "a number >= 0")
        epochs = self.personal_epochs
        check(epochs is None or epochs >= 0, "strategy.personal_epochs", epochs, "a whole number >= 0, or null")

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train both networks from the same received one."""
        anchor = cohort.spread(received["arrays"])
        common = anchor.clone()
        cohort.fit(common, self.loss)
        own = cohort.state["model"]
        cohort.fit(own, self.loss, epochs=self.personal_epochs, adjust=proximal(self.mu, anchor))
        return cohort.reply(common, state={"model": own})


@dataclass(kw_only=True)
class Ditto(PersonalizedStrategy):
    """Uniform average of the common networks."""

    update = DittoUpdate
    weighting: str = "uniform"
