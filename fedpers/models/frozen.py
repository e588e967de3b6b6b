"""Networks whose body stays as it came: clients train a head, and prompts where the body takes them.

Prompts are those of Jia et al., "Visual prompt tuning", ECCV 2022, shallow: further tokens of the first block. What a
frozen body computes alike at every step, for every client, is computed once: the tokens of the pictures if there are
prompts, else the features.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedpers.data.federated import FederatedData
from fedpers.errors import ConfigError, check
from fedpers.models.initial import drawing
from fedpers.models.vit import check_promptable

log = logging.getLogger(__name__)

BUDGET = 4 * 2**30
"""Largest size in bytes of what is computed once for all samples; beyond it every batch computes its own."""
PROMPTS = "prompts"
"""Name of the prompts among a network's parameters."""
_AT_ONCE = 256  # samples


class FrozenNetwork(nn.Module):
    """A frozen body, always in evaluation mode, under a head that is trained.

    Parameters
    ----------
    body : nn.Module
        Samples to features ``[B, F]``; with prompts it needs ``embed`` and ``encode``, see
        :class:`fedpers.models.vit.VisionBody`. Taken over and frozen.
    head : nn.Linear
    prompts : Tensor ``[P, D]`` or None
        Initial prompts, trained as the parameter ``prompts``.
    ready : bool
        Whether inputs are tokens ``[B, T, D]`` (with prompts) or features ``[B, F]`` (without), not samples.
    """

    def __init__(self, body: nn.Module, head: nn.Linear, prompts: Tensor | None = None, *, ready: bool) -> None:
        super().__init__()
        self.prompts = None if prompts is None else nn.Parameter(prompts)
        self.body = (nn.Identity() if ready and prompts is None else body).requires_grad_(False)
        self.head = head.requires_grad_(True)
        self.ready = ready
        self.train()

    def train(self, mode: bool = True) -> FrozenNetwork:
        """Set the mode of all but the body."""
        super().train(mode)
        self.body.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``[B, C]``."""
        if self.prompts is None:
            features = self.body(x)
        else:
            tokens = x if self.ready else self.body.embed(x)  # type: ignore[operator]
            features = self.body.encode(tokens, self.prompts)  # type: ignore[operator]
        scores: Tensor = self.head(features)
        return scores


def prompted(
    model: nn.Module, data: FederatedData, prompts: int, seed: int, *, budget: int | None = None
) -> tuple[FrozenNetwork, FederatedData]:
    """Freeze a vision transformer, give it prompts, and put tokens in the place of pictures.

    The head keeps its values: trained ones where the whole network was pretrained, new ones under downloaded weights.
    Prompts are uniform in ``+-sqrt(6 / (pixels of a patch + D))``, as in the authors' code of visual prompt tuning.

    Parameters
    ----------
    model : nn.Module
        With a body that takes prompts and a linear head; left as it is.
    data : FederatedData
        On the device of `model`.
    prompts : int
        P, >= 1.
    seed : int
        The run's seed, for the initial prompts.
    budget : int, optional
        Bytes, default :data:`BUDGET`.

    Raises
    ------
    ConfigError
        If the network or the data are of another kind.
    """
    check_promptable(model)
    body, head = _parts(model, data)
    embed: Callable[[Tensor], Tensor] = body.embed  # type: ignore[assignment]
    first = _of_one(embed, model, data)
    width = first.shape[-1]
    pixels = getattr(getattr(body, "patch", None), "in_features", width)
    bound = math.sqrt(6 / (pixels + width))
    with drawing(seed, "prompts"):
        values = torch.empty(prompts, width).uniform_(-bound, bound)
    tokens = _once(embed, data, first, "tokens", budget)
    network = FrozenNetwork(body, head, values.to(first), ready=tokens is not None)
    return network, data if tokens is None else replace(data, x=tokens)


def featured(
    model: nn.Module, data: FederatedData, *, budget: int | None = None
) -> tuple[FrozenNetwork, FederatedData]:
    """Freeze a network's body and put features in the place of samples; the head keeps its values.

    Parameters
    ----------
    model : nn.Module
        With a body and a linear head; left as it is.
    data : FederatedData
        On the device of `model`.
    budget : int, optional
        Bytes, default :data:`BUDGET`.

    Raises
    ------
    ConfigError
        If the network or the data are of another kind.
    """
    body, head = _parts(model, data)
    features = _once(body, data, _of_one(body, model, data), "features", budget)
    network = FrozenNetwork(body, head, ready=features is not None)
    return network, data if features is None else replace(data, x=features)


def _parts(model: nn.Module, data: FederatedData) -> tuple[nn.Module, nn.Linear]:
    """Copies of body, in evaluation mode, and head."""
    body, head = getattr(model, "body", None), getattr(model, "head", None)
    if not isinstance(body, nn.Module) or not isinstance(head, nn.Linear):
        raise ConfigError("model", type(model).__name__, "a network with a 'body' and a linear 'head'")
    classes = data.task.classes and data.x.is_floating_point()
    check(classes, "dataset", data.name, "samples of numbers with class labels, for a frozen network")
    return copy.deepcopy(body).eval(), copy.deepcopy(head)


@torch.no_grad()
def _of_one(function: Callable[[Tensor], Tensor], model: nn.Module, data: FederatedData) -> Tensor:
    """Result ``[1, ...]`` for the first sample."""
    try:
        return function(data.x[:1])
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        allowed = f"a network that takes samples of shape {list(data.x.shape[1:])} ({error})"
        raise ConfigError("model", type(model).__name__, allowed) from error


@torch.no_grad()
def _once(
    function: Callable[[Tensor], Tensor], data: FederatedData, first: Tensor, what: str, budget: int | None
) -> Tensor | None:
    """Results ``[N, ...]`` for all samples; None if they are too large. `first` is that of the first sample."""
    size = first.nbytes * len(data.x)
    if size > (BUDGET if budget is None else budget):
        log.info("%s of %d samples would take %.1f GB: every batch computes its own", what, len(data.x), size / 1e9)
        return None
    log.info("%s of %d samples are computed once (%.1f MB)", what, len(data.x), size / 1e6)
    out = first.new_empty(len(data.x), *first.shape[1:])
    for start in range(0, len(data.x), _AT_ONCE):
        out[start : start + _AT_ONCE] = function(data.x[start : start + _AT_ONCE])
    return out
