"""Ways in which clients differ beyond the samples they own."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedpers.data.federated import PARTS, FederatedData
from fedpers.errors import DataError, check
from fedpers.randomness import generator
from fedpers.settings.data import HeterogeneityConfig

_BY_LABEL = ("label_noise", "label_groups")
_BY_GROUP = ("label_groups", "rotation")


def apply_heterogeneity(data: FederatedData, config: HeterogeneityConfig, seed: int) -> FederatedData:
    """Change each client's samples as `config` says; draws come from (`seed`, client or group).

    Raises
    ------
    DataError
        If a sample that would change belongs to two clients.
    ConfigError
        If the data are ratings, have no labels to change, or are no pictures that can be turned; or there are fewer
        clients than groups.
    """
    name = config.name
    if name == "none" or (name not in _BY_GROUP and config.strength == 0):
        return data
    allowed = f"none, because {data.name} holds ratings"
    check(data.num_items == 0, "heterogeneity", name, allowed)
    allowed = f"none, feature_shift or rotation, because {data.name} has no class labels"
    check(name not in _BY_LABEL or data.task.classes, "heterogeneity", name, allowed)
    if name in _BY_LABEL and data.num_classes < 2:
        raise DataError(f"heterogeneity={name} needs at least two classes.")
    parts = PARTS[:1] if name == "label_noise" else PARTS
    owned = torch.cat([indices for part in parts for indices in data.part(part)])
    if len(set(owned.tolist())) < len(owned):
        raise DataError(f"heterogeneity={name} needs samples that belong to one client each.")
    if name == "feature_shift":
        return replace(data, x=_shifted(data, config.strength, seed))
    if name == "label_noise":
        return replace(data, y=_noisy(data, config.strength, seed))
    allowed = f"at most {data.num_clients}, the number of clients"
    check(config.groups <= data.num_clients, "heterogeneity.groups", config.groups, allowed)
    order = generator(seed, "groups").permutation(data.num_clients)
    data = replace(data, groups=tuple(int(position) % config.groups for position in order))
    if name == "label_groups":
        return replace(data, y=_renamed(data, config.groups, seed))
    return replace(data, x=_turned(data, config.groups))


def _positions(data: FederatedData, client: int) -> Tensor:
    """All samples of a client."""
    return torch.cat([data.part(part)[client] for part in PARTS])


def _shifted(data: FederatedData, strength: float, seed: int) -> Tensor:
    x = data.x.clone()
    for client in range(data.num_clients):
        contrast, brightness = generator(seed, "feature_shift", client).normal(size=2)
        positions = _positions(data, client)
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


def _renamed(data: FederatedData, groups: int, seed: int) -> Tensor:
    """Labels after each group's permutation of the classes."""
    y = data.y.clone()
    names = [generator(seed, "label_groups", group).permutation(data.num_classes) for group in range(groups)]
    for client, group in enumerate(data.groups):
        positions = _positions(data, client)
        y[positions] = torch.from_numpy(names[group])[y[positions]]
    return y


def _turned(data: FederatedData, groups: int) -> Tensor:
    """Pictures ``[N, ..., H, W]`` after each group's turn."""
    square = data.x.dim() >= 3 and (groups == 2 or data.x.shape[-1] == data.x.shape[-2])
    allowed = f"another, because samples of {data.name} have shape {list(data.x.shape[1:])}"
    pictures = "square pictures" if groups == 4 else "pictures"
    check(square, "heterogeneity", "rotation", f"{allowed}: only {pictures} can be turned")
    x = data.x.clone()
    for client, group in enumerate(data.groups):
        positions = _positions(data, client)
        x[positions] = torch.rot90(x[positions], group * (4 // groups), (-2, -1))
    return x
