from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpers.cohort.plan import BatchPlan, plan_batches
from fedpers.errors import ConfigError


def samples(*sizes: int) -> list[np.ndarray]:
    """Clients that own 100, 101, ...; 200, 201, ...; and so on."""
    return [np.arange(size) + 100 * (k + 1) for k, size in enumerate(sizes)]


def rows(plan: BatchPlan) -> list[list[list[int]]]:
    """Real samples by step and row of the plan."""
    return [
        [plan.index[t, k, : plan.count[t, k]].tolist() for k in range(plan.count.shape[1])] for t in range(plan.steps)
    ]


def test_epochs_in_the_given_order() -> None:
    plan = plan_batches(samples(5, 3), batch_size=2, epochs=2)
    assert rows(plan) == [
        [[100, 101], [200, 201]],
        [[102, 103], [202]],
        [[104], [200, 201]],
        [[100, 101], [202]],
        [[102, 103], []],
        [[104], []],
    ]
    assert plan.active == [2, 2, 2, 2, 1, 1]
    assert plan.width == [2, 2, 2, 2, 2, 1]
    assert plan.ragged == [False, True, True, True, False, False]
    assert plan.client_steps.tolist() == [6, 4]
    assert plan.order is None


def test_steps_go_over_the_end_of_a_pass() -> None:
    plan = plan_batches(samples(3, 2), batch_size=2, steps=3)
    assert rows(plan) == [[[100, 101], [200, 201]], [[102], [200, 201]], [[100, 101], [200, 201]]]


def test_drop_last_and_a_client_smaller_than_a_batch() -> None:
    plan = plan_batches(samples(7, 2), batch_size=3, epochs=1, drop_last=True)
    assert rows(plan) == [[[100, 101, 102], [200, 201]], [[103, 104, 105], []]]


def test_batch_size_zero_takes_all_of_each_client() -> None:
    plan = plan_batches(samples(4, 1), batch_size=0, epochs=2)
    assert rows(plan) == [[[100, 101, 102, 103], [200]], [[100, 101, 102, 103], [200]]]


def test_padding_repeats_a_sample_of_the_same_batch() -> None:
    plan = plan_batches(samples(5, 3), batch_size=4, epochs=1)
    assert plan.index[0].tolist() == [[100, 101, 102, 103], [200, 201, 202, 200]]
    assert plan.index[1, 0].tolist() == [104] * 4
    assert plan.count.tolist() == [[4, 3], [1, 0]]


def test_rows_are_ordered_by_steps() -> None:
    plan = plan_batches(samples(4, 3, 2), batch_size=1, steps=[1, 0, 3])
    assert plan.order is not None
    assert plan.order.tolist() == [2, 0, 1]
    assert plan.client_steps.tolist() == [3, 1, 0]
    assert rows(plan) == [[[300], [100], []], [[301], [], []], [[300], [], []]]
    assert plan.active == [2, 1, 1]


def test_orders_are_drawn_by_position_in_the_cohort_and_pass() -> None:
    asked = []

    def draw(client: int, epoch: int) -> np.random.Generator:
        asked.append((client, epoch))
        return np.random.default_rng(10 * client + epoch)

    plan = plan_batches(samples(2, 3), batch_size=3, steps=[1, 2], draw=draw)
    assert sorted(asked) == [(0, 0), (1, 0), (1, 1)]
    expected = [(200 + np.random.default_rng(10 + epoch).permutation(3)).tolist() for epoch in (0, 1)]
    assert [step[0] for step in rows(plan)] == expected


def test_no_steps_at_all() -> None:
    plan = plan_batches(samples(3, 2), batch_size=2, epochs=0)
    assert plan.steps == 0
    assert plan.client_steps.tolist() == [0, 0]


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"epochs": 1, "steps": 1},
        {"epochs": -1},
        {"epochs": 1.5},
        {"epochs": [1, 1]},
        {"steps": [2, -1]},
        {"steps": [2, 3, 4]},
        {"steps": [[1], [2]]},
        {"steps": True},
        {"epochs": 1, "batch_size": -4},
    ],
)
def test_refuses(wanted: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^(epochs, steps|epochs|steps|batch_size)="):
        plan_batches(samples(3, 2), **{"batch_size": 2, **wanted})


sizes_of_clients = st.lists(st.integers(1, 23), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(sizes_of_clients, st.integers(0, 9), st.integers(0, 3), st.integers(0, 99))
def test_every_epoch_visits_each_sample_once(sizes: list[int], batch_size: int, epochs: int, seed: int) -> None:
    positions = samples(*sizes)
    plan = plan_batches(
        positions, batch_size=batch_size, epochs=epochs, draw=lambda k, e: np.random.default_rng([seed, k, e])
    )
    order = list(range(len(sizes))) if plan.order is None else plan.order.tolist()
    for row, client in enumerate(order):
        seen: list[int] = []
        passes = 0
        for t in range(plan.steps):
            seen += plan.index[t, row, : plan.count[t, row]].tolist()
            if len(seen) == len(positions[client]):
                assert sorted(seen) == positions[client].tolist()
                seen, passes = [], passes + 1
        assert not seen
        assert passes == epochs


@settings(max_examples=60, deadline=None)
@given(sizes_of_clients, st.integers(0, 9), st.data(), st.booleans())
def test_plans_are_prefixes_of_real_samples(
    sizes: list[int], batch_size: int, data: st.DataObject, drop_last: bool
) -> None:
    steps = data.draw(st.lists(st.integers(0, 7), min_size=len(sizes), max_size=len(sizes)))
    positions = samples(*sizes)
    plan = plan_batches(positions, batch_size=batch_size, steps=steps, drop_last=drop_last)
    order = list(range(len(sizes))) if plan.order is None else plan.order.tolist()
    assert plan.client_steps.tolist() == [steps[client] for client in order]
    for t in range(plan.steps):
        counts = plan.count[t]
        assert (counts[: plan.active[t]] > 0).all()
        assert (counts[plan.active[t] :] == 0).all()
        assert plan.width[t] == counts.max()
        assert plan.ragged[t] == (len(set(counts[: plan.active[t]].tolist())) > 1)
        for row in range(plan.active[t]):
            # Padding too is the client's own.
            assert set(plan.index[t, row].tolist()) <= set(positions[order[row]].tolist())
