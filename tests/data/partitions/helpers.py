"""Made-up data to divide."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fedpers.data import Dataset, PartitionConfig
from fedpers.tasks import Regression


def made(labels: Any, owner: Any = None, domain: Any = None, train_size: int | None = None, **names: Any) -> Dataset:
    """Samples of classes, perhaps with owners and domains."""
    y = torch.as_tensor(np.asarray(labels))
    ids = None if owner is None else torch.as_tensor(np.asarray(owner))
    styles = None if domain is None else torch.as_tensor(np.asarray(domain))
    return Dataset(
        torch.zeros(len(y), 1), y, int(y.max()) + 1, "made", train_size=train_size, owner=ids, domain=styles, **names
    )


def numbers(targets: Any, **fields: Any) -> Dataset:
    """Samples of a regression."""
    y = torch.as_tensor(np.asarray(targets, dtype=np.float32))
    y = y.unsqueeze(1) if y.dim() == 1 else y
    return Dataset(torch.zeros(len(y), 1), y, y.shape[1], "made", task=Regression(), **fields)


def settings_of(name: str, num_clients: int | None = None, **values: Any) -> PartitionConfig:
    """Settings of a partition with at least 10 samples for a client."""
    return PartitionConfig(name, num_clients, **{"min_samples": 10, **values})


def plain(lists: Any) -> list[list[int]]:
    return [positions.tolist() for positions in lists]
