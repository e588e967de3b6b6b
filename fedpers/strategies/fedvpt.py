"""FedVPT: averaged prompts for a frozen vision transformer.

The baseline of that name in F.-E. Yang et al., Efficient Model Personalization in Federated Learning via
Client-Specific Prompt Generation, ICCV 2023; prompts as in M. Jia et al., Visual Prompt Tuning, ECCV 2022 (shallow).

    p_k, h_k <- E passes of SGD on f_k(h_k(F*(p_k, .)))      from the received prompts and the client's head; F* frozen
    p        <- sum_k n_k / n * p_k

Shared: P prompts of width D, that is P * D numbers up and down. Personal: the head. Whether the paper averages heads
too is not said; its cost counts prompts only, so they stay here. With ``training.groups`` prompts and head may have
rates of their own. The head starts as it comes: see :func:`fedpers.models.frozen.prompted`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import nn

from fedpers.data.federated import FederatedData
from fedpers.models.frozen import PROMPTS, prompted
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, method


@dataclass(kw_only=True)
class FedVPTUpdate(LocalUpdate):
    """Train prompts and head; the backbone is one frozen copy for all clients."""

    shared = PROMPTS
    personal = "head"
    prompts: Annotated[int, Field(ge=1, description="tokens given to the backbone, P in the paper")] = 10

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Freeze the backbone, add prompts, and compute the pictures' tokens once.

        Raises
        ------
        ConfigError
            If the network is no vision transformer with a class token.
        """
        return prompted(model, data, self.prompts, seed)


@method("fedvpt")
@dataclass(kw_only=True)
class FedVPT(PersonalizedStrategy):
    """Average of the prompts."""

    update = FedVPTUpdate
