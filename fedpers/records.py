"""Flower records that hold live tensors and turn into bytes only when a real wire asks for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from functools import lru_cache
from io import BytesIO
from tokenize import TokenError
from typing import Any

import flwr.app as flower
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpers.cohort import ARRAYS as ARRAYS
from fedpers.cohort import Tree, entries, leaves, set_leaf, tree
from fedpers.flower_private import SType

CONFIG = "config"
METRICS = "metrics"


class LiveArray(flower.Array):
    """A Flower ``Array`` around a tensor or bytes that others may hold too.

    The tensor is not copied, and ``data`` is made when it is read: who takes a tensor with :func:`to_tensor` must not
    change it in place. :meth:`numpy` returns a copy, as Flower's does; to set ``data`` changes this object only.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.__dict__["tensor"] = tensor.detach() if tensor.requires_grad else tensor
        self.__dict__["dtype"] = str(tensor.dtype).removeprefix("torch.")
        self.__dict__["shape"] = tuple(tensor.shape)
        self.__dict__["stype"] = SType.NUMPY

    @property
    def data(self) -> bytes:
        """The array in NumPy's file format."""
        if "data" not in self.__dict__:
            self.__dict__["data"] = flower.Array(self.__dict__["tensor"].cpu().contiguous().numpy()).data
        data: bytes = self.__dict__["data"]
        return data

    @data.setter
    def data(self, value: bytes) -> None:
        self.__dict__["data"] = value
        self.__dict__.pop("tensor", None)

    def numpy(self) -> Any:
        """Copy as a NumPy array."""
        if "tensor" in self.__dict__:
            return self.__dict__["tensor"].cpu().numpy().copy()
        try:
            return _read(self)
        except ValueError:
            return super().numpy()  # which says what is wrong as Flower does, or reads what is no tensor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, flower.Array):
            return NotImplemented
        layout, other_layout = ((a.dtype, tuple(a.shape), a.stype) for a in (self, other))
        return layout == other_layout and self.data == other.data

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return flower.Array, (self.dtype, tuple(self.shape), self.stype, self.data)


LiveArray.__qualname__ = flower.Array.__qualname__  # the name that goes onto the wire, so that any node can read it


def _read(array: flower.Array) -> NDArray[Any]:
    """Copy of what the bytes of an array hold; ValueError if that is no plain array in NumPy's format.

    Bytes come from anybody: nothing is unpickled, and no memory is taken for what is not there.
    """
    data = array.data
    if array.stype != SType.NUMPY:
        raise ValueError(f"it is serialized as '{array.stype}' instead of '{SType.NUMPY}'")
    width = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4}.get(data[:8])
    if width is None:
        raise ValueError("it is not in NumPy's format")
    start = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    shape, columns_first, dtype = _layout(data[:start])
    if dtype.hasobject or dtype.names is not None:
        raise ValueError(f"it holds {dtype} instead of numbers")
    if len(data) != start + dtype.itemsize * math.prod(shape):
        raise ValueError(f"{len(data) - start} bytes are no {dtype} {list(shape)}")
    return np.ndarray(shape, dtype, data, start, order="F" if columns_first else "C").copy(order="K")


