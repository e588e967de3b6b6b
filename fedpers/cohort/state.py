"""Personal state of all clients, stacked by role and name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict
from torch import Tensor

from fedpers.cohort.tree import Tree, leaves


class StateStore:
    """Rows of personal state, one per client; a client that never wrote holds the initial state.

    Parameters
    ----------
    num_clients : int
    initial : Tree
        State of a client that has not trained yet, batch size [], possibly empty.
    """

    def __init__(self, num_clients: int, initial: Tree) -> None:
        self.initial = initial
        self.written = torch.zeros(num_clients, dtype=torch.bool)
        # Untouched memory is not occupied, so clients that never train cost nothing on a CPU.
        self.rows = TensorDict({}, batch_size=[num_clients])
        for name, value in leaves(initial).items():
            self.rows.set(tuple(name.split("/")), value.new_empty((num_clients, *value.shape)))

    def gather(self, clients: Sequence[int]) -> Tree:
        """Copy of the state of some clients, batch size ``[K]``."""
        index = torch.as_tensor(list(clients))
        new = ~self.written[index]
        out = TensorDict({}, batch_size=[len(index)])
        first = leaves(self.initial)
        for name, rows in leaves(self.rows).items():
            picked = rows[index.to(rows.device)]
            picked[new.to(rows.device)] = first[name]
            out.set(tuple(name.split("/")), picked)
        return out

    def scatter(self, clients: Sequence[int], state: Tree, keep: Tensor) -> None:
        """Store the rows of `state` (``[K]``) for which `keep` (bool ``[K]``) holds."""
        kept = keep.nonzero().flatten().cpu()
        index = torch.as_tensor(list(clients))[kept]
        new = leaves(state)
        for name, rows in leaves(self.rows).items():
            values = new[name]
            rows[index.to(rows.device)] = values[kept.to(values.device)].to(rows.device)
        self.written[index] = True
