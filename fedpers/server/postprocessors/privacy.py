"""Central differential privacy of the arrays: clients' changes are clipped, and their mean gets noise.

H. B. McMahan et al., Learning Differentially Private Recurrent Language Models, ICLR 2018, arXiv:1710.06963; adaptive:
G. Andrew et al., Differentially Private Learning with Adaptive Clipping, NeurIPS 2021, arXiv:1905.03871.

    d_k <- (w_k - w) * min(1, C / |w_k - w|)                  each client's change of all shared entries, clipped
    w   <- w + mean_k d_k + N(0, (z * C / K)^2)               K replies of equal weight
    C   <- C * exp(-lr * (b - quantile))                      adaptive; b the noisy share of changes within C

What this guarantees, and what not, is in :mod:`fedpers.server.postprocessors.accounting`. With ``noise_source="seed"``
whoever knows the run's seed can draw the same noise and subtract it: right for simulation, where a run can be repeated,
and no protection of anybody's data. With ``"system"`` the noise comes from the operating system's generator, and no run
can be repeated.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedpers.cohort import Tree, entries, tree
from fedpers.cohort.tree import expand_rows
from fedpers.errors import check
from fedpers.randomness import generator
from fedpers.records import ARRAYS
from fedpers.server.postprocessors.accounting import INSTALL, epsilon
from fedpers.server.postprocessors.base import Postprocessor, check_mean
from fedpers.settings.server import PRIVACIES, PrivacyConfig

if TYPE_CHECKING:
    from fedpers.server.strategy import PersonalizedStrategy

log = logging.getLogger(__name__)
CLIPPED = "clipped"
"""Metric of a reply: 1 if its change was longer than the clipping norm."""
NORM = "norm"


@dataclass(kw_only=True)
class Privacy(PrivacyConfig, Postprocessor):
    """Clipping and noise."""

    role: ClassVar[str] = "privacy"
    setting: ClassVar[str] = "privacy"
    name: Annotated[str, PRIVACIES] = "fixed"

    @property
    def label(self) -> str:
        """Its name."""
        return self.name

    @property
    def adaptive(self) -> bool:
        """Whether the norm follows the changes."""
        return self.name == "adaptive"

    @property
    def clipping_norm(self) -> float:
        """The norm of the present round."""
        return float(self.state[NORM]) if NORM in self.state else self.norm

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

    def check(self, strategy: PersonalizedStrategy, arrays: Tree, sampled: int) -> None:
        """Refuse methods, weights, arrays and aggregates for which the noise is not sized."""
        check(self.name != "none", "privacy", self.name, "fixed or adaptive among postprocessors")
        check_mean(self, strategy, "none")
        check_share(strategy)
        self.noises(sampled)
        check_floats(arrays, self.label)

    def reply(self, records: dict[str, Tree], sent: Tree) -> tuple[dict[str, Tree], dict[str, Tensor]]:
        """Shorten changes of the `sent` arrays to the clipping norm, and say which were longer."""
        if ARRAYS not in records:
            return records, {}
        values, size = entries(records[ARRAYS]), len(records[ARRAYS])
        before = {name: sent[name].to(value.device) for name, value in values.items()}
        changes = {name: value - before[name] for name, value in values.items()}
        squares = [change.double().square().reshape(size, -1).sum(1) for change in changes.values()]
        lengths = torch.stack(squares).sum(0).sqrt() if squares else torch.zeros(size, dtype=torch.float64)
        if not lengths.isfinite().all():
            raise ValueError("its change is too large for a finite norm")
        norm = self.clipping_norm
        longer = lengths > norm
        metrics = {CLIPPED: longer.double()}
        if not longer.any():
            return records, metrics
        factors = torch.where(longer, norm / lengths, 1.0)
        clipped = {}
        for name, change in changes.items():
            exact = torch.promote_types(change.dtype, torch.float32)  # as a number by which halves are multiplied
            shortened = (change.to(exact) * expand_rows(factors.to(exact), change)).to(change.dtype)
            clipped[name] = torch.where(expand_rows(longer, change), before[name] + shortened, values[name])
        return {**records, ARRAYS: tree(clipped, size)}, metrics

    def aggregate(
        self, strategy: PersonalizedStrategy, means: dict[str, Tree], replies: Mapping[int, Mapping[str, float]]
    ) -> dict[str, Tree]:
        """Add the noise of this round; an adaptive norm moves on."""
        report, norm = strategy.report, self.clipping_norm
        sampled, count = len(report.sampled), len(replies)
        if self.adaptive:
            clipped = sum(metrics.get(CLIPPED, 0.0) for metrics in replies.values())
            following = self.next_norm(norm, clipped, sampled, count, strategy.seed, report.round)
            self.state = {NORM: torch.tensor(following, dtype=torch.float64)}
            report.extra["clipping_norm"] = norm
        return self.blur(means, norm, sampled, count, strategy.seed, report.round)

    def blur(
        self, means: Mapping[str, Tree], norm: float, sampled: int, replies: int, seed: int, round: int
    ) -> dict[str, Tree]:
        """Add the noise that hides one of `replies` clients with changes of at most `norm`."""
        deviation = self.noises(sampled)[0] * norm / replies
        if not deviation or ARRAYS not in means:
            return dict(means)
        draw = self._noise(seed, "privacy-noise", round)
        noisy: dict[str, Tensor] = {}
        for name, value in sorted(entries(means[ARRAYS]).items()):
            noise = torch.from_numpy(draw.normal(0.0, deviation, tuple(value.shape)))
            noisy[name] = (value.double() + noise.to(value.device)).to(value.dtype)
        return {**means, ARRAYS: tree({name: noisy[name] for name in entries(means[ARRAYS])})}

    def next_norm(self, norm: float, clipped: float, sampled: int, replies: int, seed: int, round: int) -> float:
        """The clipping norm after a round in which `clipped` of `replies` changes were longer than `norm`."""
        if not self.adaptive:
            return norm
        noise = float(self._noise(seed, "privacy-count", round).normal(0.0, 1.0, ()))
        within = (replies - clipped + self.noises(sampled)[1] * noise) / replies
        return norm * math.exp(-self.norm_lr * (within - self.quantile))

    def _noise(self, seed: int, purpose: str, round: int) -> np.random.Generator | SystemNoise:
        return SystemNoise() if self.noise_source == "system" else generator(seed, purpose, round)

    def summary(self, rounds: int, sampled: int, clients: int) -> dict[str, Any]:
        """``privacy_epsilon`` (None where it is infinite or not known) and ``privacy_delta``."""
        spent = epsilon(self.noise, sampled, clients, rounds, self.delta)
        if spent is None:
            log.warning("Epsilon is not known without the library that accounts for privacy: %s.", INSTALL)
        finite = spent is not None and math.isfinite(spent)
        return {"privacy_epsilon": spent if finite else None, "privacy_delta": self.delta}


class SystemNoise:
    """Normal deviates from the operating system's random bytes, which no seed repeats."""

    def normal(self, mean: float, deviation: float, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Draw by the inverse of the normal distribution function: 53 bits choose a place in one half, one the half."""
        bits = np.frombuffer(os.urandom(8 * math.prod(shape)), np.uint64)
        lower = torch.from_numpy(((bits >> np.uint64(11)).astype(np.float64) + 1) * 2.0**-54)  # in (0, 1/2]
        sign = 1.0 - 2.0 * (bits & np.uint64(1)).astype(np.float64)
        deviates = sign * torch.special.ndtri(lower).numpy()
        return np.asarray(mean + deviation * deviates).reshape(shape)


def check_share(strategy: PersonalizedStrategy) -> None:
    """Refuse for privacy what lets one client count for more than its share."""
    allowed = "uniform with privacy, whose noise is sized for clients of equal weight"
    check(strategy.weighting == "uniform", "strategy.weighting", strategy.weighting, allowed)
    for other in strategy.postprocessors:
        allowed = "mean with privacy, whose noise is sized for a mean"
        check(other.setting != "aggregation", "aggregation", other.label, allowed)


def check_floats(arrays: Tree, label: str) -> None:
    """Refuse counts among the arrays: they would make up most of a change's norm, and noise makes nonsense of them."""
    for name, value in entries(arrays).items():
        dtype = str(value.dtype).removeprefix("torch.")
        allowed = "a network whose shared entries are no batch statistics: another one, or strategy=fedbn"
        check(value.is_floating_point(), "privacy", f"{label} with '{name}' of {dtype}", allowed)


__all__ = ["CLIPPED", "Privacy", "SystemNoise", "check_floats", "check_share"]
