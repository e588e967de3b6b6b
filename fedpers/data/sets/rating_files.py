"""Files of ratings: who liked what, and when. To add a set, give it a name in `RATINGS` and its files in `FILES`."""

from __future__ import annotations

import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpers.data.sets.arrays import read_npz
from fedpers.data.sets.base import data_root
from fedpers.errors import DataError
from fedpers.randomness import generator
from fedpers.settings.data import DatasetConfig

FILES: dict[str, tuple[str, ...]] = {
    "movielens100k": ("u.data", "ml-100k/u.data", "ratings.dat", "ml100k.npz"),
    "movielens1m": ("ratings.dat", "ml-1m/ratings.dat", "ml1m.npz"),
    "amazon_video": ("ratings_Amazon_Instant_Video.csv", "ratings.dat", "amazon_video.npz"),
    "lastfm2k": ("user_artists.dat", "hetrec2011-lastfm-2k/user_artists.dat", "lastfm2k.npz"),
}
"""Where in a folder a set is looked for, in this order."""
SOURCES = {
    "movielens100k": "https://grouplens.org/datasets/movielens/100k",
    "movielens1m": "https://grouplens.org/datasets/movielens/1m",
    "amazon_video": "https://jmcauley.ucsd.edu/data/amazon",
    "lastfm2k": "https://grouplens.org/datasets/hetrec-2011",
}
COLUMNS = ("user", "item", "rating", "time")
_SAME = {"userid": "user", "uid": "user", "itemid": "item", "movieid": "item", "mid": "item", "artistid": "item"}
_SAME |= {"weight": "rating", "timestamp": "time"}
_SYNTHETIC_GROUPS = 4
_SYNTHETIC_SIZE = 4  # of a taste


@dataclass(frozen=True)
class Ratings:
    """Rows of a file of ratings, in its order.

    Parameters
    ----------
    user, item : int64 array ``[n]``
        Ids, any whole numbers >= 0.
    rating : float64 array ``[n]``
    time : int64 or float64 array ``[n]``, or None
        None if the file does not say.
    name : str
    """

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    rating: NDArray[np.float64]
    time: NDArray[Any] | None
    name: str

    def __len__(self) -> int:
        return len(self.user)


