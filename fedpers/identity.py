"""Whether the two halves of a run belong together, settled by the answer to the server's first question.

A client names its method, the value of each of its options, the keys of a configuration that it reads, and what it does
to its replies. A server half refuses clients of another method, or with another value of an option that both halves
have, before anything is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import flwr.app as flower

from fedpers.errors import ConfigError, check

if TYPE_CHECKING:
    from fedpers.client.update import LocalUpdate
    from fedpers.server.postprocessors.base import Postprocessor
    from fedpers.server.strategy import PersonalizedStrategy

METHOD, METHODS, OPTION, READS, ENCODERS = "method", "methods", "option.", "reads", "encoders"
"""A client's class and its bases; those of them that are client halves of methods where it lives; and so on."""
ANY = "*"
"""Stands for all keys of a configuration: client mods may read any."""
ADAPTING = "adapting"
"""Key that marks a training of which nothing reaches the server."""
MAX_STEPS = "max-steps"
"""Key of the largest number of steps in each phase of a local training (Ditto's common and personal network, FedRep's
head and body)."""
PHASE_STEPS = "phase-steps"
"""Metric of such a training: the steps of the longest phase."""
INVERSE_VARIANCE = "inverse-variance"
"""Key that asks replies for the metric ``train/inverse_variance``, by which that weighting weights them."""
COMMON_KEYS = ("server-round", "auc", ADAPTING, MAX_STEPS, INVERSE_VARIANCE)
"""Keys of a message's configuration that the clients of every method read."""
_CLIENT_HALVES: set[str] = set()
"""Client halves that belong to a server half, by name."""


def register(update: type) -> None:
    """Remember the client half of a method."""
    _CLIENT_HALVES.add(_name(update))


def identity_of(
    update: LocalUpdate, encoders: Sequence[Postprocessor] = (), *, mods: bool = False
) -> flower.ConfigRecord:
    """What a client says of itself beside its number.

    Parameters
    ----------
    update : LocalUpdate
    encoders : sequence of Postprocessor
        What is done to its replies where it computes.
    mods : bool
        Whether it has Flower mods.
    """
    lineage = [_name(kind) for kind in type(update).__mro__ if kind is not object]
    reads = [ANY] if mods else sorted({*COMMON_KEYS, *update.config_keys})
    options = {f"{OPTION}{name}": _value(getattr(update, name)) for name in _options(update)}
    methods = [name for name in lineage if name in _CLIENT_HALVES]
    named = [_described(encoder) for encoder in encoders]
    return flower.ConfigRecord({METHOD: lineage, METHODS: methods, READS: reads, ENCODERS: named, **options})


def check_plain_clients(strategy: PersonalizedStrategy) -> None:
    """Refuse clients of any other Flower app, which train what they like, for a method with a client half of its own.

    Raises
    ------
    ConfigError
    """
    update = type(strategy).update
    allowed = f"clients that {update.__name__}().client_app(network, data) makes for {type(strategy).__name__}"
    check(update.is_plain(), "client_app", "another Flower ClientApp", allowed)


def check_halves(strategy: PersonalizedStrategy, identity: Mapping[str, Any]) -> None:
    """Refuse clients that do not belong to a server half; among themselves they may differ in options of their own.

    A subclass of the method's client half that is no method of its own belongs to it.

    Raises
    ------
    ConfigError
    """
    wanted, lineage = type(strategy).update, list(identity[METHOD])
    known = {*_CLIENT_HALVES, *identity.get(METHODS, ()), _name(wanted)}  # clients may live in another process
    method = next((name for name in lineage if name in known), "")
    if method != _name(wanted):
        clients = lineage[0].rpartition(".")[2]
        server = type(strategy).__name__
        raise ConfigError("client_app", clients, f"clients made by {wanted.__name__}, the client half of {server}")
    for name in strategy.common_options:
        ours, theirs = getattr(strategy.client_update, name), identity.get(f"{OPTION}{name}")
        method = type(strategy).__name__
        allowed = f"{theirs}, as the clients have it: {method}(client_update={wanted.__name__}({name}={theirs}))"
        check(theirs is None or _value(ours) == theirs, f"strategy.{name}", ours, allowed)
    encoders, given = [_described(p) for p in strategy.postprocessors if p.encodes], list(identity[ENCODERS])
    allowed = f"{given or 'none'}, as in the client app (client_app(..., postprocessors=...))"
    check(encoders == given, "postprocessors", encoders or "none", allowed)


def check_config(config: Mapping[str, Any], reads: Iterable[str], method: str) -> None:
    """Refuse a message's configuration with a key that its clients do not read.

    Raises
    ------
    ConfigError
    """
    known = set(reads)
    for key, value in config.items():
        further = ", ".join(sorted(known - set(COMMON_KEYS))) or "none"
        allowed = f"no such key in a message's configuration: {method} reads {further}, and its options are its fields"
        check(ANY in known or key in known, key, value, allowed)


def _options(half: Any) -> list[str]:
    """Names of a half's options that may differ from run to run, without what is the same for all methods."""
    return [f.name for f in fields(half) if f.init and f.name not in ("training", "seed", "weighting")]


def _value(value: Any) -> str:
    """A value as text, the same for equal numbers."""
    return repr(int(value) if isinstance(value, float) and value.is_integer() else value)


def _described(postprocessor: Postprocessor) -> str:
    """Its class and settings as text, without what it came to know."""
    settings = {name: value for name, value in vars(postprocessor).items() if name != "state"}
    return f"{type(postprocessor).__name__}({', '.join(f'{n}={_value(v)}' for n, v in settings.items())})"


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
