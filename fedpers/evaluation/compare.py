"""Leaderboards: finished runs read from their folders, one table per group of comparable runs.

Runs are comparable when their configs differ only in the strategy, the seed, and where or how they were
executed (:data:`IGNORED`). Within a group each method is one row, averaged over its seeds.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

logger = logging.getLogger(__name__)

BASELINES = ("local", "fedavg")
"""Strategies a personalized method has to beat, unless its runs name others (``baselines`` of ``summary.json``)."""

NO_LEARNING = "no_learning"
"""A baseline of every ranking table: it scores without learning, from a leak of the protocol alone."""

IGNORED = frozenset({"strategy", "training", "seed", "runtime", "tracker", "output", "hydra"})
"""Top-level config keys in which comparable runs may differ, besides where a data set is found."""

_USUAL = {"aggregation": "mean", "privacy": "none", "compression": "none"}
"""What a run without these settings has; any other stands in a table of its own."""

_LEVEL = 0.05


@dataclass(frozen=True)
class RunRecord:
    """One finished (or interrupted) run.

    Parameters
    ----------
    folder : Path
        The run folder.
    config : dict
        Its resolved ``config.yaml``.
    summary : dict
        Its ``summary.json``.
    finished : float
        When the summary was written, seconds since the epoch.
    """

    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    finished: float = 0.0

    @property
    def strategy(self) -> str:
        """Name of the strategy."""
        return str(self.summary["strategy"])

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.summary["seed"])

    @property
    def options(self) -> dict[str, Any]:
        """Options of the strategy, nested keys joined by dots."""
        strategy = self.config.get("strategy")
        flat = _flatten(strategy) if isinstance(strategy, Mapping) else {}
        return {key: value for key, value in flat.items() if key != "name"}

    @property
    def training(self) -> dict[str, Any]:
        """Settings of local training, which a study may tune for each method."""
        training = self.config.get("training")
        return _flatten(training) if isinstance(training, Mapping) else {}

    @property
    def comparable(self) -> dict[str, Any]:
        """What must be equal for two runs to stand in one table, nested keys joined by dots."""
        flat = _flatten({key: value for key, value in self.config.items() if key not in IGNORED})
        flat.pop("dataset.download", None)
        if flat.get("dataset.name") not in ("npz", "ratings"):  # there the path says what the data are, not only where
            flat.pop("dataset.root", None)
        for key, usual in _USUAL.items():
            if flat.get(f"{key}.name", usual) == usual:  # nothing else of it matters then
                flat = {name: value for name, value in flat.items() if not name.startswith(f"{key}.")}
        return flat | {"protocol": self.summary.get("protocol", "validation-selected")}

    def metric(self, name: str, round: str = "selected") -> float:
        """One metric at the ``"selected"`` or ``"last"`` round; NaN when it was not measured."""
        return _number(self.summary[round].get(name))


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
        Mean over clients of the group's headline metric on test, at the selected round, in 0..1.
    interval : float
        Half the width of its 95 % confidence interval over seeds (Student's t); NaN for one seed.
    std, worst_decile : float
        Spread over clients at the selected round, and mean of the worst tenth of them.
    last : float
        The same after the last round.
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
        two seeds are common.
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
        Further metrics at the selected round, keys of :attr:`Row.selected`, and what the table calls them.
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


def find_runs(paths: Iterable[str | os.PathLike[str]]) -> list[RunRecord]:
    """Read all runs at or below the given folders, sorted by folder.

    A folder that cannot be used (it does not exist, its run has no summary yet, a file of it is damaged) is
    named in a logged warning and left out.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        if not Path(path).is_dir():
            logger.warning("%s is not a folder and is left out.", path)
        for name, subfolders, files in os.walk(path):
            if "summary.json" in files or "config.yaml" in files:
                folders.setdefault(Path(name).resolve(), Path(name))
                subfolders.clear()  # trackers keep files of the same names inside a run folder
            else:
                subfolders[:] = sorted(sub for sub in subfolders if sub != ".hydra")
    records = []
    for _, folder in sorted(folders.items()):
        try:
            records.append(_read(folder))
        except Exception as error:  # whatever is wrong with one folder must not hide the others
            logger.warning("%s is left out: %s", folder, error)
    return records


