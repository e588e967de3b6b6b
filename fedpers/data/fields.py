"""Samples of several inputs, such as a picture and a patient's age, as columns of one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpers.errors import DataError

EXACT = 2**24
"""Whole numbers below it are exact as float32."""


@dataclass(frozen=True)
class InputField:
    """One of a sample's inputs.

    Attributes
    ----------
    name : str
    shape : tuple of int
        Of one sample; empty for a single number.
    whole : bool
        Whether it holds whole numbers, which a network is given as int64.
    """

    name: str
    shape: tuple[int, ...]
    whole: bool

    @property
    def width(self) -> int:
        """Columns that it takes."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class SeveralInputs:
    """Inputs ``[n, ...]`` of n samples by name.

    Raises
    ------
    DataError
        If they differ in length, or there are none.
    """

    values: Mapping[str, NDArray[Any]]
    where: str

    def __post_init__(self) -> None:
        sizes = {name: len(values) for name, values in self.values.items()}
        if len(set(sizes.values())) != 1:
            counts = ", ".join(f"{name} {size}" for name, size in sizes.items()) or "there are none"
            raise DataError(f"{self.where}: inputs differ in their number of samples: {counts}.")

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def __getitem__(self, rows: NDArray[Any]) -> SeveralInputs:
        return SeveralInputs({name: values[rows] for name, values in self.values.items()}, self.where)


def packed(parts: Sequence[SeveralInputs]) -> tuple[NDArray[np.float32], tuple[InputField, ...]]:
    """Inputs of all clients as columns ``[N, F]``, in the order of their names, and what the columns are.

    Raises
    ------
    DataError
        If clients differ in their inputs, an input is no number, not finite, or a whole number that float32 does not
        keep.
    """
    kinds = [{name: (v.shape[1:], v.dtype.kind in "iu") for name, v in part.values.items()} for part in parts]
    shapes = [{name: shape for name, (shape, _) in kind.items()} for kind in kinds]
    for part, shape in zip(parts, shapes, strict=True):
        if shape != shapes[0]:
            raise DataError(f"{part.where}: inputs are {_listed(shape)}, of the first client {_listed(shapes[0])}.")
        for name, values in part.values.items():
            if values.dtype.kind not in "fiub":
                raise DataError(f"{part.where}: input '{name}' is {values.dtype}, expected numbers.")
            if values.dtype.kind in "iu" and values.size and int(np.abs(values).max()) >= EXACT:
                raise DataError(f"{part.where}: input '{name}' has whole numbers beyond {EXACT - 1}.")
            if not np.isfinite(values).all():
                raise DataError(f"{part.where}: input '{name}' is not finite (nan or infinite).")
    names = sorted(shapes[0])
    fields = tuple(InputField(name, shapes[0][name], all(kind[name][1] for kind in kinds)) for name in names)
    rows = [[part.values[name].reshape(len(part), -1).astype(np.float32) for name in names] for part in parts]
    return np.concatenate([np.concatenate(columns, 1) for columns in rows]), fields


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))


def unpacked(x: Tensor, fields: Sequence[InputField]) -> dict[str, Tensor]:
    """Inputs ``[B, ...]`` by name from columns ``[B, F]``."""
    parts = torch.split(x, [field.width for field in fields], 1)
    named = {}
    for field, part in zip(fields, parts, strict=True):
        values = part.reshape(len(x), *field.shape)
        named[field.name] = values.round().long() if field.whole else values
    return named
