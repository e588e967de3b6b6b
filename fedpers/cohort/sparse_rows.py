"""Tables of which each client visits a few rows in a round: only those are stacked, trained and sent.

What weight decay does to all other rows is one factor, applied exactly. Inside a round, an id that repeats in a batch
is one row with a count, so there is neither gather nor scatter in a step.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fedpers.cohort.cohort import Cohort
from fedpers.cohort.fold import ARRAYS, Fold, Records
from fedpers.cohort.optim import Optimizer
from fedpers.cohort.step import Step
from fedpers.cohort.tree import Tree, entries, expand_rows, tree


class VisitedRows:
    """Which rows of item tables K clients visit in a round, and how often in each step.

    Inputs ``data.x`` are ids of rows, 0 to m - 1; labels ``data.y`` are 1 for a positive and 0 for a negative.

    Parameters
    ----------
    cohort : Cohort
    everything : bool
        Whether all m rows count as visited.

    Attributes
    ----------
    rows : Tensor ``[K, R]``
        Ids, ascending, int64; m (padding) after a client's last one.
    batches : list of int ``[K]``
        Steps of each client in a pass, not ascending.
    whole : bool
        Whether every client has all its samples in one batch, so that their order does not matter.
    training : Training
        The cohort's, which draws no order where there is none to draw.
    """

    def __init__(self, cohort: Cohort, *, everything: bool = False) -> None:
        data, training, device = cohort.data, cohort.training, cohort.device
        drawn = [cohort.samples(client) for client in cohort.clients]
        sizes = torch.tensor([len(positions) for positions in drawn])
        batch = training.batch_size
        self.batches = cohort.batches_per_pass()
        self.whole = batch == 0 or int(sizes.max()) <= batch
        self.training = replace(training, shuffle=False) if self.whole else training
        visited = torch.full((cohort.size, data.num_items), everything, device=device)
        owner = torch.arange(cohort.size).repeat_interleave(sizes).to(device)
        visited[owner, data.x[torch.from_numpy(np.concatenate(drawn)).to(device)]] = True
        self._row_index = visited.cumsum(1) - 1  # of an id among its client's rows
        client, row = visited.nonzero(as_tuple=True)
        self.rows = row.new_full((cohort.size, int(self._row_index[:, -1].max()) + 1), data.num_items)
        self.rows[client, self._row_index[client, row]] = row
        self._in_rows = client * self.rows.shape[1] + self._row_index[client, row]
        self._in_tables = client * data.num_items + row
        self._dtype = next(v.dtype for v in entries(cohort.template).values() if v.is_floating_point())
        self._counts: tuple[Tensor, Tensor] | None = None

    def gather(self, table: Tensor) -> Tensor:
        """Copy the visited rows ``[K, R, dim]`` of a table for all ``[m, dim]`` or of one for each ``[K, m, dim]``.

        Padding holds some row.
        """
        index = self.rows.clamp(max=table.shape[-2] - 1)
        if table.dim() == 3:
            index = index + torch.arange(len(index), device=index.device)[:, None] * table.shape[1]
        return table.reshape(-1, table.shape[-1]).index_select(0, index.flatten()).view(*index.shape, -1)

    def put(self, table: Tensor, values: Tensor, factor: Tensor) -> Tensor:
        """Write rows back: a table ``[K, m, dim]``, changed in place, of which the other rows shrink by a factor.

        Parameters
        ----------
        table : Tensor ``[K, m, dim]``
        values : Tensor ``[K, R, dim]``
            The visited rows.
        factor : Tensor ``[K]``
        """
        table.mul_(expand_rows(factor, table))
        changed = values.reshape(-1, values.shape[2]).index_select(0, self._in_rows)
        table.view(-1, table.shape[2]).index_copy_(0, self._in_tables, changed)
        return table

    def counts(self, step: Step) -> tuple[Tensor, Tensor]:
        """Positives and samples ``[a, R]`` of each row in a step's batches."""
        if self._counts is not None:
            positives, samples = self._counts
            return step.take(positives), step.take(samples)
        index = step.take(self._row_index).gather(1, step.x)
        weight = torch.ones_like(step.y) if step.weight is None else step.weight
        empty = self.rows.new_zeros(step.active, self.rows.shape[1], dtype=self._dtype)
        positives, samples = (empty.scatter_add(1, index, value.to(self._dtype)) for value in (weight * step.y, weight))
        if self.whole and step.rows is None and step.active == len(self.rows):  # all later steps are the same
            self._counts = positives, samples
        return positives, samples

    def message(self, values: Tensor, factor: Tensor) -> Tree:
        """What is sent of a common table, batch size [K]; see :func:`packed`.

        Parameters
        ----------
        values : Tensor ``[K, R, dim]``
            The visited rows.
        factor : Tensor ``[K]``
            What weight decay left of each of the others.
        """
        real = self.rows < self._row_index.shape[1]
        rows = torch.where(real, self.rows, -1).int()
        return tree({"rows": rows, "values": values, "factor": factor}, len(rows))


