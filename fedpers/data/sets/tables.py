"""Tables: a row is a sample, columns are its features, its label and perhaps its client."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpers.data.sets.arrays import dataset_of
from fedpers.data.sets.base import Dataset, data_root, labels_for, warn_of_many_classes
from fedpers.data.sets.rating_files import file_text
from fedpers.errors import ConfigError, DataError, check, one_of, reason
from fedpers.settings.dataset import DatasetConfig

if TYPE_CHECKING:
    from pandas import DataFrame

logger = logging.getLogger(__name__)

_NAMELESS = re.compile(r"|Unnamed: \d+|__index_level_\d+__")
_WHOLE_NUMBER = r"-?(?:0|[1-9]\d{0,17})"
_SEPARATORS = (",", ";", "\t", "|")
"""Columns that nobody named: numbers of the rows, as pandas writes them."""


def table(config: DatasetConfig) -> Dataset:
    """Read a ``.csv`` file (also compressed; the separator is found) or a ``.parquet`` file.

    Raises
    ------
    DataError
        If the file is missing or damaged, or a cell is empty or no number.
    ConfigError
        If a column that was named is not there.
    """
    import pandas as pd

    path = data_root(config, "file")
    try:
        rows = pd.read_parquet(path) if config.name == "parquet" else _read_csv(path, config)
    except DataError:
        raise
    except Exception as error:  # of pandas, of unpacking, of the file
        raise DataError(f"{path} cannot be read as {config.name} ({reason(error)}).") from error
    return dataset_of_table(config, path, path.name.split(".")[0], rows)


def _read_csv(path: Path, config: DatasetConfig) -> DataFrame:
    """Labels, clients and domains as they stand there, unless all of a column are plain numbers."""
    import pandas as pd

    text = {column: str for column in (config.label, config.client, config.domain) if column}
    content = file_text(path)
    if not content.strip():
        raise DataError(f"{path} is empty.")
    rows = pd.read_csv(
        io.StringIO(content), sep=_separator(content), engine="python", dtype=text, skipinitialspace=True,
        keep_default_na=False, na_values=["", "NaN", "nan"],
    )  # fmt: skip
    if not rows.index.equals(pd.RangeIndex(len(rows))):  # pandas took the first cell for the name of a row
        raise DataError(f"{path}: rows have more cells than the header.")
    for column in [column for column in text if column in rows]:
        rows[column] = rows[column].str.strip()
        whole = bool(rows[column].str.fullmatch(_WHOLE_NUMBER).all())
        if column == config.label and config.task == "regression":
            plain = True
        elif column == config.label:
            plain = not bool(rows[column].str.fullmatch(r"0\d+").any())
        else:
            plain = whole  # 30 and 30.0, 3e1 or 030 are different clients
        if plain:
            numbers = pd.to_numeric(rows[column], errors="coerce")
            rows[column] = numbers if bool(numbers.notna().all()) else rows[column]
    return rows


def _separator(content: str) -> str | None:
    """The most frequent of comma, semicolon, tab and bar outside of quotes in the first line; None if there is none."""
    first = re.sub(r'"[^"]*"', "", content.lstrip("\ufeff\r\n").partition("\n")[0])
    best = max(_SEPARATORS, key=first.count)
    return best if best in first else None


def dataset_of_table(
    config: DatasetConfig, path: Path, name: str, rows: DataFrame, train_size: int | None = None, *,
    class_names: tuple[str, ...] = (),
) -> Dataset:  # fmt: skip
    """Make a data set of the columns that `config` names.

    Columns without a name, in which pandas writes the numbers of the rows, are left out unless `features` has them.
    Features get mean 0 and deviation 1, those of the official training part if there is one.

    Parameters
    ----------
    config : DatasetConfig
        Of it `label`, `client`, `domain`, `features` and `task`; without `features` all other columns are.
    path : Path
        For errors.
    name : str
    rows : DataFrame
    train_size : int, optional
    class_names : tuple of str
        See :func:`dataset_of`.

    Raises
    ------
    DataError, ConfigError
        See :func:`table`.
    """
    import pandas as pd

    columns = [str(column) for column in rows.columns]
    rows = rows.set_axis(columns, axis=1)
    used = {"dataset.label": [config.label], "dataset.features": list(config.features or ())}
    for key, column in (("dataset.client", config.client), ("dataset.domain", config.domain)):
        used[key] = [column] if column else []
    for key, named in used.items():
        for column in named:
            if column not in columns:
                raise ConfigError(key, column, f"a column of {path}: {one_of(columns, column)}")
    features = used["dataset.features"]
    if not features:
        others = [column for column in columns if column not in (config.label, config.client, config.domain)]
        features = [column for column in others if not _NAMELESS.fullmatch(column)]
        for column in sorted(set(others) - set(features)):
            logger.warning("%s: column '%s' has no name of its own and is left out.", path, column)
    if not features or len(rows) == 0:
        raise DataError(f"{path} has no {'rows' if features else 'columns beside label, client and domain'}.")
    for column in (*features, config.label, *used["dataset.client"], *used["dataset.domain"]):
        absent = rows[column].isna()
        if bool(absent.any()):
            raise DataError(f"{path}: column '{column}' has no value in row {int(absent.argmax()) + 1}.")
    for column in features:
        if rows[column].dtype.kind not in "iufb":
            row = int(pd.to_numeric(rows[column], errors="coerce").isna().argmax())
            raise DataError(
                f"{path}: column '{column}' has {str(rows[column].iloc[row])!r} in row {row + 1}, but features are "
                f"numbers; mend it, name columns of numbers in dataset.features, or say that it holds clients or "
                f"domains (dataset.client={column}, dataset.domain={column})."
            )
    x = rows[features].to_numpy(np.float64)
    x = x - x[:train_size].mean(0)
    deviation = x[:train_size].std(0)
    x = x / np.where(deviation > 0, deviation, 1.0)
    client, domain = (None if column is None else _ids(rows[column]) for column in (config.client, config.domain))
    labels = labels_for(config.task, _labels(rows[config.label]), "dataset.task", f"column '{config.label}' of {path}")
    if config.task is None and not class_names:
        whole = labels.dtype.kind == "f" and bool((labels == np.floor(labels)).all())
        allowed = f"classification or regression, because column '{config.label}' of {path} has whole numbers as floats"
        check(not whole, "dataset.task", "null", allowed)
        warn_of_many_classes(str(path), labels, "dataset.task=regression")
    return dataset_of(path, name, {"features": x}, {config.label: labels}, client=client, domain=domain,
                      train_size=train_size, class_names=class_names)  # fmt: skip


def _labels(column: Any) -> Any:
    """Whole numbers, floats, or anything else as text."""
    return column.to_numpy() if column.dtype.kind in "iufb" else column.astype(str).to_numpy(str)


def _ids(column: Any) -> Any:
    """Whole numbers, or anything else as text."""
    return column.to_numpy() if column.dtype.kind in "iu" else column.astype(str).to_numpy(str)
