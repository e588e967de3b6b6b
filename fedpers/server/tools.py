"""What server halves are built from: an optimizer, and a table with a row for each client."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedpers.cohort import Tree, entries, tree
from fedpers.cohort.tree import expand_rows
from fedpers.settings import Settings
from fedpers.settings.training import Beta


@dataclass(frozen=True, kw_only=True)
class ServerOptimizer(Settings):
    """Steps of a server along directions that point where to go (a mean change of clients, a negative gradient).

    S. Reddi et al., Adaptive Federated Optimization, ICLR 2021, arXiv:2003.00295 (Algorithm 2); Adam and Yogi with the
    bias correction of D. Kingma, J. Ba, Adam, ICLR 2015, arXiv:1412.6980. With direction d:

        sgd        x <- x + lr * d
        momentum   m <- momentum * m + d;   x <- x + lr * m
        adam       m <- b1 m + (1 - b1) d;  v <- b2 v + (1 - b2) d^2;               x <- x + lr * m^ / (sqrt(v^) + eps)
        yogi       as adam, but             v <- v - (1 - b2) d^2 sign(v - d^2)

    Its state is a tree like any other: the caller keeps it.

    Raises
    ------
    ConfigError
        If a value is out of its range.
    """

    name: Literal["sgd", "momentum", "adam", "yogi"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1, description="of momentum")] = 0.9
    betas: Annotated[tuple[Beta, Beta], Field(title="two numbers >= 0 and < 1", description="of adam and yogi")] = (
        0.9,
        0.999,
    )
    eps: Annotated[float, Field(gt=0, description="of adam and yogi")] = 1e-8

    @classmethod
    def key(cls, name: str) -> str:
        """As the options of methods are called: ``strategy.server_lr``."""
        return f"strategy.server_{'optimizer' if name == 'name' else name}"

    def moments(self, value: Tensor) -> dict[str, Tensor]:
        """State before the first step of a tensor: none, ``first``, or ``first``, ``second`` and ``steps``."""
        if self.name == "sgd":
            return {}
        first = {"first": torch.zeros_like(value)}
        if self.name == "momentum":
            return first
        return {**first, "second": torch.zeros_like(value), "steps": torch.zeros((), dtype=torch.int64)}

    def step(self, direction: Tensor, moments: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Step along a direction, and the state after it.

        Parameters
        ----------
        direction : Tensor
        moments : mapping of str to Tensor
            As :meth:`moments` and this method return it. ``steps`` may be ``[n]`` for rows ``[n, ...]`` that took
            different numbers of steps.
        """
        if self.name == "sgd":
            return self.lr * direction, {}
        if self.name == "momentum":
            first = self.momentum * moments["first"] + direction
            return self.lr * first, {"first": first}
        steps = moments["steps"] + 1
        first = torch.lerp(moments["first"], direction, 1 - self.betas[0])
        square = direction.square()
        if self.name == "adam":
            second = torch.lerp(moments["second"], square, 1 - self.betas[1])
        else:
            second = moments["second"] - (1 - self.betas[1]) * square * torch.sign(moments["second"] - square)
        count = (expand_rows(steps, direction) if steps.dim() else steps).double()
        mean, spread = (m / (1 - b**count).to(m) for m, b in zip((first, second), self.betas, strict=True))
        return self.lr * mean / (spread.sqrt() + self.eps), {"first": first, "second": second, "steps": steps}

    def step_tree(self, directions: Tree, state: Tree | None) -> tuple[Tree, Tree]:
        """Steps along the directions of a tree (batch size []), and the state after them, ``NAME.MOMENT``.

        Parameters
        ----------
        directions : Tree
        state : Tree or None
            Of the step before; None before the first.
        """
        old_moments = {} if state is None else entries(state)
        steps: dict[str, Tensor] = {}
        new_moments: dict[str, Tensor] = {}
        for name, value in entries(directions).items():
            start = self.moments(value)
            steps[name], after = self.step(value, {m: old_moments.get(f"{name}.{m}", start[m]) for m in start})
            new_moments.update({f"{name}.{m}": moment for m, moment in after.items()})
        return tree(steps), tree(new_moments)


class ClientTable:
    """A row per client, kept in a server's state.

    Rows are made when a client is first asked for. The table is a tree, ``client`` ``[n]`` ascending and one tensor
    ``[n, ...]`` per column, so that checkpoints hold it like all other state.

    Parameters
    ----------
    first : callable
        Returns the first row of a client, by column.
    values : Tree, optional
        What :attr:`values` was, to go on with.
    """

    def __init__(
        self,
        first: Callable[[int], Mapping[str, Tensor]],
        values: Tree | None = None,
    ) -> None:
        self.first_row = first
        columns = {} if values is None else dict(entries(values))
        self._clients: Tensor = columns.pop("client", torch.zeros(0, dtype=torch.int64)).cpu()
        self._columns = dict(sorted(columns.items()))

    @property
    def clients(self) -> list[int]:
        """Clients that have a row, ascending."""
        clients: list[int] = self._clients.tolist()
        return clients

    @property
    def values(self) -> Tree:
        """The whole table, batch size []."""
        return tree({"client": self._clients, **self._columns})

    def add(self, clients: Sequence[int]) -> None:
        """Make the first rows of clients that have none."""
        new = sorted(set(clients) - set(self.clients))
        if not new:
            return
        rows = [self.first_row(client) for client in new]
        both = torch.cat([self._clients, torch.tensor(new)])
        order = both.argsort()
        columns = {}
        for name in rows[0]:
            added = torch.stack([row[name] for row in rows])
            before = self._columns.get(name)
            whole = added if before is None else torch.cat([before, added])
            columns[name] = whole[order.to(whole.device)]
        self._clients = both[order]
        self._columns = dict(sorted(columns.items()))

    def rows(self, clients: Sequence[int]) -> dict[str, Tensor]:
        """Copies of the rows ``[n, ...]`` of some clients by column, in their order; new ones are made."""
        self.add(clients)
        index = self._row_indices(clients)
        return {n: torch.index_select(v, 0, index.to(v.device)) for n, v in self._columns.items()}

    def put(self, clients: Sequence[int], rows: Mapping[str, Tensor]) -> None:
        """Store new rows, by column ``[n, ...]`` in the order of `clients`, each once; columns left out stay."""
        self.add(clients)
        index = self._row_indices(clients)
        for name, value in rows.items():
            column = self._columns[name]  # whoever took `values` before keeps what they were
            self._columns[name] = column.index_copy(0, index.to(column.device), value.to(column))

    def mean(self) -> dict[str, Tensor]:
        """Mean over all rows, by column of floats."""
        return {n: v.mean(0) for n, v in self._columns.items() if v.is_floating_point()}

    def _row_indices(self, clients: Sequence[int]) -> Tensor:
        return torch.searchsorted(self._clients, torch.tensor(list(clients), dtype=torch.int64))
