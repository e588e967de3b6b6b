"""Ways in which clients differ beyond the samples they own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedpers.data.federated import PARTS, FederatedData
from fedpers.errors import ConfigError, DataError, check
from fedpers.randomness import generator
from fedpers.settings.base import Settings
from fedpers.settings.heterogeneity import Drift, HeterogeneityConfig

_BY_LABEL = ("label_noise", "label_groups")
_OF_PICTURES = ("rotation", "blur", "colour", "missing_channels")


def apply_heterogeneity(data: FederatedData, config: HeterogeneityConfig, seed: int) -> FederatedData:
    """Change each client's samples as `config` says; draws come from (`seed`, shift, client or group).

    Labels of all parts of a client change alike, except for noise, which only training labels have. With a drift, a
    share of the clients is shifted once more from a round on: to the next group, by draws made anew. Clients that fall
    into groups for several reasons have the group of all of them together.

    Raises
    ------
    DataError
        If a sample that would change belongs to two clients.
    ConfigError
        If the data are ratings, have no labels to change, or are no pictures that can be changed so; or there are fewer
        clients than groups.
    """
    shifts = {n: s for n, s in config.shifts().items() if getattr(s, "strength", 1) > 0}
    for name, shift in shifts.items():
        _check(data, name)
        if (groups := getattr(shift, "groups", 0)) > data.num_clients:
            has_settings = getattr(config, name) is not None
            allowed = f"at most {data.num_clients}, the number of clients"
            raise ConfigError((shift if has_settings else config).key("groups"), groups, allowed)
    shifted = _apply(data, shifts, seed)
    if config.drift is None:
        return _numbered_from_0(shifted)
    allowed = "null unless a shift is chosen that it can move, such as heterogeneity=label_groups"
    check(bool(shifts), "heterogeneity.drift.round", config.drift.round, allowed)
    return _numbered_from_0(_drifting(shifted, _apply(data, shifts, seed, moved=True), config.drift, seed))


def _numbered_from_0(data: FederatedData) -> FederatedData:
    """The same groups, also those after a drift, by numbers without gaps."""
    if not data.groups:
        return data
    numbers = {group: number for number, group in enumerate(sorted({*data.groups, *data.drifted_groups}))}
    groups, later = (tuple(numbers[group] for group in each) for each in (data.groups, data.drifted_groups))
    return replace(data, groups=groups, drifted_groups=later)


def _apply(data: FederatedData, shifts: Mapping[str, Settings], seed: int, *, moved: bool = False) -> FederatedData:
    """Change each client's samples; `moved`: as after a drift."""
    for name, shift in shifts.items():
        data = _APPLIED[name](data, shift, seed, moved)
    return data


def _drifting(before: FederatedData, after: FederatedData, drift: Drift, seed: int) -> FederatedData:
    """Data in which a share of the clients has other samples from a round on, which stand behind the first ones."""
    count = max(1, round(drift.share * before.num_clients))
    clients = np.sort(generator(seed, "drift").permutation(before.num_clients)[:count])
    moving = torch.unique(torch.cat([_positions(before, int(client)) for client in clients]))
    drifted = torch.arange(len(before.x) + len(moving))
    drifted[moving] = len(before.x) + torch.arange(len(moving))
    x, y = (torch.cat([first, then[moving]]) for first, then in ((before.x, after.x), (before.y, after.y)))
    groups = list(before.groups)
    for client in clients if groups else ():
        groups[client] = after.groups[client]
    return replace(before, x=x, y=y, drift_round=drift.round or 0, drifted=drifted, drifted_groups=tuple(groups))


