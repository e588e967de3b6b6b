"""Which network, and whether it is pretrained: the group ``model``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from fedpers.errors import check, one_of
from fedpers.settings.base import CUSTOM, OnlyFor, OpenChoices, Settings, choice_options, options

KINDS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "cnn": {},
    "cnn_bn": {"name": "cnn", "norm": "batch"},
    "cnn1d": {},
    "lstm": {},
    "transformer": {},
    "resnet18_gn": {"name": "resnet18", "norm": "group"},
    "resnet18_bn": {"name": "resnet18", "norm": "batch"},
    "vit": {},
}
"""Networks that clients can be dealt: settings of each."""
_WITH_FEATURES = ("auto", "mlp", "cnn", "cnn1d", "lstm", "transformer", "resnet18", "vit")
_MIXING = ("name", "kinds", "kind_file", "features")
_PRETRAINED = ("auto", "mlp", "cnn", "cnn1d", "resnet18", "vit", "vit_b16")
SMALLEST_PICTURE, LARGEST_PICTURE = 28, 64
"""Pixels a side of pictures for which ``auto`` means ``cnn``: what its two convolutions are made for."""
_Size = Annotated[int, Field(ge=1)]


@dataclass
class ModelConfig(Settings, group="model"):
    """Settings of a network; an option left at None takes the network's default, one that it lacks is refused."""

    name: Annotated[
        str,
        OpenChoices(
            auto="by the shape of a sample: lstm for tokens, cnn1d for series [channels, steps], cnn for pictures "
            "of 28 to 64 pixels a side, else mlp",
            mlp="fully connected layers",
            cnn="two convolutions, as in the federated learning literature",
            cnn1d="two convolutions over time, for series",
            lstm="a recurrent network, for tokens and series",
            transformer="a small transformer in which a token sees earlier ones, for tokens",
            resnet18="a residual network for small pictures",
            vit="a small vision transformer",
            vit_b16="ViT-B/16 with weights from torchvision or a file",
            factorization="a table of items and a vector of the user, for ratings",
        ),
    ] = "auto"
    hidden: Annotated[
        tuple[_Size, ...] | None,
        Field(
            min_length=1,
            title="one or more whole numbers >= 1, e.g. [64,32]",
            description="sizes of the fully connected layers before the head",
        ),
        OnlyFor(auto=None, mlp=(64,), cnn=(512,), cnn1d=(512,)),
    ] = None
    width: Annotated[
        int | None, Field(ge=1, description="channels of the first convolution"), OnlyFor(cnn=32, cnn1d=32, resnet18=64)
    ] = None
    norm: Annotated[
        Literal["none", "batch", "group"] | None,
        Field(description="normalization; of cnn none or batch, of resnet18 group or batch"),
        OnlyFor(cnn="none", resnet18="group"),
    ] = None
    groups: Annotated[int | None, Field(ge=1, description="of norm=group; must divide width"), OnlyFor(resnet18=2)] = (
        None
    )
    patch: Annotated[
        int | None,
        Field(ge=1, description="pixels a side; null: the smallest >= 2 that gives at most 64 patches"),
        OnlyFor("vit"),
    ] = None
    dim: Annotated[
        int | None, Field(ge=1, description="features"), OnlyFor(vit=64, transformer=64, factorization=32)
    ] = None
    depth: Annotated[int | None, Field(ge=1, description="blocks"), OnlyFor(vit=4, transformer=2)] = None
    heads: Annotated[
        int | None, Field(ge=1, description="of attention; must divide dim"), OnlyFor(vit=4, transformer=4)
    ] = None
    mlp_ratio: Annotated[
        float | None,
        Field(gt=0, description="hidden width of a block in multiples of dim"),
        OnlyFor(vit=2.0, transformer=2.0),
    ] = None
    tied: Annotated[
        bool | None, Field(description="whether the head's weights are the embedding's"), OnlyFor(transformer=False)
    ] = None
    embedding: Annotated[int | None, Field(ge=1, description="width of a token's embedding"), OnlyFor(lstm=32)] = None
    hidden_size: Annotated[int | None, Field(ge=1, description="of the recurrent layers"), OnlyFor(lstm=128)] = None
    layers: Annotated[int | None, Field(ge=1, description="recurrent ones"), OnlyFor(lstm=1)] = None
    bias: Annotated[bool | None, Field(description="whether a user has a bias"), OnlyFor(factorization=True)] = None
    weights: Annotated[
        str | None,
        Field(min_length=1, title="imagenet, random, timm:NAME or the path of a file",
              description="initial values of the body"),
        OnlyFor(vit_b16="imagenet"),
    ] = None  # fmt: skip
    features: Annotated[
        int | None,
        Field(ge=1, description="width of a projection before the head, so that all kinds of network have the same"),
        OnlyFor(*_WITH_FEATURES),
    ] = None
    arguments: Annotated[
        dict[str, Any] | None,
        Field(
            description="what a network of your own is made with; input_shape, num_classes, num_items, num_tokens and "
            "per_token are given where it has such parameters"
        ),
        OnlyFor(CUSTOM),
    ] = None
    kinds: Annotated[
        tuple[str, ...] | None,
        Field(min_length=2, title=f"two or more of {', '.join(KINDS)}",
              description="networks that clients are dealt in equal numbers at random, each with its defaults"),
        OnlyFor("auto", "mlp"),
    ] = None  # fmt: skip
    kind_file: Annotated[
        str | None,
        Field(description="a .json file with the kind of each client, in place of the draw"),
        OnlyFor("auto", "mlp"),
    ] = None
    head: Annotated[
        str | None,
        Field(min_length=1, title="the dotted name of a layer, or null",
              description="the layer that is the head; null: the one called head"),
    ] = None  # fmt: skip
    pretrained: Annotated[
        Literal["public"] | None,
        Field(description="public: the whole network is trained first on the public share of the data"),
        OnlyFor(*_PRETRAINED),
    ] = None
    pretrain_epochs: Annotated[int, Field(ge=1, description="passes at most"), OnlyFor(*_PRETRAINED)] = 20
    pretrain_lr: Annotated[float, Field(gt=0, description="of AdamW at the start"), OnlyFor(*_PRETRAINED)] = 1e-3
    pretrain_batch_size: Annotated[int, Field(ge=1, description="samples of a batch"), OnlyFor(*_PRETRAINED)] = 32
    pretrain_accuracy: Annotated[
        float | None,
        Field(gt=0, le=1, description="stop at this accuracy on a held-out tenth of the share"),
        OnlyFor(*_PRETRAINED),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        known = choice_options(type(self), self.name)
        for name, option in options(type(self)).items():
            value = getattr(self, name)
            allowed = f"no value: {self.name} has the options {', '.join(n for n in known if n != 'name')}"
            check(name in known or value == option.default, option.key, value, allowed)
        self._check_kinds()
        if self.norm is not None:
            kinds = ("none", "batch") if self.name == "cnn" else ("batch", "group")
            check(self.norm in kinds, "model.norm", self.norm, one_of(kinds, self.norm))
        allowed = f"false with model.features={self.features}, after which the head is not as wide as the embedding"
        check(self.features is None or not self.tied, "model.tied", self.tied, allowed)
        allowed = "no value with model.norm=batch (model=resnet18_bn sets none)"
        check(self.groups is None or self.norm != "batch", "model.groups", self.groups, allowed)
        for name, option in options(type(self)).items():
            if name.startswith("pretrain_") and self.pretrained is None:
                value = getattr(self, name)
                allowed = f"{'null' if option.default is None else option.default} unless model.pretrained=public"
                check(value == option.default, option.key, value, allowed)

    def _check_kinds(self) -> None:
        """Refuse kinds that are not known, and settings that none of them would read."""
        check(self.kind_file is None or self.kinds is not None, "model.kind_file", self.kind_file, "null without kinds")
        for kind in self.kinds or ():
            check(kind in KINDS, "model.kinds", kind, one_of(KINDS, kind))
        check(len(set(self.kinds or ())) == len(self.kinds or ()), "model.kinds", self.kinds, "each kind once")
        for name, option in choice_options(type(self), self.name).items():
            if self.kinds is not None and name not in _MIXING:
                value = getattr(self, name)
                allowed = "no value with model.kinds: each has its defaults"
                check(value in (None, option.default), option.key, value, allowed)

    def for_samples(self, shape: Sequence[int], num_tokens: int = 0) -> ModelConfig:
        """Settings of the network that ``auto`` means for samples of this shape; others as they are.

        Parameters
        ----------
        shape : sequence of int
            Of one sample.
        num_tokens : int
            Size of the vocabulary of samples that are tokens; else 0.

        Raises
        ------
        ConfigError
            If that network lacks an option that is set.
        """
        if self.name != "auto" or self.kinds is not None:
            return self
        series = len(shape) == 2 and shape[1] >= 4
        pictures = len(shape) == 3 and all(SMALLEST_PICTURE <= side <= LARGEST_PICTURE for side in shape[1:])
        name = "lstm" if num_tokens else "cnn1d" if series else "cnn" if pictures else "mlp"
        allowed = f"null, because {name}, the network for such samples, is not pretrained"
        check(self.pretrained is None or name in _PRETRAINED, "model.pretrained", self.pretrained, allowed)
        return replace(self, name=name)

    def of_kinds(self) -> dict[str, ModelConfig]:
        """Settings of each kind of network that clients are dealt, by its name."""
        return {
            kind: ModelConfig(**{"name": kind, **KINDS[kind], "features": self.features}) for kind in self.kinds or ()
        }

    @property
    def label(self) -> str:
        """Name for tables."""
        return self.name if self.kinds is None else "+".join(self.kinds)

    def options(self) -> dict[str, Any]:
        """Arguments of the network by name: what was given, else the network's defaults."""
        chosen: dict[str, Any] = {}
        for name, option in choice_options(type(self), self.name).items():
            if name not in (*_MIXING, "head") and not name.startswith("pretrain"):
                value = getattr(self, name)
                chosen[name] = option.default if value is None else value
        return chosen