def leaderboard(runs: Sequence[RunRecord]) -> list[Group]:
    """Group comparable runs and rank the methods of each group.

    Of several runs with the same config and seed the newest counts, a finished one before an interrupted one, and a
    note says so.
    """
    by_config: dict[str, list[RunRecord]] = defaultdict(list)
    for run in runs:
        by_config[json.dumps(run.comparable, sort_keys=True, default=str)].append(run)
    members = list(by_config.values())
    titles = _titles([group[0] for group in members])
    groups = [_group(title, group) for title, group in zip(titles, members, strict=True)]
    return sorted(groups, key=lambda group: group.title)


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


def print_leaderboard(runs: Sequence[RunRecord], console: Console | None = None) -> None:
    """Print one table per group of comparable runs, best method first.

    Parameters
    ----------
    runs : sequence of RunRecord
    console : rich.console.Console, optional
        Where to print; standard output if not given.
    """
    console = console or Console()
    if not runs:
        console.print("No finished runs found.")
    for group in leaderboard(runs):
        console.print(Text(group.title, style="bold"))
        # a terminal too narrow for the numbers wraps whole lines rather than losing names and digits
        width = 80 if console.width < 80 else None
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, width=width)
        table.add_column("method", overflow="fold", min_width=16)
        table.add_column("")
        further = [label for _, label in group.also]
        spread = ("std", "worst") if group.spread else ()
        for name in (f"{group.headline} %", *further, *spread, "last", "MB", "kgrad", "s", "n"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in group.rows:
            interval = "" if math.isnan(row.interval) else f" ±{100 * row.interval:.1f}"
            table.add_row(
                Text(f"{row.method} (baseline)" if row.baseline else row.method),
                _marks(row, _single(group.rows)),
                f"{_percent(row.score)}{interval}",
                *(_percent(_shown(row, key)) for key, _ in group.also),
                *(_percent(value) for value in (row.std, row.worst_decile) if group.spread),
                _percent(row.last),
                _short(row.megabytes),
                _short(row.gradients / 1000),
                _short(row.seconds),
                str(len(row.seeds)),
                style="bold" if row.best else "dim" if row.baseline else "",
            )
        console.print(table, crop=False)
        for note in group.notes:
            console.print(Text(note, style="dim"))
        console.print()


def _shown(row: Row, key: str) -> float:
    """A further metric at the selected round; adaptation is measured at the end only, whichever round was selected."""
    return (row.at_end if key.startswith("adapted/") else row.selected).get(key, math.nan)


def _read(folder: Path) -> RunRecord:
    from omegaconf import OmegaConf

    path = folder / "summary.json"
    if not path.exists():
        raise FileNotFoundError("it has no summary.json; the run is going on or was killed.")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"its summary.json is damaged ({error}).") from error
    try:
        config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=True)
    except Exception as error:
        raise ValueError(f"its config.yaml is missing or damaged ({' '.join(str(error).split())}).") from error
    if not isinstance(config, dict) or not isinstance(summary, dict):
        raise ValueError("its config.yaml or summary.json does not hold named values.")
    missing = [key for key in ("strategy", "seed", "selected", "last") if summary.get(key) is None]
    if missing:
        raise ValueError(f"its summary.json lacks {', '.join(missing)}.")
    if not (isinstance(summary["selected"], dict) and isinstance(summary["last"], dict)):
        raise ValueError("its summary.json does not hold metrics by name under selected and last.")
    try:
        int(summary["seed"])
        for value in (*summary["selected"].values(), *summary["last"].values()):
            _number(value)
        for key in ("bytes_up", "bytes_down", "gradients", "seconds", "failures", "privacy_epsilon", "privacy_delta"):
            _number(summary.get(key))
    except (TypeError, ValueError) as error:
        raise ValueError(f"its summary.json holds something else where a number belongs ({error}).") from error
    return RunRecord(folder, {str(k): v for k, v in config.items()}, summary, path.stat().st_mtime)


