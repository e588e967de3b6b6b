"""What the pictures of a report show, read from run folders: curves over rounds, and the clients of each seed."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpers.evaluation.leaderboard import Group, Row
from fedpers.evaluation.plots import read_rounds
from fedpers.evaluation.runs import RunRecord

logger = logging.getLogger(__name__)

COSTS = {"round": "round", "gradients": "gradients of all clients", "megabytes": "megabytes up and down",
         "seconds": "seconds", "simulated hours": "simulated hours on clients' devices"}  # fmt: skip
"""What a curve can be drawn over, and its name on the axis."""
_USUAL = ("train/loss", "train/passes")

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Scores of a method over rounds; those that were measured in every seed.

    Attributes
    ----------
    scores : ndarray ``[seeds, rounds]``
        Mean over clients of the headline metric on test.
    costs : dict of str to ndarray ``[rounds]``
        What was spent up to each of these rounds by keys of :data:`COSTS`, mean over seeds.
    """

    scores: Floats
    costs: dict[str, Floats]


@dataclass(frozen=True)
class Clients:
    """The clients of one run that train and were measured.

    Attributes
    ----------
    names : list of str
        Of clients without a name, their numbers.
    train, test : ndarray ``[n]``
        Samples.
    score : ndarray ``[n]``
        Headline metric on test at the selected round.
    divergence : ndarray ``[n]`` or None
        Total variation distance between the labels of the client and of all; None if the run does not say.
    """

    names: list[str]
    train: Floats
    test: Floats
    score: Floats
    divergence: Floats | None

    def among(self, names: Collection[str]) -> Clients:
        """Those of these names."""
        kept = np.array([name in names for name in self.names], dtype=bool)
        if kept.all():
            return self
        divergence = None if self.divergence is None else self.divergence[kept]
        of_names = [name for name in self.names if name in names]
        return Clients(of_names, self.train[kept], self.test[kept], self.score[kept], divergence)


@dataclass(frozen=True)
class Method:
    """A row of a leaderboard with what its run folders hold.

    Attributes
    ----------
    row : Row
    runs : list of RunRecord
        In the order of ``row.seeds``.
    curve : Curve or None
        None if no round was measured in every seed.
    clients : dict of int to Clients
        By seed; seeds whose file is missing are left out.
    extra : dict of str to ndarray ``[2, rounds]``
        Rounds, and what the method records of itself in them, mean over seeds: ``personal_share/LAYER``, ``sparsity``.
    """

    row: Row
    runs: list[RunRecord]
    curve: Curve | None
    clients: dict[int, Clients]
    extra: dict[str, Floats] = field(default_factory=dict)


def read_methods(group: Group, runs: Mapping[str, RunRecord]) -> tuple[list[Method], list[str]]:
    """Read what the folders of a group hold.

    Parameters
    ----------
    group : Group
    runs : mapping of str to RunRecord
        By folder.

    Returns
    -------
    methods : list of Method
        In the order of the rows.
    problems : list of str
        A sentence on each file that could not be used.
    """
    methods, problems = [], []
    for row in group.rows:
        rounds, clients = [], {}
        for seed, folder in zip(row.seeds, row.folders, strict=True):
            try:
                rounds.append(read_rounds(Path(folder)).rows)
            except Exception as error:  # whatever is wrong with one folder must not hide the others
                problems.append(f"Not drawn: {folder} has no usable rounds.jsonl ({_sentence(error)}).")
            try:
                clients[seed] = _read_clients(Path(folder) / "clients.parquet", group.headline)
            except Exception as error:
                problems.append(f"Not drawn: {folder} has no usable clients.parquet ({_sentence(error)}).")
        try:
            curve, extra = _curve(rounds, f"test/{group.headline}"), dict(_extra(rounds))
        except (AttributeError, OverflowError, TypeError, ValueError) as error:
            problems.append(f"Not drawn: the rounds of {row.label} hold something else than numbers ({error}).")
            curve, extra = None, {}
        methods.append(Method(row, [runs[folder] for folder in row.folders], curve, clients, extra))
    return methods, problems


