"""Clients that differ beyond the samples they own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedpers.data import FederatedData, HeterogeneityConfig, apply_heterogeneity
from fedpers.data.federated import PARTS
from fedpers.errors import ConfigError, DataError
from fedpers.settings.base import choice_options, choices
from fedpers.settings.heterogeneity import SHIFTS, Drift, LabelGroups, LabelNoise, Noise, PermutedPixels, Rotation
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
        positions = torch.cat([data.part(part)[client] for part in PARTS])
        before, after = data.x[positions].flatten(), shifted.x[positions].flatten()
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
    shares = [float((noisy.y[positions] != data.y[positions]).float().mean()) for positions in data.train]
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


def pictures(clients: int = 8, side: int = 6, channels: int = 3) -> FederatedData:
    data = gaussian_data([6] * clients, classes=4)
    x = torch.randn(len(data.x), channels, side, side, generator=torch.Generator().manual_seed(0))
    return replace(data, x=x)


BY_NAME = sorted(set(choices(HeterogeneityConfig)) - {"none"})


@pytest.mark.parametrize("name", BY_NAME)
def test_every_shift_is_drawn_from_the_seed_and_changes_what_it_says(name: str) -> None:
    data = pictures()
    values = choice_options(HeterogeneityConfig, name)
    config = HeterogeneityConfig(name, **{n: values[n].default for n in ("strength", "groups") if n in values})
    first, again, other = (apply_heterogeneity(data, config, seed) for seed in (1, 1, 2))
    assert first.checksum == again.checksum != data.checksum
    assert first.checksum != other.checksum
    assert torch.equal(first.x, data.x) == (name in ("label_groups", "label_noise"))
    assert torch.equal(first.y, data.y) == (name not in ("label_groups", "label_noise"))
    assert bool(first.x.isfinite().all())
    assert bool(first.groups) == (name in ("label_groups", "rotation", "permuted_pixels"))
    if name in SHIFTS and name not in ("label_groups", "rotation", "permuted_pixels"):
        nothing: dict[str, Any] = {name: SHIFTS[name](strength=0.0)}  # type: ignore[call-arg]
        assert apply_heterogeneity(data, HeterogeneityConfig(**nothing), 1) is data


def test_shifts_compose_and_test_labels_are_what_the_client_means() -> None:
    data = pictures()
    config = HeterogeneityConfig(
        rotation=Rotation(2, 180.0), label_groups=LabelGroups(4), label_noise=LabelNoise(1.0, "pair"), noise=Noise(0.1)
    )
    shifted = apply_heterogeneity(data, config, 3)
    turned = apply_heterogeneity(data, HeterogeneityConfig(rotation=Rotation(2, 180.0)), 3)
    named = apply_heterogeneity(turned, HeterogeneityConfig("label_groups", groups=4), 3)
    noisy = apply_heterogeneity(turned, HeterogeneityConfig(noise=Noise(0.1)), 3)
    torch.testing.assert_close(shifted.x, noisy.x)
    for part in ("validation", "test"):
        for positions in shifted.part(part):  # type: ignore[arg-type]
            assert torch.equal(shifted.y[positions], named.y[positions])
    wrong = torch.cat([(shifted.y[p] - named.y[p]) % 4 for p in shifted.train])
    assert set(wrong.tolist()) == {0, 1}  # a pair: the next class
    assert shifted.groups == named.groups
    assert len(set(shifted.groups)) > 4  # who is turned does not follow from who names the classes how


def test_pictures_are_turned_by_any_angle() -> None:
    data = pictures(6, side=9, channels=1)
    spot = torch.zeros(len(data.x), 1, 9, 9)
    spot[:, :, 4, 7] = 1.0  # to the right of the middle
    turned = apply_heterogeneity(replace(data, x=spot), HeterogeneityConfig(rotation=Rotation(3, 45.0)), 0)
    for client, group in enumerate(turned.groups):
        picture = turned.x[data.train[client][0], 0]
        row, column = divmod(int(picture.argmax()), 9)
        expected = {0: (4, 7), 1: (2, 6), 2: (1, 4)}[group]  # counterclockwise, as torch.rot90
        assert (row, column) == expected


def test_a_permutation_of_pixels_is_one_for_each_group() -> None:
    data = pictures()
    permuted = apply_heterogeneity(data, HeterogeneityConfig("permuted_pixels", groups=2), 0)
    for client, group in enumerate(permuted.groups):
        positions = data.train[client]
        before, after = data.x[positions].flatten(1), permuted.x[positions].flatten(1)
        assert torch.equal(before.sort(1).values, after.sort(1).values)
        assert torch.equal(before, after) == (group == 0)


def test_one_channel_is_always_left() -> None:
    reduced = apply_heterogeneity(pictures(), HeterogeneityConfig("missing_channels", strength=1.0), 0)
    for positions in reduced.train:
        left = (reduced.x[positions].abs().sum((0, 2, 3)) > 0).tolist()
        assert sum(left) == 1


@pytest.mark.parametrize("name", ["rotation", "blur", "colour", "missing_channels"])
def test_shifts_of_pictures_need_pictures(name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"heterogeneity={name}: expected another, because samples of .* shape \[6\]"
    ):
        apply_heterogeneity(gaussian_data([6] * 4), HeterogeneityConfig(name, strength=0.5, groups=4), 0)


def test_more_groups_than_clients_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"heterogeneity\.groups=3: expected at most 2, the number of clients"):
        grouped(gaussian_data((5, 5)), "label_groups", 3)
    for name, kind in (("label_groups", LabelGroups), ("rotation", Rotation), ("permuted_pixels", PermutedPixels)):
        nested: dict[str, Any] = {name: kind(groups=9)}
        with pytest.raises(ConfigError, match=rf"^heterogeneity\.{name}\.groups=9: expected at most 8, the number of"):
            apply_heterogeneity(pictures(), HeterogeneityConfig(**nested), 0)
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
    numbers = replace(data, y=data.y.float(), num_classes=1, task=Regression())
    with pytest.raises(ConfigError, match=r"heterogeneity=label_noise: expected a shift of features"):
        apply_heterogeneity(numbers, HeterogeneityConfig("label_noise", 0.5), 0)
    shared = type(data)(data.x, data.y, [data.train[0]] * 2, data.validation, data.test, data.num_classes)
    with pytest.raises(DataError, match="belong to one client each"):
        apply_heterogeneity(shared, HeterogeneityConfig("label_noise", 0.5), 0)


def drifting(share: float = 1.0) -> tuple[FederatedData, FederatedData]:
    """Data whose clients name classes by groups, without a drift and with one from round 5 on."""
    data = gaussian_data([20] * 8)
    config = HeterogeneityConfig("label_groups", groups=4, drift=Drift(5, share))
    return grouped(data, "label_groups"), apply_heterogeneity(data, config, 0)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_drift_moves_clients_to_the_next_group_at_its_round(share: float) -> None:
    before, data = drifting(share)
    moved = 0
    for client in range(data.num_clients):
        partner = (before.groups[client] + 1) % 4
        example = before.groups.index(partner)
        for part in PARTS:
            early, late = (data.positions(part, client, round) for round in (4, 5))
            assert torch.equal(early, before.part(part)[client])
            assert torch.equal(data.y[early], before.y[early])
            assert torch.equal(data.x[early], data.x[late])
        labels = raw().y
        names, others = (
            dict(zip(labels[positions].tolist(), before.y[positions].tolist(), strict=True))
            for positions in (all_of(before, client), all_of(before, example))
        )
        late = torch.cat([data.positions(part, client, 5) for part in PARTS])
        is_now = dict(zip(labels[all_of(before, client)].tolist(), data.y[late].tolist(), strict=True))
        if is_now != names:
            moved += 1
            assert all(is_now[label] == others[label] for label in is_now.keys() & others.keys())
        assert data.drifted_groups[client] == (partner if is_now != names else before.groups[client])
    assert moved == round(share * 8)


def raw() -> FederatedData:
    return gaussian_data([20] * 8)


def all_of(data: FederatedData, client: int) -> torch.Tensor:
    return torch.cat([data.part(part)[client] for part in PARTS])


def test_a_drift_stays_where_data_are_restricted_and_changes_the_checksum() -> None:
    before, data = drifting()
    part = data.restrict([2, 5])
    for client in (2, 5):
        for round in (1, 9):
            expected, actual = (d.y[d.positions("train", client, round)] for d in (data, part))
            assert torch.equal(expected, actual)
            assert data.samples(client, 0, round).tolist() == data.positions("train", client, round).tolist()
    assert len(part.x) == 2 * sum(len(all_of(data, client)) for client in (2, 5))
    other = replace(data, drift_round=6)
    assert len({before.checksum, data.checksum, other.checksum}) == 3


def test_groups_of_two_reasons_have_the_same_numbers_after_a_drift() -> None:
    data = gaussian_data([20] * 6)
    config = HeterogeneityConfig(permuted_pixels=PermutedPixels(2), label_groups=LabelGroups(4))
    before = apply_heterogeneity(data, config, 0)
    drifted = apply_heterogeneity(data, replace(config, drift=Drift(5, 1.0)), 0)
    samples = [torch.cat([data.part(part)[client] for part in PARTS]) for client in range(6)]

    def treatment(of: FederatedData, client: int, round: int) -> tuple[list[int], dict[int, int]]:
        positions = torch.cat([of.positions(part, client, round) for part in PARTS])
        order = [int((data.x[samples[client][0]] == value).nonzero()) for value in of.x[positions[0]]]
        names = dict(zip(data.y[samples[client]].tolist(), of.y[positions].tolist(), strict=True))
        return order, names

    first = {drifted.groups[client]: treatment(drifted, client, 4) for client in range(6)}
    later = {drifted.drifted_groups[client]: treatment(drifted, client, 5) for client in range(6)}
    common = first.keys() & later.keys()
    assert common
    for group in common:
        (order, names), (order_later, names_later) = first[group], later[group]
        assert order == order_later
        assert all(names[label] == names_later[label] for label in names.keys() & names_later.keys())
    assert {*drifted.groups, *drifted.drifted_groups} == set(range(len({*drifted.groups, *drifted.drifted_groups})))
    same = [[a == b for b in groups] for groups in (before.groups, drifted.groups) for a in groups]
    assert same[:6] == same[6:]


def test_a_drift_needs_a_round_and_something_to_move() -> None:
    with pytest.raises(ConfigError, match=r"heterogeneity\.drift\.round=None: expected a round >= 1"):
        Drift()
    with pytest.raises(ConfigError, match=r"heterogeneity\.drift\.round=3: expected null unless a shift is chosen"):
        apply_heterogeneity(gaussian_data(), HeterogeneityConfig(drift=Drift(3)), 0)
    with pytest.raises(ConfigError, match=r"heterogeneity\.drift\.share=1\.5"):
        Drift(3, 1.5)


@pytest.mark.parametrize("name", ["blur", "rotation"])
def test_series_are_no_pictures(name: str) -> None:
    data = gaussian_data([20] * 4)
    series = replace(data, x=torch.randn(len(data.x), 3, 32))
    with pytest.raises(ConfigError, match=f"heterogeneity={name}: expected another, because samples"):
        apply_heterogeneity(series, HeterogeneityConfig(name, strength=1.0 if name == "blur" else 0.0), 0)
