"""Clients that differ beyond the samples they own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedpers.data import FederatedData, HeterogeneityConfig, apply_heterogeneity
from fedpers.data.federated import PARTS
from fedpers.errors import ConfigError, DataError
from fedpers.tasks import Regression
from tests.problems import gaussian_data


def test_none_changes_nothing() -> None:
    data = gaussian_data()
    assert apply_heterogeneity(data, HeterogeneityConfig(), 0) is data


def test_feature_shift_is_one_affine_map_per_client_in_all_its_parts() -> None:
    data = gaussian_data()
    shifted = apply_heterogeneity(data, HeterogeneityConfig("feature_shift", 0.5), seed=3)
    maps = []
    for client in range(data.num_clients):
        own = torch.cat([data.part(part)[client] for part in PARTS])
        before, after = data.x[own].flatten(), shifted.x[own].flatten()
        design = torch.stack([before, torch.ones_like(before)], 1)
        slope, offset = torch.linalg.lstsq(design, after[:, None]).solution.flatten().tolist()
        assert torch.allclose(slope * before + offset, after, atol=1e-4)
        maps.append((round(slope, 4), round(offset, 4)))
    assert len(set(maps)) == data.num_clients
    assert torch.equal(shifted.y, data.y)
    again = apply_heterogeneity(data, HeterogeneityConfig("feature_shift", 0.5), seed=3)
    assert torch.equal(again.x, shifted.x)


def test_label_noise_touches_training_labels_only_and_never_leaves_one_right() -> None:
    data = gaussian_data((200, 300))
    noisy = apply_heterogeneity(data, HeterogeneityConfig("label_noise", 1.0), seed=1)
    changed = (noisy.y != data.y).nonzero().flatten()
    training = torch.cat(list(data.train))
    assert set(changed.tolist()) <= set(training.tolist())
    shares = [float((noisy.y[own] != data.y[own]).float().mean()) for own in data.train]
    assert 0 < min(shares) < max(shares) < 1
    assert noisy.y.max() < data.num_classes


def grouped(data: FederatedData, name: str, groups: int = 4, seed: int = 0) -> FederatedData:
    return apply_heterogeneity(data, HeterogeneityConfig(name, groups=groups), seed)


def test_groups_are_of_nearly_equal_size_and_drawn() -> None:
    data = gaussian_data([20] * 10)
    groups = grouped(data, "label_groups").groups
    assert sorted(groups.count(group) for group in range(4)) == [2, 2, 3, 3]
    assert groups != grouped(data, "label_groups", seed=1).groups
    assert data.groups == ()
    assert grouped(data, "label_groups").checksum != data.checksum


def test_each_group_names_the_classes_in_one_way_of_its_own() -> None:
    data = gaussian_data([200] * 6, classes=4)
    renamed = grouped(data, "label_groups", 3)
    assert torch.equal(renamed.x, data.x)
    names: dict[int, set[tuple[int, int]]] = {}
    for client, group in enumerate(renamed.groups):
        positions = torch.cat([data.part(part)[client] for part in PARTS])
        pairs = zip(data.y[positions].tolist(), renamed.y[positions].tolist(), strict=True)
        names.setdefault(group, set()).update(pairs)
    for pairs in names.values():
        assert len(pairs) == len({old for old, _ in pairs}) == len({new for _, new in pairs}) == 4
    assert len({tuple(sorted(pairs)) for pairs in names.values()}) == 3


def test_each_group_sees_pictures_turned_alike() -> None:
    data = gaussian_data([6] * 4)
    pictures = replace(data, x=torch.arange(len(data.x) * 9.0).view(-1, 1, 3, 3))
    turned = grouped(pictures, "rotation")
    assert sorted(turned.groups) == [0, 1, 2, 3]
    for client, group in enumerate(turned.groups):
        for part in PARTS:
            positions = data.part(part)[client]
            expected = torch.rot90(pictures.x[positions], group, (-2, -1))
            assert torch.equal(turned.x[positions], expected)
    wide = replace(data, x=torch.zeros(len(data.x), 1, 2, 3))
    assert grouped(wide, "rotation", 2).x.shape == wide.x.shape
    for wrong, groups in ((wide, 4), (data, 2)):
        with pytest.raises(ConfigError, match=r"heterogeneity=rotation: expected another, because samples of .* shape"):
            grouped(wrong, "rotation", groups)


def test_more_groups_than_clients_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"heterogeneity\.groups=3: expected at most 2, the number of clients"):
        grouped(gaussian_data((5, 5)), "label_groups", 3)
    with pytest.raises(ConfigError, match=r"heterogeneity\.groups=3: expected 2 or 4 with heterogeneity=rotation"):
        HeterogeneityConfig("rotation", groups=3)
    with pytest.raises(DataError, match="groups must be one number >= 0 for each of 2 clients"):
        replace(gaussian_data((5, 5)), groups=(0,))


def test_bad_values_and_shared_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="heterogeneity=nois: expected one of"):
        HeterogeneityConfig("nois")
    with pytest.raises(ConfigError, match=r"heterogeneity\.strength=1\.5: expected a number >= 0 and <= 1"):
        HeterogeneityConfig("label_noise", 1.5)
    data = gaussian_data((5, 5))
    numbers = replace(data, y=data.y.float(), task=Regression())
    with pytest.raises(ConfigError, match=r"heterogeneity=label_noise: expected none, feature_shift or rotation"):
        apply_heterogeneity(numbers, HeterogeneityConfig("label_noise", 0.5), 0)
    shared = type(data)(data.x, data.y, [data.train[0]] * 2, data.validation, data.test, data.num_classes)
    with pytest.raises(DataError, match="belong to one client each"):
        apply_heterogeneity(shared, HeterogeneityConfig("label_noise", 0.5), 0)
