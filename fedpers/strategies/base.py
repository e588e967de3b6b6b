"""The two halves every method consists of."""

from __future__ import annotations

from fedpers.strategies.client import CohortApp, LocalUpdate, Received
from fedpers.strategies.server import PersonalizedStrategy, RoundReport

__all__ = ["CohortApp", "LocalUpdate", "PersonalizedStrategy", "Received", "RoundReport"]
