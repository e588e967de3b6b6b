"""Ways in which clients differ beyond the samples they own."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedpers.data.federated import PARTS, FederatedData
from fedpers.errors import DataError, check
from fedpers.randomness import generator
from fedpers.settings.data import HeterogeneityConfig


def apply_heterogeneity(data: FederatedData, config: HeterogeneityConfig, seed: int) -> FederatedData:
    """Change each client's samples as `config` says; draws come from (`seed`, client).

    Raises
    ------
    DataError
        If a sample that would change belongs to two clients.
    ConfigError
        If the data are ratings, or have no labels that could be noisy.
    """
    if config.name == "none" or config.strength == 0:
        return data
    allowed = f"none, because {data.name} holds ratings"
    check(data.num_items == 0, "heterogeneity", config.name, allowed)
    allowed = f"none or feature_shift, because {data.name} has no class labels"
    check(config.name != "label_noise" or data.task.classes, "heterogeneity", config.name, allowed)
    if config.name == "label_noise" and data.num_classes < 2:
        raise DataError("heterogeneity=label_noise needs at least two classes.")
    parts = PARTS if config.name == "feature_shift" else PARTS[:1]
    owned = torch.cat([indices for part in parts for indices in data.part(part)])
    if len(set(owned.tolist())) < len(owned):
        raise DataError(f"heterogeneity={config.name} needs samples that belong to one client each.")
    if config.name == "feature_shift":
        return replace(data, x=_shifted(data, config.strength, seed))
    return replace(data, y=_noisy(data, config.strength, seed))


def _shifted(data: FederatedData, strength: float, seed: int) -> Tensor:
    x = data.x.clone()
    for client in range(data.num_clients):
        contrast, brightness = generator(seed, "feature_shift", client).normal(size=2)
        positions = torch.cat([data.part(part)[client] for part in PARTS])
        x[positions] = x[positions] * float(torch.tensor(strength * contrast).exp()) + strength * brightness
    return x


def _noisy(data: FederatedData, strength: float, seed: int) -> Tensor:
    y = data.y.clone()
    for client, positions in enumerate(data.train):
        rng = generator(seed, "label_noise", client)
        wrong = positions[
            torch.from_numpy(rng.permutation(len(positions))[: round(strength * rng.random() * len(positions))])
        ]
        other = torch.from_numpy(rng.integers(1, data.num_classes, len(wrong)))
        y[wrong] = (y[wrong] + other) % data.num_classes
    return y
