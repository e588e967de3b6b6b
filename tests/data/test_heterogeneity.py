"""Clients that differ beyond the samples they own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedpers.data import HeterogeneityConfig, apply_heterogeneity
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


def test_bad_values_and_shared_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="heterogeneity=nois: expected one of"):
        HeterogeneityConfig("nois")
    with pytest.raises(ConfigError, match=r"heterogeneity\.strength=1\.5: expected a number >= 0 and <= 1"):
        HeterogeneityConfig("label_noise", 1.5)
    data = gaussian_data((5, 5))
    numbers = replace(data, y=data.y.float(), task=Regression())
    with pytest.raises(ConfigError, match=r"heterogeneity=label_noise: expected none or feature_shift, because"):
        apply_heterogeneity(numbers, HeterogeneityConfig("label_noise", 0.5), 0)
    shared = type(data)(data.x, data.y, [data.train[0]] * 2, data.validation, data.test, data.num_classes)
    with pytest.raises(DataError, match="belong to one client each"):
        apply_heterogeneity(shared, HeterogeneityConfig("label_noise", 0.5), 0)
