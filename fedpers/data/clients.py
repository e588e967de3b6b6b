"""Data of a user's own, client by client, as :class:`FederatedData`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from fedpers.data.federated import PARTS, FederatedData, Part
from fedpers.data.fields import InputField, SeveralInputs, packed
from fedpers.data.sequences import columns_of, sequences_of
from fedpers.data.split import hold_out
from fedpers.data.values import (
    KINDS,
    array_of,
    inputs_of,
    is_frame,
    is_missing,
    join_inputs,
    labels_of,
    numbers_of,
    plain_array,
)
from fedpers.errors import DataError, check
from fedpers.tasks import CLASSIFICATION, NextToken, Regression, Task

_FORMS = "a pair (inputs, labels), a data frame or a PyTorch Dataset with positions and a length"
_Pair = tuple[NDArray[Any] | SeveralInputs, NDArray[Any]]
"""Inputs and labels of n samples."""


def data_of_clients(
    clients: Any,
    *,
    owner: Any,
    label: str,
    tokens: bool,
    task_name: str | None,
    validation: float,
    test: float,
    seed: int,
    name: str,
) -> FederatedData:
    """Make data of all clients; see :meth:`FederatedData.from_clients`."""
    for key, share in (("validation", validation), ("test", test)):
        check(0 <= share < 1 and validation + test < 1, key, share, "shares >= 0 that leave something for training")
    check(task_name in (None, "classification", "regression"), "task", task_name, "classification, regression or None")
    samples = _by_owner(clients, owner, label, name, tokens) if owner is not None else _named(clients, name)
    _check_columns(samples, name)
    given = [
        (client, _parts(of_client, label, f"{name}: client {client}", tokens)) for client, of_client in samples.items()
    ]
    lists = _lists(given, [validation, test], seed, name)
    filled = [(f"client {client}", x, y) for client, parts in given for x, y in parts.values() if len(y)]
    labels = [(client, y) for client, _, y in filled]
    columns, fields, following = _together(
        [(client, x) for client, x, _ in filled], [y for _, _, y in filled], tokens, name
    )
    allowed = "None, because labels are the next tokens"
    check(following is None or task_name is None, "task", task_name, allowed)
    classes: tuple[str, ...] = ()
    task: Task
    if following is not None:
        task, targets, num_classes = NextToken(), following, int(max(columns.max(), following.max())) + 1
    else:
        targets, classes = labels_of(labels, task_name, name)
        if targets.is_floating_point():
            task, num_classes = Regression(), targets[0].numel()
        else:
            task, num_classes = CLASSIFICATION, int(targets.max()) + 1
    train, validated, tested = ([torch.from_numpy(positions) for positions in lists[part]] for part in PARTS)
    return FederatedData(
        columns,
        targets,
        train,
        validated,
        tested,
        num_classes,
        name,
        client_names=tuple(samples),
        class_names=classes,
        fields=fields,
        num_tokens=num_classes if following is not None else 0,
        task=task,
    )


def _lists(
    given: Sequence[tuple[str, dict[str, _Pair]]], shares: Sequence[float], seed: int, name: str
) -> dict[Part, list[NDArray[np.int64]]]:
    """Positions of each client's parts, if samples of one client and part after another are put together.

    What is not given in parts is divided, of which the `shares` are held out for validation and for testing; a part
    that is not given is empty.
    """
    lists: dict[Part, list[NDArray[np.int64]]] = {part: [] for part in PARTS}
    needed = 1 + sum(share > 0 for share in shares)
    start = 0
    for number, (client, parts) in enumerate(given):
        where = f"{name}: client {client}"
        positions: dict[str, NDArray[np.int64]] = {}
        for part, (x, y) in parts.items():
            if len(x) != len(y):
                raise DataError(f"{where} has {len(x)} samples but {len(y)} labels.")
            if len(y) == 0 and part in ("all", "train"):
                raise DataError(f"{where} has no samples{' for training' * (part == 'train')}.")
            positions[part] = np.arange(start, start + len(y))
            start += len(y)
        if "all" in positions:
            if len(positions["all"]) < needed:
                raise DataError(
                    f"{where} has {len(positions['all'])} samples, but its parts for training, validation and testing "
                    f"need one each; leave it out, or set a share to 0."
                )
            positions = dict(zip(PARTS, hold_out(positions["all"], shares, seed, number), strict=True))
        for part in PARTS:
            lists[part].append(positions.get(part, np.zeros(0, np.int64)))
    return lists


def _together(
    inputs: Sequence[tuple[str, NDArray[Any] | SeveralInputs]],
    labels: Sequence[NDArray[Any]],
    tokens: bool,
    name: str,
) -> tuple[Tensor, tuple[InputField, ...], Tensor | None]:
    """Inputs of all clients, what their columns are where they are several, and the next tokens if such are learned."""
    several = [x for _, x in inputs if isinstance(x, SeveralInputs)]
    arrays = [(client, x) for client, x in inputs if not isinstance(x, SeveralInputs)]
    if several and arrays:
        raise DataError(f"{name}: {arrays[0][0]} has one input for a sample, {several[0].where} several.")
    if several:
        columns, fields = packed(several)
        return torch.from_numpy(columns), fields, None
    if not tokens:
        return join_inputs(arrays, name), (), None
    x, following = columns_of([x for _, x in arrays], labels, [f"{name}: {client}" for client, _ in arrays])
    return torch.from_numpy(x), (), None if following is None else torch.from_numpy(following)


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


def _by_owner(samples: Any, owner: Any, label: str, name: str, tokens: bool) -> dict[str, Any]:
    """One set, cut by the owner of each sample."""
    x, y = _pair(samples, label, name, tokens)
    for given in samples if isinstance(samples, tuple | list) else (samples,):
        _check_order(given, owner, f"{name}: samples and owner")
    ids = array_of(owner, f"{name}: owner")
    if ids.shape != (len(y),):
        raise DataError(f"{name}: owner is {list(ids.shape)}, expected one id for each of {len(y)} samples.")
    if any(is_missing(value) for value in ids.tolist()):
        raise DataError(f"{name}: owner has no value for a sample.")
    names = np.array([str(value) for value in ids.tolist()]) if ids.dtype == object else ids
    values, numbers = np.unique(names, return_inverse=True)
    return {str(value): (x[numbers == k], y[numbers == k]) for k, value in enumerate(values.tolist())}


def _parts(given: Any, label: str, where: str, tokens: bool) -> dict[str, _Pair]:
    """Inputs and labels of a client's parts; ``all`` of one that is still to be split."""
    if not isinstance(given, Mapping):
        return {"all": _pair(given, label, where, tokens)}
    if not set(given) <= set(PARTS):
        raise DataError(f"{where}: a dictionary of a client's parts has the keys {', '.join(PARTS)}, not "
                        f"{', '.join(map(str, given))}; several inputs are a pair (dictionary, labels).")  # fmt: skip
    if "train" not in given:
        raise DataError(f"{where} has no part for training.")
    return {part: _pair(given[part], label, f"{where}, {part}", tokens) for part in PARTS if part in given}


