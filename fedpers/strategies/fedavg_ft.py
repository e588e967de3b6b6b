"""FedAvg with fine-tuning: clients adapt the average before they predict.

Called FedAvg+ or FedAvg-FT in the literature, e.g. Y. Jiang et al., Improving Federated Learning Personalization via
Model Agnostic Meta Learning, arXiv:1909.12488; G. Cheng et al., Fine-tuning is Fine in Federated Learning,
arXiv:2108.07313.

    training as FedAvg
    prediction of client k: w_k <- w, then E_ft passes of SGD on f_k

Shared: the whole network. Personal: nothing; the fine-tuned network is used for the prediction and then forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from fedpers.cohort import Cohort, Tree
from fedpers.strategies.base import PersonalizedStrategy, Received, method
from fedpers.strategies.fedavg import FedAvgUpdate


@dataclass(kw_only=True)
class FedAvgFTUpdate(FedAvgUpdate):
    """FedAvg's training; fine-tuning before each evaluation."""

    finetune_epochs: Annotated[int, Field(ge=1, description="passes before each prediction")] = 1

    def personalize(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Tree:
        """Fine-tune the received network on the client's training samples."""
        params = cohort.assemble(received["arrays"])
        cohort.fit(params, self.loss, epochs=self.finetune_epochs, purpose="finetune")
        return params


@method("fedavg_ft")
@dataclass(kw_only=True)
class FedAvgFT(PersonalizedStrategy):
    """FedAvg's server."""

    update = FedAvgFTUpdate
