"""FedBABU: a body trained under a head that stays as it was drawn; clients fine-tune both before they predict.

J. Oh, S. Kim, S.-Y. Yun, FedBABU: Toward Enhanced Representation for Federated Image Classification, ICLR 2022,
arXiv:2106.06042.

    b_k <- b, then E passes of SGD on f_k(., h_0)        the initial head h_0 fixed, the same for all clients
    b   <- sum_k n_k / n * b_k
    prediction of client k: (b_k, h_k) <- (b, h_0), then E_ft passes of SGD on f_k

Shared: the body, its BatchNorm statistics averaged with it. Personal: nothing; the fine-tuned network is used for the
prediction and then forgotten.

Both parts are fine-tuned; the paper compares this with the head or the body alone (``finetune``). With
``finetune_epochs: 0`` the received body predicts under the initial head, as the paper measures what is common to all.

Common implementations fine-tune once, after the last round, what the client holds: the body it trained if it took part
in that round, otherwise the body it received last. Here fine-tuning starts from the received body, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from fedpers.cohort import Batch, Cohort, Network, Reply, Selection
from fedpers.records import ARRAYS
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, method


@dataclass(kw_only=True)
class FedBABUUpdate(LocalUpdate):
    """Train the body under the initial head; fine-tuning before each evaluation."""

    shared = "body"
    settles_parts = True
    finetune_epochs: Annotated[
        int, Field(ge=0, description="passes before each prediction; 0 predicts with what was received")
    ] = 5
    finetune: Annotated[Literal["all", "body", "head"], Field(description="what these passes train")] = "all"

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train the body."""
        params = cohort.assemble(received[ARRAYS])
        cohort.fit(params, self.loss, only="body")
        return cohort.reply(params)

    def finetune_loss(self, network: Network, batch: Batch) -> Tensor:
        """That of training."""
        return self.loss(network, batch)

    @property
    def finetuned_parts(self) -> Selection:
        """Body, head or both."""
        return self.finetune


@method("fedbabu")
@dataclass(kw_only=True)
class FedBABU(PersonalizedStrategy):
    """Average of the bodies by number of training samples."""

    update = FedBABUUpdate
