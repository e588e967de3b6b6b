"""Data of a user's own, client by client, as :class:`FederatedData`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpers.data.federated import PARTS, FederatedData
from fedpers.data.sets.base import normalized
from fedpers.data.split import hold_out
from fedpers.errors import DataError, check, reason
from fedpers.tasks import CLASSIFICATION, Regression

logger = logging.getLogger(__name__)


def data_of_clients(
    clients: Any, *, owner: Any, label: str, validation: float, test: float, seed: int, name: str
) -> FederatedData:
    """Make data of all clients; see :meth:`FederatedData.from_clients`."""
    for key, share in (("validation", validation), ("test", test)):
        check(0 <= share < 1 and validation + test < 1, key, share, "shares >= 0 that leave something for training")
    samples = _by_owner(clients, owner, label, name) if owner is not None else _named(clients, name)
    _check_columns(samples, label, name)
    rows: list[tuple[NDArray[Any], NDArray[Any]]] = []
    lists: dict[str, list[NDArray[np.int64]]] = {part: [] for part in PARTS}
    start = 0
    for number, (client, given) in enumerate(samples.items()):
        where = f"{name}: client {client}"
        for part, (x, y) in _parts(given, label, where).items():
            if len(x) != len(y):
                raise DataError(f"{where} has {len(x)} samples but {len(y)} labels.")
            rows.append((x, y))
            positions = np.arange(start, start + len(y))
            start += len(y)
            if part == "all":
                if len(y) == 0:
                    raise DataError(f"{where} has no samples.")
                for each, held in zip(("train", "validation", "test"), hold_out(positions, [validation, test], seed,
                                                                               number), strict=True):  # fmt: skip
                    lists[each].append(held)
            else:
                lists[part].append(positions)
        for part in PARTS:  # a part that is not given is empty
            if len(lists[part]) == number:
                lists[part].append(np.zeros(0, np.int64))
    inputs = _inputs([x for x, _ in rows], name)
    labels, classes = _labels([y for _, y in rows], name)
    regression = labels.is_floating_point()
    train, validated, tested = ([torch.from_numpy(positions) for positions in lists[part]] for part in PARTS)
    return FederatedData(
        inputs,
        labels,
        train,
        validated,
        tested,
        labels[0].numel() if regression else int(labels.max()) + 1,
        name,
        client_names=tuple(samples),
        class_names=classes,
        task=Regression() if regression else CLASSIFICATION,
    )


def _check_columns(samples: Mapping[str, Any], label: str, name: str) -> None:
    """Refuse data frames whose columns differ: they would be put together by position."""
    frames = {client: list(map(str, given.columns)) for client, given in samples.items() if hasattr(given, "columns")}
    first = next(iter(frames.values()), [])
    for client, columns in frames.items():
        if columns != first:
            raise DataError(
                f"{name}: client {client} has the columns {', '.join(columns)}, the first {', '.join(first)}."
            )


def _named(clients: Any, name: str) -> dict[str, Any]:
    """Samples by name of the client."""
    if isinstance(clients, Mapping):
        named = {str(client): given for client, given in clients.items()}
    elif isinstance(clients, Sequence) and not isinstance(clients, str):
        named = {str(number): given for number, given in enumerate(clients)}
    else:
        raise DataError(f"{name}: clients must be a list or a dictionary by name, not {type(clients).__name__}.")
    if not named:
        raise DataError(f"{name}: there are no clients.")
    if len(named) < len(clients):
        raise DataError(f"{name}: two clients have the same name.")
    return named


def _by_owner(samples: Any, owner: Any, label: str, name: str) -> dict[str, Any]:
    """One set, cut by the owner of each sample."""
    x, y = _pair(samples, label, name)
    ids = np.asarray(owner)
    if ids.shape != (len(y),):
        raise DataError(f"{name}: owner is {list(ids.shape)}, expected one id for each of {len(y)} samples.")
    if any(value is None or value != value for value in ids.tolist()):
        raise DataError(f"{name}: owner has no value for a sample.")
    values, numbers = np.unique(ids.astype(str) if ids.dtype == object else ids, return_inverse=True)
    return {str(value): (x[numbers == k], y[numbers == k]) for k, value in enumerate(values.tolist())}


def _parts(given: Any, label: str, where: str) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """Inputs and labels of a client's parts; ``all`` of one that is still to be split."""
    if isinstance(given, Mapping) and not set(given) <= set(PARTS):
        raise DataError(f"{where}: a dictionary of a client's parts has the keys {', '.join(PARTS)}, not "
                        f"{', '.join(map(str, given))}; several inputs for a sample are not supported.")  # fmt: skip
    if isinstance(given, Mapping):
        if "train" not in given:
            raise DataError(f"{where} has no part for training.")
        return {part: _pair(given[part], label, f"{where}, {part}") for part in PARTS if part in given}
    return {"all": _pair(given, label, where)}


