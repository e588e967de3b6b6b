"""What happened in a round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedpers.client.update import EXTRA


@dataclass
class RoundReport:
    """What happened in a round.

    Attributes
    ----------
    round : int
    sampled : list of int
        Clients asked to train, ascending.
    failures : dict of int to str
        Those whose reply was left out, and why.
    bytes_down, bytes_up : int
        Arrays sent to the clients asked to train, and those of their usable replies; evaluation is measurement and
        no part of a method.
    bytes_to_others : int
        Of `bytes_down` what went to clients that were not asked to train; the round does not wait for them.
    steps, samples, gradients : int
        Optimizer steps, samples and gradient computations (of one client on one batch) of all replies.
    train_loss : float
        Mean over samples of the losses met while training; NaN without replies.
    extra : dict of str to float
        The method's own metrics: means over the replies of :attr:`fedpers.cohort.Reply.metrics`, and what its server
        half adds.
    clients : dict of int to dict
        Metrics of each evaluated client, see :meth:`LocalUpdate.evaluate`; empty in rounds without evaluation.
    unseen, adapted : dict of int to dict
        Metrics of clients that never train, as they come, and (at the end of a run) after adapting locally.
    common : dict of str to float
        Metrics of the network that all clients are sent, on the data's global test set; empty where there is none.
    evaluation_failures : dict of int to str
    seconds : float
        From the start of training to the end of evaluation.
    train_seconds : float
        Training and aggregation only.
    simulated_seconds : float
        That the training would take on the clients' own devices (:mod:`fedpers.run.clock`); 0 without such a clock.
    """

    round: int
    sampled: list[int] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    steps: int = 0
    samples: int = 0
    gradients: int = 0
    train_loss: float = math.nan
    extra: dict[str, float] = field(default_factory=dict)
    clients: dict[int, dict[str, float]] = field(default_factory=dict)
    unseen: dict[int, dict[str, float]] = field(default_factory=dict)
    adapted: dict[int, dict[str, float]] = field(default_factory=dict)
    evaluation_failures: dict[int, str] = field(default_factory=dict)
    common: dict[str, float] = field(default_factory=dict, kw_only=True)
    seconds: float = 0.0
    train_seconds: float = 0.0
    simulated_seconds: float = field(default=0.0, kw_only=True)
    bytes_to_others: int = field(default=0, kw_only=True)

    @property
    def diverged(self) -> list[int]:
        """Evaluated clients with an infinite loss, ascending."""
        return sorted(c for c, metrics in self.clients.items() if any(math.isinf(value) for value in metrics.values()))

    def book(self, replies: Mapping[int, Mapping[str, float]], bytes_up: int) -> None:
        """Add what the usable replies of a round, by client, say of its training."""
        losses, extra = 0.0, dict[str, list[float]]()
        for _, metrics in sorted(replies.items()):
            self.steps += int(metrics.get("steps", 0))
            self.gradients += int(metrics.get("gradients", 0))
            self.samples += int(metrics.get("samples", 0))
            losses += metrics.get("train-loss", math.nan) * metrics.get("samples", 0)
            for name, value in metrics.items():
                if name.startswith(EXTRA):
                    extra.setdefault(name.removeprefix(EXTRA), []).append(value)
        self.bytes_up += bytes_up
        self.train_loss = losses / self.samples if self.samples else math.nan
        self.extra.update({name: sum(values) / len(values) for name, values in extra.items()})
