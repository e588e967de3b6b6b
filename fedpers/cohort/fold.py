"""Aggregation as a fold: add replies one by one or a cohort at a time, merge partial folds, take the result.

Memory does not grow with the number of clients, and partial folds from other machines can be merged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from fedpers.cohort.tree import Tree, entries, tree

Records = Mapping[str, Tree]
"""What a message carries: trees by record."""
ARRAYS = "arrays"
"""Record of the model's arrays, as in Flower's own strategies."""


GROUPS = "groups"
"""Record in which :class:`GroupedMean` says which groups its means belong to."""


class Fold(ABC):
    """Something that takes replies and yields an aggregate; a subclass has :meth:`add`, :meth:`merge`, :meth:`result`.

    It travels to where replies are made, empty, and :meth:`partial` of it travels back.

    Attributes
    ----------
    any_layout : bool
        Whether tensors may come as they lie in a cohort (:meth:`fedpers.cohort.Cohort.assemble`); if not, they come
        contiguous. A fold that says so works entry by entry, since other sums differ by layout in the last digit, and
        its result is contiguous.
    """

    any_layout: ClassVar[bool] = False

    def decode(self, records: dict[str, Tree], client: int) -> dict[str, Tree]:
        """Undo ``LocalUpdate.encode`` for one client's `records` (batch size []).

        Raises
        ------
        ValueError
            That says why the reply cannot be used.
        """
        return records

    @abstractmethod
    def add(self, records: Records, weight: float, client: int) -> None:
        """Take in the records of one client, batch size []."""

    def add_stack(self, records: Records, weights: Tensor, clients: Sequence[int]) -> None:
        """Take in the records of K clients, batch size [K], with their `weights` ``[K]``."""
        for k, client in enumerate(clients):
            rows = {r: tree({n: v[k] for n, v in entries(values).items()}) for r, values in records.items()}
            self.add(rows, float(weights[k]), client)

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Take in what another fold of the same kind took in."""

    def partial(self) -> Self:
        """What another fold of the same kind needs to :meth:`merge` this one, without what both know."""
        return self

    @abstractmethod
    def result(self) -> dict[str, Tree]:
        """Return the aggregate of all that was added."""


class WeightedMean(Fold):
    """Weighted mean of each tensor of each record, summed in float64; integer tensors are rounded.

    A tensor that only some clients send is averaged over those.
    """

    any_layout = True

    def __init__(self) -> None:
        self.sums: dict[str, dict[str, Tensor]] = {}
        self.weights: dict[str, dict[str, float]] = {}
        self.dtypes: dict[str, dict[str, torch.dtype]] = {}

    def add(self, records: Records, weight: float, client: int = -1) -> None:
        """Take in one client's `records` (batch size []) with its `weight` >= 0; whose they are does not matter."""
        for record, values in records.items():
            for name, value in entries(values).items():
                total = self._sum(record, name, value)
                total.add_(value.to(total.device), alpha=weight)
                self.weights[record][name] += weight

    def add_stack(self, records: Records, weights: Tensor, clients: Sequence[int] = ()) -> None:
        """Take in the `records` of K clients, batch size [K], with their `weights` ``[K]`` >= 0."""
        numbers = weights.tolist()
        for record, values in records.items():
            for name, value in entries(values).items():
                total = self._sum(record, name, value[0])
                # row by row: no copy in float64, and the same sum whatever the size of the stack
                for row, weight in zip(value.to(total.device), numbers, strict=True):
                    total.add_(row, alpha=weight)
                    self.weights[record][name] += weight

    def _sum(self, record: str, name: str, like: Tensor) -> Tensor:
        sums = self.sums.setdefault(record, {})
        if name not in sums:
            sums[name] = torch.zeros_like(like, dtype=torch.float64)
            self.weights.setdefault(record, {})[name] = 0.0
            self.dtypes.setdefault(record, {})[name] = like.dtype
        return sums[name]

    def merge(self, other: Self) -> None:
        """Take in what `other` took in."""
        for record, sums in other.sums.items():
            totals = self.sums.setdefault(record, {})
            for name, value in sums.items():
                weight = other.weights[record][name]
                if name in totals:
                    totals[name].add_(value.to(totals[name].device))
                    self.weights[record][name] += weight
                else:
                    totals[name] = value.clone()
                    self.weights.setdefault(record, {})[name] = weight
                    self.dtypes.setdefault(record, {})[name] = other.dtypes[record][name]

    def result(self) -> dict[str, Tree]:
        """Return the means as trees of batch size []."""
        out = {}
        for record, sums in self.sums.items():
            means = {}
            for name, total in sums.items():
                mean = total / self.weights[record][name]
                dtype = self.dtypes[record][name]
                means[name] = (mean if dtype.is_floating_point else mean.round()).to(dtype).contiguous()
            out[record] = tree(means)
        return out