def read_ratings(config: DatasetConfig) -> Ratings:
    """Read (or make) a set of ratings.

    ``dataset.root`` is a file, or a folder in which `FILES` are looked for. A text file has columns separated by
    ``::``, tabs, commas or semicolons. With a header they are found by name: ``user``, ``item`` and perhaps ``rating``
    and ``time``, or as MovieLens and HetRec name them (``userId``, ``movieId``, ``artistID``, ``weight``,
    ``timestamp``). Without one (not for ``ratings``) they are user, item, rating and perhaps time. Without ratings
    each row counts as liked. Ids are whole numbers, or names of which none is a number. An .npz file has arrays
    ``user``, ``item`` and perhaps ``rating`` and ``time``. Two packed forms are read as well. One has ``count`` (rows
    of user 1, 2, ...), ``item`` and each user's latest item ``test_item``; the order of the others is not known, so
    they share one time. The other has ``ua`` ``[n, 3]``: user, artist and number of listenings.

    Raises
    ------
    DataError
        If the file is missing, empty or damaged, lacks a column, or a cell cannot be used.
    """
    if config.name == "synthetic_ratings":
        return _synthetic(config)
    try:
        path = _find(config)
        columns = _from_npz(path) if path.suffix == ".npz" else _from_text(path, config)
    except OSError as error:
        raise DataError(f"{config.name}: {error}.") from error
    name = path.stem if config.name == "ratings" else config.name
    lengths = {column: len(values) for column, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{path}: columns differ in length: {', '.join(f'{c} {n}' for c, n in lengths.items())}.")
    if lengths["user"] == 0:
        raise DataError(f"{path} is empty, expected rows of user, item, rating and time.")
    time = columns.get("time")
    return Ratings(
        user=_ids(path, "user", columns["user"]),
        item=_ids(path, "item", columns["item"]),
        rating=_numbers(path, "rating", columns.get("rating", np.ones(lengths["user"]))).astype(np.float64),
        time=None if time is None else _numbers(path, "time", time),
        name=name,
    )


def _find(config: DatasetConfig) -> Path:
    root = data_root(config)
    if os.path.isfile(root):
        return root
    names = FILES.get(config.name, ())
    for name in names:
        if os.path.isfile(root / name):
            return root / name
    if not names:
        raise DataError(f"{root} is missing or not a file.")
    raise DataError(
        f"{config.name}: {root} has none of {', '.join(names)}; fetch them from {SOURCES[config.name]} and set "
        f"dataset.root to the folder or the file."
    )


# --- text -----------------------------------------------------------------------------------------------------------


def _from_text(path: Path, config: DatasetConfig) -> dict[str, NDArray[Any]]:
    import pandas as pd

    try:
        text = path.read_text(encoding="utf-8-sig").lstrip("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text file ({error.reason}).") from error
    first = text.partition("\n")[0]
    separator = next((s for s in ("::", "\t", ",", ";") if s in first), ",")
    if separator == "::":
        text, first, separator = text.replace("::", "\t"), first.replace("::", "\t"), "\t"
    cells = [cell.strip().strip('"') for cell in first.split(separator)]
    column_names = [_SAME.get(cell.lower().replace("_", ""), cell.lower()) for cell in cells]
    header = config.name == "ratings" or "user" in column_names or "item" in column_names
    if not text.strip():
        raise DataError(f"{path} is empty, expected rows of user, item, rating and time.")
    if header:
        for column in ("user", "item"):
            if column not in column_names:
                raise DataError(f"{path} has no column '{column}'; its first line names {', '.join(cells)}.")
    elif not 3 <= len(cells) <= len(COLUMNS):
        raise DataError(f"{path} has {len(cells)} columns, expected user, item, rating and perhaps time.")
    names = column_names if header else list(COLUMNS[: len(cells)])
    doubled = [column for column in COLUMNS if names.count(column) > 1]
    if doubled:
        raise DataError(f"{path} has more than one column '{doubled[0]}'.")
    as_text = {"user": str, "item": str} if config.name == "amazon_video" else None  # ids like 0000143502
    names = [column if column in COLUMNS else f"other {index}" for index, column in enumerate(names)]  # each once
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(
                io.StringIO(text),
                sep=separator,
                names=names,
                header=0 if header else None,
                index_col=False,
                dtype=as_text,
                low_memory=False,
            )
    except pd.errors.ParserWarning as error:
        raise DataError(f"{path} is damaged (its rows have more cells than its first line).") from error
    except ValueError as error:  # one such row, or an open quote
        raise DataError(f"{path} is damaged ({str(error).strip().splitlines()[-1].rstrip('.')}).") from error
    columns: dict[str, NDArray[Any]] = {}
    for column in (name for name in names if name in COLUMNS):
        values = table[column]
        if bool(values.isna().any()):
            raise DataError(f"{path}: column '{column}' has no value in row {int(values.isna().argmax()) + 1}.")
        if values.dtype.kind in "iuf":
            columns[column] = values.to_numpy()
            continue
        number = pd.to_numeric(values, errors="coerce").notna()
        names_allowed = column in ("user", "item") and (as_text is not None or not bool(number.any()))
        if not names_allowed:
            row = int((~number).argmax())
            raise DataError(f"{path}: column '{column}' has '{values.iloc[row]}' in row {row + 1}, expected a number.")
        columns[column] = pd.factorize(values)[0].astype(np.int64)
    return columns


def _ids(path: Path, column: str, values: NDArray[Any]) -> NDArray[np.int64]:
    numbers = _numbers(path, column, values)
    bad = (numbers < 0) | (numbers != np.floor(numbers)) | (numbers >= 2**62)
    if bad.any():
        row = int(bad.argmax())
        raise DataError(f"{path}: column '{column}' has {numbers[row]} in row {row + 1}, expected a whole number >= 0.")
    return numbers.astype(np.int64)


def _numbers(path: Path, column: str, values: NDArray[Any]) -> NDArray[Any]:
    """Int64 or finite float64."""
    if values.dtype.kind in "iu":
        return values.astype(np.int64)
    bad = ~np.isfinite(values)
    if bad.any():
        row = int(bad.argmax())
        raise DataError(f"{path}: column '{column}' has {values[row]} in row {row + 1}, expected a number.")
    return values.astype(np.float64)


# --- npz ------------------------------------------------------------------------------------------------------------


def _from_npz(path: Path) -> dict[str, NDArray[Any]]:
    arrays = read_npz(path)
    if "ua" in arrays:
        listened = arrays["ua"]
        if listened.ndim != 2 or listened.shape[1] != 3:
            raise DataError(f"{path}: ua is {list(listened.shape)}, expected [n, 3]: user, artist, listenings.")
        arrays = dict(zip(COLUMNS[:3], listened.T, strict=True))
    elif "count" in arrays:
        arrays = _from_counts(path, arrays)
    for column in ("user", "item"):
        if column not in arrays:
            raise DataError(f"{path} has no array '{column}'; it has {', '.join(sorted(arrays)) or 'none'}.")
    columns = {column: arrays[column] for column in COLUMNS if column in arrays}
    for column, values in columns.items():
        kinds = "iufUS" if column in ("user", "item") else "iuf"
        if values.ndim != 1 or values.dtype.kind not in kinds:
            raise DataError(f"{path}: {column} is {values.dtype} {list(values.shape)}, expected numbers [n].")
        if values.dtype.kind in "US":
            columns[column] = np.unique(values, return_inverse=True)[1].astype(np.int64)
    return columns


def _from_counts(path: Path, arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Rows of user 1, then of user 2, ...; a user's latest item is known, the order of the others is not."""
    for name in ("count", "item", "test_item"):
        if name not in arrays:
            raise DataError(f"{path} has no array '{name}', which belongs to 'count'.")
        if arrays[name].ndim != 1 or arrays[name].dtype.kind not in "iu":
            raise DataError(f"{path}: {name} must be whole numbers [n].")
    count, item, latest = (arrays[name].astype(np.int64) for name in ("count", "item", "test_item"))
    if len(count) != len(latest) or (count < 0).any() or count.sum() != len(item):
        raise DataError(f"{path}: count has {count.sum()} rows of {len(count)} users, but item and test_item do not.")
    time = (item == np.repeat(latest, count)).astype(np.int64)
    user = np.repeat(np.arange(1, len(count) + 1), count)
    absent = np.setdiff1d(np.arange(1, len(count) + 1), user[time == 1])
    if len(absent):
        raise DataError(f"{path}: test_item of user {absent[0]} is not among its items.")
    return {"user": user, "item": item, "time": time}


# --- made up --------------------------------------------------------------------------------------------------------


def _synthetic(config: DatasetConfig) -> Ratings:
    """Users of four groups with tastes of their own; a group sees items in its own way.

    User u of group g likes item j by ``p_u . (q_j + o_gj) + b_j``, all drawn from normal distributions: q is what items
    are to everyone, o how a group sees them, b popularity. Liked are 20 to 60 items, drawn without replacement with
    probability in proportion to ``exp`` of that; they are in random order.
    """
    users, items = config.num_users, config.num_items
    rng = generator(config.seed, "synthetic_ratings")
    taste = rng.normal(size=(users, _SYNTHETIC_SIZE))
    common = rng.normal(size=(items, _SYNTHETIC_SIZE))
    views = rng.normal(size=(_SYNTHETIC_GROUPS, items, _SYNTHETIC_SIZE))
    liking = np.stack([(common + views[u % _SYNTHETIC_GROUPS]) @ taste[u] for u in range(users)])
    liking += rng.normal(size=items)
    drawn = np.argsort(-(liking + rng.gumbel(size=liking.shape)), axis=1)  # Gumbel: draws without replacement
    sizes = rng.integers(20, min(60, items // 2) + 1, users)
    item = np.concatenate([rng.permutation(drawn[u, : sizes[u]]) for u in range(users)])
    time = np.concatenate([np.arange(size) for size in sizes])
    return Ratings(np.repeat(np.arange(users), sizes), item, np.ones(len(item)), time, config.name)
