"""FedRep: a shared representation under private heads.

L. Collins et al., Exploiting Shared Representations for Personalized Federated Learning,
ICML 2021, arXiv:2102.07078.

    h_k <- E_head passes of SGD on f_k(b, .)        the body fixed
    b_k <- E_body passes of SGD on f_k(., h_k)      the head fixed
    b   <- mean_k b_k

Shared: the body, its BatchNorm statistics averaged with it. Personal: the head. "Fixed" means parameters: BatchNorm
statistics of the body follow the data in both phases, as in any forward pass in training mode.

The paper averages bodies uniformly (``weighting: uniform``); common implementations weight by samples
(``weighting: samples``). As in the paper many head passes come before one body pass (E_head = 10, E_body = 1), which
takes more gradients in a round than methods that pass once: ``training.budget`` makes them comparable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from fedpers.cohort import Cohort, Reply
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, Weighting, check_passes, method


@dataclass(kw_only=True)
class FedRepUpdate(LocalUpdate):
    """First the head, then the body."""

    shared = "body"
    personal = "head"
    head_epochs: Annotated[int | None, Field(ge=0, description="passes on the head; null: those of training")] = 10
    body_epochs: Annotated[int | None, Field(ge=0, description="passes on the body; null: those of training")] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_passes(self, "head_epochs", "body_epochs")

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train the head on the received body, then the body under that head."""
        params = cohort.assemble(received["arrays"])
        for part, epochs in ((self.personal, self.head_epochs), (self.shared, self.body_epochs)):
            if cohort.trainable(part):  # strategy.personal_layers may leave one of them without any
                cohort.fit(params, self.loss, only=part, epochs=epochs)
        return cohort.reply(params)


@method("fedrep")
@dataclass(kw_only=True)
class FedRep(PersonalizedStrategy):
    """Uniform average of the bodies."""

    update = FedRepUpdate
    weighting: Weighting = "uniform"
