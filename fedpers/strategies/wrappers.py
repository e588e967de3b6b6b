"""Around the mean of a round: clipping and noise, robust aggregates, and Flower's own wrappers.

All are for methods whose clients answer with the server's arrays and nothing else, of which the server takes the mean
(:meth:`~fedpers.strategies.server.PersonalizedStrategy.plain_mean`).

**Privacy** is central differential privacy of the arrays: H. B. McMahan et al., Learning Differentially Private
Recurrent Language Models, ICLR 2018, arXiv:1710.06963; adaptive: G. Andrew et al., Differentially Private Learning with
Adaptive Clipping, NeurIPS 2021, arXiv:1905.03871.

    d_k <- (w_k - w) * min(1, C / |w_k - w|)                  each client's change of all shared entries, clipped
    w   <- w + mean_k d_k + N(0, (z * C / K)^2)               K replies of equal weight
    C   <- C * exp(-lr * (b - quantile))                      adaptive; b the noisy share of changes within C

Metrics and numbers of samples are sent as they are, and no account is kept of what is spent.

Flower's ``DifferentialPrivacy...`` strategies do the same around a method of this package in any ``ServerApp``.
Differences in flwr 1.41: they draw from NumPy's global generator; a round in which a client fails is dropped; a change
of exactly 0 raises ZeroDivisionError; the adaptive ones take the share of clipped changes for b, so that C runs away
from its target, and the server's one sizes the noise by the next round's C.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import flwr.app as flower
import torch
from flwr.serverapp.exception import AggregationError, InconsistentMessageReplies
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedMedian,
    FedTrimmedAvg,
    Krum,
    Strategy,
)
from torch import Tensor

from fedpers.cohort import Tree, entries, tree
from fedpers.errors import TrainingError, check, one_of
from fedpers.randomness import generator
from fedpers.strategies.records import ARRAYS, METRICS, from_record, to_record

CLIPPED = "clipped"
"""Metric of a reply: 1 if its change was longer than the clipping norm."""
PRIVACIES = ("none", "fixed", "adaptive")
AGGREGATIONS = ("mean", "median", "trimmed_mean", "krum")
CLIENT_SIDE = (DifferentialPrivacyClientSideFixedClipping, DifferentialPrivacyClientSideAdaptiveClipping)
_FLOWERS = (
    DifferentialPrivacyServerSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    *CLIENT_SIDE,
)


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """Clipping and noise.

    Parameters
    ----------
    name : {"none", "fixed", "adaptive"}
        Whether the clipping norm stays or follows the changes' norms.
    noise : float
        Noise multiplier z, >= 0: standard deviation of the noise, relative to what one client can change at most.
    norm : float
        Largest Euclidean norm of a client's change over all shared entries, > 0; if adaptive, that of the first round.
    quantile : float
        Adaptive: share of the changes that should be within the norm, in [0, 1].
    norm_lr : float
        Adaptive: rate of the norm, > 0.
    count_noise : float, optional
        Adaptive: standard deviation of the noise on the number of changes within the norm, > noise / 2; default a
        twentieth of the sampled clients.

    Raises
    ------
    ConfigError
        If a value is out of its range.
    """

    name: str = "fixed"
    noise: float = 1.0
    norm: float = 1.0
    quantile: float = 0.5
    norm_lr: float = 0.2
    count_noise: float | None = None

    def __post_init__(self) -> None:
        check(self.name in PRIVACIES, "privacy", self.name, one_of(PRIVACIES, self.name))
        check(0 <= self.noise < math.inf, "privacy.noise", self.noise, "a number >= 0")
        check(0 < self.norm < math.inf, "privacy.norm", self.norm, "a number > 0")
        check(0 <= self.quantile <= 1, "privacy.quantile", self.quantile, "a number >= 0 and <= 1")
        check(0 < self.norm_lr < math.inf, "privacy.norm_lr", self.norm_lr, "a number > 0")
        given = self.count_noise
        check(given is None or 0 <= given < math.inf, "privacy.count_noise", given, "a number >= 0, or null")

    @property
    def adaptive(self) -> bool:
        """Whether the norm follows the changes."""
        return self.name == "adaptive"

    def noises(self, sampled: int) -> tuple[float, float]:
        """Noise multiplier of the mean, and standard deviation of the noise on the count.

        An adaptive norm spends some of the privacy that `noise` stands for on the count, so that the mean needs more.

        Parameters
        ----------
        sampled : int
            Clients asked in a round.

        Raises
        ------
        ConfigError
            If the count's noise is too small to leave anything for the mean.
        """
        if not self.adaptive or not self.noise:
            return self.noise, self.count_noise or 0.0
        count = sampled / 20 if self.count_noise is None else self.count_noise
        allowed = f"a number < {2 * count:g}, twice privacy.count_noise (default: a twentieth of the sampled clients)"
        check(self.noise < 2 * count, "privacy.noise", self.noise, allowed)
        return (self.noise**-2 - (2 * count) ** -2) ** -0.5, count

    def clip(self, records: Mapping[str, Tree], sent: Tree, norm: float) -> tuple[dict[str, Tree], bool]:
        """Shorten a reply's change of the `sent` arrays to `norm`; also say whether it was longer."""
        if ARRAYS not in records:
            return dict(records), False
        values = entries(records[ARRAYS])
        before = {name: sent[name].to(value.device) for name, value in values.items()}
        changes = {name: value - before[name] for name, value in values.items()}
        squares = [change.double().square().sum() for change in changes.values()]
        length = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
        if length <= norm:
            return dict(records), False
        clipped = {name: before[name] + change * (norm / length) for name, change in changes.items()}
        return {**records, ARRAYS: tree(clipped)}, True

    def blur(
        self, means: Mapping[str, Tree], norm: float, sampled: int, replies: int, seed: int, round: int
    ) -> dict[str, Tree]:
        """Add the noise that hides one of `replies` clients with changes of at most `norm`."""
        deviation = self.noises(sampled)[0] * norm / replies
        if not deviation or ARRAYS not in means:
            return dict(means)
        draw = generator(seed, "privacy-noise", round)
        noisy: dict[str, Tensor] = {}
        for name, value in sorted(entries(means[ARRAYS]).items()):
            noise = torch.from_numpy(draw.normal(0.0, deviation, tuple(value.shape)))
            noisy[name] = (value.double() + noise.to(value.device)).to(value.dtype)
        return {**means, ARRAYS: tree({name: noisy[name] for name in entries(means[ARRAYS])})}

    def next_norm(self, norm: float, clipped: float, sampled: int, replies: int, seed: int, round: int) -> float:
        """The clipping norm after a round in which `clipped` of `replies` changes were longer than `norm`."""
        if not self.adaptive:
            return norm
        noise = self.noises(sampled)[1] * generator(seed, "privacy-count", round).normal()
        within = (replies - clipped + noise) / replies
        return norm * math.exp(-self.norm_lr * (within - self.quantile))


