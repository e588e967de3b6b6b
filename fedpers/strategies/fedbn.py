"""FedBN: local normalization layers.

X. Li et al., FedBN: Federated Learning on Non-IID Features via Local Batch Normalization,
ICLR 2021, arXiv:2102.07623.

    w_k <- w except normalization layers, then E passes of SGD on f_k over everything
    w   <- mean_k w_k                      normalization layers left out

Shared: all but the normalization layers. Personal: their scale, shift and running statistics.

Layers are found by their type, not by the letters "bn" in a name as in common implementations, and what nobody reads
is not sent.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fedpers.cohort import Tree, select
from fedpers.errors import ConfigError
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Weighting, method


@dataclass(kw_only=True)
class FedBNUpdate(LocalUpdate):
    """Train everything; normalization layers stay."""

    shared = ("all", "-norm")
    personal = "norm"

    def initial_state(self, template: Tree, module: nn.Module) -> Tree:
        """Refuse a network that has nothing to keep."""
        if not select(module, "norm"):
            raise ConfigError(
                "model",
                type(module).__name__,
                "a network with normalization layers for strategy=fedbn, e.g. model=cnn_bn, or transformer for tokens",
            )
        return super().initial_state(template, module)


@method("fedbn")
@dataclass(kw_only=True)
class FedBN(PersonalizedStrategy):
    """Uniform average of all other layers."""

    update = FedBNUpdate
    weighting: Weighting = "uniform"
