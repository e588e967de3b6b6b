"""One file per method: its server half (a Flower strategy) and its client half, side by side."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from fedpers.errors import ConfigError, one_of
from fedpers.strategies.apfl import APFL, APFLUpdate
from fedpers.strategies.base import CohortApp, LocalUpdate, PersonalizedStrategy, Received, RoundReport
from fedpers.strategies.ditto import Ditto, DittoUpdate
from fedpers.strategies.ensemble import Ensemble, EnsembleUpdate
from fedpers.strategies.fedala import FedALA, FedALAUpdate
from fedpers.strategies.fedamp import FedAMP, FedAMPUpdate
from fedpers.strategies.fedavg import FedAvg, FedAvgUpdate
from fedpers.strategies.fedavg_ft import FedAvgFT, FedAvgFTUpdate
from fedpers.strategies.fedbn import FedBN, FedBNUpdate
from fedpers.strategies.fedjets import FedJETs, FedJETsUpdate
from fedpers.strategies.fedmf import FedMF, FedMFUpdate
from fedpers.strategies.fedper import FedPer, FedPerUpdate
from fedpers.strategies.fedproto import FedProto, FedProtoUpdate
from fedpers.strategies.fedprox import FedProx, FedProxUpdate
from fedpers.strategies.fedrap import FedRAP, FedRAPUpdate
from fedpers.strategies.fedrep import FedRep, FedRepUpdate
from fedpers.strategies.fedselect import FedSelect, FedSelectUpdate
from fedpers.strategies.fedvpt import FedVPT, FedVPTUpdate
from fedpers.strategies.gpfl import GPFL, GPFLUpdate
from fedpers.strategies.head_only import HeadOnly, HeadOnlyUpdate
from fedpers.strategies.local import Local, LocalOnlyUpdate
from fedpers.strategies.moon import MOON, MOONUpdate
from fedpers.strategies.no_learning import NoLearning, NoLearningUpdate
from fedpers.strategies.perfedavg import PerFedAvg, PerFedAvgUpdate
from fedpers.strategies.pfedme import PFedMe, PFedMeUpdate
from fedpers.strategies.pfedpg import PFedPG, PFedPGUpdate
from fedpers.strategies.pfedrec import PFedRec, PFedRecUpdate
from fedpers.strategies.pretrained import Pretrained, PretrainedUpdate
from fedpers.strategies.scaffold import Scaffold, ScaffoldUpdate

STRATEGIES: dict[str, type[PersonalizedStrategy]] = {
    "local": Local,
    "fedavg": FedAvg,
    "fedavg_ft": FedAvgFT,
    "fedprox": FedProx,
    "scaffold": Scaffold,
    "fedper": FedPer,
    "fedrep": FedRep,
    "fedbn": FedBN,
    "ditto": Ditto,
    "pfedme": PFedMe,
    "perfedavg": PerFedAvg,
    "apfl": APFL,
    "moon": MOON,
    "fedala": FedALA,
    "fedproto": FedProto,
    "fedamp": FedAMP,
    "fedrap": FedRAP,
    "fedmf": FedMF,
    "pfedrec": PFedRec,
    "no_learning": NoLearning,
    "gpfl": GPFL,
    "fedselect": FedSelect,
    "fedjets": FedJETs,
    "pretrained": Pretrained,
    "ensemble": Ensemble,
    "head_only": HeadOnly,
    "fedvpt": FedVPT,
    "pfedpg": PFedPG,
}
"""Methods by the name typed as ``strategy=``."""

_NOT_A_METHODS_OWN = {
    "training",
    "fraction",
    "seed",
    "evaluate_every",
    "min_replies",
    "unseen",
    "postprocessors",
}


def strategy_class(name: str) -> type[PersonalizedStrategy]:
    """Return the server half of a method.

    Parameters
    ----------
    name : str
        A key of :data:`STRATEGIES`, or ``module:Class`` for a method of your own, importable from the current folder.

    Raises
    ------
    ConfigError
        If there is no such method, or the class is not a :class:`PersonalizedStrategy`.
    """
    if ":" not in name:
        if name not in STRATEGIES:
            raise ConfigError("strategy", name, f"{one_of(STRATEGIES, name)}, or module:Class")
        return STRATEGIES[name]
    module, _, attribute = name.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise ConfigError("strategy.name", name, f"module:Class of a module that can be imported ({error})") from error
    if not (isinstance(found, type) and issubclass(found, PersonalizedStrategy)):
        raise ConfigError("strategy.name", name, "module:Class of a subclass of PersonalizedStrategy")
    return found


def option_types(name: str) -> dict[str, Any]:
    """Return the types of a method's own settings, of both halves.

    Raises
    ------
    ConfigError
        If the method is unknown.
    """
    allowed = options_of(name)
    server = strategy_class(name)
    hints = {**get_type_hints(server.update), **get_type_hints(server)}
    return {key: hints[key] for key in allowed}


def options_of(name: str) -> dict[str, Any]:
    """Return the defaults of a method's own settings, of both halves, as typed after ``strategy.``.

    Raises
    ------
    ConfigError
        If the method is unknown.
    """
    server = strategy_class(name)
    found: dict[str, Any] = {}
    for half in (server, server.update):
        for field in fields(half):
            if field.init and field.name not in _NOT_A_METHODS_OWN:
                found[field.name] = field.default
    return found


def make_strategy(
    name: str, options: Mapping[str, Any] | None = None, *, server: Mapping[str, Any] | None = None, **client: Any
) -> tuple[PersonalizedStrategy, LocalUpdate]:
    """Make both halves of a method.

    Parameters
    ----------
    name : str
        See :func:`strategy_class`.
    options : mapping, optional
        The method's own settings; each goes to the half that has it.
    server : mapping, optional
        Further settings of the server half (``fraction``, ``seed``, ``evaluate_every``, ``min_replies``, ``unseen``).
    **client
        Further settings of the client half (``training``).

    Raises
    ------
    ConfigError
        If the method or a setting is unknown, or a value is out of its range.
    """
    allowed = options_of(name)
    strategy = strategy_class(name)
    for key, value in (options or {}).items():
        if key not in allowed:
            raise ConfigError(f"strategy.{key}", value, f"one of the settings of {name}: {one_of(allowed, key)}")
    halves: list[dict[str, Any]] = []
    for half, extra in ((strategy, server or {}), (strategy.update, client)):
        own = {field.name for field in fields(half) if field.init}
        halves.append({**{k: v for k, v in (options or {}).items() if k in own}, **extra})
    return strategy(**halves[0]), strategy.update(**halves[1])


__all__ = [
    "APFL",
    "GPFL",
    "MOON",
    "STRATEGIES",
    "APFLUpdate",
    "CohortApp",
    "Ditto",
    "DittoUpdate",
    "Ensemble",
    "EnsembleUpdate",
    "FedALA",
    "FedALAUpdate",
    "FedAMP",
    "FedAMPUpdate",
    "FedAvg",
    "FedAvgFT",
    "FedAvgFTUpdate",
    "FedAvgUpdate",
    "FedBN",
    "FedBNUpdate",
    "FedJETs",
    "FedJETsUpdate",
    "FedMF",
    "FedMFUpdate",
    "FedPer",
    "FedPerUpdate",
    "FedProto",
    "FedProtoUpdate",
    "FedProx",
    "FedProxUpdate",
    "FedRAP",
    "FedRAPUpdate",
    "FedRep",
    "FedRepUpdate",
    "FedSelect",
    "FedSelectUpdate",
    "FedVPT",
    "FedVPTUpdate",
    "GPFLUpdate",
    "HeadOnly",
    "HeadOnlyUpdate",
    "Local",
    "LocalOnlyUpdate",
    "LocalUpdate",
    "MOONUpdate",
    "NoLearning",
    "NoLearningUpdate",
    "PFedMe",
    "PFedMeUpdate",
    "PFedPG",
    "PFedPGUpdate",
    "PFedRec",
    "PFedRecUpdate",
    "PerFedAvg",
    "PerFedAvgUpdate",
    "PersonalizedStrategy",
    "Pretrained",
    "PretrainedUpdate",
    "Received",
    "RoundReport",
    "Scaffold",
    "ScaffoldUpdate",
    "make_strategy",
    "option_types",
    "options_of",
    "strategy_class",
]
