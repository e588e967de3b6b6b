"""Data of a user's own, client by client, as :class:`FederatedData`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from fedpers.data.federated import PARTS, FederatedData
from fedpers.data.sets.base import labels_for, normalized, warn_of_many_classes
from fedpers.data.split import hold_out
from fedpers.errors import DataError, check, reason
from fedpers.tasks import CLASSIFICATION, Regression

logger = logging.getLogger(__name__)

SEVERAL_INPUTS = (
    "several inputs of a sample are not taken: put them together as the columns of one array [n, F], as "
    "np.concatenate([a, b], axis=1) does, and let a network of your own take these apart"
)
_FORMS = "a pair (inputs, labels), a data frame or a PyTorch Dataset with positions and a length"
_KINDS = {"i": np.int64, "u": np.uint64, "f": np.float64, "b": np.bool_}
"""NumPy's type for the columns of a data frame, by their kind."""
_Part = tuple[str, NDArray[Any]]
"""Whose values these are, for errors, and the values."""


def data_of_clients(
    clients: Any,
    *,
    owner: Any,
    label: str,
    tokens: bool,
    task: str | None,
    validation: float,
    test: float,
    seed: int,
    name: str,
) -> FederatedData:
    """Make data of all clients; see :meth:`FederatedData.from_clients`."""
    for key, share in (("validation", validation), ("test", test)):
        check(0 <= share < 1 and validation + test < 1, key, share, "shares >= 0 that leave something for training")
    check(task in (None, "classification", "regression"), "task", task, "classification, regression or None")
    samples = _by_owner(clients, owner, label, name) if owner is not None else _named(clients, name)
    _check_columns(samples, name)
    inputs: list[_Part] = []
    labels: list[_Part] = []
    lists: dict[str, list[NDArray[np.int64]]] = {part: [] for part in PARTS}
    needed = 1 + (validation > 0) + (test > 0)
    start = 0
    for number, (client, given) in enumerate(samples.items()):
        where = f"{name}: client {client}"
        for part, (x, y) in _parts(given, label, where).items():
            if len(x) != len(y):
                raise DataError(f"{where} has {len(x)} samples but {len(y)} labels.")
            if len(y) == 0 and part in ("all", "train"):
                raise DataError(f"{where} has no samples{' for training' * (part == 'train')}.")
            positions = np.arange(start, start + len(y))
            start += len(y)
            if len(y):
                inputs.append((f"client {client}", x))
                labels.append((f"client {client}", y))
            if part == "all":
                if len(y) < needed:
                    raise DataError(
                        f"{where} has {len(y)} samples, but its parts for training, validation and testing need one "
                        f"each; leave it out, or set a share to 0."
                    )
                for each, held in zip(("train", "validation", "test"), hold_out(positions, [validation, test], seed,
                                                                               number), strict=True):  # fmt: skip
                    lists[each].append(held)
            else:
                lists[part].append(positions)
        for part in PARTS:  # a part that is not given is empty
            if len(lists[part]) == number:
                lists[part].append(np.zeros(0, np.int64))
    targets, classes = _labels(labels, task, name)
    regression = targets.is_floating_point()
    train, validated, tested = ([torch.from_numpy(positions) for positions in lists[part]] for part in PARTS)
    return FederatedData(
        _inputs(inputs, tokens, name),
        targets,
        train,
        validated,
        tested,
        targets[0].numel() if regression else int(targets.max()) + 1,
        name,
        client_names=tuple(samples),
        class_names=classes,
        task=Regression() if regression else CLASSIFICATION,
    )


# ------------------------------------------------------------------------------------------- containers


def _named(clients: Any, name: str) -> dict[str, Any]:
    """Samples by name of the client."""
    if isinstance(clients, Mapping):
        named = {str(client): given for client, given in clients.items()}
    elif isinstance(clients, Sequence) and not isinstance(clients, str | bytes):
        named = {str(number): given for number, given in enumerate(clients)}
    else:
        raise DataError(
            f"{name}: clients must be a list or a dictionary by name, not {type(clients).__name__}; one set of all "
            f"clients needs owner=, the client of each sample."
        )
    if not named:
        raise DataError(f"{name}: there are no clients.")
    if len(named) < len(clients):
        raise DataError(f"{name}: two clients have the same name.")
    return named


