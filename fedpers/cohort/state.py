"""Personal state of all clients, stacked by role and name."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedpers.cohort.tensordicts import MemoryMappedTensor
from fedpers.cohort.tree import Tree, leaves, set_leaf, tree

BLOCK_BYTES = 2**26
"""Bytes of state that :meth:`StateStore.blocks` copies at once."""
Block = tuple[Tensor, Tree]
"""Clients, int64 ``[n]`` ascending, and their states ``[n]``."""


class StateStore:
    """Rows of personal state, one per client; a client that never wrote holds the initial state.

    Parameters
    ----------
    clients : sequence of int
        Whose state is kept here.
    initial : Tree
        State of a client that has not trained yet, batch size [], possibly empty.
    memory : float, optional
        Most bytes of memory for the rows, where `initial` is; rows that need more lie in memory-mapped files.
    folder : Path, optional
        Where a folder for these files is made, which is gone when the store is closed; default is the system's for
        temporary files.

    Attributes
    ----------
    clients : Tensor
        int64 ``[N]``.
    initial : Tree
    rows : Tree
        Batch size ``[N]``; the values of a client that never wrote are undefined.
    written : Tensor
        Which clients have written, bool ``[N]``.
    bytes_per_client : int
    """

    def __init__(
        self, clients: Sequence[int], initial: Tree, *, memory: float | None = None, folder: Path | None = None
    ) -> None:
        self.clients = torch.as_tensor(list(clients), dtype=torch.int64)
        self.initial = initial
        self.written = torch.zeros(len(self.clients), dtype=torch.bool)
        self._row_of_client = {client: row for row, client in enumerate(self.clients.tolist())}
        first = leaves(initial)
        self.bytes_per_client = sum(value.nbytes for value in first.values())
        needed = len(self.clients) * self.bytes_per_client
        self._files = None
        if memory is not None and needed > memory:
            self._files = tempfile.TemporaryDirectory(prefix="states-", dir=folder, ignore_cleanup_errors=True)
        # Untouched memory is not occupied, so clients that never train cost nothing on a CPU; nor do holes in files.
        self.rows = tree({}, len(self.clients))
        for number, (name, value) in enumerate(first.items()):
            shape = (len(self.clients), *value.shape)
            if self._files is None:
                rows = value.new_empty(shape)
            else:
                file = str(Path(self._files.name) / f"{number}.memmap")
                rows = MemoryMappedTensor.empty(shape, dtype=value.dtype, filename=file)
            set_leaf(self.rows, name, rows)

    @property
    def mapped(self) -> bool:
        """Whether rows lie in files."""
        return self._files is not None

    def gather(self, clients: Sequence[int]) -> Tree:
        """Copy of the state of some clients, batch size ``[K]``, on the device of the initial state.

        Raises
        ------
        KeyError
            If the store does not know one of them.
        """
        index = self._row_indices(clients)
        new = ~self.written[index]
        out = tree({}, len(index))
        first = leaves(self.initial)
        for name, rows in leaves(self.rows).items():
            picked = rows.index_select(0, index.to(rows.device))
            picked = picked.to(first[name].device)
            picked[new.to(picked.device)] = first[name]
            set_leaf(out, name, picked)
        return out

    def scatter(self, clients: Sequence[int], state: Tree, keep: Tensor) -> None:
        """Store the rows of `state` (``[K]``) for which `keep` (bool ``[K]``) holds.

        Entries that `state` lacks stay as they are, initial at the client's first call.
        """
        kept_rows = keep.nonzero().flatten().cpu()
        index = self._row_indices(clients)[kept_rows]
        new, all_rows, first = leaves(state), leaves(self.rows), leaves(self.initial)
        fresh = index[~self.written[index]]
        for name in all_rows.keys() - new.keys():
            all_rows[name][fresh.to(all_rows[name].device)] = first[name].to(all_rows[name].device)
        for name, values in new.items():
            rows = all_rows[name]
            rows[index.to(rows.device)] = values[kept_rows.to(values.device)].to(rows.device)
        self.written[index] = True

    def blocks(self) -> Iterator[Block]:
        """Copies of all that was written, a few clients at a time."""
        written = self.clients[self.written].sort().values
        if not self.bytes_per_client:
            return
        for part in torch.split(written, max(1, BLOCK_BYTES // self.bytes_per_client)):
            yield part, self.gather(part.tolist())

    def clear(self) -> None:
        """Let every client hold the initial state again."""
        self.written.zero_()

    def load(self, clients: Sequence[int], state: Tree) -> None:
        """Store the states ``[n]`` of `clients`."""
        self.scatter(clients, state, torch.ones(len(clients), dtype=torch.bool))

    def close(self) -> None:
        """Delete the memory-mapped files, if there are any."""
        if self._files is not None:
            self.rows = tree({}, len(self.clients))
            self._files.cleanup()

    def _row_indices(self, clients: Sequence[int]) -> Tensor:
        return torch.tensor([self._row_of_client[int(client)] for client in clients], dtype=torch.int64)
