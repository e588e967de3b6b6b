"""What is done around the mean of a round.

The groups ``compression``, ``privacy``, ``aggregation`` and ``server_optimizer``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from fedpers.errors import check
from fedpers.settings.base import Choices, OnlyFor, Settings
from fedpers.settings.training import Beta

PRIVACIES = Choices(
    none="changes are averaged as they come",
    fixed="central differential privacy: clipped changes, noise on their mean; needs strategy.weighting=uniform",
    adaptive="the same with a norm that follows the clients' changes",
)


@dataclass(kw_only=True)
class TopKConfig(Settings, group="compression"):
    """Options of :class:`~fedpers.server.postprocessors.TopK`."""

    share: Annotated[
        float,
        Field(gt=0, le=1, description="of the entries of each tensor, one at least; 1: all, and no positions"),
        OnlyFor("topk"),
    ] = 0.01
    bits: Annotated[
        Literal[2, 3, 4, 5, 6, 7, 8, 16, 32],
        Field(title="2 to 8, 16 or 32", description="of a value; up to 8 it is a byte, 32 is float32 as it is"),
        OnlyFor("topk"),
    ] = 8
    error_feedback: Annotated[
        bool, Field(description="clients add what they did not send to their next change"), OnlyFor("topk")
    ] = True


@dataclass(kw_only=True)
class CompressionConfig(TopKConfig):
    """How replies are compressed (the group ``compression``)."""

    name: Annotated[
        str,
        Choices(
            none="changes travel whole",
            topk="of each tensor of a client's change only the largest entries travel, in few bits",
        ),
    ] = "none"


@dataclass(kw_only=True)
class PrivacyConfig(Settings, group="privacy"):
    """Central differential privacy (the group ``privacy``), see :mod:`fedpers.server.postprocessors.privacy`."""

    name: Annotated[str, PRIVACIES] = "none"
    noise: Annotated[
        float,
        Field(
            ge=0, description="standard deviation of the noise, relative to what one client can change; 0 only clips"
        ),
        OnlyFor("fixed", "adaptive"),
    ] = 1.0
    norm: Annotated[
        float,
        Field(
            gt=0, description="largest Euclidean norm of a client's change of all shared entries; at first, if adaptive"
        ),
        OnlyFor(fixed=1.0, adaptive=0.1),
    ] = 1.0
    quantile: Annotated[
        float, Field(ge=0, le=1, description="share of the changes that should be within the norm"), OnlyFor("adaptive")
    ] = 0.5
    norm_lr: Annotated[float, Field(gt=0, description="rate of the norm"), OnlyFor("adaptive")] = 0.2
    count_noise: Annotated[
        float | None,
        Field(
            ge=0,
            description="standard deviation of the noise on the number of changes within the norm, > noise / 2; "
            "null: a twentieth of the sampled clients",
        ),
        OnlyFor("adaptive"),
    ] = None
    delta: Annotated[
        float,
        Field(gt=0, lt=1, description="probability with which more than epsilon may be lost; far below 1 / clients"),
        OnlyFor("fixed", "adaptive"),
    ] = 1e-5
    noise_source: Annotated[
        Literal["seed", "system"],
        Field(description="seed: can be repeated, and subtracted by whoever knows the seed; system: neither"),
        OnlyFor("fixed", "adaptive"),
    ] = "seed"


@dataclass(frozen=True, kw_only=True)
class Aggregation(Settings, group="aggregation"):
    """What takes the place of the mean (the group ``aggregation``); all but the mean know no weights."""

    name: Annotated[
        str,
        Choices(
            mean="weighted by strategy.weighting",
            median="of each entry",
            trimmed_mean="of each entry, without the largest and smallest",
            krum="the reply nearest to its neighbours",
        ),
    ] = "mean"
    malicious: Annotated[
        int,
        Field(ge=0, description="clients that may send anything; needs 2 * malicious + 3 clients in a round"),
        OnlyFor("krum"),
    ] = 1
    share: Annotated[
        float, Field(gt=0, lt=0.5, description="of the replies, left out at either end"), OnlyFor("trimmed_mean")
    ] = 0.2

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


@dataclass(frozen=True, kw_only=True)
class ServerOptimizerConfig(Settings, group="server_optimizer"):
    """How the server moves (the group ``server_optimizer``), see :mod:`fedpers.server.postprocessors.optimizer`."""

    name: Annotated[
        str,
        Choices(
            none="to the mean of the clients",
            sgd="along the mean change of the clients",
            momentum="the same with momentum: FedAvgM",
            adam="FedAdam",
            yogi="FedYogi",
        ),
    ] = "none"
    lr: Annotated[
        float, Field(gt=0, description="rate of the server"), OnlyFor(sgd=1.0, momentum=1.0, adam=0.01, yogi=0.01)
    ] = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1), OnlyFor("momentum")] = 0.9
    betas: Annotated[
        tuple[Beta, Beta],
        Field(title="two numbers >= 0 and < 1", description="of the moments"),
        OnlyFor("adam", "yogi"),
    ] = (0.9, 0.99)
    eps: Annotated[
        float,
        Field(gt=0, description="added to the root of the second moment, tau in the paper"),
        OnlyFor("adam", "yogi"),
    ] = 1e-3
