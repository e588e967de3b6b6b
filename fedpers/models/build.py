"""From a model's settings to a network whose initial values depend on the seed alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedpers.custom import call_custom, import_custom
from fedpers.data.fields import InputField
from fedpers.errors import check
from fedpers.models.factorization import Factorization
from fedpers.models.fields import take_fields
from fedpers.models.head import with_head
from fedpers.models.initial import drawing
from fedpers.models.networks import CNN, MLP, Network, ResNet18
from fedpers.models.pretrain import Pretraining, pretrain
from fedpers.models.sequences import CNN1D, LSTM, Transformer
from fedpers.models.vit import ViT, ViTB16
from fedpers.models.weights import load_weights
from fedpers.randomness import generator
from fedpers.settings.model import ModelConfig

MODELS: dict[str, Callable[..., Network]] = {
    "mlp": MLP,
    "cnn": CNN,
    "cnn1d": CNN1D,
    "lstm": LSTM,
    "transformer": Transformer,
    "resnet18": ResNet18,
    "vit": ViT,
    "vit_b16": ViTB16,
    "factorization": Factorization,
}
"""Name -> what builds the network from ``(input_shape, num_classes, **options)``.

Those of :data:`OF_SEQUENCES` are given ``num_tokens`` and ``per_token`` too; ``factorization`` is built from the number
of items instead; ``weights`` is not given to what builds the network.
"""
OF_SEQUENCES = ("lstm", "transformer")


def build_model(
    config: ModelConfig,
    input_shape: tuple[int, ...],
    num_classes: int,
    seed: int,
    *,
    num_items: int | None = None,
    num_tokens: int = 0,
    per_token: bool = False,
    fields: Sequence[InputField] = (),
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
    num_tokens : int
        Size of the vocabulary if samples are tokens ``[T]``; else 0.
    per_token : bool
        Whether the network is to give outputs at each position of a sequence.
    fields : sequence of InputField
        What the columns of samples of several inputs are; see :attr:`FederatedData.fields`.
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
    if ":" in config.name:
        known = {"input_shape": input_shape, "num_classes": num_classes, "num_items": num_items}
        samples = _samples(input_shape, num_items, num_tokens, seed)
        known |= {"num_tokens": num_tokens, "per_token": per_token}
        return _custom(config, known, samples, seed, fields)
    config = config.for_samples(input_shape, num_tokens)
    build, options = MODELS[config.name], config.options()
    weights = options.pop("weights", "random")
    if config.name == "factorization":
        allowed = f"another model for samples of shape {tuple(input_shape)}: factorization takes item ids"
        check(num_items is not None and tuple(input_shape) == (), "model.name", config.name, allowed)
    else:
        allowed = f"factorization for item ids: {config.name} takes samples of numbers"
        check(num_items is None and tuple(input_shape) != (), "model.name", config.name, allowed)
    if config.name in OF_SEQUENCES:
        options |= {"num_tokens": num_tokens, "per_token": per_token}
    else:
        check(num_tokens == 0, "model.name", config.name, f"one of {', '.join(OF_SEQUENCES)} for tokens")
    if config.pretrained is not None:
        allowed = "null, or data with a public share (set split.public)"
        check(public is not None, "model.pretrained", config.pretrained, allowed)
        classes = public is None or not public[1].is_floating_point()
        check(classes, "model.pretrained", config.pretrained, "null, because pretraining needs class labels")
    with drawing(seed, "model"):
        model = build(num_items, **options) if num_items is not None else build(input_shape, num_classes, **options)
        if config.features is not None:
            model = _projected(model, config.features, num_classes)
    if weights != "random":
        load_weights(model, weights)
    if config.pretrained is not None and public is not None:
        pretrain(model, *public, Pretraining.of(config), seed, device)
    if config.head is None:
        return model
    return with_head(model, config.head, _samples(input_shape, num_items, num_tokens, seed))


def _custom(
    config: ModelConfig, known: dict[str, Any], samples: Tensor, seed: int, fields: Sequence[InputField]
) -> Network:
    """A network of the user's own, its initial values drawn from `seed`; `known` is what it may be made with."""
    kind = import_custom("model.name", config.name)
    makes = callable(kind) and not isinstance(kind, nn.Module)
    check(makes, "model.name", config.name, "module:Name of a class or a function that makes a network")
    with drawing(seed, "model"):
        model = call_custom("model", config.name, kind, known, config.arguments or {})
    allowed = f"module:Name of what makes an nn.Module, not {type(model).__name__}"
    check(isinstance(model, nn.Module), "model.name", config.name, allowed)
    made = cast(Network, take_fields(model, fields))
    return made if config.head is None else with_head(made, config.head, samples)


def _projected(model: Network, features: int, num_classes: int) -> Network:
    """The same network with a linear layer and ReLU of width `features` between body and head."""
    width = model.head.in_features
    assert isinstance(width, int)
    body = model.body.children() if isinstance(model.body, nn.Sequential) else [model.body]
    model.body = nn.Sequential(*body, nn.Linear(width, features), nn.ReLU())
    model.head = nn.Linear(features, num_classes)
    return model


def _samples(shape: tuple[int, ...], num_items: int | None, num_tokens: int, seed: int) -> Tensor:
    """Two samples such as the data may hold: of normal numbers, or ids of tokens or items."""
    if num_tokens:
        return torch.from_numpy(generator(seed, "model.head").integers(num_tokens, size=(2, *shape)))
    if num_items is not None:
        return torch.arange(min(2, num_items))
    return torch.from_numpy(generator(seed, "model.head").standard_normal((2, *shape))).float()
