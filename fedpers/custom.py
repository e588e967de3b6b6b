"""Parts of a user's own, named as ``module:Name`` and found from the folder in which the command is typed."""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from fedpers.errors import ConfigError, one_of

log = logging.getLogger(__name__)


def import_custom(key: str, name: str) -> Any:
    """Import ``module:Name``.

    Parameters
    ----------
    key : str
        What was typed, for errors: ``model.name``.
    name : str

    Raises
    ------
    ConfigError
        If the module cannot be imported, or has nothing of that name.
    """
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        imported = importlib.import_module(module)
    except (ImportError, SyntaxError) as error:
        if module.endswith(".py"):
            raise ConfigError(
                key, name, f"the module's name without .py: {module.removesuffix('.py')}:{attribute}"
            ) from error
        raise ConfigError(key, name, f"module:Name of a module that can be imported ({error})") from error
    if not hasattr(imported, attribute):
        raise ConfigError(key, name, f"module:Name, but module {module} has no {attribute}")
    return getattr(imported, attribute)


def call_custom(
    key: str, name: str, function: Callable[..., Any], known: Mapping[str, Any], arguments: Mapping[str, Any]
) -> Any:
    """Call a function or class of a user's own.

    Parameters
    ----------
    key, name : str
        As it was typed, for errors: ``model`` and ``mine:Net``.
    function : callable
    known : mapping
        What fedpers can tell; of it is given what the function has a parameter for.
    arguments : mapping
        What the user typed below ``KEY.arguments``.

    Raises
    ------
    ConfigError
        If an argument is unknown, or a parameter without a default has none.
    """
    parameters = inspect.signature(function).parameters
    names = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for argument, value in arguments.items():
        if argument not in names and not takes_any:
            raise ConfigError(f"{key}.arguments.{argument}", value, f"a parameter of {name}: {one_of(names, argument)}")
    given = {**{n: value for n, value in known.items() if n in names}, **arguments}
    for parameter in names:
        if parameter not in given and parameters[parameter].default is inspect.Parameter.empty:
            raise ConfigError(f"{key}.arguments.{parameter}", None, f"a value, because {name} needs one")
    return function(**given)


def warn_of_similar_names(kind: type, base: type) -> None:
    """Say which functions of a class resemble one that it could override, and are called by none of its functions.

    ``personalise`` would otherwise be ignored, and the inherited ``personalize`` run.

    Parameters
    ----------
    kind : type
        A subclass of `base`, just defined.
    base : type
    """
    functions = {name: value for name, value in vars(kind).items() if inspect.isfunction(value)}
    called = {n for name, function in functions.items() for n in function.__code__.co_names if n != name}
    inherited = {name for name in dir(base) if not name.startswith("_") and callable(getattr(base, name))}
    for name in functions:
        if name.startswith("_") or name in called or any(name in vars(parent) for parent in kind.__mro__[1:]):
            continue
        (near,) = difflib.get_close_matches(name, inherited, n=1, cutoff=0.8) or [name]
        if near not in functions:
            log.warning("%s.%s is never called (did you mean '%s'?).", kind.__name__, name, near)
