"""Visited rows of tables against whole tables, and what is checked of what came over a wire."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedpers.cohort import Cohort, Training, entries, tree
from fedpers.cohort.sparse_rows import RowMean, VisitedRows, dense, packed, sparse, with_rows
from fedpers.strategies import make_strategy
from tests.problems import plain_ranking, ranking_data

ITEMS, DIM, SEED = 40, 5, 0


def cohort_of(clients: Sequence[int], sizes: tuple[int, ...] = (9, 4, 12, 6), **training: Any) -> Cohort:
    """Users in descending order of their samples, in round 1."""
    problem = plain_ranking(torch.float64)
    _, update = make_strategy("fedmf", training=Training(**training))
    app = update.client_app(problem.network, ranking_data(sizes), seed=SEED)
    return app.cohort(clients, app.initial_state.expand(len(clients)).clone(), {"server-round": 1})


def items_of(cohort: Cohort, client: int) -> np.ndarray:
    return np.unique(cohort.data.samples(client, SEED, 1) % ITEMS)


# ------------------------------------------------------------------ rows of a round


def test_rows_are_the_items_of_a_round() -> None:
    cohort = cohort_of([2, 0, 3, 1])
    visited = VisitedRows(cohort)
    for k, client in enumerate(cohort.clients):
        expected = items_of(cohort, client)
        assert visited.rows[k, : len(expected)].tolist() == expected.tolist()
        assert visited.rows[k, len(expected) :].tolist() == [ITEMS] * (visited.rows.shape[1] - len(expected))
    assert VisitedRows(cohort, everything=True).rows.tolist() == [list(range(ITEMS))] * 4


def test_gathered_rows_are_put_back_and_the_others_shrink() -> None:
    cohort = cohort_of([2, 0, 3, 1])
    visited = VisitedRows(cohort)
    common, each = torch.randn(ITEMS, DIM), torch.randn(4, ITEMS, DIM)
    factor = torch.tensor([0.9, 1.0, 0.5, 0.1])
    of_common, rows = visited.gather(common), visited.gather(each)
    after = visited.put(each.clone(), rows + 1, factor)
    for k, client in enumerate(cohort.clients):
        items = items_of(cohort, client)
        assert torch.equal(of_common[k, : len(items)], common[items])
        assert torch.equal(rows[k, : len(items)], each[k, items])
        whole = factor[k] * each[k]
        whole[items] = each[k, items] + 1
        assert torch.equal(after[k], whole)


@pytest.mark.parametrize("batch_size", [0, 7, 16, 100])
def test_counts_are_those_of_each_batch(batch_size: int) -> None:
    cohort = cohort_of([2, 0, 3, 1], batch_size=batch_size, epochs=2)
    visited = VisitedRows(cohort)
    assert visited.whole == (batch_size in (0, 100))
    assert visited.training.shuffle == (not visited.whole)
    for step, _ in cohort.walk({}, training=visited.training):
        positives, samples = visited.counts(step)
        for place in range(step.active):
            size = int(step.count[place])
            x, y = step.x[place, :size], step.y[place, :size]
            for counts, ids in ((samples, x), (positives, x[y > 0])):
                known = torch.bincount(ids, minlength=ITEMS)
                rows = visited.rows[place]
                assert counts[place][rows < ITEMS].tolist() == known[rows[rows < ITEMS]].tolist()
                assert float(counts[place].sum()) == len(ids)
    assert cohort.steps_taken.tolist() == [2 * n for n in visited.batches]


def test_counts_of_clients_that_are_left() -> None:
    cohort = cohort_of([2, 0, 3, 1], batch_size=0)
    visited = VisitedRows(cohort)
    ((first, _),) = cohort.walk({}, steps=[1, 1, 1, 1], training=visited.training)
    ((later, _),) = cohort.walk({}, steps=[0, 1, 0, 1], training=visited.training)
    for all_of_them, some in zip(visited.counts(first), visited.counts(later), strict=True):
        assert torch.equal(all_of_them[[1, 3]], some)


def test_users_with_one_batch_each_leave_out_others_in_every_pass() -> None:
    cohort = cohort_of([1, 2, 0], (4, 6, 5), batch_size=16, drop_last=True)  # one whole batch of 16 and a tail
    visited = VisitedRows(cohort)
    assert visited.batches == [1, 1, 1]
    assert not visited.whole
    walks = [cohort.walk({}, steps=visited.batches, training=visited.training) for _ in range(6)]
    samples = torch.stack([visited.counts(step)[1] for walk in walks for step, _ in walk])
    assert bool((samples.sum(-1) == 16).all())
    for user in range(3):
        assert len({tuple(row.tolist()) for row in samples[:, user]}) > 1


# ------------------------------------------------------------------ on the way


def sent(rows: Sequence[int], values: Tensor, factor: float) -> dict[str, Tensor]:
    return {"rows": torch.tensor(rows).int(), "values": values, "factor": torch.tensor(factor, dtype=values.dtype)}


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(0, 4))
@settings(max_examples=25, deadline=None)
def test_the_mean_of_rows_is_the_mean_of_tables(seed: int, users: int, cut: int) -> None:
    rng = np.random.default_rng(seed)
    table = torch.from_numpy(rng.normal(size=(6, 2)))
    folds, tables, weights = (RowMean("items", table), RowMean("items", table)), [], []
    for user in range(users):
        rows = np.sort(rng.choice(6, rng.integers(0, 7), replace=False)).tolist()
        message = sent(rows, torch.from_numpy(rng.normal(size=(len(rows), 2))), rng.uniform(0.5, 1))
        tables.append(with_rows(table, message))
        weights.append(float(rng.integers(1, 9)))
        folds[user >= cut].add(folds[0].decode({"arrays": tree(message)}, user), weights[-1], user)
    part = pickle.loads(pickle.dumps(folds[1].partial()))
    assert part.table is None
    folds[0].merge(part)
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    mean = torch.tensordot(shares, torch.stack(tables), dims=1)
    assert torch.allclose(entries(folds[0].result()["arrays"])["items"], mean, rtol=1e-12)


def test_a_table_with_rows_is_the_table_of_a_client() -> None:
    table = torch.randn(4, 2)
    changed = with_rows(table, sent([1, 3], torch.ones(2, 2), 0.5))
    assert torch.equal(changed, torch.stack([table[0] * 0.5, torch.ones(2), table[2] * 0.5, torch.ones(2)]))


def test_nothing_that_was_added_has_no_mean() -> None:
    assert RowMean("items", torch.zeros(4, 2)).result() == {}


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_messages_hold_the_visited_rows_alone(threshold: float) -> None:
    cohort = cohort_of([2, 0, 3, 1])
    visited = VisitedRows(cohort)
    table = torch.randn(ITEMS, DIM)
    message = visited.message(visited.gather(table), torch.tensor([0.9, 1.0, 0.5, 0.1]))
    fold = RowMean("items", table)
    for k, client in enumerate(cohort.clients):
        items = items_of(cohort, client)
        wire = entries(packed(entries(message[k]), threshold))
        assert ("indices" in wire) == bool(threshold)
        read = entries(fold.decode({"arrays": tree(wire)}, client)["arrays"])
        assert read["rows"].tolist() == items.tolist()
        assert torch.equal(read["values"], table[items] * (table[items].abs() > threshold))
        assert float(read["factor"]) == float(message["factor"][k])


@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.integers(0, 4), st.floats(0, 2))
@settings(max_examples=25, deadline=None)
def test_what_was_left_out_is_zero(seed: int, rows: int, width: int, threshold: float) -> None:
    table = torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, width)))
    assert torch.equal(dense(sparse(table, threshold)), table * (table.abs() > threshold))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rows": torch.tensor([1, 4])}, r"'rows' name items outside 0\.\.3"),
        ({"rows": torch.tensor([-1, 2])}, r"'rows' name items outside 0\.\.3"),
        ({"rows": torch.tensor([2, 1])}, "'rows' do not ascend"),
        ({"rows": torch.tensor([2, 2])}, "'rows' do not ascend"),
        ({"shape": torch.tensor([1, 4])}, r"'values' has shape \[1, 4\], expected \[2, 2\]"),
        ({"shape": torch.tensor([-2, -2])}, r"'values' has shape \[-2, -2\], expected \[2, 2\]"),
        ({"shape": torch.tensor([2**40, 2])}, r"'values' has shape \[1099511627776, 2\], expected \[2, 2\]"),
        ({"indices": torch.tensor([0, 4])}, "'indices' lie outside of the table"),
        ({"indices": torch.tensor([-1, 2])}, "'indices' lie outside of the table"),
        ({"indices": torch.tensor([1])}, "there are 1 'indices' for 2 values"),
    ],
)
def test_what_is_no_part_of_a_table_is_refused(change: dict[str, Tensor], sentence: str) -> None:
    message = sent([1, 2], torch.ones(2), 1.0)
    message |= {"indices": torch.tensor([0, 3]), "shape": torch.tensor([2, 2]), **change}
    with pytest.raises(ValueError, match=sentence):
        RowMean("items", torch.zeros(4, 2)).decode({"arrays": tree(message)}, 0)
