"""Methods against the values of one setting: a sweep as one table."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedpers.errors import ConfigError, one_of
from fedpers.evaluation.leaderboard import Group, Row, leaderboard
from fedpers.evaluation.runs import RunRecord, differing, settings_key

UNSET = "not set"
"""Column of methods that do not have the setting."""


@dataclass(frozen=True)
class Pivot:
    """Runs that are comparable but for one setting.

    Parameters
    ----------
    title : str
        What they have in common.
    key : str
        The setting, or a group of settings.
    groups : dict
        Leaderboard of each value, named by it; numbers ascending.
    rows : dict
        Of each method, by its label, its row in each leaderboard that has one; the highest mean score first.
    """

    title: str
    key: str
    groups: dict[str, Group]
    rows: dict[str, dict[str, Row]]


def pivots(runs: Sequence[RunRecord], key: str) -> list[Pivot]:
    """Divide runs by the value of a setting, and put those that differ in nothing else (but method and seed) together.

    Parameters
    ----------
    runs : sequence of RunRecord
    key : str
        As typed, e.g. ``partition.alpha``, ``training.lr``, ``strategy.mu``; or a group of settings, of which the
        choice is named: ``dataset``, ``partition``.

    Raises
    ------
    ConfigError
        If no run has such a setting.
    """
    within = {run.folder: _setting(run, key) for run in runs}
    if not any(within.values()):
        swept = {name for name in set().union(*(run.settings for run in runs)) if len(_values(runs, name)) > 1}
        raise ConfigError("--pivot", key, one_of(swept - {"seed", "output"}, key) if swept else "a swept setting")
    names = _names(list(within.values()), key)
    by_rest: dict[str, dict[str, list[RunRecord]]] = defaultdict(lambda: defaultdict(list))
    rests: dict[str, dict[str, Any]] = {}
    for run, name in zip(runs, names, strict=True):
        rest = {k: v for k, v in run.comparable.items() if not _belongs(k, key)}
        by_rest[settings_key(rest)][name].append(run)
        rests.setdefault(settings_key(rest), rest)
    made = [_pivot(key, by_value) for by_value in by_rest.values()]
    titles = []
    for (title, _, _), rest in zip(made, rests.values(), strict=True):
        alike = [other for other, (name, _, _) in zip(rests.values(), made, strict=True) if name == title]
        titles.append(" · ".join([title, *differing(rest, alike)]))
    return [Pivot(title, key, groups, rows) for title, (_, groups, rows) in zip(titles, made, strict=True)]


def _belongs(name: str, key: str) -> bool:
    return name == key or name.startswith(f"{key}.")


def _setting(run: RunRecord, key: str) -> dict[str, Any]:
    """The setting by itself, or all of a group."""
    return {k: v for k, v in run.settings.items() if _belongs(k, key) and v is not None}


def _values(runs: Sequence[RunRecord], name: str) -> set[str]:
    return {settings_key(run.settings.get(name)) for run in runs}


def _names(settings: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """Name the column of each run: the value, of a group the choice and what else tells it apart."""
    names: list[str] = []
    texts: dict[str, str] = {}  # of equal values one: 1 and 1.0 are one column
    for values in settings:
        if key in values or not values:
            names.append(texts.setdefault(settings_key(values[key]), str(values[key])) if values else UNSET)
            continue
        choice = values.get(f"{key}.name")
        alike = [other for other in settings if other and other.get(f"{key}.name") == choice]
        details = [text.removeprefix(f"{key}.") for text in differing(values, alike)]
        names.append(" ".join([*([str(choice)] if choice is not None else []), *details]))
    return names


def _pivot(
    key: str, by_value: Mapping[str, Sequence[RunRecord]]
) -> tuple[str, dict[str, Group], dict[str, dict[str, Row]]]:
    groups = {name: leaderboard(by_value[name])[0] for name in sorted(by_value, key=_order)}
    rows: dict[str, dict[str, Row]] = defaultdict(dict)
    for name, group in groups.items():
        for row in group.rows:
            rows[row.label][name] = row
    means = {label: float(np.mean([row.score for row in cells.values()])) for label, cells in rows.items()}
    order = sorted(rows, key=lambda label: (math.isnan(means[label]), -np.nan_to_num(means[label]), label))
    return _shared_title([group.title for group in groups.values()]), groups, {label: rows[label] for label in order}


def _order(name: str) -> tuple[bool, float, str]:
    try:
        return name == UNSET, float(name), name
    except ValueError:
        return name == UNSET, math.inf, name


def _shared_title(titles: Sequence[str]) -> str:
    """What the titles have in common; of ``dirichlet(alpha=0.1)`` and ``dirichlet(alpha=1)`` the name."""
    parts = [title.split(" · ") for title in titles]
    shared = [part for part in parts[0] if all(part in other for other in parts)]
    bare = [[part.partition("(")[0] for part in other] for other in parts]
    names = [part.partition("(")[0] for part in parts[0]]
    return " · ".join(
        part if part in shared else name
        for part, name in zip(parts[0], names, strict=True)
        if part in shared or (name != part and all(name in other for other in bare))
    )
