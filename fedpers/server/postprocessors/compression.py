"""Compression of what clients send: the largest entries of a change, in few bits.

Of each tensor of its change a client sends the k entries of largest magnitude: their positions, and their values as
whole multiples of a step. What is left out stays with the client and is added to its next change (error feedback), so
that nothing is lost for good, but for what a reply held that the server did not accept.

    v    <- trained - sent + r              change of a tensor of n entries, and the residual kept from before
    S    <- the k = max(1, round(share * n)) positions of largest |v|; the first of equal ones
    step <- max |v| / (2^(bits - 1) - 1)    one float32 number
    q_i  <- round(v_i / step), i in S       whole numbers; with 32 bits v_i as float32, and no step
    r    <- v - (step * q_i at i in S, else 0)

S. U. Stich, J.-B. Cordonnier, M. Jaggi, Sparsified SGD with Memory, NeurIPS 2018, arXiv:1809.07599; uniform
quantization as in D. Alistarh et al., QSGD, NeurIPS 2017, arXiv:1610.02132, here rounded to nearest. What the server
sends is not compressed, nor are BatchNorm's running statistics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fedpers.cohort import Tree, entries, tree
from fedpers.cohort.tree import expand_rows
from fedpers.errors import check
from fedpers.records import ARRAYS
from fedpers.server.postprocessors.base import Postprocessor, check_mean
from fedpers.settings.server import TopKConfig

if TYPE_CHECKING:
    from fedpers.server.collect import Schema
    from fedpers.server.strategy import PersonalizedStrategy

VALUES, POSITIONS, STEPS = "values", "positions", "steps"
"""Records of a compressed reply; integers, running statistics and empty tensors stay among its arrays."""
_FLOAT_BITS = 32


@dataclass(kw_only=True)
class TopK(TopKConfig, Postprocessor):
    """The largest entries of each tensor, quantized, with error feedback, which takes as much state as the arrays."""

    role: ClassVar[str] = "residual"
    setting: ClassVar[str] = "compression"
    encodes: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """Its name."""
        return "topk"

    @property
    def levels(self) -> int:
        """Largest whole number that a value may be."""
        return int(2 ** (self.bits - 1)) - 1

    @property
    def dtype(self) -> torch.dtype:
        """Of values on the wire."""
        return torch.int8 if self.bits <= 8 else torch.int16 if self.bits <= 16 else torch.float32

    def count(self, size: int) -> int:
        """Number of entries sent of a tensor of `size` entries, >= 1."""
        return max(1, round(self.share * size))

    def check(self, strategy: PersonalizedStrategy, arrays: Tree, sampled: int) -> None:
        """Refuse methods that send more than arrays, and postprocessors that would see what is not decoded yet."""
        check_mean(self, strategy, "none")
        order = [other.setting for other in strategy.postprocessors]
        check(order[0] == self.setting, "postprocessors", order, "compression first, whose replies the others read")

    def client_state(self, arrays: Tree) -> Tree | None:
        """A residual of zeros."""
        compressed = {name: torch.zeros_like(v) for name, v in entries(arrays).items() if _compressible(name, v)}
        return tree(compressed) if self.error_feedback and compressed else None

    def encode(
        self,
        records: dict[str, Tree],
        sent: Tree,
        state: Tree | None,
        *,
        seed: int,
        round: int,
        clients: Sequence[int],
    ) -> tuple[dict[str, Tree], Tree | None]:
        """Compress the changes of K clients; the new state is what is left of them.

        A client with a change that is not finite sends a step, or values, that are not finite, and keeps its residual.
        """
        if ARRAYS not in records:
            return records, state
        size = len(records[ARRAYS])
        plain: dict[str, Tensor] = {}
        wire: dict[str, dict[str, Tensor]] = {VALUES: {}, POSITIONS: {}, STEPS: {}}
        rest: dict[str, Tensor] = {}
        usable = torch.ones(size, dtype=torch.bool)
        for name, value in entries(records[ARRAYS]).items():
            if not _compressible(name, value[0]):
                plain[name] = value
                continue
            change = value - sent[name].to(value.device)
            if state is not None:
                change = change + state[name].to(value.device)
            rows = change.reshape(size, -1)
            values, positions, step = self._compress(rows)
            wire[VALUES][name] = values
            if positions is not None:
                wire[POSITIONS][name] = positions
            if step is not None:
                wire[STEPS][name] = step
            if state is not None:
                decoded = _decompress(values, positions, step, rows.shape[1], rows.dtype)
                rest[name] = (rows - decoded).view_as(change)
                usable = usable.to(value.device) & (rows - decoded).isfinite().all(1)
        encoded = {record: tree(tensors, size) for record, tensors in ((ARRAYS, plain), *wire.items()) if tensors}
        others = {record: values for record, values in records.items() if record != ARRAYS}
        if state is None:
            return {**others, **encoded}, None
        for name, value in rest.items():
            rest[name] = torch.where(expand_rows(usable.to(value.device), value), value, state[name].to(value))
        return {**others, **encoded}, tree({**entries(state), **rest}, size)  # what was not sent keeps its residual

    def _compress(self, rows: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Values ``[K, k]``, positions ``[K, k]`` (None if all are sent) and steps ``[K]`` of changes ``[K, n]``."""
        magnitudes = rows.abs().nan_to_num(nan=math.inf, posinf=math.inf)
        size, count = rows.shape[1], self.count(rows.shape[1])
        positions = None if count == size else _largest(magnitudes, count)
        values = rows if positions is None else rows.gather(1, positions)
        if self.bits == _FLOAT_BITS:
            return values.float(), _int32(positions), None
        step = (magnitudes.amax(1) / self.levels).float()
        exact = torch.promote_types(rows.dtype, torch.float32)
        divisor = torch.where(step > 0, step, 1.0).to(exact).unsqueeze(1)
        whole = (values.to(exact) / divisor).round().nan_to_num().clamp(-self.levels, self.levels)
        return whole.to(self.dtype), _int32(positions), step

    def schema(self, schema: Schema) -> Schema:
        """Values, positions and steps in place of arrays of floating-point numbers."""
        wire: Schema = {}
        for (record, name), entry in schema.items():
            size = math.prod(entry.shape)
            whole = not getattr(torch, entry.dtype).is_floating_point or _is_statistic(name)
            if record != ARRAYS or not size or whole:
                wire[record, name] = entry
                continue
            count = self.count(size)
            wire[VALUES, name] = entry._replace(shape=(count,), dtype=str(self.dtype).removeprefix("torch."))
            if count < size:
                wire[POSITIONS, name] = entry._replace(shape=(count,), dtype="int32")
            if self.bits < _FLOAT_BITS:
                wire[STEPS, name] = entry._replace(shape=(), dtype="float32")
        return wire

    def reply(self, records: dict[str, Tree], sent: Tree) -> tuple[dict[str, Tree], dict[str, Tensor]]:
        """Add the changes to the `sent` arrays; ValueError if they are none."""
        if VALUES not in records:
            return records, {}
        parts = {record: _tensors(records, record) for record in (ARRAYS, VALUES, POSITIONS, STEPS)}
        size = len(records[VALUES])
        arrays: dict[str, Tensor] = {}
        for name, before in entries(sent).items():  # their order is that of the server's arrays
            if name in parts[ARRAYS]:
                arrays[name] = parts[ARRAYS][name]
            if name not in parts[VALUES]:
                continue
            shape = before.shape[sent.batch_dims :]
            values, positions = parts[VALUES][name], parts[POSITIONS].get(name)
            if positions is not None:
                _check_positions(name, positions, math.prod(shape))
            change = _decompress(values, positions, parts[STEPS].get(name), math.prod(shape), before.dtype)
            if not change.isfinite().all():
                raise ValueError(f"'{name}' holds values that are not finite")
            arrays[name] = before.to(change.device) + change.view(size, *shape)
        others = {record: values for record, values in records.items() if record not in parts}
        return {**others, ARRAYS: tree(arrays, size)}, {}