class GroupedMean(Fold):
    """A weighted mean for each group of clients.

    Parameters
    ----------
    group_of : dict of int to int
        Group of each client; clients that it lacks belong to group 0.

    Attributes
    ----------
    means : dict of int to WeightedMean
        By group, of those with replies.
    """

    any_layout = True

    def __init__(self, group_of: Mapping[int, int]) -> None:
        self.group_of = dict(group_of)
        self.means: dict[int, WeightedMean] = {}

    def add(self, records: Records, weight: float, client: int) -> None:
        """Take in one client's records."""
        self.means.setdefault(self.group_of.get(client, 0), WeightedMean()).add(records, weight)

    def merge(self, other: Self) -> None:
        """Merge group by group."""
        for group, mean in other.means.items():
            self.means.setdefault(group, WeightedMean()).merge(mean)

    def result(self) -> dict[str, Tree]:
        """Means ``[n, ...]`` of n groups by record, and in ``groups`` their numbers ``group`` ``[n]``, ascending.

        All replies must hold the same entries.
        """
        groups = sorted(self.means)
        results = [self.means[group].result() for group in groups]
        stacked = {
            record: tree({n: torch.stack([r[record][n] for r in results]) for n in entries(values)}, len(groups))
            for record, values in (results[0] if results else {}).items()
        }
        return {**stacked, GROUPS: tree({"group": torch.tensor(groups)})} if results else {}


class Collect(Fold):
    """Keeps every reply: for aggregates that need all of them at once, and for work on the server.

    Memory grows with the number of replies.

    Attributes
    ----------
    kept : dict of int to (records, weight)
        By client, batch size [].
    """

    def __init__(self) -> None:
        self.kept: dict[int, tuple[dict[str, Tree], float]] = {}

    def add(self, records: Records, weight: float, client: int) -> None:
        """Keep one client's records and weight."""
        self.kept[client] = (dict(records), weight)

    def merge(self, other: Self) -> None:
        """Keep what another kept."""
        self.kept.update(other.kept)

    @property
    def clients(self) -> list[int]:
        """Whose replies are kept, ascending."""
        return sorted(self.kept)

    def weights(self) -> Tensor:
        """Weights ``[n]`` of :attr:`clients`, float64."""
        return torch.tensor([self.kept[client][1] for client in self.clients], dtype=torch.float64)

    def stacked(self) -> dict[str, Tree]:
        """All replies by record, batch size [n], in the order of :attr:`clients`.

        Raises
        ------
        ValueError
            If they do not hold the same entries.
        """
        rows = [self.kept[client][0] for client in self.clients]
        names = [{(record, n) for record, values in row.items() for n in entries(values)} for row in rows]
        for client, held in zip(self.clients, names, strict=True):
            if held != names[0]:
                raise ValueError(f"replies of clients {self.clients[0]} and {client} do not hold the same entries")
        return {
            record: tree({n: torch.stack([row[record][n] for row in rows]) for n in entries(values)}, len(rows))
            for record, values in (rows[0] if rows else {}).items()
        }

    def result(self) -> dict[str, Tree]:
        """Return :meth:`stacked`, and ``client`` ``[n]`` and ``weight`` ``[n]`` as the record ``replies``."""
        if not self.kept:
            return {}
        about = {"client": torch.tensor(self.clients), "weight": self.weights()}
        return {**self.stacked(), REPLIES: tree(about)}


REPLIES = "replies"
"""Record in which :class:`Collect` says whose replies it kept."""
