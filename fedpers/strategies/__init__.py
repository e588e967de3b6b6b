"""One file per method: its server half (a Flower strategy) and its client half, side by side.

``from fedpers.strategies import FedRep, FedRepUpdate`` finds a class in the file of its method.
"""

from __future__ import annotations

import importlib
from typing import Any

from fedpers.strategies.base import (
    CohortApp,
    LocalUpdate,
    PersonalizedStrategy,
    Received,
    RoundReport,
    SampleWeighting,
    Weighting,
)
from fedpers.strategies.registry import (
    STRATEGIES,
    default_options,
    make_strategy,
    method,
    method_options,
    option_types,
    strategy_class,
)

options_of = default_options  # former name, which code outside of this package may import


def __getattr__(name: str) -> Any:
    """Module of a method, or a class of one: imports the methods' files until one defines the class.

    Raises
    ------
    AttributeError
        If none does.
    """
    if name in STRATEGIES:
        return importlib.import_module(f"fedpers.strategies.{name}")
    for file in () if name.startswith("_") else STRATEGIES:
        module = importlib.import_module(f"fedpers.strategies.{file}")
        attribute = vars(module).get(name)
        if getattr(attribute, "__module__", None) == module.__name__:
            return attribute
    raise AttributeError(f"module 'fedpers.strategies' has no attribute '{name}'")


__all__ = [
    "STRATEGIES",
    "CohortApp",
    "LocalUpdate",
    "PersonalizedStrategy",
    "Received",
    "RoundReport",
    "SampleWeighting",
    "Weighting",
    "default_options",
    "make_strategy",
    "method",
    "method_options",
    "option_types",
    "options_of",
    "strategy_class",
]
