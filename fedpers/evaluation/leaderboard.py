"""Leaderboards: one table for each group of comparable runs, in which each method is one row over its seeds.

Runs are comparable when their settings differ only in the strategy, the seed, and where or how they were executed
(:data:`fedpers.evaluation.runs.IGNORED`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fedpers.evaluation.comparisons import compare
from fedpers.evaluation.runs import (
    DEFAULT_CHOICES,
    RunRecord,
    assignments,
    number,
    settings_key,
    usual_values,
    varying,
)
from fedpers.evaluation.statistics import Comparison, half_interval
from fedpers.evaluation.wording import claim, notes, subject
from fedpers.settings.groups import method_title

BASELINES = ("local", "fedavg")
"""Strategies a personalized method has to beat, unless its runs name others (``baselines`` of ``summary.json``)."""

NO_LEARNING = "no_learning"
"""A baseline of every ranking table: it learns nothing and ranks items by how rarely they were drawn as negatives,
which shows what a protocol gives away."""


OTHER_DATA = (
    "Runs of the same settings and seed saw other data, by the checksum in manifest.json (a file or a function that "
    "changed, or that draws without a seed): they stand in tables of their own."
)
"""Note of tables that only their data tell apart."""


@dataclass(frozen=True)
class Row:
    """One method in a leaderboard; numbers are means over its seeds, NaN where unknown.

    Parameters
    ----------
    method : str
        Strategy and, where a group has it with several settings, the options that differ, without values that most of
        its rows have (:func:`fedpers.evaluation.runs.usual_values`).
    label : str
        The same with the strategy's name as papers write it.
    strategy : str
    options : dict
        All options of the strategy.
    seeds : tuple of int
        Ascending.
    score : float
        Mean over clients of the group's headline metric on test, at the selected round, at most 1; NaN if a seed has
        none.
    interval : float
        Half the width of its 95 % confidence interval over seeds (Student's t); NaN for fewer than three.
    std, worst_decile : float
        Spread over clients at the selected round, and mean of the worst tenth of them.
    last : float
        `score` after the last round.
    megabytes : float
        Sent up and down in all rounds, 10^6 bytes.
    gradients : float
        Gradients computed in training, of one client on one batch each.
    seconds : float
        Wall-clock time of the run.
    simulated_seconds : float
        That training would take on the clients' own devices; NaN without ``clock=devices``.
    epsilon : float
        Privacy spent in the rounds done, the most of all seeds; NaN without privacy, or where it is not bounded.
    selected, at_end : dict
        Every metric at the selected and at the last round.
    baseline, best : bool
    comparisons : tuple of Comparison
        With each of the group's references that is another strategy, in the order of :attr:`Group.references`.
    interrupted : bool
        Whether a run of it stopped before its last round.
    folders : tuple of str
        Run folders, in the order of `seeds`.
    """

    method: str
    label: str
    strategy: str
    options: dict[str, Any]
    seeds: tuple[int, ...]
    score: float
    interval: float
    std: float
    worst_decile: float
    last: float
    megabytes: float
    gradients: float
    seconds: float
    simulated_seconds: float
    epsilon: float
    selected: dict[str, float]
    at_end: dict[str, float]
    baseline: bool
    best: bool
    comparisons: tuple[Comparison, ...]
    interrupted: bool
    folders: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Comparable runs: rows best first, what they have in common, and what a reader must know.

    Parameters
    ----------
    title : str
    rows : list of Row
    sentence : str
        What the table says, to be quoted: who beats the references, who cannot be told apart from them, who is worse.
    claim : str
        The sentence without what it is about.
    references : tuple of str
        Strategies all others are compared with: of its baselines those that it has.
    headline : str
        Metric the rows are ranked by.
    also : tuple of str
        Further metrics, and what the table calls them: keys of :attr:`Row.selected`, or of :attr:`Row.at_end` for those
        that begin with ``adapted/``.
    spread : bool
        Whether the table shows the spread over clients.
    notes : list of str
    """

    title: str
    rows: list[Row]
    sentence: str = ""
    claim: str = ""
    references: tuple[str, ...] = ()
    headline: str = "accuracy"
    also: tuple[tuple[str, str], ...] = ()
    spread: bool = True
    notes: list[str] = field(default_factory=list)


def leaderboard(runs: Sequence[RunRecord]) -> list[Group]:
    """Group comparable runs and rank the methods of each group; groups are in the order of their first run's folder.

    Of several runs with the same config and seed the newest counts, a finished one before an interrupted one, and a
    note says so.
    """
    by_config: dict[str, list[RunRecord]] = defaultdict(list)
    for run in runs:
        by_config[settings_key(run.comparable)].append(run)
    members = sorted(by_config.values(), key=lambda group: min(str(run.folder) for run in group))
    titles = _titles([group[0] for group in members])
    groups = []
    for title, group in zip(titles, members, strict=True):
        parts = _by_data(group)
        for part in parts:
            checksum = min(part, key=lambda run: run.seed).data_checksum
            data = f" · data {checksum}" if len(parts) > 1 else ""
            groups.append(_group(f"{title}{data}", part))
            if data:
                groups[-1].notes.append(OTHER_DATA)
    return groups


def _by_data(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Divide runs of the same settings so that in each part all runs of a seed saw the same data."""
    parts: list[tuple[dict[int, str], list[RunRecord]]] = []
    for run in sorted(runs, key=lambda run: run.finished):
        checksum = run.data_checksum
        fitting = (part for part in parts if checksum is None or part[0].get(run.seed, checksum) == checksum)
        known, members = part = next(fitting, ({}, []))
        if not members:
            parts.append(part)
        members.append(run)
        if checksum is not None:
            known[run.seed] = checksum
    return [members for _, members in parts]


def leaderboard_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Give all rows as JSON-ready dicts: the fields of :class:`Row` and ``group``, with None for NaN."""
    return [
        {
            "group": group.title,
            "sentence": group.sentence,
            "headline": group.headline,
            **{key: _jsonable(value) for key, value in asdict(row).items()},
        }
        for group in groups
        for row in group.rows
    ]


def _titles(runs: Sequence[RunRecord]) -> list[str]:
    """Name each group by what its runs share, and groups that would look alike by what tells them apart."""
    short = []
    for run in runs:
        s, config = run.summary, run.comparable
        parts = [s.get("dataset"), s.get("partition"), *run.shifts, s.get("model")]
        parts += [f"{s[name]} {name.removeprefix('num_')}" for name in ("num_clients", "rounds") if name in s]
        if config.get("fraction") is not None:
            parts.append(f"fraction {config['fraction']}")
        parts += [f"{key} {config[f'{key}.name']}" for key in DEFAULT_CHOICES if f"{key}.name" in config]
        if config["protocol"] != "validation-selected":
            parts.append(f"protocol {config['protocol']}")
        short.append(" · ".join(str(part) for part in parts if part is not None))
    by_title: dict[str, list[RunRecord]] = defaultdict(list)
    for run, title in zip(runs, short, strict=True):
        by_title[title].append(run)
    keys = {title: varying([run.comparable for run in alike]) for title, alike in by_title.items()}
    return [
        " · ".join([title, *assignments(run.comparable, keys[title])]) for run, title in zip(runs, short, strict=True)
    ]


def _group(title: str, runs: Sequence[RunRecord]) -> Group:
    methods: dict[str, dict[int, RunRecord]] = defaultdict(dict)
    older = []
    for run in sorted(runs, key=lambda run: (not run.summary.get("interrupted"), run.finished)):
        key = settings_key([run.strategy, run.options, run.training])
        if run.seed in methods[key]:
            older.append(methods[key][run.seed])
        methods[key][run.seed] = run

    per_method = [dict(sorted(seeds.items())) for seeds in methods.values()]
    firsts = [next(iter(seeds.values())) for seeds in per_method]
    labels = _labels(firsts)
    titles = [
        method_title(run.strategy) + label.removeprefix(run.strategy) for run, label in zip(firsts, labels, strict=True)
    ]
    first = next((run.summary for run in runs if "task" in run.summary), runs[0].summary)  # older runs name none
    headline = str(first.get("headline", "accuracy"))
    measured = f"test/{headline}"
    scores = [{seed: run.metric(measured) for seed, run in s.items()} for s in per_method]
    means = [float(np.mean(list(values.values()))) for values in scores]

    baselines = tuple(first.get("baselines", BASELINES))
    references = tuple(name for name in baselines if any(run.strategy == name for run in runs))
    compared, problems = compare(per_method, scores, references, headline)
    order = sorted(range(len(means)), key=lambda i: (math.isnan(means[i]), -np.nan_to_num(means[i]), labels[i]))
    best = order[0]
    rows = []
    for i in order:
        repeats = list(per_method[i].values())
        rows.append(
            Row(
                method=labels[i],
                label=titles[i] if titles.count(titles[i]) == 1 else labels[i],  # two modules may have such a class
                strategy=repeats[0].strategy,
                options=repeats[0].options,
                seeds=tuple(per_method[i]),
                score=means[i],
                interval=half_interval(list(scores[i].values())),
                std=_mean(run.metric(f"{measured}_std") for run in repeats),
                worst_decile=_mean(run.metric(f"{measured}_worst_decile") for run in repeats),
                last=_mean(run.metric(measured, "last") for run in repeats),
                megabytes=_mean(
                    number(r.summary.get("bytes_up")) + number(r.summary.get("bytes_down")) for r in repeats
                )
                / 1e6,
                gradients=_mean(number(run.summary.get("gradients")) for run in repeats),
                seconds=_mean(number(run.summary.get("seconds")) for run in repeats),
                simulated_seconds=_mean(number(run.summary.get("simulated_seconds")) for run in repeats),
                epsilon=float(np.max([number(run.summary.get("privacy_epsilon")) for run in repeats])),
                selected=_means(repeats, "selected"),
                at_end=_means(repeats, "last"),
                baseline=repeats[0].strategy in (*baselines, NO_LEARNING),
                best=i == best and not math.isnan(means[i]),
                comparisons=compared[i],
                interrupted=any(run.summary.get("interrupted") for run in repeats),
                folders=tuple(str(run.folder) for run in repeats),
            )
        )
    also = [(f"test/{name}", f"{name} %") for name in first.get("also", ())]
    if any(f"unseen/{headline}" in row.selected for row in rows):
        also.append((f"unseen/{headline}", "unseen"))
    keys = {key for row in rows for key in row.at_end if key.startswith(f"adapted/{headline}")}
    if f"adapted/{headline}" in keys:
        also.append((f"adapted/{headline}", "adapted"))
    ending = f"adapted/{headline}_after_"
    numbers = sorted(int(key.removeprefix(ending)) for key in keys if key.removeprefix(ending).isdigit())
    also.extend((f"{ending}{steps}", f"adapted {steps}") for steps in numbers)
    runs_used = [run for s in per_method for run in s.values()]
    spread = bool(first.get("spread", True))
    said, about = claim(rows, baselines), subject(runs[0])
    group = Group(title, rows, about + said, said, references, headline, tuple(also), spread)
    group.notes.extend(notes(group, runs_used, older, problems))
    return group


def _labels(runs: Sequence[RunRecord]) -> list[str]:
    """Name each method, of which one run is given, by its strategy and what tells it from others of that strategy."""
    by_strategy: dict[str, list[RunRecord]] = defaultdict(list)
    for run in runs:
        by_strategy[run.strategy].append(run)
    settings = {name: varying([run.options for run in alike]) for name, alike in by_strategy.items()}
    usual = {name: usual_values([run.options for run in alike]) for name, alike in by_strategy.items()}
    budgets = {name: varying([run.training for run in alike]) for name, alike in by_strategy.items()}
    return [
        " ".join(
            [
                run.strategy,
                *assignments(run.options, _said(run.options, settings[run.strategy], usual[run.strategy])),
                *assignments(run.training, [key for key in budgets[run.strategy] if key in run.training]),
            ]
        )
        for run in runs
    ]


def _said(options: Mapping[str, Any], keys: Iterable[str], usual: Mapping[str, str]) -> list[str]:
    """Those of the keys whose values are not the usual ones."""
    return [key for key in keys if str(options.get(key)) != usual.get(key)]


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _means(runs: Sequence[RunRecord], when: str) -> dict[str, float]:
    """Mean of every metric that one of the runs has at its selected or last round."""
    names = dict.fromkeys(name for run in runs for name in run.summary[when])
    return {name: _mean(run.metric(name, when) for run in runs) for name in names}


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
