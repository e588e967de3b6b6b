"""Flower records that hold live tensors and turn into bytes only when a real wire asks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flwr.app as flower
import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from fedpers.cohort import Tree, entries, leaves, tree

ARRAYS = "arrays"
"""Record of the model's arrays, as in Flower's own strategies."""
CONFIG = "config"
METRICS = "metrics"


class LiveArray(flower.Array):
    """A Flower ``Array`` around a tensor; ``data`` is made when it is read.

    The tensor is not copied: who gets one must not change it in place. :meth:`numpy` returns a copy, as Flower's does.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.__dict__["tensor"] = tensor.detach()
        self.__dict__["dtype"] = str(tensor.dtype).removeprefix("torch.")
        self.__dict__["shape"] = tuple(tensor.shape)
        self.__dict__["stype"] = "numpy.ndarray"

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The array in NumPy's file format."""
        if "bytes" not in self.__dict__:
            self.__dict__["bytes"] = flower.Array(self.__dict__["tensor"].cpu().contiguous().numpy()).data
        found: bytes = self.__dict__["bytes"]
        return found

    def numpy(self) -> Any:
        """Copy as a NumPy array."""
        copied: np.ndarray = np.array(self.__dict__["tensor"].cpu().numpy())
        return copied


LiveArray.__qualname__ = flower.Array.__qualname__  # the name that goes onto the wire, so that any node can read it


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
    """
    if isinstance(array, LiveArray):
        live: Tensor = array.__dict__["tensor"]
        return live
    return torch.from_numpy(array.numpy())


def from_record(record: flower.ArrayRecord, device: torch.device | str | None = None) -> Tree:
    """Tree of batch size [] of a record."""
    tensors = {name: to_tensor(array) for name, array in record.items()}
    return tree({n: t if device is None else t.to(device) for n, t in tensors.items()})


def trees(content: flower.RecordDict, device: torch.device | str | None = None) -> dict[str, Tree]:
    """All array records of a message's content as trees."""
    return {name: from_record(record, device) for name, record in content.array_records.items()}


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
    for record in content.array_records.values():
        for array in record.values():
            if isinstance(array, LiveArray):
                total += array.__dict__["tensor"].nbytes
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
    """Inverse of :func:`flatten_state`; `like` (batch size []) tells the roles and devices."""
    out = TensorDict({}, batch_size=[1])
    for name, value in leaves(like).items():
        out.set(tuple(name.split("/")), to_tensor(record[name]).to(value.device).unsqueeze(0))
    return out
