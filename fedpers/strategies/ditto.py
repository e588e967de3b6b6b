"""Ditto: fair and robust personalization.

T. Li et al., Ditto: Fair and Robust Federated Learning Through Personalization,
ICML 2021, arXiv:2012.04221 (Algorithm 1).

    w_k <- w, then E passes of SGD on f_k                              the copy that is averaged
    v_k <- E_p passes of SGD on f_k(v_k) + mu/2 * ||v_k - w||^2        the network of the client
    w   <- mean_k w_k

Shared: the whole network w. Personal: a second whole network v_k, buffers included.

The paper averages uniformly (``weighting: uniform``); common implementations weight by samples. The two trainings do
not touch each other, so their order does not matter. A client's v_k starts from the w it first receives, and until
then it predicts with the w it is sent; ``variant: pfllib`` repeats a common implementation, in which v_k is the
initial network until the client trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from fedpers.cohort import Cohort, Reply, Tree, entries, proximal, tree
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, Weighting, method


@dataclass(kw_only=True)
class DittoUpdate(LocalUpdate):
    """Train the common network and, tied to it, a personal one."""

    personal = "all"
    mu: Annotated[float, Field(ge=0, description="strength of the tie, lambda in the paper; 0 is local training")] = 0.1
    personal_epochs: Annotated[
        int | None, Field(ge=0, description="passes for the personal network; null: training.epochs")
    ] = None
    variant: Annotated[
        Literal["paper", "pfllib"],
        Field(description="pfllib: the personal network is the initial one until the client trains"),
    ] = "paper"

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train both networks from the same received one."""
        anchor = cohort.common(received["arrays"])
        common = anchor.clone()
        cohort.fit(common, self.loss)
        personal = self._personal(cohort, received)
        tied = anchor.select(*cohort.names(self.shared))
        cohort.fit(personal, self.loss, epochs=self.personal_epochs, adjust=proximal(self.mu, tied))
        return cohort.reply(common, state={"model": personal.select(*cohort.names(self.personal))})

    def personalize(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Tree:
        """The personal network v_k."""
        return self._personal(cohort, received)

    def _personal(self, cohort: Cohort, received: Received) -> Tree:
        """v_k as the client holds it before a training; parts that are not personal are those of w."""
        if self.variant == "paper":
            return cohort.assemble(received["arrays"])
        return tree({**entries(cohort.common(received["arrays"])), **entries(cohort.state["model"])}, cohort.size)


@method("ditto")
@dataclass(kw_only=True)
class Ditto(PersonalizedStrategy):
    """Uniform average of the common networks."""

    update = DittoUpdate
    weighting: Weighting = "uniform"
