"""What a leaderboard says in words: the sentence to be quoted, and notes on what changes a reading of the table."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from fedpers.evaluation.comparisons import as_reference
from fedpers.evaluation.runs import RunRecord, assignments, differing, number, settings_key, usual_values
from fedpers.evaluation.statistics import LEVEL, MIN_CLIENTS, MIN_SEEDS, Comparison, average_ranks
from fedpers.settings.groups import method_title

if TYPE_CHECKING:
    from fedpers.evaluation.leaderboard import Group, Row

NAMED = 5
"""So many methods are named in a phrase, the best; the others are counted."""
MIN_TABLES = 5
"""With fewer tables methods are not ranked over them."""
_VERDICTS = ("better", "undecided", "worse", "untested")
_VERBS = {
    "better": ("beats", "beat"),
    "undecided": ("cannot be told apart from", "cannot be told apart from"),
    "worse": ("is worse than", "are worse than"),
    "untested": ("is not tested against", "are not tested against"),
}


def subject(run: RunRecord) -> str:
    """Begin a sentence with the data of a table, of which one run is given; empty if they are not known."""
    s = run.summary
    parts = [str(s["partition"])] if s.get("partition") else []
    parts += run.shifts
    parts += [f"{s['num_clients']} clients"] if s.get("num_clients") else []
    details = f" ({', '.join(parts)})" if parts else ""
    return f"On {s['dataset']}{details}, " if s.get("dataset") else ""


def claim(rows: Sequence[Row], baselines: Sequence[str]) -> str:
    """Say who beats the references, who cannot be told apart from them and who is worse, in one sentence.

    Parameters
    ----------
    rows : sequence of Row
        Best first.
    baselines : sequence of str
        Strategies that are references where there is a row of them.
    """
    present = [name for name in baselines if any(row.strategy == name for row in rows)]
    absent = [method_title(name) for name in baselines if name not in present]
    lacking = f"; there is no run of {listed(absent, 'or')} to compare with" if absent else ""
    everything = [c for row in rows for c in row.comparisons]
    if not everything:
        best = next((row for row in rows if row.best), None)
        if best is None:
            return "no method has a score."
        lead = "is the only method" if len(rows) == 1 else "comes first"
        return f"{best.label} {lead} with {100 * best.score:.1f} %{lacking}."
    methods = [row for row in rows if row.strategy not in present]
    # what a reference is to another matters where it beats it, and where there is nothing else
    against = [row for row in rows if row.strategy in present and row.comparisons]
    beating = [row for row in against if any(c.verdict == "better" for c in row.comparisons)]
    phrases = _clauses(methods) + _clauses(beating or ([] if methods else against[-1:]))
    lead = ""
    for reference in present:
        said = {c.verdict for c in everything if c.reference == reference}
        # a method that is ahead without being better for sure is no reason to praise the reference
        ahead = any(c.difference > 0 for row in methods for c in row.comparisons if c.reference == reference)
        if methods and not lead and said and not said & {"better", "untested"} and not ahead:
            lead = f"{method_title(reference)} is not beaten by any method: "
    return f"{lead}{'; '.join(phrases)}{lacking}{_basis(everything)}."


def ranks_over_tables(groups: Sequence[Group]) -> str:
    """Say how methods rank over tables, if at least :data:`MIN_TABLES` share the three methods with most scores.

    Methods are taken in the order of how many tables they are in, as long as the tables that have all of them, times
    their number, grow; else nothing is said.
    """
    scores: dict[str, dict[int, float]] = defaultdict(dict)
    for table, group in enumerate(groups):
        for row in group.rows:
            if not math.isnan(row.score):
                scores[row.label][table] = row.score
    names = sorted(scores, key=lambda name: (-len(scores[name]), name))
    best: tuple[int, list[str], list[int]] = (0, [], [])
    shared = set(range(len(groups)))
    for count, name in enumerate(names, start=1):
        shared &= scores[name].keys()
        if count >= 3 and len(shared) >= MIN_TABLES and count * len(shared) > best[0]:
            best = (count * len(shared), names[:count], sorted(shared))
    _, names, tables = best
    if not names:
        return ""
    ranks = average_ranks({name: [scores[name][table] for table in tables] for name in names})
    listing = listed(shortened([f"{name} {rank:.1f}" for name, rank in ranks.ranks.items()]))
    text = f"Average ranks over {ranks.tables} tables: {listing}"
    if ranks.p_value > LEVEL:
        return f"{text}; Friedman's test tells none apart (p = {ranks.p_value:.2g})."
    return (
        f"{text}; ranks less than {ranks.critical_difference:.1f} apart cannot be told apart (Nemenyi's test after "
        f"Friedman's with p = {ranks.p_value:.2g}, which take the tables as independent of each other)."
    )


def _clauses(rows: Sequence[Row]) -> list[str]:
    """One phrase for all rows of which the same is said: first who beats most references, last who is worse."""
    alike: dict[tuple[tuple[str, str], ...], list[str]] = defaultdict(list)
    for row in rows:
        alike[tuple((c.reference, c.verdict) for c in row.comparisons)].append(row.label)

    def standing(said: tuple[tuple[str, str], ...]) -> tuple[int, ...]:
        ranks = [_VERDICTS.index(verdict) for _, verdict in said]
        return (sum(ranks), *ranks)

    return [_clause(alike[said], said) for said in sorted(alike, key=standing) if said]


def _clause(names: Sequence[str], said: Sequence[tuple[str, str]]) -> str:
    plural = int(len(names) > 1)
    predicates = []
    for verdict in _VERDICTS:
        if references := [method_title(name) for name, what in said if what == verdict]:
            joined = listed(references, "or" if verdict == "undecided" else "and")
            predicates.append(f"{_VERBS[verdict][plural]} {joined}")
    return f"{listed(shortened(names))} {listed(predicates)}"


def _basis(comparisons: Iterable[Comparison]) -> str:
    """What the claims stand on, in brackets."""
    tested = [c for c in comparisons if c.verdict != "untested"]
    over, seeds = {c.over for c in tested}, sorted({c.seeds for c in tested})
    if not tested:
        return ""
    many = f"{seeds[0]} seed{'s' * (seeds[0] > 1)}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    if over == {"seeds"}:
        return f" ({many})"
    if over == {"clients"}:
        return f" (over the clients of {many}, which says nothing of other seeds)"
    return f" ({many}; some over clients only)"


def listed(words: Sequence[str], conjunction: str = "and") -> str:
    """``a, b and c``."""
    return f" {conjunction} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def shortened(names: Sequence[str]) -> list[str]:
    """The first :data:`NAMED`, and how many others; one other is named as well."""
    return list(names) if len(names) <= NAMED + 1 else [*names[:NAMED], f"{len(names) - NAMED} others"]


def notes(
    group: Group,
    runs: Sequence[RunRecord],
    older: Sequence[RunRecord],
    problems: Sequence[str],
) -> list[str]:
    """Say what a reader of the table must know, in whole sentences.

    Parameters
    ----------
    group : Group
        Without notes.
    runs : sequence of RunRecord
        Of its rows.
    older : sequence of RunRecord
        Left out for newer ones.
    problems : sequence of str
        Of :func:`fedpers.evaluation.comparisons.compare`.
    """
    rows = group.rows
    notes = _reading(group)
    if any(label == "unseen" for _, label in group.also):
        notes.append(
            "unseen: clients that never train, as they come, at the selected round; "
            "adapted: at the end of the run, after training locally for one round, or for the steps that the column "
            "names (strategy=pfedpg: for strategy.adapt_rounds)."
        )
    notes.extend(_usual_notes(rows))
    if different := _training_notes(runs):
        notes.append(f"Rows differ in training settings (training.*): {'; '.join(different)}.")
    if private := [run for run in runs if run.summary.get("privacy_delta") is not None]:
        notes.append(_privacy_note(rows, private[0]))
    stopped = [run for run in runs if run.summary.get("interrupted")]
    if stopped:
        reasons = [f": {str(r.summary['error']).removesuffix('.')}" if r.summary.get("error") else "" for r in stopped]
        ends = [
            f"{r.folder} ({r.summary.get('rounds_done')} of {r.summary.get('rounds')} rounds{reason})"
            for r, reason in zip(stopped, reasons, strict=True)
        ]
        notes.append(f"Interrupted: {', '.join(ends)}.")
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
    notes.extend(problems)
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


def _usual_notes(rows: Sequence[Row]) -> list[str]:
    """What rows of a method have where their names do not say it."""
    by_strategy: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_strategy[row.strategy].append(row)
    usual = {strategy: usual_values([row.options for row in alike]) for strategy, alike in by_strategy.items()}
    return [
        f"{method_title(strategy)} has {' '.join(assignments(values, values))} where the name does not say otherwise."
        for strategy, values in usual.items()
        if values
    ]


def _training_notes(runs: Sequence[RunRecord]) -> list[str]:
    """What tells the training of a strategy's runs from that of most runs, a phrase for each strategy."""
    keys = [settings_key(run.training) for run in runs]
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