def _titles(runs: Sequence[RunRecord]) -> list[str]:
    """Name each group by what its runs share, and groups that would look alike by what tells them apart."""
    short = []
    for run in runs:
        s, config = run.summary, run.comparable
        parts = [s.get("dataset"), s.get("partition"), s.get("model")]
        parts += [f"{s[name]} {name.removeprefix('num_')}" for name in ("num_clients", "rounds") if name in s]
        if config.get("fraction") is not None:
            parts.append(f"fraction {config['fraction']}")
        parts += [f"{key} {config[f'{key}.name']}" for key in _USUAL if f"{key}.name" in config]
        if config["protocol"] != "validation-selected":
            parts.append(f"protocol {config['protocol']}")
        short.append(" · ".join(str(part) for part in parts if part is not None))
    titles = []
    for run, title in zip(runs, short, strict=True):
        alike = [other.comparable for other, name in zip(runs, short, strict=True) if name == title]
        titles.append(" · ".join([title, *_differing(run.comparable, alike)]))
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
        settings = _differing(run.options, [other.options for other in alike])
        budget = _differing(run.training, [other.training for other in alike])
        labels.append(" ".join([run.strategy, *settings, *budget]))
    first = next((run.summary for run in runs if "task" in run.summary), runs[0].summary)  # older runs name none
    headline = str(first.get("headline", "accuracy"))
    measured = f"test/{headline}"
    scores = [{seed: run.metric(measured) for seed, run in s.items()} for s in per_method]
    means = [float(np.mean(list(values.values()))) for values in scores]

    order = sorted(range(len(means)), key=lambda i: (math.isnan(means[i]), -means[i], labels[i]))
    best = order[0]
    rows = []
    for i in order:
        kept = list(per_method[i].values())
        p_value = math.nan if i == best else _paired_p(scores[best], scores[i])
        rows.append(
            Row(
                method=labels[i],
                strategy=kept[0].strategy,
                options=kept[0].options,
                seeds=tuple(per_method[i]),
                score=means[i],
                interval=_half_interval(list(scores[i].values())),
                std=_mean(run.metric(f"{measured}_std") for run in kept),
                worst_decile=_mean(run.metric(f"{measured}_worst_decile") for run in kept),
                last=_mean(run.metric(measured, "last") for run in kept),
                megabytes=_mean(_number(r.summary.get("bytes_up")) + _number(r.summary.get("bytes_down")) for r in kept)
                / 1e6,
                gradients=_mean(_number(run.summary.get("gradients")) for run in kept),
                seconds=_mean(_number(run.summary.get("seconds")) for run in kept),
                epsilon=float(np.max([_number(run.summary.get("privacy_epsilon")) for run in kept])),
                selected={name: _mean(run.metric(name) for run in kept) for name in kept[0].summary["selected"]},
                at_end={name: _mean(run.metric(name, "last") for run in kept) for name in kept[0].summary["last"]},
                baseline=kept[0].strategy in (*BASELINES, NO_LEARNING),
                best=i == best,
                p_value=p_value,
                significant=None if math.isnan(p_value) else p_value <= _LEVEL,
                interrupted=any(run.summary.get("interrupted") for run in kept),
                folders=tuple(str(run.folder) for run in kept),
            )
        )
    also = [(f"test/{name}", f"{name} %") for name in first.get("also", ())]
    if any(f"unseen/{headline}" in row.selected for row in rows):
        also.append((f"unseen/{headline}", "unseen"))
    if any(f"adapted/{headline}" in row.at_end for row in rows):
        also.append((f"adapted/{headline}", "adapted"))
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
    if others and _single(rows):
        notes.append("One seed cannot tell whether a difference is more than chance.")
    else:
        if any(row.significant is False for row in others):
            notes.append(f"~ Not significantly different from the best (paired t-test, common seeds, p > {_LEVEL}).")
        if any(row.significant is None for row in others):
            notes.append("? Fewer than two seeds in common with the best: the difference cannot be tested.")
    if any(label == "unseen" for _, label in group.also):
        notes.append(
            "unseen: clients that never train, as they come, at the selected round; "
            "adapted: at the end of the run, after training locally for one round "
            "(strategy=pfedpg: for strategy.adapt_rounds)."
        )
    absent = [name for name in baselines if not any(row.strategy == name for row in rows)]
    if absent:
        notes.append(f"There is no {' and no '.join(absent)} run to compare with.")
    if different := _own_training(runs):
        notes.append(f"Rows differ in training settings (training.*): {'; '.join(different)}.")
    if private := [run for run in runs if run.summary.get("privacy_delta") is not None]:
        notes.append(_privacy_note(rows, private[0]))
    stopped = [run for run in runs if run.summary.get("interrupted")]
    if stopped:
        ends = [f"{r.folder} ({r.summary.get('rounds_done')} of {r.summary.get('rounds')} rounds)" for r in stopped]
        notes.append(f"! Interrupted: {', '.join(ends)}.")
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
        return "Privacy: epsilon is not known; it takes a library for it (pip install 'fedpers[privacy]')."
    alike = len(set(spent.values())) == 1
    values = next(iter(spent.values())) if alike else ", ".join(f"{value} ({name})" for name, value in spent.items())
    delta = f"{_number(run.summary['privacy_delta']):g}"
    return f"Privacy: epsilon {values} at delta {delta}, of a client's data in the arrays; metrics travel as they are."