def _pair(given: Any, label: str, where: str, tokens: bool) -> _Pair:
    """Inputs ``[n, ...]`` and labels ``[n, ...]`` of a pair, a data frame or a PyTorch data set."""
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], SeveralInputs):
        return given
    if is_frame(given):
        x, y = _of_frame(given, label, where)
        return _entries(x, f"{where}: inputs", tokens), y
    if isinstance(given, TensorDataset) and len(given.tensors) == 2:
        given = given.tensors
    if isinstance(given, tuple | list) and len(given) == 2:
        x, y = given
        _check_order(x, y, f"{where}: inputs and labels")
        following = sequences_of(y, f"{where}: labels", -1) if tokens else None
        return _entries(x, f"{where}: inputs", tokens), array_of(
            y, f"{where}: labels"
        ) if following is None else following
    if isinstance(given, Dataset) and not isinstance(given, IterableDataset) and hasattr(given, "__len__"):
        return _of_dataset([given[position] for position in range(len(given))], where, tokens)
    kind = type(given).__name__ + (f" of {len(given)}" if isinstance(given, tuple | list) else "")
    hint = "; give its to_pandas()" if hasattr(given, "to_pandas") else ""
    raise DataError(f"{where} must be {_FORMS}, not {kind}{hint}.")


def _of_dataset(items: Sequence[Any], where: str, tokens: bool) -> _Pair:
    """Inputs and labels of the samples of a PyTorch data set."""
    for item in items:
        if not isinstance(item, tuple | list) or len(item) != 2:
            what = f"{len(item)} values" if isinstance(item, tuple | list) else type(item).__name__
            raise DataError(f"{where}: samples of the data set must be pairs (input, label), not {what}.")
    if items and isinstance(items[0][0], Mapping):
        names = {tuple(sorted(map(str, x))) if isinstance(x, Mapping) else () for x, _ in items}
        if len(names) > 1:
            raise DataError(f"{where}: samples differ in the names of their inputs.")
        given = {name: _stacked([x[name] for x, _ in items], f"{where}: input '{name}'") for name in items[0][0]}
        return _pair((given, [y for _, y in items]), "", where, tokens)
    labels = [plain_array(y, f"{where}: labels") if isinstance(y, Tensor) else y for _, y in items]
    if tokens:
        return _pair(([x for x, _ in items], labels), "", where, tokens)
    x = _stacked([x for x, _ in items], f"{where}: inputs")
    return x, array_of(labels, f"{where}: labels")


def _stacked(values: Sequence[Any], what: str) -> NDArray[Any]:
    """One array of an entry for each sample."""
    arrays = [plain_array(value, what) for value in values]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise DataError(f"{what} differ in shape: {', '.join(map(str, sorted(shapes)[:3]))}.")
    return np.stack(arrays) if arrays else np.zeros(0)


def _entries(values: Any, what: str, tokens: bool) -> NDArray[Any] | SeveralInputs:
    """An entry for each sample: numbers, several inputs by name, or sequences of tokens."""
    if isinstance(values, Mapping):
        if tokens:
            raise DataError(f"{what} are {type(values).__name__}, expected sequences because of tokens=True.")
        given = {str(name): array_of(value, f"{what}: '{name}'") for name, value in values.items()}
        return SeveralInputs(given, what.removesuffix(": inputs"))
    if not tokens:
        return inputs_of(values, what)
    sequences = sequences_of(numbers_of(values, what) if is_frame(values) else values, what)
    if sequences is None and len(values):
        raise DataError(
            f"{what} are {type(values).__name__}, expected sequences of tokens [n, T] because of tokens=True."
        )
    return np.zeros(0, dtype=object) if sequences is None else sequences


# ------------------------------------------------------------------------------------------ data frames


def _frames(samples: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Columns of all data frames, each after the name of its client."""
    for client, given in samples.items():
        for frame in given.values() if isinstance(given, Mapping) else (given,):
            if is_frame(frame):
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
    values = labels.to_numpy(KINDS.get(labels.dtype.kind))
    return numbers_of(frame.drop(columns=label), where), array_of(values, f"{where}: labels")