def read_label_counts(method: Method) -> tuple[list[str], list[str], Floats] | None:
    """Who owns what, in the first run of a method.

    Returns
    -------
    tuple of (names, classes, counts ``[clients, classes]``), or None
        None if the run does not say, as those of tasks without classes and those of before it was recorded.
    """
    import pyarrow.parquet as parquet

    path = Path(method.row.folders[0]) / "clients.parquet"
    if method.row.seeds[0] not in method.clients:
        return None
    file = parquet.ParquetFile(path)
    classes = [name for name in file.schema_arrow.names if name.startswith("class ")]
    if not classes:
        return None
    table = file.read(columns=[*classes, *_names_column(file.schema_arrow.names)])
    counts = np.stack([np.asarray(table[name], dtype=np.float64) for name in classes], axis=1)
    names = [str(name) for name in table[_names_column(table.column_names)[0]].to_pylist()]
    return names, [name.removeprefix("class ") for name in classes], counts


def paired(method: Method, reference: Method) -> list[tuple[int, Clients, Clients]]:
    """Clients that were measured with both methods, by common seed, the same ones at the same places.

    Returns
    -------
    list of (seed, clients of `method`, clients of `reference`)
    """
    pairs = []
    for seed, clients in method.clients.items():
        other = reference.clients.get(seed)
        if other is not None:
            common = set(clients.names) & set(other.names)
            pairs.append((seed, clients.among(common), other.among(common)))
    return [pair for pair in pairs if pair[1].names]


def _names_column(columns: Sequence[str]) -> list[str]:
    return ["name"] if "name" in columns else ["client"]


def _read_clients(path: Path, headline: str) -> Clients:
    import pyarrow.parquet as parquet

    file = parquet.ParquetFile(path)
    present = file.schema_arrow.names
    scored = f"test_{headline.replace('-', '_')}_selected"
    wanted = [*_names_column(present), "train_size", "test_size", "unseen", scored]
    absent = [name for name in wanted if name not in present]
    if absent:
        raise ValueError(f"it lacks {', '.join(absent)}")
    table = file.read(columns=[*wanted, *(["divergence"] if "divergence" in present else [])])
    score = _floats(table[scored])
    used = np.isfinite(score) & ~np.asarray(table["unseen"], dtype=bool)
    names = table[wanted[0]].to_pylist()
    return Clients(
        [str(names[i]) for i in np.flatnonzero(used)],
        _floats(table["train_size"])[used],
        _floats(table["test_size"])[used],
        score[used],
        _floats(table["divergence"])[used] if "divergence" in present else None,
    )


def _floats(column: Any) -> Floats:
    return np.asarray(column.to_numpy(), dtype=np.float64)


def _curve(seeds: Sequence[Sequence[Mapping[str, Any]]], name: str) -> Curve | None:
    measured = [{int(row["round"]) for row in rows if row.get(name) is not None} for rows in seeds]
    common = sorted(set.intersection(*measured)) if measured else []
    if not common:
        return None
    scores, costs = [], []
    for rows in seeds:
        spent = np.zeros(4)
        by_round: dict[int, tuple[Any, Floats]] = {}
        for row in rows:
            sent = float(row.get("bytes_up") or 0) + float(row.get("bytes_down") or 0)
            hours = float(row.get("simulated_seconds") or 0) / 3600
            new = [float(row.get("gradients") or 0), sent / 1e6, float(row.get("seconds") or 0), hours]
            spent = np.add(spent, new)
            by_round[int(row["round"])] = (row.get(name), spent)
        scores.append([float(by_round[r][0]) for r in common])
        costs.append([by_round[r][1] for r in common])
    mean = np.mean(costs, axis=0)
    drawn_over = {"round": np.array(common, dtype=np.float64)}
    drawn_over |= {key: mean[:, i] for i, key in enumerate(("gradients", "megabytes", "seconds", "simulated hours"))}
    return Curve(np.array(scores), drawn_over)


def _extra(seeds: Sequence[Sequence[Mapping[str, Any]]]) -> Iterator[tuple[str, Floats]]:
    """What a method records beyond the loss, in the rounds that all seeds have it of."""
    names = dict.fromkeys(key for rows in seeds for row in rows for key in row if key.startswith("train/"))
    for name in names:
        if name in _USUAL:
            continue
        values = [{int(row["round"]): float(row[name]) for row in rows if row.get(name) is not None} for rows in seeds]
        common = sorted(set.intersection(*(set(seed) for seed in values)))
        if common:
            mean = np.mean([[seed[r] for r in common] for seed in values], axis=0)
            yield name.removeprefix("train/"), np.array([common, mean], dtype=np.float64)


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