def _own_training(runs: Sequence[RunRecord]) -> list[str]:
    """What tells the training of a strategy's runs from that of most runs, a phrase for each strategy."""
    keys = [json.dumps(run.training, sort_keys=True, default=str) for run in runs]
    usual = runs[max(range(len(runs)), key=lambda i: (keys.count(keys[i]), -i))].training
    trainings: dict[str, set[str]] = defaultdict(set)
    for run, key in zip(runs, keys, strict=True):
        trainings[run.strategy].add(key)
    found: dict[str, None] = {}
    for run in runs:
        if len(trainings[run.strategy]) > 1:
            found["named beside the method"] = None
            continue
        own = [f"{k}={run.training.get(k)}" for k in sorted({*usual, *run.training})
               if run.training.get(k) != usual.get(k)]  # fmt: skip
        if own:
            found[f"{run.strategy} has {' '.join(own)}"] = None
    if found.keys() - {"named beside the method"}:
        found["the others " + " ".join(_differing(usual, [run.training for run in runs]))] = None
    return list(found)


def _marks(row: Row, single: bool) -> str:
    """Give the marks that the notes explain; with a `single` seed in all rows one note says what `?` would."""
    untested = row.significant is None and not row.best and not single
    return ("~" if row.significant is False else "?" if untested else "") + ("!" if row.interrupted else "")


def _single(rows: Sequence[Row]) -> bool:
    return all(len(row.seeds) == 1 for row in rows)


def _paired_p(best: Mapping[int, float], other: Mapping[int, float]) -> float:
    """P-value of a two-sided paired t-test over common seeds; NaN for fewer than two."""
    from scipy.stats import ttest_rel

    common = sorted(best.keys() & other.keys())
    a, b = np.array([best[seed] for seed in common]), np.array([other[seed] for seed in common])
    if len(common) < 2 or np.isnan(a - b).any():
        return math.nan
    if np.ptp(a - b) == 0:  # the statistic is 0/0 or infinite
        return 1.0 if a[0] == b[0] else 0.0
    return float(ttest_rel(a, b).pvalue)


def _half_interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % confidence interval of a mean (Student's t); NaN for one value."""
    from scipy.stats import t

    n = len(values)
    return math.nan if n < 2 else float(t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))


def _differing(own: Mapping[str, Any], alike: Sequence[Mapping[str, Any]]) -> list[str]:
    """``key=value`` of `own` for every key in which the mappings `alike` are not all equal."""
    keys = sorted(set().union(*alike))
    return [f"{key}={own.get(key)}" for key in keys if any(other.get(key) != own.get(key) for other in alike)]


def _flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def _short(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
