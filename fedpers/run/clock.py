"""Time that rounds would take on the clients' own devices, beside the time that computing them here takes.

Rounds are synchronous: each sampled client receives, trains and replies, and the slowest ends the round. Speeds are
those of a median device, times ``exp(spread * z)`` with z from N(0, 1) for each client's computation, download and
upload, drawn from (seed, "device", client). A client computes the gradients that its reply counts, each of as many
samples as a step has in the mean, and receives and sends the mean bytes of the round. The server's work, evaluation,
and clients whose reply is left out take no time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from fedpers.randomness import generator
from fedpers.settings.run import ClockConfig
from fedpers.strategies import RoundReport

_BITS = 8e-6
"""Megabits of a byte."""


class DeviceClock:
    """Says how long rounds take.

    Parameters
    ----------
    config : ClockConfig
    seed : int
        The run's, so that all methods are compared on the same devices.
    """

    def __init__(self, config: ClockConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self._speeds: dict[int, tuple[float, float, float]] = {}

    def speeds(self, client: int) -> tuple[float, float, float]:
        """Samples a second, and megabits a second down and up, of a client."""
        if client not in self._speeds:
            config = self.config
            medians = (config.samples_per_second, config.download, config.upload)
            drawn = generator(self.seed, "device", client).standard_normal(3).tolist()
            samples, down, up = (m * math.exp(config.spread * z) for m, z in zip(medians, drawn, strict=True))
            self._speeds[client] = samples, down, up
        return self._speeds[client]

    def seconds(self, report: RoundReport, replies: Mapping[int, Mapping[str, float]]) -> float:
        """Time until the slowest reply of a round is there; 0 without replies.

        Parameters
        ----------
        report : RoundReport
            Of the round, for the bytes.
        replies : mapping of int to mapping
            Metrics of each usable reply, by client: ``samples`` of all ``steps``, for which a method may compute more
            ``gradients`` than one each.
        """
        received = _BITS * (report.bytes_down - report.bytes_to_others) / max(1, len(report.sampled))
        sent = _BITS * report.bytes_up / max(1, len(replies))
        times = [0.0]
        for client, metrics in replies.items():
            samples, down, up = self.speeds(client)
            per_step = metrics.get("gradients", 0.0) / steps if (steps := metrics.get("steps", 0.0)) else 1.0
            times.append(received / down + per_step * metrics.get("samples", 0.0) / samples + sent / up)
        return max(times)