def _check(data: FederatedData, name: str) -> None:
    """Refuse data that a shift cannot change."""
    check(data.num_items == 0, "heterogeneity", name, f"none, because {data.name} holds ratings")
    allowed = f"none, because {data.name} holds tokens to predict"
    check(not data.task.per_token, "heterogeneity", name, allowed)
    allowed = f"a shift of features, because {data.name} has no class labels"
    check(name not in _BY_LABEL or data.task.classes, "heterogeneity", name, allowed)
    if name in _BY_LABEL and data.num_classes < 2:
        raise DataError(f"heterogeneity={name} needs at least two classes.")
    shape = f"another, because samples of {data.name} have shape {list(data.x.shape[1:])}"
    square = data.x.dim() == 3 and data.x.shape[1] == data.x.shape[2]  # pictures without channels, unlike series [C, T]
    pictures = data.x.dim() == 4 or (square and name in ("rotation", "blur"))
    check(name not in _OF_PICTURES or pictures, "heterogeneity", name, f"{shape}, and are no pictures")
    check(name != "permuted_pixels" or data.x.dim() >= 2, "heterogeneity", name, shape)
    kind = str(data.x.dtype).removeprefix("torch.")
    allowed = f"label_groups or label_noise, because samples of {data.name} are {kind}"
    check(name in _BY_LABEL or data.x.is_floating_point(), "heterogeneity", name, allowed)
    parts = PARTS[:1] if name == "label_noise" else PARTS
    without_owners = data.global_test is not None and data.global_owners is None
    allowed = f"none, because nothing says whose the samples of {data.name}'s global test set are (global_owners)"
    check(not without_owners, "heterogeneity", name, allowed)
    owned = torch.cat([indices for part in parts for indices in data.part(part)])
    if int(torch.bincount(owned).max()) > 1:
        raise DataError(f"heterogeneity={name} needs samples that belong to one client each.")


def _positions(data: FederatedData, client: int) -> Tensor:
    """All samples of a client, also those of it in the global test set."""
    positions = [data.part(part)[client] for part in PARTS]
    if data.global_test is not None and data.global_owners is not None:
        positions.append(data.global_test[data.global_owners == client])
    return torch.cat(positions)


def _each_client(change: Callable[[Tensor, np.random.Generator, Any], Tensor], name: str) -> Any:
    """A shift that changes the samples ``[n, ...]`` of each client by draws of its own."""

    def applied(data: FederatedData, shift: Settings, seed: int, moved: bool) -> FederatedData:
        x = data.x.clone()
        purpose = f"{name}, drift" if moved else name
        for client in range(data.num_clients):
            positions = _positions(data, client)
            x[positions] = change(x[positions], generator(seed, purpose, client), shift)
        return replace(data, x=x)

    return applied


def _each_group(change: Callable[[FederatedData, Tensor, int, int, Any], tuple[Tensor, Tensor]], name: str) -> Any:
    """A shift that changes inputs and labels of clients by the group they fall into."""

    def applied(data: FederatedData, shift: Any, seed: int, moved: bool) -> FederatedData:
        # a second reason is drawn by itself, so that neither follows from the other
        purpose = f"groups, {name}" if data.groups else "groups"
        order = generator(seed, purpose).permutation(data.num_clients)
        group_of = [(int(position) + moved) % shift.groups for position in order]
        x, y = data.x.clone(), data.y.clone()
        for client, group in enumerate(group_of):
            positions = _positions(data, client)
            x[positions], y[positions] = change(data, positions, group, seed, shift)
        if data.groups:
            group_of = [first * shift.groups + group for first, group in zip(data.groups, group_of, strict=True)]
        return replace(data, x=x, y=y, groups=tuple(group_of))

    return applied


def _shifted(x: Tensor, rng: np.random.Generator, shift: Any) -> Tensor:
    contrast, brightness = rng.normal(size=2)
    changed: Tensor = x * float(torch.tensor(shift.strength * contrast).exp()) + shift.strength * brightness
    return changed


def _contrasted(x: Tensor, rng: np.random.Generator, shift: Any) -> Tensor:
    return x * float(torch.tensor(shift.strength * rng.normal()).exp())


def _noisy(x: Tensor, rng: np.random.Generator, shift: Any) -> Tensor:
    deviation = shift.strength * rng.random()
    noisy: Tensor = x + deviation * torch.from_numpy(rng.standard_normal(x.shape)).to(x)
    return noisy


def _blurred(x: Tensor, rng: np.random.Generator, shift: Any) -> Tensor:
    """Rows, then columns, after a normal curve of three deviations to each side; edges are repeated."""
    deviation = shift.strength * rng.random()
    reach = int(np.ceil(3 * deviation))
    if reach == 0 or deviation < 1e-3:
        return x
    offsets = torch.arange(-reach, reach + 1, dtype=x.dtype)
    curve = torch.exp(-0.5 * (offsets / deviation) ** 2)
    curve = curve / curve.sum()
    flat = x.reshape(-1, 1, *x.shape[-2:])
    flat = F.conv2d(F.pad(flat, (reach, reach, 0, 0), "replicate"), curve.view(1, 1, 1, -1))
    flat = F.conv2d(F.pad(flat, (0, 0, reach, reach), "replicate"), curve.view(1, 1, -1, 1))
    return flat.reshape(x.shape)


