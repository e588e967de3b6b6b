"""How a client trains: optimizer, rates, batches; the same for every method of a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedpers.errors import check, one_of

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of local training.

    Parameters
    ----------
    lr : float
        Learning rate, > 0.
    epochs : int
        Passes over a client's training samples in a round, >= 0.
    steps : int, optional
        Steps in a round instead of `epochs`.
    batch_size : int
        Samples in a batch, >= 1, or 0 for all samples of a client at once.
    shuffle : bool
        New order in every pass (drawn from seed, client, round, pass) or always the order of the data.
    drop_last : bool
        Leave out the incomplete last batch of a pass.
    optimizer : {"sgd", "adam", "adamw"}
        State (momentum) starts anew in every round, as a client that keeps nothing else would have it.
    momentum : float
        Of SGD, in [0, 1).
    nesterov : bool
    weight_decay : float
        >= 0; decoupled in ``adamw``, added to the gradient otherwise.
    betas, eps
        Of Adam.
    clip : float, optional
        Largest Euclidean norm of a client's whole gradient, > 0.
    schedule : {"constant", "linear", "cosine"}
        Rate over a client's own steps of the round, from `lr` to 0.
    lr_decay : float
        The rate of round r is ``lr * lr_decay ** (r - 1)``; in (0, 1].
    groups : mapping, optional
        Other `lr` or `weight_decay` for some parameters: ``{"head": {"lr": 0.1}}``. Later entries win.

    Raises
    ------
    ConfigError
        If a value is out of its range.
    """

    lr: float = 0.05
    epochs: int = 1
    steps: int | None = None
    batch_size: int = 10
    shuffle: bool = True
    drop_last: bool = False
    optimizer: str = "sgd"
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float | None = None
    schedule: str = "constant"
    lr_decay: float = 1.0
    groups: Mapping[str, Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        def ok(name: str, good: bool, allowed: str) -> None:
            check(good, f"training.{name}", getattr(self, name), allowed)

        ok("lr", self.lr > 0 and math.isfinite(self.lr), "a number > 0")
        ok("epochs", self.epochs >= 0, "a whole number >= 0")
        ok("steps", self.steps is None or self.steps >= 0, "a whole number >= 0, or null")
        ok("batch_size", self.batch_size >= 0, "a whole number >= 1, or 0 for all samples at once")
        ok("optimizer", self.optimizer in OPTIMIZERS, one_of(OPTIMIZERS, str(self.optimizer)))
        ok("schedule", self.schedule in SCHEDULES, one_of(SCHEDULES, str(self.schedule)))
        ok("momentum", 0 <= self.momentum < 1, "a number >= 0 and < 1")
        ok("nesterov", not self.nesterov or self.momentum > 0, "false unless training.momentum > 0")
        ok("weight_decay", self.weight_decay >= 0, "a number >= 0")
        ok("betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers >= 0 and < 1")
        ok("eps", self.eps > 0, "a number > 0")
        ok("clip", self.clip is None or self.clip > 0, "a number > 0, or null")
        ok("lr_decay", 0 < self.lr_decay <= 1, "a number > 0 and <= 1")
        for name, options in (self.groups or {}).items():
            for key, value in options.items():
                where = f"training.groups.{name}.{key}"
                check(key in ("lr", "weight_decay"), where, value, one_of(["lr", "weight_decay"], key))
                check(isinstance(value, (int, float)) and value >= 0, where, value, "a number >= 0")
