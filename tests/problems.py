"""Small federated problems made from numbers alone, for tests that need no data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from fedpers.cohort import Training
from fedpers.data.federated import FederatedData

SIZES = (27, 11, 46, 22, 38, 6, 31)  # batches of 8 or 16 leave no remainder too small for batch normalization


def gaussian_data(
    sizes: tuple[int, ...] = SIZES,
    *,
    classes: int = 4,
    features: tuple[int, ...] = (6,),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> FederatedData:
    """Clients of unequal `sizes` (training samples), own mixes of Gaussian classes; 5 more samples per other part."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(classes, *features))
    xs, ys, lists = [], [], {"train": [], "validation": [], "test": []}
    at = 0
    for size in sizes:
        mix = rng.dirichlet([0.5] * classes)
        for part, count in (("train", size), ("validation", 5), ("test", 5)):
            y = rng.choice(classes, count, p=mix)
            xs.append(centers[y] + rng.normal(scale=0.7, size=(count, *features)))
            ys.append(y)
            lists[part].append(torch.arange(at, at + count))
            at += count
    x = torch.from_numpy(np.concatenate(xs)).to(dtype)
    y_all = torch.from_numpy(np.concatenate(ys)).to(torch.int64)
    return FederatedData(x, y_all, lists["train"], lists["validation"], lists["test"], classes, "gaussian")


class SmallNetwork(nn.Module):
    """Two layers with batch normalization and dropout between them: all that can go wrong in a cohort."""

    def __init__(
        self, features: int = 6, classes: int = 4, *, norm: bool = True, dropout: float = 0.3, seed: int = 0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Linear(features, 8, bias=not norm),
                nn.BatchNorm1d(8) if norm else nn.Identity(),
                nn.ReLU(),
                nn.Dropout(dropout),
            )
            self.head = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(x))
        return out


@dataclass
class Problem:
    """A network and data that a method can work with, and settings that put all of its parts to work."""

    network: nn.Module
    data: FederatedData
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Training = field(default_factory=lambda: Training(lr=0.02, epochs=2, batch_size=8, momentum=0.5))


def classification(dtype: torch.dtype = torch.float32) -> Problem:
    """Classes, batch normalization, dropout."""
    return Problem(SmallNetwork().to(dtype), gaussian_data(dtype=dtype))


def scaffold(dtype: torch.dtype = torch.float32) -> Problem:
    """The same with plain SGD."""
    return Problem(
        SmallNetwork().to(dtype), gaussian_data(dtype=dtype), training=Training(lr=0.02, epochs=2, batch_size=8)
    )


def fedjets(dtype: torch.dtype = torch.float32) -> Problem:
    """Three anchors, three other clients, one that never trains."""
    data = replace(gaussian_data(dtype=dtype), unseen=(6,))
    return Problem(SmallNetwork().to(dtype), data, {"experts": 3, "gate_hidden": 5, "gate_lr": 0.1})


SPECIAL: dict[str, Callable[[torch.dtype], Problem]] = {"scaffold": scaffold, "fedjets": fedjets}
"""Methods that need something else than :func:`classification`."""


def problem(method: str, dtype: torch.dtype = torch.float32) -> Problem:
    """The small problem on which `method` is tested together with all others."""
    return SPECIAL.get(method, classification)(dtype)
