"""How a client trains: optimizer, rates, batches; the same for every method of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from fedpers.errors import check
from fedpers.settings.base import Settings

Beta = Annotated[float, Field(ge=0, lt=1)]
"""How much of a moment an optimizer keeps from step to step."""
Groups = Mapping[str, Mapping[Literal["lr", "weight_decay"], Annotated[float, Field(ge=0)]]]
"""Rates of some parameters, by what :func:`fedpers.cohort.select` knows them by."""


@dataclass(frozen=True, kw_only=True)
class Training(Settings, group="training"):
    """Settings of local training (the group ``training``).

    An optimizer's state starts anew in every round, as a client that keeps nothing else would have it. Where `groups`
    overlap, later entries win.
    """

    lr: Annotated[float, Field(gt=0, description="learning rate")] = 0.05
    epochs: Annotated[int, Field(ge=0, description="passes over a client's training samples in a round")] = 1
    steps: Annotated[int | None, Field(ge=0, description="steps in a round instead of epochs")] = None
    budget: Annotated[
        int | None,
        Field(
            ge=1,
            description="gradients that a client computes over the run, in the mean: the run ends with the round that "
            "reaches it; null: after `rounds`",
        ),
    ] = None
    batch_size: Annotated[int, Field(ge=0, description="samples in a batch; 0: all of a client's at once")] = 10
    shuffle: Annotated[bool, Field(description="a new order in every pass, else that of the data")] = True
    drop_last: Annotated[bool, Field(description="leave out the incomplete last batch of a pass")] = False
    optimizer: Annotated[Literal["sgd", "adam", "adamw"], Field(description="of clients, anew in every round")] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1, description="of sgd")] = 0.0
    nesterov: Annotated[bool, Field(description="of sgd, with momentum")] = False
    weight_decay: Annotated[float, Field(ge=0, description="decoupled in adamw, else added to the gradient")] = 0.0
    betas: Annotated[tuple[Beta, Beta], Field(title="two numbers >= 0 and < 1", description="of adam and adamw")] = (
        0.9,
        0.999,
    )
    eps: Annotated[float, Field(gt=0, description="of adam and adamw")] = 1e-8
    clip: Annotated[float | None, Field(gt=0, description="largest Euclidean norm of a client's gradient")] = None
    proximal: Annotated[
        float,
        Field(
            ge=0,
            description="strength of the pull to where a training of the round starts, as in fedprox: mu / 2 times the "
            "squared distance",
        ),
    ] = 0.0
    logit_adjustment: Annotated[
        float,
        Field(
            ge=0,
            description="of classes: times the logarithm of the client's share of each class, which is added to its "
            "scores in training only (Menon et al., ICLR 2021, eq. 10); 1 is balanced softmax. A class that a client "
            "lacks is no alternative",
        ),
    ] = 0.0
    schedule: Annotated[
        Literal["constant", "linear", "cosine"], Field(description="of the rate over a client's steps of a round, to 0")
    ] = "constant"
    lr_decay: Annotated[float, Field(gt=0, le=1, description="factor on the rate from round to round")] = 1.0
    groups: Annotated[
        Groups | None, Field(description="other lr or weight_decay for some parameters, e.g. {head:{lr:0.1}}")
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = "false unless training.momentum > 0"
        check(not self.nesterov or self.momentum > 0, "training.nesterov", self.nesterov, allowed)
        of_sgd = f"0 with training.optimizer={self.optimizer}, whose moments are training.betas"
        check(self.optimizer == "sgd" or self.momentum == 0, "training.momentum", self.momentum, of_sgd)
