"""Ways in which clients differ beyond the samples they own: the group ``heterogeneity``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from fedpers.errors import check
from fedpers.settings.base import Choices, OnlyFor, Settings, choice_options

_Groups = Annotated[int, Field(ge=2, description="groups of clients, of nearly equal size, drawn at random")]
_Strength = Annotated[float, Field(ge=0, description="0 changes nothing")]
_Share = Annotated[float, Field(ge=0, le=1, description="0 changes nothing")]


@dataclass
class FeatureShift(Settings, group="heterogeneity.feature_shift"):
    """Contrast and brightness of each client's own: ``exp(strength * a) * x + strength * b``, a and b from N(0, 1)."""

    strength: _Strength = 0.5


@dataclass
class Contrast(Settings, group="heterogeneity.contrast"):
    """Contrast of each client's own: ``exp(strength * a) * x``, a from N(0, 1)."""

    strength: _Strength = 0.5


@dataclass
class Noise(Settings, group="heterogeneity.noise"):
    """Gaussian noise on each sample, of deviation ``strength * u`` with u of client k from [0, 1]."""

    strength: _Strength = 0.5


@dataclass
class Blur(Settings, group="heterogeneity.blur"):
    """Gaussian blur of pictures, of deviation ``strength * u`` pixels with u of client k from [0, 1]."""

    strength: Annotated[float, Field(ge=0, le=100, description="pixels; 0 changes nothing")] = 1.0


@dataclass
class Colour(Settings, group="heterogeneity.colour"):
    """The feature shift, drawn for each channel of each client."""

    strength: _Strength = 0.5


@dataclass
class MissingChannels(Settings, group="heterogeneity.missing_channels"):
    """Each channel is missing (0) for each client with probability `strength`; one is left."""

    strength: _Share = 0.3


@dataclass
class PermutedPixels(Settings, group="heterogeneity.permuted_pixels"):
    """Groups of clients see the numbers of a sample in orders of their own (the first group as they are)."""

    groups: _Groups = 4


@dataclass
class Rotation(Settings, group="heterogeneity.rotation"):
    """Groups of clients see pictures turned by multiples of an angle."""

    groups: _Groups = 4
    angle: Annotated[
        float, Field(gt=0, lt=360, description="degrees by which the next group's pictures are turned")
    ] = 90.0


@dataclass
class LabelGroups(Settings, group="heterogeneity.label_groups"):
    """Groups of clients name the classes in orders of their own."""

    groups: _Groups = 4


@dataclass
class LabelNoise(Settings, group="heterogeneity.label_noise"):
    """A share ``strength * u`` of client k's training labels is wrong, u from [0, 1]."""

    strength: _Share = 0.4
    kind: Annotated[
        Literal["symmetric", "pair"], Field(description="wrong labels are any other class, or the next one")
    ] = "symmetric"


@dataclass
class Drift(Settings, group="heterogeneity.drift"):
    """From a round on, a share of the clients is shifted otherwise: to the next group, or by draws made anew.

    It moves what the other shifts do, of which one at least must be chosen; labels of all parts move alike.
    """

    round: Annotated[
        int | None,
        Field(
            ge=1, description="from this one on clients are in the next group of each shift, or its draws are made anew"
        ),
    ] = None
    share: Annotated[float, Field(gt=0, le=1, description="of the clients that drift, drawn at random")] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.round is not None, "heterogeneity.drift.round", self.round, "a round >= 1")


SHIFTS: dict[str, type[Settings]] = {
    "rotation": Rotation,
    "permuted_pixels": PermutedPixels,
    "blur": Blur,
    "contrast": Contrast,
    "colour": Colour,
    "feature_shift": FeatureShift,
    "missing_channels": MissingChannels,
    "noise": Noise,
    "label_groups": LabelGroups,
    "label_noise": LabelNoise,
}
"""Shifts in the order in which they are applied."""
_GROUPED = ("rotation", "permuted_pixels", "label_groups")


@dataclass
class HeterogeneityConfig(Settings, group="heterogeneity"):
    """Ways in which clients differ beyond the samples they own (the group ``heterogeneity``).

    One is chosen by name, with `strength` or `groups`; any may be added under a key of its own, as in
    ``heterogeneity.rotation.angle=30 heterogeneity.label_noise.kind=pair``. The command takes a list of names for
    several such keys.
    """

    name: Annotated[
        str,
        Choices(
            none="clients differ in their samples only",
            feature_shift="client k sees exp(strength * a) * x + strength * b, a and b drawn from N(0, 1): its own "
            "contrast and brightness",
            contrast="client k sees exp(strength * a) * x, a drawn from N(0, 1)",
            noise="client k's samples have noise of deviation strength * u, u drawn from [0, 1]",
            blur="client k's pictures are blurred by a Gaussian of strength * u pixels, u drawn from [0, 1]",
            colour="each channel of client k has its own contrast and brightness, of the given strength",
            missing_channels="each channel is missing for each client with probability strength",
            permuted_pixels="clients fall into groups, each of which sees the numbers of a sample in its own order",
            label_noise="a share strength * u of client k's training labels is wrong, u drawn from [0, 1]",
            label_groups="clients fall into groups, each of which names the classes in an order of its own",
            rotation="clients fall into groups, whose pictures are turned by multiples of 90 degrees",
        ),
    ] = "none"
    strength: Annotated[
        float, Field(ge=0, description="0 changes nothing; of label_noise and missing_channels at most 1"),
        OnlyFor(
            feature_shift=0.5, contrast=0.5, noise=0.5, blur=1.0, colour=0.5, missing_channels=0.3, label_noise=0.4
        ),
    ] = 0.0  # fmt: skip
    groups: Annotated[
        int, Field(ge=2, description="groups of clients, of nearly equal size, drawn at random; of rotation 2 or 4"),
        OnlyFor(*_GROUPED),
    ] = 4  # fmt: skip
    feature_shift: FeatureShift | None = None
    contrast: Contrast | None = None
    noise: Noise | None = None
    blur: Blur | None = None
    colour: Colour | None = None
    missing_channels: MissingChannels | None = None
    permuted_pixels: PermutedPixels | None = None
    rotation: Rotation | None = None
    label_groups: LabelGroups | None = None
    label_noise: LabelNoise | None = None
    drift: Drift | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name in ("label_noise", "missing_channels"):
            check(self.strength <= 1, "heterogeneity.strength", self.strength, "a number >= 0 and <= 1")
        if self.name == "rotation":
            check(self.groups in (2, 4), "heterogeneity.groups", self.groups, "2 or 4 with heterogeneity=rotation")

        if getattr(self, self.name, None) is not None:
            allowed = f"its default, because heterogeneity.{self.name}.* say it"
            usual = choice_options(type(self), self.name)
            for name in ("strength", "groups"):
                value = getattr(self, name)
                if name in usual:
                    check(value == usual[name].default, f"heterogeneity.{name}", value, allowed)

    def shifts(self) -> dict[str, Settings]:
        """Shifts by name, in the order in which they are applied."""
        chosen: dict[str, Settings] = {}
        for name in SHIFTS:
            given: Settings | None = getattr(self, name)
            if given is not None:
                chosen[name] = given
            elif name == self.name:
                chosen[name] = self._named()
        return chosen

    def _named(self) -> Settings:
        """Settings of the shift that is chosen by name."""
        if self.name == "rotation":
            return Rotation(self.groups, 360 / self.groups)
        kind = SHIFTS[self.name]
        return kind(groups=self.groups) if self.name in _GROUPED else kind(strength=self.strength)  # type: ignore[call-arg]
