"""Sets of the library ``datasets``: by name, or saved on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpers.data.sets.arrays import dataset_of
from fedpers.data.sets.base import Dataset, labels_for
from fedpers.data.sets.tables import dataset_of_table
from fedpers.errors import ConfigError, DataError, one_of, reason
from fedpers.settings.dataset import DatasetConfig


def hugging_face(config: DatasetConfig) -> Dataset:
    """Read a set that ``datasets.save_to_disk`` wrote, or one by its name (downloaded if it is not in the cache).

    ``train`` and ``test``, where it has both, are the official parts; otherwise all its parts are one. A column of
    pictures is scaled to ``dataset.size`` pixels a side and normalized; without one, columns of numbers are features.
    Where the set has names for the numbers of a column, classes and clients are called so.

    Raises
    ------
    DataError
        If it cannot be loaded, or has columns that cannot be used.
    ConfigError
        If a column that was named is not there.
    """
    import datasets

    where = Path(config.path or "").expanduser()
    try:
        loaded: Any = datasets.load_from_disk(str(where)) if where.exists() else datasets.load_dataset(str(config.path))
    except Exception as error:  # whatever that library or the network says
        raise DataError(f"dataset.path={config.path} cannot be loaded ({reason(error)}).") from error
    parts = dict(loaded) if isinstance(loaded, dict) else {"all": loaded}
    official = {"train", "test"} <= parts.keys()
    rows = datasets.concatenate_datasets([parts["train"], parts["test"]] if official else list(parts.values()))
    train_size = len(parts["train"]) if official else None
    name = where.name.replace("/", "_")
    pictures = [column for column, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    named = {"dataset.label": config.label, "dataset.client": config.client, "dataset.domain": config.domain}
    for key, column in named.items():
        if column is not None and column not in rows.column_names:
            raise ConfigError(key, column, f"a column of {where}: {one_of(rows.column_names, column)}")
    class_names = () if config.task == "regression" else _names(rows, config.label)
    if not pictures:
        table = rows.to_pandas()
        if config.client is not None:
            table[config.client] = _named(table[config.client].to_numpy(), rows, config.client)
        return dataset_of_table(config, where, name, table, train_size, class_names=class_names)
    x = np.stack([_scaled(picture, config.size) for picture in rows[pictures[0]]])
    grey = bool((x == x[..., :1]).all())
    client, domain = (
        None if column is None else _named(np.array(rows[column][:]), rows, column)
        for column in (config.client, config.domain)
    )
    labels = labels_for(config.task, np.array(rows[config.label][:]), "dataset.task", f"column '{config.label}'")
    return dataset_of(where, name, {pictures[0]: x[..., :1] if grey else x}, {config.label: labels}, client=client,
                      domain=domain, train_size=train_size, class_names=class_names)  # fmt: skip


def _names(rows: Any, column: str) -> tuple[str, ...]:
    """What the set calls the numbers 0, 1, ... of a column; nothing if it has no names for them."""
    return tuple(getattr(rows.features[column], "names", None) or ())


def _named(values: NDArray[Any], rows: Any, column: str) -> NDArray[Any]:
    """Names in place of the numbers of a column, where the set has names."""
    names = _names(rows, column)
    known = bool(names) and values.dtype.kind in "iu" and int(values.min()) >= 0
    return np.array(names)[values] if known else values


def _scaled(picture: Any, size: int) -> Any:
    """Uint8 ``[size, size, 3]``."""
    if picture is None or picture.mode[0] in "IF":
        raise DataError(f"a picture is {'missing' if picture is None else picture.mode}, expected 8 bits a channel.")
    picture = picture.convert("RGB")
    return np.asarray(picture if picture.size == (size, size) else picture.resize((size, size)))
