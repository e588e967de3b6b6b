"""From a model's settings to a network whose initial values depend on the seed alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fedpers.errors import check, one_of
from fedpers.models.factorization import Factorization
from fedpers.models.head import with_head
from fedpers.models.initial import drawing
from fedpers.models.networks import CNN, MLP, Network, ResNet18
from fedpers.models.pretrain import Pretraining, pretrain
from fedpers.models.vit import ViT, ViTB16
from fedpers.models.weights import load_weights
from fedpers.randomness import generator

MODELS: dict[str, tuple[Callable[..., Network], dict[str, Any]]] = {
    "mlp": (MLP, {"hidden": (64,)}),
    "cnn": (CNN, {"width": 32, "hidden": (512,), "norm": "none"}),
    "resnet18": (ResNet18, {"norm": "group", "groups": 2, "width": 64}),
    "vit": (ViT, {"patch": None, "dim": 64, "depth": 4, "heads": 4, "mlp_ratio": 2.0}),
    "vit_b16": (ViTB16, {"weights": "imagenet"}),
    "factorization": (Factorization, {"dim": 32, "bias": True}),
}
"""Name -> what builds the network from ``(input_shape, num_classes, **options)``, and its options' defaults.

``factorization`` is built from the number of items instead; ``weights`` is not given to what builds the network.
"""

_DEFAULTS = Pretraining()


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
    patch : int, optional
        Side of a patch in pixels, >= 1 (``vit``, default: the smallest one >= 2 that gives at most 64 patches).
    dim : int, optional
        Number of features, >= 1 (``vit``, default 64; ``factorization``, default 32).
    depth : int, optional
        Blocks, >= 1 (``vit``, default 4).
    heads : int, optional
        Attention heads, >= 1, must divide `dim` (``vit``, default 4).
    mlp_ratio : float, optional
        Hidden width of a block in multiples of `dim`, > 0 (``vit``, default 2).
    bias : bool, optional
        Whether a user has a bias (``factorization``, default true).
    weights : str, optional
        Initial values of the body (``vit_b16``, default ``imagenet``): ``imagenet``, ``random``, ``timm:NAME`` or the
        path of a file, see :func:`fedpers.models.weights.load_weights`.
    head : str, optional
        Dotted name of the layer that is the head, where it is not the one called ``head``; see
        :func:`fedpers.models.head.with_head`.
    pretrained : str, optional
        ``"public"`` trains the whole network on the public share of the data first (all but ``factorization``), see
        :func:`fedpers.models.pretrain.pretrain`. The settings that follow need it.
    pretrain_epochs : int
        Largest number of passes, >= 1.
    pretrain_lr : float
        Rate of AdamW at the start, > 0.
    pretrain_batch_size : int
        >= 1.
    pretrain_accuracy : float, optional
        Stop as soon as the accuracy on a held-out tenth of the share reaches this, in (0, 1]; None makes all passes.

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
    patch: int | None = None
    dim: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float | None = None
    bias: bool | None = None
    weights: str | None = None
    head: str | None = None
    pretrained: str | None = None
    pretrain_epochs: int = _DEFAULTS.epochs
    pretrain_lr: float = _DEFAULTS.lr
    pretrain_batch_size: int = _DEFAULTS.batch_size
    pretrain_accuracy: float | None = _DEFAULTS.accuracy

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
        for option in ("width", "groups", "patch", "dim", "depth", "heads"):
            value = getattr(self, option)
            check(value is None or _is_size(value), f"model.{option}", value, "an integer >= 1")
        check(self.head is None or bool(self.head), "model.head", self.head, "the dotted name of a layer, or null")
        check(self.mlp_ratio is None or _is_positive(self.mlp_ratio), "model.mlp_ratio", self.mlp_ratio, "a number > 0")
        check(self.bias is None or isinstance(self.bias, bool), "model.bias", self.bias, "true or false")
        allowed = "imagenet, random, timm:NAME or the path of a file"
        check(self.weights is None or bool(self.weights), "model.weights", self.weights, allowed)
        if self.norm is not None:
            kinds = ("none", "batch") if self.name == "cnn" else ("batch", "group")
            check(self.norm in kinds, "model.norm", self.norm, one_of(kinds, self.norm))
        allowed = "no value with model.norm=batch (model=resnet18_bn sets none)"
        check(self.groups is None or self.norm != "batch", "model.groups", self.groups, allowed)
        self._check_pretraining()

    def _check_pretraining(self) -> None:
        check(self.pretrained in (None, "public"), "model.pretrained", self.pretrained, "null or public")
        allowed = "null: factorization has a user of its own on every client"
        check(self.pretrained is None or self.name != "factorization", "model.pretrained", self.pretrained, allowed)
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(self) if f.name.startswith("pretrain_")}
        for option, (value, default) in values.items():
            allowed = f"{'null' if default is None else default} unless model.pretrained=public"
            check(self.pretrained is not None or value == default, f"model.{option}", value, allowed)
        for option in ("pretrain_epochs", "pretrain_batch_size"):
            check(_is_size(values[option][0]), f"model.{option}", values[option][0], "an integer >= 1")
        check(_is_positive(self.pretrain_lr), "model.pretrain_lr", self.pretrain_lr, "a number > 0")
        target = self.pretrain_accuracy
        good = target is None or (_is_positive(target) and target <= 1)
        check(good, "model.pretrain_accuracy", target, "a number > 0 and <= 1, or null")

    def options(self) -> dict[str, Any]:
        """Options of the network that were given, by name; its head and those of pretraining are not among them."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith("pretrain")}
        return {
            option: value for option, value in given.items() if option not in ("name", "head") and value is not None
        }

    def pretraining(self) -> Pretraining:
        """Return the settings of pretraining."""
        return Pretraining(self.pretrain_epochs, self.pretrain_lr, self.pretrain_batch_size, self.pretrain_accuracy)


