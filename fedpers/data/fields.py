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


def fields_of(given: Mapping[str, NDArray[Any]], where: str) -> tuple[InputField, ...]:
    """Fields of the inputs ``[n, ...]`` of one client, in the order of their names.

    Raises
    ------
    DataError
        If an input is no number, or a whole number is too large to be kept.
    """
    fields = []
    for name in sorted(given):
        values = given[name]
        if values.dtype.kind not in "fiub":
            raise DataError(f"{where}: input '{name}' is {values.dtype}, expected numbers.")
        whole = values.dtype.kind in "iu"
        if whole and values.size and int(np.abs(values).max()) >= EXACT:
            raise DataError(
                f"{where}: input '{name}' has whole numbers beyond {EXACT - 1}, which are not kept exactly."
            )
        fields.append(InputField(name, values.shape[1:], whole))
    return tuple(fields)


def packed(given: Mapping[str, NDArray[Any]], where: str) -> NDArray[np.float32]:
    """Inputs ``[n, ...]`` by name as columns ``[n, F]``, in the order of their names.

    Raises
    ------
    DataError
        If they differ in length.
    """
    sizes = {name: len(values) for name, values in given.items()}
    if len(set(sizes.values())) != 1:
        counts = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise DataError(f"{where}: inputs differ in their number of samples: {counts}.")
    columns = [given[name].reshape(len(given[name]), -1).astype(np.float32) for name in sorted(given)]
    return np.concatenate(columns, 1)


def unpacked(x: Tensor, fields: Sequence[InputField]) -> dict[str, Tensor]:
    """Inputs ``[B, ...]`` by name from columns ``[B, F]``."""
    parts = torch.split(x, [field.width for field in fields], 1)
    named = {}
    for field, part in zip(fields, parts, strict=True):
        values = part.reshape(len(x), *field.shape)
        named[field.name] = values.round().long() if field.whole else values
    return named