def _by_owner(samples: Any, owner: Any, label: str, name: str) -> dict[str, Any]:
    """One set, cut by the owner of each sample."""
    x, y = _pair(samples, label, name)
    for given in samples if isinstance(samples, tuple | list) else (samples,):
        _check_order(given, owner, f"{name}: samples and owner")
    ids = array_of(owner, f"{name}: owner")
    if ids.shape != (len(y),):
        raise DataError(f"{name}: owner is {list(ids.shape)}, expected one id for each of {len(y)} samples.")
    if any(_is_missing(value) for value in ids.tolist()):
        raise DataError(f"{name}: owner has no value for a sample.")
    names = np.array([str(value) for value in ids.tolist()]) if ids.dtype == object else ids
    values, numbers = np.unique(names, return_inverse=True)
    return {str(value): (x[numbers == k], y[numbers == k]) for k, value in enumerate(values.tolist())}


def _parts(given: Any, label: str, where: str) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """Inputs and labels of a client's parts; ``all`` of one that is still to be split."""
    if not isinstance(given, Mapping):
        return {"all": _pair(given, label, where)}
    if not set(given) <= set(PARTS):
        raise DataError(f"{where}: a dictionary of a client's parts has the keys {', '.join(PARTS)}, not "
                        f"{', '.join(map(str, given))}; {SEVERAL_INPUTS}.")  # fmt: skip
    if "train" not in given:
        raise DataError(f"{where} has no part for training.")
    return {part: _pair(given[part], label, f"{where}, {part}") for part in PARTS if part in given}


