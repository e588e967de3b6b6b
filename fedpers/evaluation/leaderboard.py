"""Leaderboards: one table for each group of comparable runs, in which each method is one row over its seeds.

Runs are comparable when their settings differ only in the strategy, the seed, and where or how they were executed
(:data:`fedpers.evaluation.runs.IGNORED`).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fedpers.evaluation.runs import DEFAULT_CHOICES, RunRecord, differing, number
from fedpers.evaluation.statistics import half_interval, paired_p

BASELINES = ("local", "fedavg")
"""Strategies a personalized method has to beat, unless its runs name others (``baselines`` of ``summary.json``)."""

NO_LEARNING = "no_learning"
"""A baseline of every ranking table: it learns nothing and ranks items by how rarely they were drawn as negatives,
which shows what a protocol gives away."""
_LEVEL = 0.05


@dataclass(frozen=True)
class Row:
    """One method in a leaderboard; numbers are means over its seeds, NaN where unknown.

    Parameters
    ----------
    method : str
        Strategy and, where a group has it with several settings, the options that differ.
    strategy : str
    options : dict
        All options of the strategy.
    seeds : tuple of int
        Ascending.
    score : float
        Mean over clients of the group's headline metric on test, at the selected round, at most 1; NaN if a seed has
        none.
    interval : float
        Half the width of its 95 % confidence interval over seeds (Student's t); NaN for one seed.
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
    epsilon : float
        Privacy spent in the rounds done, the most of all seeds; NaN without privacy, or where it is not bounded.
    selected, at_end : dict
        Every metric at the selected and at the last round.
    baseline, best : bool
    p_value : float
        Paired t-test against the best row over common seeds; NaN for the best row itself and where fewer than
        two seeds with a score are common.
    significant : bool or None
        Whether the difference from the best row is (p <= 0.05); None where `p_value` is NaN.
    interrupted : bool
        Whether a run of it stopped before its last round.
    folders : tuple of str
        Run folders, in the order of `seeds`.
    """

    method: str
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
    epsilon: float
    selected: dict[str, float]
    at_end: dict[str, float]
    baseline: bool
    best: bool
    p_value: float
    significant: bool | None
    interrupted: bool
    folders: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Comparable runs: rows best first, what they have in common, and what a reader must know.

    Parameters
    ----------
    title : str
    rows : list of Row
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
        by_config[json.dumps(run.comparable, sort_keys=True, default=str)].append(run)
    members = sorted(by_config.values(), key=lambda group: min(str(run.folder) for run in group))
    titles = _titles([group[0] for group in members])
    return [_group(title, group) for title, group in zip(titles, members, strict=True)]


def leaderboard_rows(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Give all rows as JSON-ready dicts: the fields of :class:`Row` and ``group``, with None for NaN."""
    return [
        {
            "group": group.title,
            "headline": group.headline,
            **{key: _jsonable(value) for key, value in asdict(row).items()},
        }
        for group in leaderboard(runs)
        for row in group.rows
    ]


_NO_SHIFTS = ("none", None, "name", "strength", "groups")
"""Values of ``heterogeneity.name`` and keys below ``heterogeneity`` that name no shift."""


def _titles(runs: Sequence[RunRecord]) -> list[str]:
    """Name each group by what its runs share, and groups that would look alike by what tells them apart."""
    short = []
    for run in runs:
        s, config = run.summary, run.comparable
        shifts = dict.fromkeys(key.split(".")[1] for key in config if key.startswith("heterogeneity."))
        shifts = {name: None for name in (config.get("heterogeneity.name"), *shifts) if name not in _NO_SHIFTS}
        parts = [s.get("dataset"), s.get("partition"), *shifts, s.get("model")]
        parts += [f"{s[name]} {name.removeprefix('num_')}" for name in ("num_clients", "rounds") if name in s]
        if config.get("fraction") is not None:
            parts.append(f"fraction {config['fraction']}")
        parts += [f"{key} {config[f'{key}.name']}" for key in DEFAULT_CHOICES if f"{key}.name" in config]
        if config["protocol"] != "validation-selected":
            parts.append(f"protocol {config['protocol']}")
        short.append(" · ".join(str(part) for part in parts if part is not None))
    titles = []
    for run, title in zip(runs, short, strict=True):
        alike = [other.comparable for other, name in zip(runs, short, strict=True) if name == title]
        titles.append(" · ".join([title, *differing(run.comparable, alike)]))
    return titles


def _group(title: str, runs: Sequence[RunRecord]) -> Group:
    methods: dict[str, dict[int, RunRecord]] = defaultdict(dict)
    older = []
    for run in sorted(runs, key=lambda run: (not run.summary.get("interrupted"), run.finished)):
        key = json.dumps([run.strategy, run.options, run.training], sort_keys=True, default=str)
        if run.seed in methods[key]:
            older.append(methods[key][run.seed])
        methods[key][run.seed] = run

    per_method = [dict(sorted(seeds.items())) for seeds in methods.values()]
    labels = []
    for seeds in per_method:
        run = next(iter(seeds.values()))
        same = [next(iter(s.values())) for s in per_method]
        alike = [other for other in same if other.strategy == run.strategy]
        settings = differing(run.options, [other.options for other in alike])
        budget = differing(run.training, [other.training for other in alike])
        labels.append(" ".join([run.strategy, *settings, *budget]))
    first = next((run.summary for run in runs if "task" in run.summary), runs[0].summary)  # older runs name none
    headline = str(first.get("headline", "accuracy"))
    measured = f"test/{headline}"
    scores = [{seed: run.metric(measured) for seed, run in s.items()} for s in per_method]
    means = [float(np.mean(list(values.values()))) for values in scores]

    order = sorted(range(len(means)), key=lambda i: (math.isnan(means[i]), -np.nan_to_num(means[i]), labels[i]))
    best = order[0]
    rows = []
    for i in order:
        repeats = list(per_method[i].values())
        p_value = math.nan if i == best else paired_p(scores[best], scores[i])
        rows.append(
            Row(
                method=labels[i],
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
                epsilon=float(np.max([number(run.summary.get("privacy_epsilon")) for run in repeats])),
                selected=_means(repeats, "selected"),
                at_end=_means(repeats, "last"),
                baseline=repeats[0].strategy in (*first.get("baselines", BASELINES), NO_LEARNING),
                best=i == best and not math.isnan(means[i]),
                p_value=p_value,
                significant=None if math.isnan(p_value) else p_value <= _LEVEL,
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
    group = Group(title, rows, headline, tuple(also), bool(first.get("spread", True)))
    runs_used = [run for s in per_method for run in s.values()]
    group.notes.extend(_notes(group, runs_used, older, first.get("baselines", BASELINES)))
    return group


def _notes(group: Group, runs: Sequence[RunRecord], older: Sequence[RunRecord], baselines: Sequence[str]) -> list[str]:
    """Say what a reader of the table must know, in whole sentences."""
    rows = group.rows
    spread = "std: over clients; worst: mean of the worst tenth of the clients; " if group.spread else ""
    notes = [
        f"Test {group.headline}: mean over clients at the selected round, ± 95 % interval over seeds; "
        f"{spread}MB: up and down; kgrad: thousand gradients computed in training; s: seconds; n: seeds."
    ]
    others = [row for row in rows if not row.best]
    if others and one_seed(rows):
        notes.append("One seed cannot tell whether a difference is more than chance.")
    else:
        if any(row.significant is False for row in others):
            notes.append(f"~ Not significantly different from the best (paired t-test, common seeds, p > {_LEVEL}).")
        if any(row.significant is None for row in others):
            notes.append("? Fewer than two seeds in common with the best have a score: the difference is not tested.")
    if any(label == "unseen" for _, label in group.also):
        notes.append(
            "unseen: clients that never train, as they come, at the selected round; "
            "adapted: at the end of the run, after training locally for one round, or for so many steps "
            "(strategy=pfedpg: for strategy.adapt_rounds)."
        )
    absent = [name for name in baselines if not any(row.strategy == name for row in rows)]
    if absent:
        notes.append(f"There is no {' and no '.join(absent)} run to compare with.")
    if different := _training_notes(runs):
        notes.append(f"Rows differ in training settings (training.*): {'; '.join(different)}.")
    if private := [run for run in runs if run.summary.get("privacy_delta") is not None]:
        notes.append(_privacy_note(rows, private[0]))
    stopped = [run for run in runs if run.summary.get("interrupted")]
    if stopped:
        ends = [f"{r.folder} ({r.summary.get('rounds_done')} of {r.summary.get('rounds')} rounds)" for r in stopped]
        notes.append(f"! Interrupted: {', '.join(ends)}.")
    if early := [run for run in runs if str(run.summary.get("ended_by")).startswith("stop.")]:
        ends = [f"{r.folder} ({r.summary['rounds_done']} of {r.summary['rounds']} rounds)" for r in early]
        notes.append(f"Ended early by stop.*, so that runs did different numbers of rounds: {', '.join(ends)}.")
    if any(run.selected_on == "test" for run in runs):
        chosen = {part: sorted({r.strategy for r in runs if r.selected_on == part}) for part in ("test", "validation")}
        phrases = [f"on {part} for {', '.join(names)}" for part, names in chosen.items() if names]
        notes.append(f"The round is chosen as the methods' authors do: {'; '.join(phrases)}.")
    if unselected := [str(run.folder) for run in runs if run.summary.get("selected_round", 0) is None]:
        notes.append(f"No round could be selected: {', '.join(unselected)}.")
    for what, key in (
        ("The network had diverged", "last_diverged"),
        ("Not all clients were measured", "last_left_out"),
    ):
        if affected := [f"{r.folder} ({r.summary[key]} clients)" for r in runs if r.summary.get(key)]:
            notes.append(f"{what} at the last round: {', '.join(affected)}.")
    failures = sum(int(run.summary.get("failures") or 0) for run in runs)
    if failures:
        names = sorted({run.strategy for run in runs if run.summary.get("failures")})
        notes.append(f"{failures} client replies were unusable and left out ({', '.join(names)}).")
    if older:
        folders = ", ".join(str(run.folder) for run in older)
        notes.append(f"Left out because a newer or finished run has the same config and seed: {folders}.")
    return notes


def _privacy_note(rows: Sequence[Row], run: RunRecord) -> str:
    """Say what is guaranteed in the runs of a group, of which `run` is one."""
    privacy = run.config.get("privacy")
    if isinstance(privacy, Mapping) and privacy.get("noise") == 0:
        return "Privacy: changes are clipped and get no noise, which guarantees nothing."
    spent = {row.method: "unknown" if math.isnan(row.epsilon) else f"{row.epsilon:.3g}" for row in rows}
    if set(spent.values()) == {"unknown"}:
        return (
            "Privacy: epsilon is not known: it takes a library for it (pip install 'fedpers[privacy]'), and some noise."
        )
    alike = len(set(spent.values())) == 1
    values = next(iter(spent.values())) if alike else ", ".join(f"{value} ({name})" for name, value in spent.items())
    delta = f"{number(run.summary['privacy_delta']):g}"
    return f"Privacy: epsilon {values} at delta {delta}, of a client's data in the arrays; metrics travel as they are."


def _training_notes(runs: Sequence[RunRecord]) -> list[str]:
    """What tells the training of a strategy's runs from that of most runs, a phrase for each strategy."""
    keys = [json.dumps(run.training, sort_keys=True, default=str) for run in runs]
    usual = runs[max(range(len(runs)), key=lambda i: (keys.count(keys[i]), -i))].training
    trainings: dict[str, set[str]] = defaultdict(set)
    for run, key in zip(runs, keys, strict=True):
        trainings[run.strategy].add(key)
    phrases: dict[str, None] = {}
    for run in runs:
        if len(trainings[run.strategy]) > 1:
            phrases["named beside the method"] = None
            continue
        changed = [f"{k}={run.training.get(k)}" for k in sorted({*usual, *run.training})
               if run.training.get(k) != usual.get(k)]  # fmt: skip
        if changed:
            phrases[f"{run.strategy} has {' '.join(changed)}"] = None
    if phrases.keys() - {"named beside the method"}:
        phrases["the others " + " ".join(differing(usual, [run.training for run in runs]))] = None
    return list(phrases)


def one_seed(rows: Sequence[Row]) -> bool:
    """Whether each row is of one seed."""
    return all(len(row.seeds) == 1 for row in rows)


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