def sgd_step(
    optimizer: Optimizer,
    tensors: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    decay_factors: Mapping[str, Tensor],
    rate_factors: Tensor,
) -> None:
    """Take a plain step with weight decay in place: ``x <- x - rate * (grad + decay * x)``.

    Parameters
    ----------
    optimizer : Optimizer
        Whose rates and decays hold (``Walk.optimizer``).
    tensors : mapping of name to Tensor ``[a, ...]``
    grads : mapping of name to Tensor ``[a, ...]``
    decay_factors : mapping of name to Tensor ``[a]``
        By table, what decay has left of rows that are not visited.
    rate_factors : Tensor ``[a]``
        Factors on the rates.
    """
    rate_factors = rate_factors * optimizer.scale
    for name, grad in grads.items():
        value, decay = tensors[name], optimizer.decay[name]
        rate = (rate_factors * optimizer.lr[name]).to(value.dtype)
        if decay and name in decay_factors:
            factor = 1 - rate * decay
            value.mul_(expand_rows(factor, value))
            decay_factors[name].mul_(factor)
        elif decay:
            grad = grad.add(value, alpha=decay)
        value.addcmul_(expand_rows(rate, value), grad, value=-1)


# ------------------------------------------------------------------ on the way


def packed(message: Mapping[str, Tensor], threshold: float = 0.0) -> Tree:
    """What travels of one client's row of :meth:`VisitedRows.message`.

    Parameters
    ----------
    message : mapping
        ``rows`` ``[R]``, -1 where there is none, ``values`` ``[R, dim]`` and ``factor``.
    threshold : float
        Entries with ``|value| <= threshold`` are left out, >= 0; 0 keeps all.

    Returns
    -------
    Tree
        ``rows`` int32 ``[r]``, ``values`` ``[r, dim]`` and ``factor``; with a threshold the values are those of
        :func:`sparse`.
    """
    real = message["rows"] >= 0
    values = message["values"][real]
    coded = sparse(values, threshold) if threshold else {"values": values}
    return tree({"rows": message["rows"][real], **coded, "factor": message["factor"]})


def sparse(table: Tensor, threshold: float) -> dict[str, Tensor]:
    """Entries of a table ``[n, dim]`` with ``|value| > threshold``, their indices in the flat table, and its shape."""
    indices = (table.abs() > threshold).flatten().nonzero().flatten()
    return {"values": table.flatten()[indices], "indices": indices.int(), "shape": torch.tensor(table.shape)}


def dense(message: Mapping[str, Tensor]) -> Tensor:
    """Inverse of :func:`sparse`, 0 where nothing was sent; a table that was sent whole is returned as it is.

    Raises
    ------
    ValueError
        If indices and values do not belong to a table of that shape.
    """
    if "indices" not in message:
        return message["values"]
    shape, indices = message["shape"].tolist(), message["indices"].long()
    table = message["values"].new_zeros(shape[0] * shape[1])
    if len(indices) != len(message["values"]):
        raise ValueError(f"there are {len(indices)} 'indices' for {len(message['values'])} values")
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(table):
        raise ValueError("'indices' lie outside of the table")
    table[indices] = message["values"]
    return table.view(shape)


def with_rows(table: Tensor, message: Mapping[str, Tensor]) -> Tensor:
    """The table ``[m, dim]`` of a client that received `table` and sent `message` (decoded)."""
    changed = table * message["factor"].to(table.device)
    changed[message["rows"].long()] = message["values"].to(table.device)
    return changed


class RowMean(Fold):
    """Exact mean of tables of which each differs from a common one by a factor and in some rows.

    Parameters
    ----------
    name : str
        Of the table.
    table : Tensor ``[m, dim]``
        What all clients received.
    """

    def __init__(self, name: str, table: Tensor) -> None:
        self.name = name
        self.table: Tensor | None = table
        self.rest = 0.0
        self.total = 0.0
        # made with the first reply: what an empty fold holds travels, and may lie in memory that others share
        self.change: Tensor | None = None

    @property
    def _received_table(self) -> Tensor:
        assert self.table is not None, "this part of a fold can be merged only"
        return self.table

    def decode(self, records: dict[str, Tree], client: int) -> dict[str, Tree]:
        """Check rows, and fill in the small values that were not sent."""
        message = dict(entries(records[ARRAYS]))
        rows, (size, width) = message["rows"], self._received_table.shape
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < size:
            raise ValueError(f"'rows' name items outside 0..{size - 1}")
        if not bool((rows.diff() > 0).all()):
            raise ValueError("'rows' do not ascend")
        shape = message["shape"].tolist() if "indices" in message else list(message["values"].shape)
        if shape != [len(rows), width]:
            raise ValueError(f"'values' has shape {shape}, expected {[len(rows), width]}")
        decoded = {"rows": rows, "values": dense(message), "factor": message["factor"]}
        return {**records, ARRAYS: tree(decoded)}

    def add(self, records: Records, weight: float, client: int) -> None:
        """Take in ``rows`` ``[r]``, ``values`` ``[r, dim]`` and ``factor`` of a client."""
        message, table = entries(records[ARRAYS]), self._received_table
        rows, factor = message["rows"].long().to(table.device), float(message["factor"])
        self.rest += weight * factor
        self.total += weight
        moved = message["values"].to(table.device).double() - factor * table[rows].double()
        if self.change is None:
            self.change = torch.zeros(table.shape, dtype=torch.float64, device=table.device)
        self.change.index_add_(0, rows, moved, alpha=weight)

    def merge(self, other: Self) -> None:
        """Take in what another fold took in."""
        if other.change is None:
            return
        self.rest += other.rest
        self.total += other.total
        change = other.change.to(self._received_table.device)
        self.change = change if self.change is None else self.change + change

    def partial(self) -> Self:
        """The same without the table, which whoever merges it has."""
        part = copy.copy(self)
        part.table = None
        return part

    def result(self) -> dict[str, Tree]:
        """Return the mean table."""
        if not self.total or self.change is None:
            return {}
        mean = (self._received_table.double() * self.rest + self.change) / self.total
        return {ARRAYS: tree({self.name: mean.to(self._received_table.dtype)})}