def _pair(given: Any, label: str, where: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Inputs ``[n, ...]`` and labels ``[n, ...]`` of a pair, a data frame or a PyTorch data set."""
    if hasattr(given, "columns") and hasattr(given, "to_numpy"):
        if label not in given.columns:
            columns = ", ".join(map(str, given.columns))
            raise DataError(f"{where}: there is no column '{label}' among {columns}; name it with label=.")
        return given.drop(columns=label).to_numpy(), given[label].to_numpy()
    if isinstance(given, torch.utils.data.TensorDataset) and len(given.tensors) == 2:
        given = given.tensors
    if isinstance(given, tuple | list) and len(given) == 2:
        return _array(given[0], f"{where}: inputs"), _array(given[1], f"{where}: labels")
    if isinstance(given, torch.utils.data.Dataset) and hasattr(given, "__len__"):
        items = [given[position] for position in range(len(given))]
        if not all(isinstance(item, tuple | list) and len(item) == 2 for item in items):
            raise DataError(f"{where}: samples of the data set must be pairs (input, label).")
        inputs = [np.asarray(item[0]) for item in items]
        shapes = {value.shape for value in inputs}
        if len(shapes) > 1:
            raise DataError(f"{where}: inputs differ in shape: {', '.join(map(str, sorted(shapes)[:3]))}.")
        return (
            np.stack(inputs) if inputs else np.zeros(0),
            _array([item[1] for item in items], f"{where}: labels"),
        )
    kind = type(given).__name__
    raise DataError(f"{where} must be a pair (inputs, labels), a data frame or a PyTorch Dataset, not {kind}.")


def _array(values: Any, what: str) -> NDArray[Any]:
    try:
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    except TypeError:  # bfloat16, which NumPy does not have
        array = values.detach().cpu().float().numpy()
    except ValueError as error:
        raise DataError(f"{what} differ in shape ({reason(error)}).") from error
    if array.ndim == 0:
        raise DataError(f"{what} are {type(values).__name__}, expected numbers of each sample.")
    return array


def _inputs(parts: Sequence[NDArray[Any]], name: str) -> Tensor:
    """Inputs of all samples: pictures of bytes normalized, floats float32, whole numbers int64."""
    shapes = {part.shape[1:] for part in parts if len(part)}
    if len(shapes) != 1:
        raise DataError(f"{name}: clients differ in the shape of a sample: {', '.join(map(str, sorted(shapes)[:3]))}.")
    x = np.concatenate([part for part in parts if len(part)])
    if x.dtype == np.uint8 and (x.ndim == 3 or (x.ndim == 4 and x.shape[-1] <= 4)):
        return normalized(x[..., None] if x.ndim == 3 else x, len(x))
    if x.dtype.kind not in "fiub":
        raise DataError(f"{name}: inputs are {x.dtype}, expected numbers.")
    if x.dtype.kind == "f" or x.dtype.kind == "b":
        if not np.isfinite(x).all():
            raise DataError(f"{name}: inputs are not finite (nan or infinite).")
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    return torch.from_numpy(x.astype(np.int64))


def _labels(parts: Sequence[NDArray[Any]], name: str) -> tuple[Tensor, tuple[str, ...]]:
    """Labels of all samples: class ids and the classes' names, or targets of a regression without names."""
    kinds = {part.dtype.kind for part in parts if len(part)}
    shapes = {part.shape[1:] for part in parts if len(part)}
    if len(shapes) > 1 or (kinds & set("USO") and kinds - set("USO")) or ("f" in kinds and len(kinds) > 1):
        types = ", ".join(sorted({str(part.dtype) for part in parts if len(part)}))
        raise DataError(f"{name}: clients differ in the type or the shape of labels: {types}.")
    missing = [
        value for part in parts if part.dtype == object for value in part.tolist() if value is None or value != value
    ]
    if missing:
        raise DataError(f"{name}: a label is missing ({missing[0]}).")
    y = np.concatenate([part for part in parts if len(part)]) if kinds else np.zeros(0, np.int64)
    if y.dtype.kind == "f":
        if not np.isfinite(y).all():
            raise DataError(f"{name}: labels are not finite (nan or infinite).")
        if y.ndim == 1 and (y == np.floor(y)).all():
            raise DataError(
                f"{name}: labels are whole numbers as {y.dtype}; give class ids as whole numbers, or the targets of a "
                f"regression as floats [n, 1]."
            )
        return torch.from_numpy(y.astype(np.float32)), ()
    if y.ndim != 1 or y.dtype.kind not in "iubUSO":
        raise DataError(f"{name}: labels are {y.dtype} {list(y.shape)}, expected one class for each sample, or floats.")
    if y.dtype == object:
        number_of: dict[Any, int] = {}
        try:
            ids = [number_of.setdefault(value, len(number_of)) for value in y.tolist()]
        except TypeError as error:
            raise DataError(f"{name}: labels must be hashable ({reason(error)}).") from error
        return torch.tensor(ids), tuple(map(str, number_of))
    values, numbers = np.unique(y, return_inverse=True)
    if values.dtype.kind in "iu" and (values == np.arange(len(values))).all():
        return torch.from_numpy(y.astype(np.int64)), ()
    names = tuple(str(value) for value in values.tolist())
    logger.info("%s: %d classes: %s", name, len(names), ", ".join(names))
    return torch.from_numpy(numbers.astype(np.int64)), names
