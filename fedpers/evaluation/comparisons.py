"""The methods of one table against its fixed references: over seeds where there are enough, else over clients."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from fedpers.evaluation.runs import RunRecord
from fedpers.evaluation.statistics import (
    MIN_SEEDS,
    Comparison,
    Estimate,
    Floats,
    holm,
    paired_bootstrap,
    paired_t,
    verdict,
)

Over = Literal["seeds", "clients"]
Seeds = Mapping[int, RunRecord]


def compare(
    methods: Sequence[Seeds], scores: Sequence[Mapping[int, float]], references: Sequence[str], headline: str
) -> tuple[list[tuple[Comparison, ...]], list[str]]:
    """Compare every method with every reference of another strategy.

    Of several rows of a reference's strategy (with different settings) the one with the highest score is the
    reference, which makes it harder for the methods; of those with at least :data:`MIN_SEEDS` seeds, if there are any.

    Parameters
    ----------
    methods : sequence of mappings
        Of each method its runs by seed.
    scores : sequence of mappings
        Of each method its score by seed, NaN where unknown.
    references : sequence of str
        Strategies.
    headline : str
        Metric of the scores.

    Returns
    -------
    comparisons : list of tuple of Comparison
        Of each method, in the order of `references`.
    problems : list of str
        Sentences on what could not be read or tested.
    """
    strategies = [next(iter(runs.values())).strategy for runs in methods]
    compared: list[list[Comparison]] = [[] for _ in methods]
    clients = _Clients(headline)
    for name in references:
        rows = [i for i, strategy in enumerate(strategies) if strategy == name]
        means = {i: float(np.mean(list(scores[i].values()))) for i in rows}
        reference = max(rows, key=lambda i: as_reference(len(scores[i]), means[i]))
        others = [i for i, strategy in enumerate(strategies) if strategy != name]
        estimates = _estimates(methods, scores, reference, others, clients)
        corrected = holm([estimates[i][0].p_value for i in others])
        for i, p_value in zip(others, corrected, strict=True):
            e, over = estimates[i]
            said = verdict(e.difference, float(p_value))
            seeds = len(scores[i].keys() & scores[reference].keys())
            row = Comparison(name, e.difference, e.low, e.high, float(p_value), over, seeds, e.effect, said)
            compared[i].append(row)
    return [tuple(row) for row in compared], sorted(set(clients.problems.values()))


def as_reference(seeds: int, mean: float) -> tuple[bool, float]:
    """Order the rows of one strategy, the reference last: enough seeds to test over, then the mean score (or NaN)."""
    return seeds >= MIN_SEEDS, -math.inf if math.isnan(mean) else mean


def _estimates(
    methods: Sequence[Seeds],
    scores: Sequence[Mapping[int, float]],
    reference: int,
    others: Sequence[int],
    clients: _Clients,
) -> dict[int, tuple[Estimate, Over]]:
    """Difference of each of the `others` from the reference, and what it was tested over."""
    estimates: dict[int, tuple[Estimate, Over]] = {}
    by_sizes: dict[tuple[int, ...], list[tuple[int, list[Floats]]]] = defaultdict(list)
    for i in others:
        common = sorted(scores[i].keys() & scores[reference].keys())
        a, b = ([scores[j][seed] for seed in common] for j in (i, reference))
        estimate = paired_t(a, b)
        if len(common) >= MIN_SEEDS and not math.isnan(estimate.p_value):
            estimates[i] = (estimate, "seeds")
            continue
        estimates[i] = (Estimate(estimate.difference), "clients")
        if math.isnan(estimate.difference):  # no seed in common, or one without a score, which is not left out
            continue
        differences = [clients.differences(methods[i][seed], methods[reference][seed]) for seed in common]
        if all(len(d) for d in differences):
            by_sizes[tuple(map(len, differences))].append((i, differences))
    for members in by_sizes.values():  # methods with as many clients are resampled together
        stacked = [np.stack([d[seed] for _, d in members], axis=1) for seed in range(len(members[0][1]))]
        for (i, _), estimate in zip(members, paired_bootstrap(stacked), strict=True):
            estimates[i] = (estimate, "clients")
    return estimates


class _Clients:
    """Scores of single clients, read once from each run folder."""

    def __init__(self, headline: str) -> None:
        self.column = f"test_{headline}_selected".replace("-", "_")
        self.problems: dict[str, str] = {}
        self._read: dict[str, tuple[Floats, Floats]] = {}

    def differences(self, run: RunRecord, reference: RunRecord) -> Floats:
        """Run minus reference of every client that trains and has both scores; empty if a file cannot be used."""
        (ids, values), (other_ids, others) = self._scores(run), self._scores(reference)
        _, rows, other_rows = np.intersect1d(ids, other_ids, assume_unique=True, return_indices=True)
        return np.asarray(values[rows] - others[other_rows])

    def _scores(self, run: RunRecord) -> tuple[Floats, Floats]:
        key = str(run.folder)
        if key not in self._read:
            try:
                self._read[key] = self._load(run)
            except Exception as error:  # whatever is wrong with a file, the other comparisons stand
                self._read[key] = (np.empty(0), np.empty(0))
                what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be used ({error})"
                self.problems[key] = f"{run.folder / 'clients.parquet'} {what}: not tested over clients."
        return self._read[key]

    def _load(self, run: RunRecord) -> tuple[Floats, Floats]:
        from pyarrow import parquet

        path = run.folder / "clients.parquet"
        if not path.exists():
            raise FileNotFoundError(path)
        with parquet.ParquetFile(path) as file:
            columns = ["client", "unseen", self.column]
            missing = [name for name in columns if name not in file.schema_arrow.names]
            if missing:
                raise ValueError(f"it has no column {' and no column '.join(missing)}")
            table = file.read(columns=columns)
        ids, unseen, values = (table[name].to_numpy().astype(float) for name in columns)
        if len(np.unique(ids)) < len(ids):
            raise ValueError("a client has several rows")
        measured = ~np.isnan(values) & (unseen == 0)  # the mean of a run, too, is over clients that train
        return ids[measured], values[measured]
