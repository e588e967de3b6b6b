"""The two halves every method consists of."""

from __future__ import annotations

from fedpers.client.app import CohortApp
from fedpers.client.update import LocalUpdate, Received, check_passes
from fedpers.server.report import RoundReport
from fedpers.server.strategy import PersonalizedStrategy, Phase, SampleWeighting, Weighting
from fedpers.strategies.registry import method

__all__ = [
    "CohortApp",
    "LocalUpdate",
    "PersonalizedStrategy",
    "Phase",
    "Received",
    "RoundReport",
    "SampleWeighting",
    "Weighting",
    "check_passes",
    "method",
]
