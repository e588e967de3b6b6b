"""Files of ratings: who liked what, and when. To add a set, give it a name in `RATINGS` and its files in `FILES`."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import os
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedpers.data.sets.arrays import read_npz
from fedpers.data.sets.base import data_root, number_labels
from fedpers.errors import DataError, reason
from fedpers.randomness import generator
from fedpers.settings.dataset import DatasetConfig
from fedpers.settings.sources import SOURCES

if TYPE_CHECKING:
    from pandas import DataFrame

FILES: dict[str, tuple[str, ...]] = {
    "movielens100k": ("u.data", "ml-100k/u.data", "ratings.dat", "ml100k.npz"),
    "movielens1m": ("ratings.dat", "ml-1m/ratings.dat", "ml1m.npz"),
    "amazon_video": ("ratings_Amazon_Instant_Video.csv", "ratings.dat", "amazon_video.npz"),
    "lastfm2k": ("user_artists.dat", "hetrec2011-lastfm-2k/user_artists.dat", "lastfm2k.npz"),
}
"""Where in a folder a set is looked for, in this order."""
AMBIGUOUS = "ratings.dat"
"""A name that files of several sets have: it counts only in a folder that was named for the set."""
COLUMNS = ("user", "item", "rating", "time")
_SAME = {"userid": "user", "uid": "user", "itemid": "item", "movieid": "item", "mid": "item", "artistid": "item"}
_SAME |= {"weight": "rating", "timestamp": "time"}
_WHOLE_NUMBER = r"-?(?:0|[1-9]\d{0,17})(?:\.0*)?"
_OTHER_NUMBER = r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?"
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
    user_names : tuple of str
        What the file calls user 0, 1, ...; empty where the numbers are the names.
    """

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    rating: NDArray[np.float64]
    time: NDArray[Any] | None
    name: str
    user_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.user)


def read_ratings(config: DatasetConfig) -> Ratings:
    """Read (or make) a set of ratings.

    ``dataset.root`` is a file, or a folder in which `FILES` are looked for. A text file (``.gz``, ``.bz2`` or ``.xz``
    too) has columns separated by ``::``, tabs, commas or semicolons. With a header they are found by name: ``user``,
    ``item`` and perhaps ``rating`` and ``time``, or as MovieLens and HetRec name them (``userId``, ``movieId``,
    ``artistID``, ``weight``, ``timestamp``). Without one (not for ``ratings``) they are user, item, rating and perhaps
    time. Without ratings each row counts as liked. Ids are text, unless all of a column are whole numbers without
    leading zeros: ``0123`` and ``123`` are two items. Times are numbers or dates. A .parquet file has columns of these
    names, an .npz file arrays ``user``, ``item`` and perhaps ``rating`` and ``time``. Two packed forms are read as
    well. One has ``count`` (rows of user 1, 2, ...), ``item`` and each user's latest item ``test_item``; the order of
    the others is not known, so they share one time. The other has ``ua`` ``[n, 3]``: user, artist and number of
    listenings.

    Raises
    ------
    DataError
        If the file is missing, empty or damaged, lacks a column, or a cell cannot be used.
    """
    if config.name == "synthetic_ratings":
        return _synthetic(config)
    try:
        path = _find(config)
        if path.suffix in (".npz", ".parquet"):
            columns, user_names = (_from_npz if path.suffix == ".npz" else _from_parquet)(path)
        else:
            columns, user_names = _from_text(path, config)
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
        user_names=user_names,
    )


def _find(config: DatasetConfig) -> Path:
    names = FILES.get(config.name, ())
    root = data_root(config, None if names else "file")
    if os.path.isfile(root):
        return root
    for name in names:
        # in the folder that all sets have by default a file of a common name may be another's
        if os.path.isfile(root / name) and (name != AMBIGUOUS or config.root is not None):
            return root / name
    raise DataError(
        f"{config.name}: {root} has none of {', '.join(names)}; fetch them from {SOURCES[config.name].url} and set "
        f"dataset.root to the folder or the file."
    )


# --- text -----------------------------------------------------------------------------------------------------------


def _from_text(path: Path, config: DatasetConfig) -> tuple[dict[str, NDArray[Any]], tuple[str, ...]]:
    import pandas as pd

    text = file_text(path).lstrip("\n")
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
                dtype={"user": str, "item": str},
                keep_default_na=False,
                na_values=[""],
                low_memory=False,
            )
    except pd.errors.ParserWarning as error:
        raise DataError(f"{path} is damaged (its rows have more cells than its first line).") from error
    except ValueError as error:  # one such row, or an open quote
        raise DataError(f"{path} is damaged ({str(error).strip().splitlines()[-1].rstrip('.')}).") from error
    return _from_table(path, table)