def _compressible(name: str, value: Tensor) -> bool:
    """Whether a client's tensor is compressed."""
    return value.is_floating_point() and value.numel() > 0 and not _is_statistic(name)


def _is_statistic(name: str) -> bool:
    """Whether it is a running mean or variance of batch normalization, which the server knows by name only.

    What is left of their changes adds up while it is not sent; a variance would become negative.
    """
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def _largest(magnitudes: Tensor, count: int) -> Tensor:
    """Ascending positions ``[K, count]`` of the largest entries in each row of ``[K, n]``, the first of equal ones."""
    smallest = magnitudes.topk(count, dim=1).values[:, -1:]  # which of several equal entries it takes is not settled
    positions = (magnitudes >= smallest).nonzero()[:, 1]
    if len(positions) > count * len(magnitudes):
        above, equal = magnitudes > smallest, magnitudes == smallest
        first = equal & (equal.cumsum(1) <= count - above.sum(1, keepdim=True))
        positions = (above | first).nonzero()[:, 1]
    return positions.view(len(magnitudes), count)


def _int32(positions: Tensor | None) -> Tensor | None:
    return None if positions is None else positions.int()


def _decompress(values: Tensor, positions: Tensor | None, step: Tensor | None, size: int, dtype: torch.dtype) -> Tensor:
    """Changes ``[K, size]``, which client and server make alike to the last digit."""
    exact = torch.promote_types(dtype, torch.float32)
    amounts = values.to(exact) if step is None else values.to(exact) * step.to(exact).unsqueeze(1)
    amounts = amounts.to(dtype)
    if positions is None:
        return amounts
    return amounts.new_zeros(len(values), size).scatter_(1, positions.long(), amounts)


def _check_positions(name: str, positions: Tensor, size: int) -> None:
    """Refuse positions that point nowhere or twice to one entry."""
    ascending = bool((positions[:, 1:] > positions[:, :-1]).all())
    inside = bool((positions[:, 0] >= 0).all() and (positions[:, -1] < size).all())
    if not (ascending and inside):
        raise ValueError(f"positions of '{name}' do not ascend from 0 to {size - 1}")


def _tensors(records: Mapping[str, Tree], record: str) -> dict[str, Tensor]:
    return entries(records[record]) if record in records else {}


__all__ = ["TopK"]