def build_model(
    config: ModelConfig,
    input_shape: tuple[int, ...],
    num_classes: int,
    seed: int,
    *,
    num_items: int | None = None,
    public: tuple[Tensor, Tensor] | None = None,
    device: torch.device | None = None,
) -> Network:
    """Build a model on the CPU, in train mode.

    Its initial values depend on `seed` and the settings, and on what it was pretrained on; torch's global generator is
    left as it was.

    Parameters
    ----------
    config : ModelConfig
    input_shape : tuple of int
        Shape of one sample, without the batch axis, e.g. ``(3, 32, 32)``; ``()`` for item ids.
    num_classes : int
        Outputs of the head, >= 1: classes, or targets of a regression; ``factorization`` has one whatever it is.
    seed : int
        The run's seed.
    num_items : int, optional
        Number of items if samples are item ids, >= 1.
    public : tuple (x ``[N, ...]``, y ``[N]``), optional
        Public share of the data, for ``pretrained="public"``.
    device : torch.device, optional
        Where to pretrain, default the CPU.

    Raises
    ------
    ConfigError
        If the model cannot take samples of this shape, `groups` does not divide `width` or `heads` not `dim`, weights
        cannot be used, `head` is not its last layer, or there is no public share with class labels to pretrain on.
    DataError
        If weights can neither be found nor downloaded.
    """
    build, defaults = MODELS[config.name]
    options = defaults | config.options()
    weights = options.pop("weights", "random")
    if config.name == "factorization":
        allowed = f"another model for samples of shape {tuple(input_shape)}: factorization takes item ids"
        check(num_items is not None and tuple(input_shape) == (), "model.name", config.name, allowed)
    else:
        allowed = f"factorization for item ids: {config.name} takes samples of numbers"
        check(num_items is None and tuple(input_shape) != (), "model.name", config.name, allowed)
    if config.pretrained is not None:
        allowed = "null, or data with a public share (set split.public)"
        check(public is not None, "model.pretrained", config.pretrained, allowed)
        classes = public is None or not public[1].is_floating_point()
        check(classes, "model.pretrained", config.pretrained, "null, because pretraining needs class labels")
    with drawing(seed, "model"):
        model = build(num_items, **options) if num_items is not None else build(input_shape, num_classes, **options)
    if weights != "random":
        load_weights(model, weights)
    if config.pretrained is not None and public is not None:
        pretrain(model, *public, config.pretraining(), seed, device)
    return model if config.head is None else with_head(model, config.head, _samples(input_shape, num_items, seed))


def _samples(shape: tuple[int, ...], num_items: int | None, seed: int) -> Tensor:
    """Two samples such as the data may hold: of normal numbers, or ids of items."""
    if num_items is not None:
        return torch.arange(min(2, num_items))
    return torch.from_numpy(generator(seed, "model.head").standard_normal((2, *shape))).float()


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