def file_text(path: Path) -> str:
    """Text of a file, perhaps compressed, in UTF-8, UTF-16 or an encoding of Western Europe."""
    unpack: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress
    }  # fmt: skip
    packed = path.read_bytes()
    try:
        content = unpack.get(path.suffix, bytes)(packed)
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        raise DataError(f"{path} is damaged ({reason(error)}).") from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encodings = ["utf-16"]
    elif b"\0" in content:
        raise DataError(f"{path} is not a text file.")
    else:
        encodings = ["utf-8-sig", "cp1252", "latin-1"]
    for encoding in encodings:
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise DataError(f"{path} is not a text file.")


def _from_parquet(path: Path) -> tuple[dict[str, NDArray[Any]], tuple[str, ...]]:
    import pandas as pd

    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged or no .parquet file ({reason(error)}).") from error
    names = [_SAME.get(str(name).lower().replace("_", ""), str(name).lower()) for name in table.columns]
    table = table.set_axis(names, axis=1)
    for column in ("user", "item"):
        if names.count(column) != 1:
            raise DataError(f"{path} has {names.count(column)} columns '{column}'; it has {', '.join(names)}.")
        table[column] = table[column].astype("string").astype(object)
    for column in ("rating", "time"):
        if names.count(column) > 1:
            raise DataError(f"{path} has {names.count(column)} columns '{column}'; it has {', '.join(names)}.")
    if "time" in names and table["time"].dtype.kind == "M" and bool(table["time"].notna().all()):
        table["time"] = table["time"].astype("int64")
    return _from_table(path, table)


def _from_table(path: Path, table: DataFrame) -> tuple[dict[str, NDArray[Any]], tuple[str, ...]]:
    """Columns as numbers, and what users are called; users and items are text in `table`."""
    import pandas as pd

    if table.empty:
        raise DataError(f"{path} is empty, expected rows of user, item, rating and time.")
    columns: dict[str, NDArray[Any]] = {}
    user_names: tuple[str, ...] = ()
    for column in (name for name in table.columns if name in COLUMNS):
        values = table[column]
        if bool(values.isna().any()):
            raise DataError(f"{path}: column '{column}' has no value in row {int(values.isna().argmax()) + 1}.")
        if column in ("user", "item"):
            values = values.str.strip()
            whole = values.str.fullmatch(_WHOLE_NUMBER)
            if bool(whole.all()):
                columns[column] = values.str.partition(".")[0].astype("int64").to_numpy()
                continue
            fraction = values.str.contains(r"[.eE]") & ~whole
            if bool(values.str.fullmatch(_OTHER_NUMBER).all()) and bool(fraction.any()):
                row = int(fraction.argmax())
                raise DataError(
                    f"{path}: column '{column}' has {values.iloc[row]} in row {row + 1}, expected a whole number >= 0."
                )
            columns[column], ids = pd.factorize(values)
            user_names = tuple(ids) if column == "user" else user_names
        elif values.dtype.kind in "iuf":
            columns[column] = values.to_numpy()
        elif column == "time" and (dates := _dates(values)).notna().all():
            columns[column] = dates.astype("int64").to_numpy()
        else:
            row = int(pd.to_numeric(values, errors="coerce").isna().argmax())
            raise DataError(f"{path}: column '{column}' has '{values.iloc[row]}' in row {row + 1}, expected a number.")
    return columns, user_names


def _dates(values: Any) -> Any:
    """Text as times, NaT where it is no date."""
    import pandas as pd

    iso = values.str.match(r"\d{4}-\d\d-\d\d")  # any other order of day and month would be a guess
    return pd.to_datetime(values.where(iso), errors="coerce", utc=True, format="mixed")


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


def _from_npz(path: Path) -> tuple[dict[str, NDArray[Any]], tuple[str, ...]]:
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
    user_names: tuple[str, ...] = ()
    for column, values in columns.items():
        kinds = "iufUS" if column in ("user", "item") else "iuf"
        if values.ndim != 1 or values.dtype.kind not in kinds:
            raise DataError(f"{path}: {column} is {values.dtype} {list(values.shape)}, expected numbers [n].")
        if values.dtype.kind in "US":
            columns[column], ids = number_labels(values)
            user_names = ids if column == "user" else user_names
    return columns, user_names


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