def _pair(given: Any, label: str, where: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Inputs ``[n, ...]`` and labels ``[n, ...]`` of a pair, a data frame or a PyTorch data set."""
    if _is_frame(given):
        return _of_frame(given, label, where)
    if isinstance(given, TensorDataset) and len(given.tensors) == 2:
        given = given.tensors
    if isinstance(given, tuple | list) and len(given) == 2:
        x, y = given
        _check_order(x, y, f"{where}: inputs and labels")
        return inputs_of(x, f"{where}: inputs"), array_of(y, f"{where}: labels")
    if isinstance(given, Dataset) and not isinstance(given, IterableDataset) and hasattr(given, "__len__"):
        items = [given[position] for position in range(len(given))]
        for item in items:
            if not isinstance(item, tuple | list) or len(item) != 2:
                what = f"{len(item)} values" if isinstance(item, tuple | list) else type(item).__name__
                raise DataError(f"{where}: samples of the data set must be pairs (input, label), not {what}.")
            if isinstance(item[0], Mapping):
                raise DataError(f"{where}: inputs are {type(item[0]).__name__}; {SEVERAL_INPUTS}.")
        inputs = [_plain_array(x, f"{where}: inputs") for x, _ in items]
        shapes = {x.shape for x in inputs}
        if len(shapes) > 1:
            raise DataError(f"{where}: inputs differ in shape: {', '.join(map(str, sorted(shapes)[:3]))}.")
        labels = [_plain_array(y, f"{where}: labels") if isinstance(y, Tensor) else y for _, y in items]
        return np.stack(inputs) if inputs else np.zeros(0), array_of(labels, f"{where}: labels")
    kind = type(given).__name__ + (f" of {len(given)}" if isinstance(given, tuple | list) else "")
    hint = f"; {SEVERAL_INPUTS}" if isinstance(given, Mapping) else ""
    hint = "; give its to_pandas()" if hasattr(given, "to_pandas") else hint
    raise DataError(f"{where} must be {_FORMS}, not {kind}{hint}.")


# ------------------------------------------------------------------------------------------ data frames


def _is_frame(given: Any) -> bool:
    """Whether it is a data frame of pandas."""
    return hasattr(given, "columns") and hasattr(given, "iloc")


def _frames(samples: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Columns of all data frames, each after the name of its client."""
    for client, given in samples.items():
        for frame in given.values() if isinstance(given, Mapping) else (given,):
            if _is_frame(frame):
                yield client, list(map(str, frame.columns))


def _check_columns(samples: Mapping[str, Any], name: str) -> None:
    """Refuse data frames whose columns differ: they would be put together by position."""
    first: list[str] | None = None
    for client, columns in _frames(samples):
        first = columns if first is None else first
        if columns != first:
            raise DataError(
                f"{name}: client {client} has the columns {', '.join(columns)}, the first {', '.join(first)}."
            )


def _check_order(one: Any, other: Any, what: str) -> None:
    """Refuse two objects of pandas with the same rows in another order: they would be put together by position."""
    first: Any = getattr(one, "index", None)
    second: Any = getattr(other, "index", None)
    ordered = hasattr(first, "equals") and hasattr(second, "equals")  # a list has a method called index
    if ordered and not first.equals(second) and set(first) == set(second):
        raise DataError(f"{what} have the same index in another order; sort one by the index of the other.")


def _of_frame(frame: Any, label: str, where: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Inputs and labels of a data frame."""
    columns = frame.columns
    if label not in columns:
        present = f"among {', '.join(map(str, columns))}" if len(columns) else "in a data frame without columns"
        raise DataError(f"{where}: there is no column '{label}' {present}; name it with label=.")
    if twice := list(columns[columns.duplicated()]):
        raise DataError(f"{where}: there are several columns '{twice[0]}'.")
    if len(columns) == 1:
        raise DataError(f"{where}: there is no column of inputs beside '{label}'.")
    labels = frame[label]
    if bool(labels.isna().any()):
        raise DataError(f"{where}: a label is missing (row {int(labels.isna().argmax()) + 1}).")
    values = labels.to_numpy(_KINDS.get(labels.dtype.kind))
    return _numbers(frame.drop(columns=label), where), array_of(values, f"{where}: labels")


def _numbers(frame: Any, where: str) -> NDArray[Any]:
    """Numbers ``[n, F]`` of a data frame, whole ones if all columns are."""
    for column, dtype in zip(frame.columns, frame.dtypes, strict=True):
        if dtype.kind not in _KINDS and len(frame):
            raise DataError(
                f"{where}: column '{column}' is {dtype}, but inputs are numbers; turn it into numbers, or leave it out."
            )
    whole = {dtype.kind for dtype in frame.dtypes} <= set("iu") and not bool(frame.isna().to_numpy().any())
    values: NDArray[Any] = frame.to_numpy(np.int64) if whole else frame.to_numpy(np.float64, na_value=np.nan)
    return values


# ---------------------------------------------------------------------------------------------- values


def inputs_of(values: Any, what: str) -> NDArray[Any]:
    """An array with an entry for each sample, as :func:`array_of`; of a data frame its numbers.

    Raises
    ------
    DataError
        If it is several arrays, or nothing of the kind can be made of it.
    """
    if isinstance(values, Mapping):
        raise DataError(f"{what} are {type(values).__name__}; {SEVERAL_INPUTS}.")
    return _numbers(values, what) if _is_frame(values) else array_of(values, what)


def array_of(values: Any, what: str) -> NDArray[Any]:
    """An array with an entry for each sample, of an array, a tensor, a list or a column; objects that are text as text.

    Raises
    ------
    DataError
        If nothing of the kind can be made of it, or values are masked.
    """
    array = _plain_array(values, what)
    if array.ndim == 0:
        raise DataError(f"{what} are {type(values).__name__}, expected an entry for each sample.")
    texts = array.dtype == object and all(isinstance(value, str) for value in array.flat)
    return array.astype(str) if texts and array.size else array


def is_pictures(x: NDArray[Any]) -> bool:
    """Whether it is pictures of bytes ``[n, H, W]`` or ``[n, H, W, C]``."""
    return x.dtype == np.uint8 and (x.ndim == 3 or (x.ndim == 4 and x.shape[-1] <= 4))


def _plain_array(values: Any, what: str) -> NDArray[Any]:
    """An array of any number of dimensions."""
    if any(np.ma.is_masked(value) for value in (values if isinstance(values, tuple | list) else (values,))):
        raise DataError(f"{what} are masked; fill in what is missing, or leave these samples out.")
    try:
        if not isinstance(values, Tensor):
            return np.asarray(values)
        if values.layout != torch.strided:
            raise DataError(f"{what} are a tensor of layout {values.layout}; give its to_dense().")
        tensor = values.detach().cpu()
        known = not tensor.is_floating_point() or tensor.dtype in (torch.float16, torch.float32, torch.float64)
        array: NDArray[Any] = (tensor if known else tensor.float()).numpy()  # NumPy has no bfloat16
        return array
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        uneven = "inhomogeneous" in str(error)
        raise DataError(f"{what} {'differ in shape' if uneven else 'cannot be read'} ({reason(error)}).") from error


def _is_missing(value: Any) -> bool:
    """Whether it stands for no value: None, NaN, NaT or pandas' NA."""
    try:
        return value is None or bool(value != value)
    except TypeError:  # NA is neither true nor false
        return True
    except ValueError:  # an array
        return False


def _inputs(parts: Sequence[_Part], tokens: bool, name: str) -> Tensor:
    """Inputs of all samples: pictures of bytes normalized, other numbers float32, token ids int64."""
    first, example = parts[0]
    for client, x in parts:
        if x.shape[1:] != example.shape[1:]:
            raise DataError(f"{name}: clients differ in the shape of a sample: {list(example.shape[1:])} of {first}, "
                            f"{list(x.shape[1:])} of {client}.")  # fmt: skip
        if not tokens and is_pictures(x) != is_pictures(example):
            raise DataError(f"{name}: clients differ in the type of inputs: {example.dtype} of {first}, {x.dtype} of "
                            f"{client}.")  # fmt: skip
    if not tokens and example.dtype == np.uint8 and example.ndim == 4 and not is_pictures(example):
        raise DataError(f"{name}: inputs of {first} are uint8 {list(example.shape)}, expected pictures [n, H, W] or "
                        f"[n, H, W, C] with C <= 4, or floats.")  # fmt: skip
    if 0 in example.shape[1:]:
        raise DataError(f"{name}: inputs of {first} are {list(example.shape)}, without any numbers.")
    if tokens:
        return torch.from_numpy(np.concatenate([_token_ids(x, f"{name}: {client}") for client, x in parts]))
    if is_pictures(example):
        x = np.concatenate([x for _, x in parts])
        return normalized(x[..., None] if x.ndim == 3 else x, len(x))
    return torch.from_numpy(np.concatenate([_floats(x, f"{name}: {client}: inputs") for client, x in parts]))


def _token_ids(x: NDArray[Any], where: str) -> NDArray[np.int64]:
    if x.dtype.kind not in "iu" or int(x.min()) < 0:
        given = x.min() if x.dtype.kind in "iu" else x.dtype
        raise DataError(f"{where}: inputs are {given}, expected whole numbers >= 0 because of tokens=True.")
    return x.astype(np.int64)


def _floats(values: NDArray[Any], what: str) -> NDArray[np.float32]:
    """Float32, refused if it is not finite or no numbers."""
    if values.dtype.kind not in _KINDS:
        raise DataError(f"{what} are {values.dtype}, expected numbers.")
    with np.errstate(over="ignore"):  # what overflows float32 is refused just below
        floats = np.ascontiguousarray(values, dtype=np.float32)
    if not np.isfinite(floats).all():
        raise DataError(f"{what} are not finite (nan or infinite).")
    return floats


# ---------------------------------------------------------------------------------------------- labels


def _labels(parts: Sequence[_Part], task: str | None, name: str) -> tuple[Tensor, tuple[str, ...]]:
    """Labels of all samples: class ids and the classes' names, or targets of a regression without names."""
    asked: list[_Part] = []
    for client, y in parts:
        missing = [value for value in y.tolist() if _is_missing(value)] if y.dtype == object else []
        if missing:
            raise DataError(f"{name}: {client}: a label is missing ({missing[0]}).")
        if y.dtype.kind == "f":
            _floats(y, f"{name}: {client}: labels")
        asked.append((client, labels_for(task, y, "task", f"the label of {client}")))
    first, example = asked[0]
    for client, y in asked:
        if y.shape[1:] != example.shape[1:] or _sort(y) != _sort(example):
            raise DataError(
                f"{name}: clients differ in the type or the shape of labels: {example.dtype} {list(example.shape[1:])} "
                f"of {first}, {y.dtype} {list(y.shape[1:])} of {client}."
            )
    y = np.concatenate([y for _, y in asked])
    if task != "regression" and y.ndim == 2 and y.shape[1] >= 2 and y.dtype.kind in "iubf" and _is_one_hot(y):
        raise DataError(
            f"{name}: labels of {first} are one-hot [n, {y.shape[1]}]; for classes give their numbers [n], as "
            f"labels.argmax(1) does, to predict these numbers set task='regression'."
        )
    if y.dtype.kind == "f" and task != "classification":
        if y.ndim == 1 and (y == np.floor(y)).all():
            raise DataError(
                f"{name}: labels are whole numbers as {y.dtype}; set task='classification' or task='regression', or "
                f"give class ids as whole numbers, or the targets of a regression as floats [n, 1]."
            )
        return torch.from_numpy(_floats(y, f"{name}: labels")), ()
    if y.ndim != 1 or y.dtype.kind not in "iubUSO":
        raise DataError(
            f"{name}: labels of {first} are {y.dtype} {list(example.shape)}, expected one class for each sample [n], "
            f"or floats; task='regression' takes whole numbers for floats."
        )
    if task is None:
        warn_of_many_classes(name, y, "task='regression'")
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
    names = tuple(value.decode(errors="replace") if isinstance(value, bytes) else str(value) for value in values)
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    logger.info("%s: %d classes: %s", name, len(names), shown)
    return torch.from_numpy(numbers.astype(np.int64)), names


def _sort(labels: NDArray[Any]) -> str:
    """Text, floats or other numbers, which cannot be put together."""
    kind = labels.dtype.kind
    return "text" if kind in "USO" else kind if kind not in "iub" else "whole"


def _is_one_hot(labels: NDArray[Any]) -> bool:
    """Whether every row ``[C]`` is a single 1 among zeros."""
    return bool((((labels == 0) | (labels == 1)).all(1) & (labels.sum(1) == 1)).all())
