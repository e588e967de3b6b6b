"""Pretrained: the network as it comes, for everybody; what training together has to beat where a public share is there.

    w <- pretraining on the public share (``model.pretrained=public``), then nothing

Shared: nothing. Personal: nothing. Clients take their turns and train nothing, so that a table has the same rounds for
all its rows. That each client must get the network once is not counted in the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fedpers.cohort import Cohort, Reply
from fedpers.data.federated import FederatedData
from fedpers.errors import check
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, method


@dataclass(kw_only=True)
class PretrainedUpdate(LocalUpdate):
    """Predict with the initial network; train nothing."""

    shared = "none"
    settles_parts = True

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Refuse one of our networks that has not been pretrained.

        Raises
        ------
        ConfigError
            If its values are random.
        """
        trained = getattr(model, "pretrained_accuracy", 1.0) is not None
        check(trained, "model.pretrained", None, "public for strategy=pretrained, with split.public > 0")
        return model, data

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Answer with nothing."""
        return Reply({})


@method("pretrained")
@dataclass(kw_only=True)
class Pretrained(PersonalizedStrategy):
    """Server that has nothing to do."""

    update = PretrainedUpdate