@lru_cache(maxsize=4096)
def _layout(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns come first, and dtype, from the start of a file in NumPy's format 1.0 or 2.0."""
    read = np.lib.format.read_array_header_1_0 if header[6] == 1 else np.lib.format.read_array_header_2_0
    try:
        layout: tuple[tuple[int, ...], bool, np.dtype[Any]] = read(BytesIO(header[8:]))
    except (SyntaxError, TypeError, MemoryError, RecursionError, TokenError) as error:
        raise ValueError(f"its header cannot be read ({error})") from error
    if any(length < 0 for length in layout[0]):
        raise ValueError(f"its shape is {list(layout[0])}")
    return layout


def own_copy(content: flower.RecordDict) -> flower.RecordDict:
    """Records of one's own around shared memory: whatever is done to them is not seen in `content`."""
    copied = content.copy()
    for name, record in content.items():
        fresh: Any = record.copy()
        for key, value in record.items():
            if isinstance(value, flower.Array):
                fresh[key] = _own_array(value)
            elif isinstance(value, list):
                fresh[key] = list(value)
        copied[name] = fresh
    return copied


def _own_array(array: flower.Array) -> flower.Array:
    if type(array) not in (flower.Array, LiveArray):  # somebody's subclass
        return copy(array)
    copied = LiveArray.__new__(LiveArray)
    copied.__dict__.update(array.__dict__)
    return copied


def to_record(values: Tree) -> flower.ArrayRecord:
    """Record of a tree of batch size [], sharing its memory."""
    record = flower.ArrayRecord()
    for name, value in entries(values).items():
        record[name] = LiveArray(value)
    return record


def to_tensor(array: flower.Array) -> Tensor:
    """Tensor of an array; the live one where there is one.

    Raises
    ------
    ValueError
        If the bytes are not an array in NumPy's format or hold objects.
    TypeError
        If PyTorch has no such numbers.
    """
    if (live := _live(array)) is not None:
        return live
    return torch.from_numpy(_read(array) if type(array) in (flower.Array, LiveArray) else array.numpy())


def _live(array: flower.Array) -> Tensor | None:
    return array.__dict__.get("tensor") if isinstance(array, LiveArray) else None


def from_record(record: flower.ArrayRecord, device: torch.device | str | None = None) -> Tree:
    """Tree of batch size [] of a record."""
    tensors = {name: to_tensor(array) for name, array in record.items()}
    return tree({n: t if device is None else t.to(device) for n, t in tensors.items()})


def array_records(content: flower.RecordDict) -> dict[str, flower.ArrayRecord]:
    """Array records of a message's content; Flower's property of that name checks and copies each into a new dict."""
    return {name: record for name, record in content.items() if isinstance(record, flower.ArrayRecord)}


def trees(content: flower.RecordDict, device: torch.device | str | None = None) -> dict[str, Tree]:
    """All array records of a message's content as trees."""
    return {name: from_record(record, device) for name, record in array_records(content).items()}


def row(stacked: Tree, k: int) -> Tree:
    """One client's tree of a stack, sharing its memory."""
    return tree({name: value[k] for name, value in entries(stacked).items()})


def stack(parts: Sequence[Mapping[str, Tree]]) -> dict[str, Tree]:
    """Stack the records of several clients, batch size [K]; all must hold the same names and shapes."""
    return {
        record: tree({n: torch.stack([p[record][n] for p in parts]) for n in entries(first)}, len(parts))
        for record, first in parts[0].items()
    }


def num_bytes(content: flower.RecordDict) -> int:
    """Bytes of all arrays of a message, names and headers left out."""
    total = 0
    for record in array_records(content).values():
        for array in record.values():
            if (live := _live(array)) is not None:
                total += live.nbytes
            else:
                total += int(np.dtype(array.dtype).itemsize * np.prod(array.shape, dtype=np.int64))
    return total


def flatten_state(state: Tree) -> flower.ArrayRecord:
    """Personal state of one client (batch size [1]) as a record with names ``role/name``, for a Flower context."""
    record = flower.ArrayRecord()
    for name, value in leaves(state).items():
        record[name] = flower.Array(value[0].detach().cpu().contiguous().numpy())
    return record


def unflatten_state(record: flower.ArrayRecord, like: Tree) -> Tree:
    """Inverse of :func:`flatten_state`; `like` (batch size []) tells roles and devices, and values that are missing."""
    out = tree({}, 1)
    for name, value in leaves(like).items():
        leaf = to_tensor(record[name]).to(value.device) if name in record else value
        set_leaf(out, name, leaf.unsqueeze(0))
    return out
