"""How far networks scatter over a training, by which clients can be weighted."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedpers.cohort.step import Step
from fedpers.cohort.tree import expand_rows, sum_rows


class RunningVariance:
    """Variance over a sequence of networks ``[K]``, per coordinate (Welford's method).

    Parameters
    ----------
    like : mapping of name to Tensor ``[K, ...]``
        Tensors of the shapes that will be added.
    """

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        self.means = {name: torch.zeros_like(value) for name, value in like.items()}
        first = next(iter(self.means.values()))
        self.count = first.new_zeros(len(first))
        self.squares = {name: first.new_zeros(len(first), dtype=torch.float64) for name in self.means}

    def add(self, values: Mapping[str, Tensor], counted: Tensor, step: Step | None = None) -> None:
        """Add `values` ``[a, ...]`` of a step's clients, or of all, for which `counted` (bool ``[a]``) holds."""
        if not bool(counted.any()):
            return
        counted = counted.to(self.count.device)
        rows = slice(len(self.count)) if step is None else step.places(self.count.device)
        self.count[rows] += counted
        share = counted / self.count[rows].clamp(min=1)
        for name, mean in self.means.items():
            before = values[name] - mean[rows]
            mean[rows] += expand_rows(share, before) * before
            self.squares[name][rows] += sum_rows(before * (values[name] - mean[rows])).double() * counted

    def sums(self) -> dict[str, Tensor]:
        """By name, the variances of all coordinates added up, ``[K]``, float64; 0 of fewer than two networks."""
        return {name: squares / (self.count - 1).clamp(min=1) for name, squares in self.squares.items()}

    def result(self) -> Tensor:
        """Mean variance of the coordinates, ``[K]``, float64."""
        size = sum(mean[0].numel() for mean in self.means.values())
        return torch.stack(list(self.sums().values())).sum(0) / size
