"""The two halves every method consists of."""

from __future__ import annotations

from fedpers.client.app import CohortApp
from fedpers.client.update import LocalUpdate, Received, refuse_steps_beside
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
    "method",
    "refuse_steps_beside",
]
