"""Head only: a frozen body under a head of the client's own; what a pretrained network is worth by itself.

    h_k <- E passes of SGD on f_k(h_k(F*(.)))      F* frozen, its features computed once; nothing is sent

Shared: nothing. Personal: the head, which starts as it comes: pretrained with the body, or new. The body is in
evaluation mode throughout: no dropout, and batch normalization by the statistics it came with.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fedpers.data.federated import FederatedData
from fedpers.models.frozen import featured
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, method


@dataclass(kw_only=True)
class HeadOnlyUpdate(LocalUpdate):
    """Train the head."""

    shared = "none"
    personal = "head"

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Freeze the body and compute the samples' features once.

        Raises
        ------
        ConfigError
            If the network is not a body under a linear head, or samples have no class labels.
        """
        return featured(model, data)


@method("head_only")
@dataclass(kw_only=True)
class HeadOnly(PersonalizedStrategy):
    """Server that has nothing to average."""

    update = HeadOnlyUpdate