def _reading(group: Group) -> list[str]:
    """How scores and comparisons are to be read, as far as the table has them."""
    many = any(not math.isnan(row.interval) for row in group.rows)
    interval = " ± 95 % interval over seeds" if many else ""
    notes = [f"Test {group.headline}: mean over clients at the selected round{interval}."]
    everything = [c for row in group.rows for c in row.comparisons]
    over = {c.over for c in everything if c.verdict != "untested"}
    if over:
        test = "paired t-test over seeds" if "seeds" in over else "paired bootstrap over clients"
        if len(over) == 2:
            test += f" (bootstrap over clients where fewer than {MIN_SEEDS} seeds are common, or all differ alike)"
        notes.append(
            f"vs: difference in points ± 95 % interval; better or worse: {test}, p ≤ 5 % after Holm's correction over "
            "the rows; undecided is not equal. Other rows are not compared with each other."
        )
    clear = [
        f"{row.label} with {method_title(c.reference)}"
        for row in group.rows
        for c in row.comparisons
        if c.verdict == "undecided" and c.low * c.high > 0
    ]
    if clear:
        notes.append(
            f"Undecided though the interval by itself is without 0, which is not enough among so many comparisons: "
            f"{listed(shortened(clear))}."
        )
    if untested := [
        f"{row.label} with {method_title(c.reference)}"
        for row in group.rows
        for c in row.comparisons
        if c.verdict == "untested"
    ]:
        notes.append(
            f"Not tested: {listed(shortened(untested))} (no seed in common, a seed without a score, "
            f"fewer than {MIN_CLIENTS} clients, or differences that are all the same)."
        )
    for reference in group.references:
        variants = [row for row in group.rows if row.strategy == reference]
        if len(variants) > 1:
            compared = max(variants, key=lambda row: as_reference(len(row.seeds), row.score))
            least = "" if compared is variants[0] else f" that have at least {MIN_SEEDS} seeds"
            notes.append(
                f"{method_title(reference)} has {len(variants)} rows; the others are compared with the best "
                f"of those{least} ({compared.label})."
            )
    return notes
