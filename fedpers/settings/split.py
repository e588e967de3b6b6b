"""How each client's samples are split: the group ``split``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from fedpers.errors import check
from fedpers.settings.base import Choices, OnlyFor, Settings

_Client = Annotated[int, Field(ge=0)]


@dataclass
class SplitConfig(Settings, group="split"):
    """How a client's samples are split (the group ``split``)."""

    name: Annotated[
        str,
        Choices(
            fractions="each client's own samples, at random",
            official="clients own training samples; the official test samples are dealt by each client's label mix",
            leave_one_out="ratings only: a user's latest item is for testing, the one before for validation",
        ),
    ] = "fractions"
    validation: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="share of the client's samples, or of its training samples (official); 0: no round is selected "
            "and the last one is reported",
        ),
        OnlyFor("fractions", "official"),
    ] = 0.15
    test: Annotated[
        float, Field(gt=0, lt=1, description="share of the client's samples; the rest is for training"),
        OnlyFor("fractions"),
    ] = 0.25  # fmt: skip
    public: Annotated[
        float,
        Field(ge=0, lt=1, description="share of all training samples that belongs to nobody, for pretraining"),
        OnlyFor("fractions", "official"),
    ] = 0.0
    global_test: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="share of each client's samples, of its training samples (official), taken out before they are "
            "split: a network that all clients are sent whole is also tested on all of these, as global/accuracy",
        ),
        OnlyFor("fractions", "official"),
    ] = 0.0
    max_train: Annotated[
        int | None,
        Field(ge=1, description="training samples of a client at most, drawn at random; the others are nobody's"),
        OnlyFor("fractions", "official"),
    ] = None
    unseen: Annotated[
        Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0, lt=1)] | tuple[_Client, ...],
        Field(
            title="a number of clients >= 0, a share between 0 and 1, or a list of clients, e.g. [3,17]",
            description="so many clients, drawn at random, or these never train and are only evaluated",
        ),
    ] = 0
    adapt_steps: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...],
        Field(
            title="whole numbers >= 1 in ascending order, e.g. [1,5,20]",
            description="unseen clients are evaluated at the end after so many local steps each, one after the other, "
            "in every phase of the method's local training; empty: after one local round",
        ),
    ] = ()
    stratified: Annotated[
        bool,
        Field(
            description="each part has the client's classes in proportion, as far as whole samples allow: a class with "
            "few may miss a part; false: parts are drawn whatever the class"
        ),
        OnlyFor("fractions", "official"),
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        ascending = list(self.adapt_steps) == sorted(set(self.adapt_steps))
        check(ascending, "split.adapt_steps", list(self.adapt_steps), "numbers in ascending order, each once")
        if self.name == "fractions":
            allowed = f"less than 1 - split.validation = {1 - self.validation:g}"
            check(self.validation + self.test < 1, "split.test", self.test, allowed)
