"""The methods by name, and a method's two halves from plain options. A method's file is imported when it is used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from fedpers.custom import import_custom
from fedpers.errors import ConfigError, one_of
from fedpers.settings import base as settings
from fedpers.settings.groups import method_names

if TYPE_CHECKING:
    from fedpers.client.update import LocalUpdate
    from fedpers.server.strategy import PersonalizedStrategy

Kind = TypeVar("Kind", bound="type[PersonalizedStrategy]")
_REGISTERED: dict[str, type[PersonalizedStrategy]] = {}


def method(name: str) -> Callable[[Kind], Kind]:
    """Register the server half of a method under the name that is typed as ``strategy=``, that of its file."""

    def register(kind: Kind) -> Kind:
        _REGISTERED[name] = kind
        return kind

    return register


class _Methods(Mapping[str, "type[PersonalizedStrategy]"]):
    """Server halves by name; a file is imported when its method is looked up."""

    def __init__(self) -> None:
        self._names = method_names()

    def __getitem__(self, name: str) -> type[PersonalizedStrategy]:
        if name not in self._names:
            raise KeyError(name)
        importlib.import_module(f"fedpers.strategies.{name}")
        return _REGISTERED[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


STRATEGIES: Mapping[str, type[PersonalizedStrategy]] = _Methods()
"""Methods by the name typed as ``strategy=``: one for each file of this folder."""


def strategy_class(name: str) -> type[PersonalizedStrategy]:
    """Return the server half of a method.

    Parameters
    ----------
    name : str
        A key of :data:`STRATEGIES`, or ``module:Class`` for a method of your own, importable from the current folder.

    Raises
    ------
    ConfigError
        If there is no such method, or the class is no :class:`PersonalizedStrategy` or names no client half.
    """
    from fedpers.server.strategy import PersonalizedStrategy

    if ":" not in name:
        if name not in STRATEGIES:
            raise ConfigError("strategy", name, f"{one_of(STRATEGIES, name)}, or module:Class")
        return STRATEGIES[name]
    kind = import_custom("strategy.name", name)
    if not (isinstance(kind, type) and issubclass(kind, PersonalizedStrategy)):
        raise ConfigError("strategy.name", name, "module:Class of a subclass of PersonalizedStrategy")
    halves = [one for one in kind.__mro__ if issubclass(one, PersonalizedStrategy) and one is not PersonalizedStrategy]
    if not any("update" in vars(one) for one in halves):
        allowed = "a class that names its client half: update = ..., a LocalUpdate of yours, or FedAvgUpdate"
        raise ConfigError("strategy.name", name, allowed)
    chosen: type[PersonalizedStrategy] = kind
    return chosen


def method_options(name: str) -> dict[str, settings.Option]:
    """Return a method's own options, of both halves, by name as typed after ``strategy.``.

    Raises
    ------
    ConfigError
        If the method is unknown.
    """
    server = strategy_class(name)
    both = {**settings.options(server), **settings.options(server.update)}
    return {key: option for key, option in both.items() if option.key == f"strategy.{key}"}


def option_types(name: str) -> dict[str, Any]:
    """Return the types of a method's own options, of both halves.

    Raises
    ------
    ConfigError
        If the method is unknown.
    """
    server = strategy_class(name)
    hints = {**get_type_hints(server), **get_type_hints(server.update)}
    return {key: hints[key] for key in method_options(name)}


def default_options(name: str) -> dict[str, Any]:
    """Return the defaults of a method's own options, of both halves.

    Raises
    ------
    ConfigError
        If the method is unknown.
    """
    return {key: option.default for key, option in method_options(name).items()}


def make_strategy(
    name: str, options: Mapping[str, Any] | None = None, *, server: Mapping[str, Any] | None = None, **client: Any
) -> tuple[PersonalizedStrategy, LocalUpdate]:
    """Make both halves of a method.

    Parameters
    ----------
    name : str
        See :func:`strategy_class`.
    options : mapping, optional
        The method's own options; each goes to the half that has it.
    server : mapping, optional
        Further settings of the server half (``fraction``, ``seed``, ``evaluate_every``, ``min_replies``, ``unseen``).
    **client
        Further settings of the client half (``training``).

    Raises
    ------
    ConfigError
        If the method or an option is unknown, or a value is out of its range.
    """
    known = method_options(name)
    kind = strategy_class(name)
    remaining = dict(options or {})
    for key, value in remaining.items():
        if key not in known:
            raise ConfigError(f"strategy.{key}", value, f"one of the settings of {name}: {one_of(known, key)}")
    of_client = {key: remaining.pop(key) for key in list(remaining) if key in settings.options(kind.update)}
    update = kind.update(**of_client, **client)
    return kind(**remaining, **(server or {}), client_update=update), update
