"""FedAvg with fine-tuning: clients adapt the average before they predict.

Called FedAvg+ or FedAvg-FT in the literature, e.g. Y. Jiang et al., Improving Federated Learning Personalization via
Model Agnostic Meta Learning, arXiv:1909.12488; G. Cheng et al., Fine-tuning is Fine in Federated Learning,
arXiv:2108.07313.

    training as FedAvg
    prediction of client k: w_k <- w, then E_ft passes of SGD on f_k

Shared: the whole network. Personal: nothing; the fine-tuned network is used for the prediction and then forgotten.

Any other method is fine-tuned by the same option (:meth:`~fedpers.client.LocalUpdate.fine_tuned`), 0 there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from fedpers.cohort import Batch, Network
from fedpers.strategies.base import PersonalizedStrategy, method
from fedpers.strategies.fedavg import FedAvgUpdate


@dataclass(kw_only=True)
class FedAvgFTUpdate(FedAvgUpdate):
    """FedAvg's training; fine-tuning before each evaluation."""

    finetune_epochs: Annotated[int, Field(ge=1, description="passes before each prediction, forgotten after it")] = 1

    def finetune_loss(self, network: Network, batch: Batch) -> Tensor:
        """That of training."""
        return self.loss(network, batch)


@method("fedavg_ft")
@dataclass(kw_only=True)
class FedAvgFT(PersonalizedStrategy):
    """FedAvg's server."""

    update = FedAvgFTUpdate
