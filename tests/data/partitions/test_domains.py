"""Clients with samples of one domain."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpers.data import Dataset, DatasetConfig, SplitConfig, load_federated
from fedpers.data.partitions import divide
from fedpers.errors import ConfigError, DataError
from tests.data.partitions.helpers import made, numbers, plain, settings_of

STYLES = np.repeat([0, 1, 2], [120, 60, 90])
PICTURES = made(np.arange(270) % 3, domain=STYLES, domain_names=("photo", "sketch", "clipart"))


def test_a_client_for_each_domain() -> None:
    division = divide(PICTURES, settings_of("domains"), 0)
    assert plain(division.owned) == [list(range(120)), list(range(120, 180)), list(range(180, 270))]
    assert division.groups == (0, 1, 2)
    assert division.names == ("photo", "sketch", "clipart")


def test_domains_are_dealt_in_turn() -> None:
    division = divide(PICTURES, settings_of("domains", 7), 0)
    assert division.groups == (0, 1, 2, 0, 1, 2, 0)
    assert [len(positions) for positions in division.owned] == [40, 30, 45, 40, 30, 45, 40]
    assert all(set(STYLES[mine]) == {group} for mine, group in zip(division.owned, division.groups, strict=True))
    assert division.names[3:] == ("photo 1", "sketch 1", "clipart 1", "photo 2")
    assert sorted(np.concatenate(division.owned).tolist()) == list(range(270))


def test_classes_of_a_domain_by_dirichlet() -> None:
    def largest_share(**values: Any) -> float:
        division = divide(PICTURES, settings_of("domains", 6, **values), 0)
        assert sorted(np.concatenate(division.owned).tolist()) == list(range(270))
        assert all(set(STYLES[mine]) == {group} for mine, group in zip(division.owned, division.groups, strict=True))
        table = [np.bincount(PICTURES.y[mine], minlength=3) for mine in division.owned]
        return float(np.mean([row.max() / row.sum() for row in table]))

    assert largest_share(within="dirichlet", alpha=0.2) > 0.55 > largest_share()


@settings(max_examples=60, deadline=None)
@given(
    domains=st.integers(1, 5),
    further=st.integers(0, 6),
    samples=st.integers(30, 150),
    seed=st.integers(0, 1000),
    gaps=st.booleans(),
)
def test_nobody_has_two_domains(domains: int, further: int, samples: int, seed: int, gaps: bool) -> None:
    domain = np.random.default_rng(seed).integers(0, domains, samples) * (2 if gaps else 1)
    present = np.unique(domain)
    data = made(np.arange(samples) % 2, domain=domain)
    clients = len(present) + further
    try:
        division = divide(data, settings_of("domains", clients, min_samples=2), seed)
    except DataError:
        dealt = {number: len(range(k, clients, len(present))) for k, number in enumerate(present)}
        assert any((domain == number).sum() < 2 * count for number, count in dealt.items())
        return
    assert len(division.owned) == len(division.groups) == clients
    assert [int(present[k % len(present)]) for k in range(clients)] == list(division.groups)
    assert sorted(np.concatenate(division.owned).tolist()) == list(range(samples))
    for group, mine in zip(division.groups, division.owned, strict=True):
        assert set(domain[mine]) == {group}
        sizes = [len(other) for k, other in enumerate(division.owned) if division.groups[k] == group]
        assert max(sizes) - min(sizes) <= 1


def test_domains_that_cannot_be() -> None:
    with pytest.raises(
        ConfigError, match=r"partition=domains: expected another partition, because made has no domains\."
    ):
        divide(made([0] * 90), settings_of("domains"), 0)
    message = r"partition\.num_clients=2: expected at least 3, the domains of made, or null for a client each\."
    with pytest.raises(ConfigError, match=message):
        divide(PICTURES, settings_of("domains", 2), 0)
    message = (
        r"domain sketch of made has 60 samples, too few for 2 of 6 clients with at least 40 each; lower partition\.nu"
    )
    with pytest.raises(DataError, match=message):
        divide(PICTURES, settings_of("domains", 6, min_samples=40), 0)
    with pytest.raises(
        ConfigError, match=r"partition=domains: expected another partition, because digits has no domains"
    ):
        load_federated(DatasetConfig(), settings_of("domains"), SplitConfig(), 0)


def test_domains_of_a_regression() -> None:
    data = numbers(np.arange(60), domain=torch.arange(60) % 2)
    assert divide(data, settings_of("domains"), 0).groups == (0, 1)
    with pytest.raises(
        ConfigError, match=r"partition\.within=dirichlet: expected iid, because made has no class labels"
    ):
        divide(data, settings_of("domains", within="dirichlet"), 0)


@pytest.mark.parametrize("split", ["fractions", "official"])
def test_clients_are_tested_on_their_own_domain(split: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    data = Dataset(
        torch.arange(400.0).unsqueeze(1),
        torch.from_numpy(rng.integers(0, 4, 400)),
        4,
        "made",
        train_size=300,
        domain=torch.from_numpy(rng.integers(0, 3, 400)),
    )
    monkeypatch.setattr("fedpers.data.load.load_dataset", lambda config: data)
    federated = load_federated(DatasetConfig(), settings_of("domains", 6), SplitConfig(split), 0)
    assert federated.groups == (0, 1, 2, 0, 1, 2)
    assert data.domain is not None
    for part in ("train", "validation", "test"):
        for client, positions in enumerate(federated.part(part)):
            assert set(data.domain[positions].tolist()) == {federated.groups[client]}
    if split == "official":
        assert sorted(torch.cat(list(federated.test)).tolist()) == list(range(300, 400))
