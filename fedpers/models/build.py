"""From a model's settings to a network whose initial values depend on the seed alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from fedpers.errors import check, one_of
from fedpers.models.networks import CNN, MLP, Network, ResNet18
from fedpers.randomness import derive

MODELS: dict[str, tuple[Callable[..., Network], dict[str, Any]]] = {
    "mlp": (MLP, {"hidden": (64,)}),
    "cnn": (CNN, {"width": 32, "hidden": (512,), "norm": "none"}),
    "resnet18": (ResNet18, {"norm": "group", "groups": 2, "width": 64}),
}
"""Name -> what builds the network from ``(input_shape, num_classes, **options)``, and its options' defaults."""


@dataclass
class ModelConfig:
    """Settings of a model. An option left at None takes the model's default; one it does not know is refused.

    Parameters
    ----------
    name : str
        A key of :data:`MODELS`.
    hidden : tuple of int, optional
        Sizes of the fully connected layers before the head, each >= 1 (``mlp``, default ``(64,)``;
        ``cnn``, default ``(512,)``).
    width : int, optional
        Channels of the first convolution, >= 1 (``cnn``, default 32; ``resnet18``, default 64).
    norm : str, optional
        Normalization: ``"group"`` or ``"batch"`` (``resnet18``, default ``"group"``); ``"none"`` or ``"batch"``
        (``cnn``, default ``"none"``).
    groups : int, optional
        Groups of a group normalization, >= 1, must divide `width` (``resnet18``, default 2;
        without effect and so refused with ``norm="batch"``).

    Raises
    ------
    ConfigError
        For an unknown name, an option the model does not have, or a value outside the range given above.
    """

    name: str = "mlp"
    hidden: tuple[int, ...] | None = None
    width: int | None = None
    norm: str | None = None
    groups: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        check(self.name in MODELS, "model.name", self.name, one_of(MODELS, self.name))
        known = MODELS[self.name][1]
        for option, value in self.options().items():
            allowed = f"no value: {self.name} has the options {', '.join(known)}"
            check(option in known, f"model.{option}", value, allowed)
        if self.hidden is not None:
            sizes = isinstance(self.hidden, Sequence) and not isinstance(self.hidden, str)
            sizes = sizes and len(self.hidden) > 0 and all(_is_size(size) for size in self.hidden)
            check(sizes, "model.hidden", self.hidden, "one or more layer sizes, integers >= 1, e.g. [64,32]")
            self.hidden = tuple(self.hidden)
        for option in ("width", "groups"):
            value = getattr(self, option)
            check(value is None or _is_size(value), f"model.{option}", value, "an integer >= 1")
        if self.norm is not None:
            kinds = ("none", "batch") if self.name == "cnn" else ("batch", "group")
            check(self.norm in kinds, "model.norm", self.norm, one_of(kinds, self.norm))
        allowed = "no value with model.norm=batch (model=resnet18_bn sets none)"
        check(self.groups is None or self.norm != "batch", "model.groups", self.groups, allowed)

    def options(self) -> dict[str, Any]:
        """Options that were given, by name."""
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "name"}
        return {option: value for option, value in given.items() if value is not None}


def build_model(config: ModelConfig, input_shape: tuple[int, ...], num_classes: int, seed: int) -> Network:
    """Build a model on the CPU, in train mode.

    Its initial values depend on `seed` (and the settings) alone; torch's global generator is left as it was.

    Parameters
    ----------
    config : ModelConfig
    input_shape : tuple of int
        Shape of one sample, without the batch axis, e.g. ``(3, 32, 32)``.
    num_classes : int
        Outputs of the head, >= 1.
    seed : int
        The run's seed.

    Raises
    ------
    ConfigError
        If the model cannot take samples of this shape, or `groups` does not divide `width`.
    """
    build, defaults = MODELS[config.name]
    # devices=[]: only the CPU generator is used, so no GPU needs to be looked at
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, "model"))
        return build(input_shape, num_classes, **(defaults | config.options()))


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