def _coloured(x: Tensor, rng: np.random.Generator, shift: Any) -> Tensor:
    contrast, brightness = (torch.from_numpy(rng.normal(size=(x.shape[1], 1, 1))).to(x) for _ in range(2))
    changed: Tensor = x * torch.exp(shift.strength * contrast) + shift.strength * brightness
    return changed


def _without_channels(x: Tensor, rng: np.random.Generator, shift: Any) -> Tensor:
    missing = rng.random(x.shape[1]) < shift.strength
    missing[rng.integers(x.shape[1])] = False  # one is left
    return x * torch.from_numpy(~missing).to(x).view(-1, 1, 1)


def _permuted(data: FederatedData, positions: Tensor, group: int, seed: int, shift: Any) -> tuple[Tensor, Tensor]:
    x = data.x[positions]
    order = generator(seed, "permuted_pixels", group).permutation(x[0].numel()) if group else np.arange(x[0].numel())
    return x.flatten(1)[:, torch.from_numpy(order)].reshape(x.shape), data.y[positions]


def _turned(data: FederatedData, positions: Tensor, group: int, seed: int, shift: Any) -> tuple[Tensor, Tensor]:
    x, angle = data.x[positions], group * shift.angle % 360
    allowed = f"another, because samples of {data.name} have shape {list(data.x.shape[1:])}: only square pictures can"
    square = x.shape[-1] == x.shape[-2] or shift.angle == 180
    check(square, "heterogeneity", "rotation", f"{allowed} be turned by {shift.angle:g} degrees")
    if angle % 90 == 0:
        return torch.rot90(x, int(angle // 90), (-2, -1)), data.y[positions]
    radians = torch.deg2rad(torch.tensor(angle, dtype=x.dtype))
    cosine, sine, zero = torch.cos(radians), torch.sin(radians), torch.zeros((), dtype=x.dtype)
    turn = torch.stack([torch.stack([cosine, -sine, zero]), torch.stack([sine, cosine, zero])])
    flat = x.reshape(len(x), -1, *x.shape[-2:])
    places = F.affine_grid(turn.expand(len(x), 2, 3), list(flat.shape), align_corners=False)
    turned = F.grid_sample(flat, places, padding_mode="border", align_corners=False)
    return turned.reshape(x.shape), data.y[positions]


def _renamed(data: FederatedData, positions: Tensor, group: int, seed: int, shift: Any) -> tuple[Tensor, Tensor]:
    names = torch.from_numpy(generator(seed, "label_groups", group).permutation(data.num_classes))
    return data.x[positions], names[data.y[positions]]


def _mislabelled(data: FederatedData, shift: Any, seed: int, moved: bool) -> FederatedData:
    y = data.y.clone()
    for client, positions in enumerate(data.train):
        rng = generator(seed, "label_noise, drift" if moved else "label_noise", client)
        count = rng.permutation(len(positions))[: round(shift.strength * rng.random() * len(positions))]
        wrong = positions[torch.from_numpy(count)]
        other = rng.integers(1, data.num_classes, len(wrong)) if shift.kind == "symmetric" else np.ones(len(wrong), int)
        y[wrong] = (y[wrong] + torch.from_numpy(other)) % data.num_classes
    return replace(data, y=y)


_APPLIED: dict[str, Callable[[FederatedData, Any, int, bool], FederatedData]] = {
    "rotation": _each_group(_turned, "rotation"),
    "permuted_pixels": _each_group(_permuted, "permuted_pixels"),
    "blur": _each_client(_blurred, "blur"),
    "contrast": _each_client(_contrasted, "contrast"),
    "colour": _each_client(_coloured, "colour"),
    "feature_shift": _each_client(_shifted, "feature_shift"),
    "missing_channels": _each_client(_without_channels, "missing_channels"),
    "noise": _each_client(_noisy, "noise"),
    "label_groups": _each_group(_renamed, "label_groups"),
    "label_noise": _mislabelled,
}
"""What applies each of :data:`fedpers.settings.heterogeneity.SHIFTS`."""
