"""Parts of a user's own, named as ``module:Name`` and found from the folder in which the command is typed."""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any

from fedpers.errors import ConfigError, FedpersError, one_of
from fedpers.failures import described

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
    if not attribute or not all(module.split(".")):
        raise ConfigError(key, name, "module:Name, e.g. mine:Net")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        imported = importlib.import_module(module)
    except FedpersError:
        raise
    except Exception as error:  # whatever a module does when it is imported
        if module.endswith(".py"):
            raise ConfigError(
                key, name, f"the module's name without .py: {module.removesuffix('.py')}:{attribute}"
            ) from error
        log.debug("%s cannot be imported:", module, exc_info=error)
        raise ConfigError(key, name, f"module:Name of a module that can be imported ({described(error)})") from error
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


def check_overrides(kind: type, base: type) -> None:
    """Look at what a subclass, just defined, overrides of a base class.

    Functions and attributes that resemble one it could override, and are used by none of its functions, are named in a
    warning: ``personalise`` would otherwise be ignored, and the inherited ``personalize`` run.

    Parameters
    ----------
    kind : type
        A subclass of `base`.
    base : type

    Raises
    ------
    ConfigError
        If a function cannot be called as that of `base` is.
    """
    functions = {name: value for name, value in vars(kind).items() if inspect.isfunction(value)}
    used = {n for name, function in functions.items() for n in _names_in(function.__code__) if n != name}
    options = vars(kind).get("__annotations__", {})
    for name, value in vars(kind).items():
        if name.startswith("_") or name in options or not (inspect.isfunction(value) or _is_plain(value)):
            continue
        if inspect.isfunction(value) and inspect.isfunction(inherited := getattr(base, name, None)):
            _check_parameters(f"{kind.__name__}.{name}", value, inherited)
        if name in used or any(name in vars(parent) for parent in kind.__mro__[1:]):
            continue
        similar = {n for n in dir(base) if not n.startswith("_") and _is_plain(getattr(base, n)) == _is_plain(value)}
        (near,) = difflib.get_close_matches(name, similar, n=1, cutoff=0.8) or [name]
        if near not in vars(kind):
            unused = "read" if _is_plain(value) else "called"
            log.warning("%s.%s is never %s (did you mean '%s'?).", kind.__name__, name, unused, near)


def _names_in(code: CodeType) -> set[str]:
    """Names that a function uses, and those of functions within it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names_in, inner))


def _is_plain(value: Any) -> bool:
    """Whether a class attribute is a value, and nothing that is called or computed."""
    return not callable(value) and not hasattr(value, "__get__")


def _check_parameters(name: str, function: Callable[..., Any], inherited: Callable[..., Any]) -> None:
    """Refuse a function that takes fewer or more parameters than the one it overrides is called with."""
    required = [p for p in inspect.signature(inherited).parameters.values() if p.default is p.empty]
    names = [p.name for p in required if p.kind is p.POSITIONAL_OR_KEYWORD]
    signature = inspect.signature(function)
    by_name = {p.name: None for p in required if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    by_name_alone = {key: value for key, value in by_name.items() if key not in names}
    for arguments, keywords in (((None,) * len(names), by_name_alone), ((), by_name)):
        try:
            signature.bind(*arguments, **keywords)
        except TypeError:
            continue
        return
    raise ConfigError(name, str(signature), f"the parameters it is called with, ({', '.join(by_name)})")
