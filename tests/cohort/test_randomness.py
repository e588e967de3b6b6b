from __future__ import annotations

import numpy as np
import pytest

from fedpers.randomness import derive, generator, sample_clients
from tests.cohort.helpers import make_cohort
from tests.problems import SmallNetwork, gaussian_data


def test_derive_is_the_same_on_every_machine_and_in_every_version() -> None:
    assert derive(0, "batches", 3, 1) == PINNED
    assert derive(np.int64(0), "batches", np.int64(3), 1) == PINNED  # type: ignore[arg-type]


PINNED = 3857532704859168239


def test_dropout_of_another_purpose_is_another_draw() -> None:
    data = gaussian_data((8, 6))
    cohort = make_cohort(SmallNetwork(dropout=0.5), data)
    keys = {purpose: cohort._keys(cohort.plan(epochs=1, purpose=purpose)) for purpose in ("batches", "finetune")}
    assert keys["batches"] is not None
    assert keys["finetune"] is not None
    assert keys["batches"].tolist() == [derive(cohort.seed, "dropout", client, 1) for client in (0, 1)]
    assert not set(keys["batches"].tolist()) & set(keys["finetune"].tolist())


def test_derive_tells_all_its_arguments_apart() -> None:
    seen = {
        derive(seed, purpose, client, round)
        for seed in range(5)
        for purpose in ("batches", "dropout")
        for client in range(20)
        for round in range(20)
    }
    assert len(seen) == 5 * 2 * 20 * 20
    assert all(0 <= value < 2**63 for value in seen)
    assert derive(0, "a", 1, 23) != derive(0, "a", 12, 3)
    assert derive(0, "a") != derive(0, "a", 0)


def test_generators_start_anew() -> None:
    assert generator(1, "x", 2).integers(10**9) == generator(1, "x", 2).integers(10**9)
    assert generator(1, "x", 2).integers(10**9) != generator(1, "x", 3).integers(10**9)


@pytest.mark.parametrize(
    ("clients", "fraction", "size"),
    [(10, 0.3, 3), (10, 0.25, 3), (10, 0.04, 1), (10, 0.001, 1), (10, 0.99, 10), (10, 1.0, 10), (1, 0.5, 1)],
)
def test_sample_sizes(clients: int, fraction: float, size: int) -> None:
    drawn = sample_clients(3, 1, clients, fraction)
    assert len(drawn) == size
    assert drawn == sorted(set(drawn))
    assert set(drawn) <= set(range(clients))


def test_sampling_depends_on_seed_and_round_alone_and_reaches_everyone() -> None:
    rounds = [sample_clients(3, r, 20, 0.25) for r in range(60)]
    assert rounds == [sample_clients(3, r, 20, 0.25) for r in range(60)]
    assert rounds != [sample_clients(4, r, 20, 0.25) for r in range(60)]
    assert len({tuple(drawn) for drawn in rounds}) > 50
    counts = np.bincount(np.concatenate(rounds), minlength=20)
    assert counts.min() > 3
    assert counts.max() < 32
