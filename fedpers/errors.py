"""What a user sees when something is wrong: one sentence that names the key, the value and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

MANY = 30
"""Names that are too many to be read in a sentence."""


class FedpersError(Exception):
    """Base of all errors meant for the user; the command line prints its sentence and exits with 2."""


class ConfigError(FedpersError, ValueError):
    """A setting has a value that cannot be used.

    Parameters
    ----------
    key : str
        The setting as it is typed, e.g. ``partition.alpha``.
    value : Any
        What was given.
    allowed : str
        What may be given instead, e.g. ``"a number > 0"``.
    """

    def __init__(self, key: str, value: Any, allowed: str) -> None:
        self.key, self.value, self.allowed = key, value, allowed
        super().__init__(f"{key}={value}: expected {allowed}.")


class DataError(FedpersError):
    """A data file is missing or damaged, or the data cannot be divided as asked."""


class TrainingError(FedpersError, RuntimeError):
    """A run cannot go on, e.g. because no sampled client sent a usable reply."""


def check(ok: bool, key: str, value: Any, allowed: str) -> None:
    """Raise :class:`ConfigError` for `key` unless `ok`."""
    if not ok:
        raise ConfigError(key, value, allowed)


def one_of(names: Iterable[str], given: str) -> str:
    """Say which names exist and which is nearest to `given`: ``"one of a, b (did you mean 'a'?)"``.

    Of many, the nearest alone is shown, if there is one.
    """
    options = sorted(names)
    near = difflib.get_close_matches(given, options, n=1, cutoff=0.5)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    shown = f"{len(options)} names" if near and len(options) > MANY else ", ".join(options)
    return f"one of {shown}{hint}"


def reason(error: BaseException) -> str:
    """Last line of an error's text, for use inside a sentence."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else type(error).__name__