@dataclass(frozen=True, kw_only=True)
class Aggregation:
    """What takes the place of the mean, by the name typed as ``aggregation=``.

    Parameters
    ----------
    name : {"mean", "median", "trimmed_mean", "krum"}
        Median and trimmed mean are taken entry by entry and, like Krum, know no weights.
    malicious : int
        Krum: clients that may send anything, >= 0.
    share : float
        Trimmed mean: share of the replies that is left out at either end, > 0 and < 0.5.

    Raises
    ------
    ConfigError
        If a value is out of its range.
    """

    name: str = "mean"
    malicious: int = 1
    share: float = 0.2

    def __post_init__(self) -> None:
        check(self.name in AGGREGATIONS, "aggregation", self.name, one_of(AGGREGATIONS, self.name))
        check(self.malicious >= 0, "aggregation.malicious", self.malicious, "a whole number >= 0")
        check(0 < self.share < 0.5, "aggregation.share", self.share, "a number > 0 and < 0.5")

    def strategy(self) -> Strategy | None:
        """Flower's strategy of that name; None for the mean."""
        if self.name == "krum":
            return Krum(num_malicious_nodes=self.malicious)
        return {"median": FedMedian(), "trimmed_mean": FedTrimmedAvg(beta=self.share)}.get(self.name)

    def replies(self, sampled: int) -> int:
        """Usable replies a round needs for the aggregate to be robust at all.

        Raises
        ------
        ConfigError
            If they are more than the `sampled` clients.
        """
        if self.name == "krum":
            needed = 2 * self.malicious + 3
            allowed = f"a whole number <= {(sampled - 3) // 2}, for Krum needs 2 * malicious + 3 of {sampled} clients"
            enough = "aggregation=mean or median: Krum needs 3 clients or more"
            check(needed <= sampled, "aggregation.malicious", self.malicious, allowed if sampled >= 3 else enough)
            return needed
        if self.name == "trimmed_mean":
            needed = next((n for n in range(3, sampled + 1) if int(self.share * n) >= 1), sampled + 1)
            allowed = f"a number >= {1 / sampled:g}, so that it leaves out at least one of {sampled} clients"
            enough = "aggregation=mean or median: a trimmed mean needs 3 clients or more"
            check(needed <= sampled, "aggregation.share", self.share, allowed if sampled >= 3 else enough)
            return needed
        return 1


