"""Values that a user gives for samples: arrays, tensors, lists and data frames as inputs and labels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpers.data.sets.base import finite_floats, labels_for, normalized, number_labels, warn_of_many_classes
from fedpers.errors import DataError, reason

logger = logging.getLogger(__name__)

KINDS = {"i": np.int64, "u": np.uint64, "f": np.float64, "b": np.bool_}
"""NumPy's type for the columns of a data frame, by their kind."""
Named = tuple[str, NDArray[Any]]
"""Whose values these are, for errors, and the values."""


def is_frame(given: Any) -> bool:
    """Whether it is a data frame of pandas."""
    return hasattr(given, "columns") and hasattr(given, "iloc")


def numbers_of(frame: Any, where: str) -> NDArray[Any]:
    """Numbers ``[n, F]`` of a data frame, whole ones if all columns are."""
    for column, dtype in zip(frame.columns, frame.dtypes, strict=True):
        if dtype.kind not in KINDS and len(frame):
            raise DataError(
                f"{where}: column '{column}' is {dtype}, but inputs are numbers; turn it into numbers, or leave it out."
            )
    whole = {dtype.kind for dtype in frame.dtypes} <= set("iu") and not bool(frame.isna().to_numpy().any())
    fits = all(frame[name].max() <= np.iinfo(np.int64).max for name, kind in frame.dtypes.items() if kind.kind == "u")
    values: NDArray[Any] = frame.to_numpy(np.int64) if whole and fits else frame.to_numpy(np.float64, na_value=np.nan)
    return values


def inputs_of(values: Any, what: str) -> NDArray[Any]:
    """An array with an entry for each sample, as :func:`array_of`; of a data frame its numbers.

    Raises
    ------
    DataError
        If nothing of the kind can be made of it.
    """
    return numbers_of(values, what) if is_frame(values) else array_of(values, what)


def array_of(values: Any, what: str) -> NDArray[Any]:
    """An array with an entry for each sample, of an array, a tensor, a list or a column; objects that are text as text.

    Raises
    ------
    DataError
        If nothing of the kind can be made of it, or values are masked.
    """
    array = plain_array(values, what)
    if array.ndim == 0:
        raise DataError(f"{what} are {type(values).__name__}, expected an entry for each sample.")
    texts = array.dtype == object and all(isinstance(value, str) for value in array.flat)
    return array.astype(str) if texts and array.size else array


def is_pictures(x: NDArray[Any]) -> bool:
    """Whether it is pictures of bytes ``[n, H, W]`` or ``[n, H, W, C]``."""
    return x.dtype == np.uint8 and (x.ndim == 3 or (x.ndim == 4 and x.shape[-1] <= 4))


def plain_array(values: Any, what: str) -> NDArray[Any]:
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
        problem = "differ in shape" if uneven else "cannot be read"
        hint = "; several inputs are given as a dictionary, tokens of any length with tokens=True" if uneven else ""
        raise DataError(f"{what} {problem} ({reason(error)}){hint}.") from error


def is_missing(value: Any) -> bool:
    """Whether it stands for no value: None, NaN, NaT or pandas' NA."""
    try:
        return value is None or bool(value != value)
    except TypeError:  # NA is neither true nor false
        return True
    except ValueError:  # an array
        return False


def join_inputs(parts: Sequence[Named], name: str) -> Tensor:
    """Inputs of all samples: pictures of bytes normalized, other numbers float32."""
    first, example = parts[0]
    for client, x in parts:
        if x.shape[1:] != example.shape[1:]:
            raise DataError(f"{name}: clients differ in the shape of a sample: {list(example.shape[1:])} of {first}, "
                            f"{list(x.shape[1:])} of {client}.")  # fmt: skip
        if is_pictures(x) != is_pictures(example):
            raise DataError(f"{name}: clients differ in the type of inputs: {example.dtype} of {first}, {x.dtype} of "
                            f"{client}.")  # fmt: skip
    if example.dtype == np.uint8 and example.ndim == 4 and not is_pictures(example):
        raise DataError(f"{name}: inputs of {first} are uint8 {list(example.shape)}, expected pictures [n, H, W] or "
                        f"[n, H, W, C] with C <= 4, or floats.")  # fmt: skip
    if 0 in example.shape[1:]:
        raise DataError(f"{name}: inputs of {first} are {list(example.shape)}, without any numbers.")
    if is_pictures(example):
        x = np.concatenate([x for _, x in parts])
        return normalized(x[..., None] if x.ndim == 3 else x, len(x))
    return torch.from_numpy(np.concatenate([floats_of(x, f"{name}: {client}: inputs") for client, x in parts]))


def floats_of(values: NDArray[Any], what: str) -> NDArray[np.float32]:
    """Float32, refused if it is not finite or no numbers."""
    if values.dtype.kind not in KINDS:
        raise DataError(f"{what} are {values.dtype}, expected numbers.")
    return finite_floats(values, f"{what} are")


def labels_of(parts: Sequence[Named], task: str | None, name: str) -> tuple[Tensor, tuple[str, ...]]:
    """Labels of all samples: class ids and the classes' names, or targets of a regression without names."""
    asked: list[Named] = []
    for client, y in parts:
        missing = [value for value in y.tolist() if is_missing(value)] if y.dtype == object else []
        if missing:
            raise DataError(f"{name}: {client}: a label is missing ({missing[0]}).")
        if y.dtype.kind == "f":
            floats_of(y, f"{name}: {client}: labels")
        asked.append((client, labels_for(task, y, "task", f"the label of {client}")))
    first, example = asked[0]
    for client, y in asked:
        if y.shape[1:] != example.shape[1:] or _kind(y) != _kind(example):
            raise DataError(
                f"{name}: clients differ in the type or the shape of labels: {example.dtype} {list(example.shape[1:])} "
                f"of {first}, {y.dtype} {list(y.shape[1:])} of {client}."
            )
    y = np.concatenate([y for _, y in asked])
    if task != "regression" and y.ndim == 2 and y.shape[1] >= 2 and y.dtype.kind in "iubf" and is_one_hot(y):
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
        return torch.from_numpy(floats_of(y, f"{name}: labels")), ()
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
    numbers, names = number_labels(y)
    if names:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        logger.info("%s: %d classes: %s", name, len(names), shown)
    return torch.from_numpy(numbers), names


def _kind(labels: NDArray[Any]) -> str:
    """Text, floats or other numbers, which cannot be put together."""
    kind = labels.dtype.kind
    return "text" if kind in "USO" else kind if kind not in "iub" else "whole"


def is_one_hot(labels: NDArray[Any]) -> bool:
    """Whether every row ``[C]`` is a single 1 among zeros."""
    return bool((((labels == 0) | (labels == 1)).all(1) & (labels.sum(1) == 1)).all())
