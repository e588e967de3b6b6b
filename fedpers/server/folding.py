"""Grids that take replies in where they are made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import flwr.app as flower
from flwr.serverapp import Grid

from fedpers.server.collect import ReplyCollector

if TYPE_CHECKING:
    from fedpers.server.strategy import PersonalizedStrategy


@runtime_checkable
class FoldingGrid(Protocol):
    """A grid that takes replies in where they are made, so that they need not travel."""

    def send_and_fold(
        self, messages: Iterable[flower.Message], collector: ReplyCollector, *, timeout: float | None = None
    ) -> None:
        """Run messages and collect all replies; those that do not come in time are missing there."""


def folding(strategy: PersonalizedStrategy, grid: Grid) -> Grid:
    """View of `grid` that folds the replies to a round's training where they are made, if it can."""
    return cast(Grid, _Folding(strategy, cast(FoldingGrid, grid))) if isinstance(grid, FoldingGrid) else grid


class _Folding:
    """A grid whose replies to a round's training go straight into a collector."""

    def __init__(self, strategy: PersonalizedStrategy, grid: FoldingGrid) -> None:
        self._strategy = strategy
        self._grid = grid

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also what copying and pickling look for before there is a grid
            raise AttributeError(name)
        return getattr(self._grid, name)

    def send_and_receive(
        self, messages: Iterable[flower.Message], *, timeout: float | None = None
    ) -> Iterable[flower.Message]:
        """As the grid does; training is folded, and no reply is returned for it."""
        collector = self._strategy.collector_for(messages)
        if collector is None:
            replies: Iterable[flower.Message] = cast(Grid, self._grid).send_and_receive(messages, timeout=timeout)
            return replies
        self._grid.send_and_fold(messages, collector, timeout=timeout)
        return []