class Aggregated:
    """Replies of a round, kept until a Flower strategy aggregates them; see :class:`fedpers.cohort.Fold`.

    The strategy is given each reply's weight and its changes of the server's arrays, in which distances lose no digits
    to what all have in common. Entries of integers (counts) are no directions in space: their median is taken.

    Parameters
    ----------
    aggregator : Strategy
    arrays : Tree
        The server's, before the round.
    round : int
    """

    def __init__(self, aggregator: Strategy, arrays: Tree, round: int) -> None:
        self.aggregator = aggregator
        self.arrays = arrays
        self.round = round
        self.kept: dict[int, tuple[Tree, float]] = {}

    def add(self, records: Mapping[str, Tree], weight: float, client: int) -> None:
        """Keep a client's arrays."""
        if ARRAYS in records:
            self.kept[client] = (records[ARRAYS], weight)

    def merge(self, other: Aggregated) -> None:
        """Keep what another kept."""
        self.kept.update(other.kept)

    def result(self) -> dict[str, Tree]:
        """Return the aggregate.

        Raises
        ------
        TrainingError
            If the strategy cannot aggregate the replies, or what it makes does not have the arrays' form.
        """
        if not self.kept:
            return {}
        before = entries(self.arrays)
        replies = [self.kept[client] for client in sorted(self.kept)]
        moved = [name for name, value in before.items() if value.is_floating_point()]
        changes = self._aggregate(
            [({n: values[n] - before[n].to(values[n].device) for n in moved}, weight) for values, weight in replies]
        )
        made = {}
        for name, value in before.items():
            if name not in moved:
                made[name] = torch.stack([values[name] for values, _ in replies]).median(0).values
                continue
            if name not in changes or changes[name].shape != value.shape:
                made_by, shape = type(self.aggregator).__name__, list(value.shape)
                raise TrainingError(f"round {self.round}: {made_by} gave no '{name}' of shape {shape}.")
            made[name] = value + changes[name].to(value)
        return {ARRAYS: tree(made)}

    def _aggregate(self, replies: list[tuple[dict[str, Tensor], float]]) -> dict[str, Tensor]:
        if not replies[0][0]:
            return {}
        key = getattr(self.aggregator, "weighted_by_key", "num-examples")
        messages = []
        for node, (values, weight) in enumerate(replies, start=1):
            content = flower.RecordDict({ARRAYS: to_record(tree(values)), METRICS: flower.MetricRecord({key: weight})})
            messages.append(flower.Message(content, node, flower.MessageType.TRAIN))
        name = type(self.aggregator).__name__
        flwr = logging.getLogger("flwr")
        level = flwr.level
        flwr.setLevel(logging.WARNING)  # it tells how many replies there are; so do our reports
        try:
            found, _ = self.aggregator.aggregate_train(self.round, messages)
        except (AggregationError, InconsistentMessageReplies, ValueError) as error:
            reason = " ".join(str(error).split()).removesuffix(".")
            what = f"round {self.round}: {name} cannot aggregate {len(replies)} replies: {reason}."
            raise TrainingError(what) from error
        finally:
            flwr.setLevel(level)
        if found is None:
            raise TrainingError(f"round {self.round}: {name} made nothing of {len(replies)} replies.")
        return dict(entries(from_record(found)))


def flowers_wrapper(strategy: Strategy) -> Strategy | None:
    """Flower's privacy wrapper that is calling `strategy` now, if one is.

    A wrapper does not tell the strategy inside that it is there, and to notice only at the replies would be too late.
    """
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        inside: Any = caller
        while isinstance(inside, _FLOWERS):
            inside = inside.strategy
            if inside is strategy:
                return cast(Strategy, caller)
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return None


__all__ = ["CLIENT_SIDE", "CLIPPED", "Aggregated", "Aggregation", "Privacy", "flowers_wrapper"]
