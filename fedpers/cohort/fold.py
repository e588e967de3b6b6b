"""Aggregation as a fold: ``add`` replies one by one, ``merge`` partial folds, take the ``result``.

Memory does not grow with the number of clients, and partial folds from other machines can be merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, Self

import torch
from torch import Tensor

from fedpers.cohort.tree import Tree, entries, tree


class Fold(Protocol):
    """Something that takes replies and yields an aggregate."""

    def add(self, records: Mapping[str, Tree], weight: float, client: int) -> None:
        """Take in the records of one client."""

    def merge(self, other: Self) -> None:
        """Take in what another fold of the same kind took in."""

    def result(self) -> dict[str, Tree]:
        """Return the aggregate of all that was added."""


class WeightedMean:
    """Weighted mean of each tensor of each record, summed in float64; integer tensors are rounded.

    A tensor that only some clients send is averaged over those.
    """

    def __init__(self) -> None:
        self.sums: dict[str, dict[str, Tensor]] = {}
        self.weights: dict[str, dict[str, float]] = {}
        self.dtypes: dict[str, dict[str, torch.dtype]] = {}

    def add(self, records: Mapping[str, Tree], weight: float, client: int = -1) -> None:
        """Take in one client's `records` (batch size []) with its `weight` >= 0; whose they are does not matter."""
        for record, values in records.items():
            sums = self.sums.setdefault(record, {})
            weights = self.weights.setdefault(record, {})
            dtypes = self.dtypes.setdefault(record, {})
            for name, value in entries(values).items():
                if name not in sums:
                    sums[name] = torch.zeros(value.shape, dtype=torch.float64, device=value.device)
                    weights[name] = 0.0
                    dtypes[name] = value.dtype
                sums[name].add_(value.to(sums[name].device), alpha=weight)
                weights[name] += weight

    def merge(self, other: Self) -> None:
        """Take in what `other` took in."""
        for record, sums in other.sums.items():
            own = self.sums.setdefault(record, {})
            for name, value in sums.items():
                weight = other.weights[record][name]
                if name in own:
                    own[name].add_(value.to(own[name].device))
                    self.weights[record][name] += weight
                else:
                    own[name] = value.clone()
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
                means[name] = mean.to(dtype) if dtype.is_floating_point else mean.round().to(dtype)
            out[record] = tree(means)
        return out
