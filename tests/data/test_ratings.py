"""Users and items: what is held out, what negatives are drawn from, and the trace of another code."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpers.data import (
    DatasetConfig,
    HeterogeneityConfig,
    PartitionConfig,
    RankingData,
    SplitConfig,
    apply_heterogeneity,
    load_federated,
)
from fedpers.data.ratings import leave_one_out
from fedpers.data.sets.rating_files import Ratings
from fedpers.errors import ConfigError, DataError
from fedpers.tasks import Ranking

TRACE = Path(__file__).parents[1] / "reference" / "fedrap" / "i_split.npz"


def ratings(rows: Sequence[Sequence[int]] | np.ndarray[Any, Any], time: bool = True) -> Ratings:
    """Rows of user, item, rating and time."""
    user, item, rating, times = np.asarray(rows, dtype=np.int64).T
    return Ratings(user, item, rating.astype(float), times if time else None, "made")


def divided(table: Ratings, seed: int = 0, unseen: int = 0, **values: Any) -> RankingData:
    config = DatasetConfig(
        "ratings", "made.csv", **{"min_interactions": 3, "eval_negatives": 2, "negatives": 1} | values
    )
    return leave_one_out(table, config, SplitConfig("leave_one_out", unseen=unseen), seed)


def tiny(**values: Any) -> RankingData:
    """Two users who like items 0..4 and 5..7 of 20; their held-out items are the last two."""
    rows = [(0, i, 1, i) for i in range(5)] + [(1, i, 1, i) for i in range(5, 8)]
    others = [(2, i, 1, i) for i in range(8, 20)]
    return divided(ratings(rows + others), **values)


def synthetic(seed: int = 0, unseen: int = 0, **values: Any) -> RankingData:
    config = DatasetConfig("synthetic_ratings", **values)
    data = load_federated(config, PartitionConfig("user"), SplitConfig("leave_one_out", unseen=unseen), seed)
    assert isinstance(data, RankingData)
    return data


# --- the trace ---


@pytest.fixture(scope="module")
def trace() -> dict[str, Any]:
    with np.load(TRACE, allow_pickle=False) as file:
        return dict(file)


def test_split_equals_the_trace(trace: dict[str, Any]) -> None:
    data = divided(ratings(trace["raw"]), min_interactions=10, eval_negatives=99, negatives=4, protocol="official")
    users, m = len(trace["split/test"]), data.num_items
    assert (data.num_clients, m) == (13, 135)
    assert np.array_equal([int(positions[0]) - m for positions in data.test], trace["split/test"][:, 1])
    assert np.array_equal([int(positions[0]) - m for positions in data.validation], trace["split/val"][:, 1])
    table, kept = trace["ratings"], trace["split/train"]
    times = {(u, i): t for u, i, _, t in table.tolist()}
    for user in range(users):
        items = kept[kept[:, 0] == user, 1].tolist()  # in the order of the file; ours is from the oldest
        ordered = sorted(range(len(items)), key=lambda row: (times[user, items[row]], -row))
        assert (data.train[user] - m).tolist() == [items[row] for row in ordered]


def test_negatives_follow_the_rules_of_the_trace(trace: dict[str, Any]) -> None:
    data = divided(ratings(trace["raw"]), min_interactions=10, eval_negatives=99, negatives=4, protocol="official")
    m = data.num_items
    for user in range(data.num_clients):
        allowed = trace[f"allowed_negatives/u{user}"]
        assert np.array_equal(np.setdiff1d(np.arange(m), data.excluded(user)), allowed)
        # Evaluation: the held-out item, then the same 99 for both parts.
        drawn = data.test[user][1:]
        assert np.array_equal(drawn, data.validation[user][1:])
        assert len(drawn) == len(drawn.unique()) == trace["eval_negatives"].shape[1]
        assert np.isin(drawn, allowed).all()
        # Training: each positive, then its negatives, as in the trace.
        items, labels = trace[f"train/draw0/u{user}/items"], trace[f"train/draw0/u{user}/ratings"]
        mine = data.samples(user, 0, 1)
        assert np.array_equal(data.y[mine], labels)
        assert sorted(data.x[mine][::5].tolist()) == sorted(items[::5].tolist())
        assert np.isin(mine.reshape(-1, 5)[:, 1:], allowed).all()


def test_clean_needs_more_items_than_the_trace_has(trace: dict[str, Any]) -> None:
    message = (
        r"made: user 163 has not touched 110 of 135 items, too few for dataset\.eval_negatives=99 each for validation "
        r"and test \(dataset\.protocol=clean\)\."
    )
    with pytest.raises(DataError, match=message):
        divided(ratings(trace["raw"]), min_interactions=10, eval_negatives=99)


# --- held-out items ---


def test_latest_by_hand() -> None:
    rows = [
        (7, 50, 5, 10),
        (9, 51, 1, 1),
        (7, 52, 5, 30),  # ties with the next: the first is later, so it is the test item
        (7, 53, 5, 30),
        (7, 54, 0, 99),  # not liked
        (7, 50, 5, 98),  # there before
        (9, 55, 1, 2),
        (7, 56, 5, 10),  # ties with 50 and comes later in the file, so it is older
        (9, 57, 1, 0),
        (8, 58, 1, 0),  # a user with two items is left out, and so are they
        (8, 59, 1, 0),
    ]
    data = divided(ratings(rows), eval_negatives=1)
    m = data.num_items
    assert m == 7  # 50 51 52 53 55 56 57
    assert [(positions - m).tolist() for positions in data.train] == [[5, 0], [6]]
    assert [int(positions[0]) - m for positions in data.validation] == [3, 1]
    assert [int(positions[0]) - m for positions in data.test] == [2, 4]


def test_without_times_the_item_that_appears_last_is_the_latest() -> None:
    rows = [(0, 5, 1, 0), (0, 4, 1, 0), (0, 3, 1, 0), (1, 6, 1, 0), (1, 3, 1, 0), (1, 5, 1, 0), (1, 7, 1, 0)]
    data = divided(ratings(rows, time=False), eval_negatives=1, protocol="official")
    items = [5, 4, 3, 6, 7]
    liked = [[items[int(i) - 5] for i in torch.cat([t, v[:1], e[:1]])] for t, v, e in _lists(data)]
    assert liked == [[5, 4, 3], [5, 3, 6, 7]]


def _lists(data: RankingData) -> Any:
    return zip(data.train, data.validation, data.test, strict=True)


def test_counts_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    rows = [(0, i, i, i) for i in range(6)] + [(0, 1, 1, 9), (1, 9, 1, 1)] + [(2, i, 1, i) for i in range(10, 16)]
    with caplog.at_level(logging.INFO):
        divided(ratings(rows))
    assert "made: 2 users, 11 items, 11 interactions; left out: 1 rows with a rating <= 0, 1 repeated" in caplog.text
    assert "1 users with fewer than 3 items" in caplog.text
    assert "made: 4 items are held out by a user and trained on by nobody." in caplog.text


def test_first_users_only() -> None:
    data = tiny(max_users=2, eval_negatives=1, protocol="official")
    assert data.num_clients == 2
    assert data.num_items == 8


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30), st.integers(0, 2), st.integers(0, 4)), max_size=120),
    protocol=st.sampled_from(["clean", "official"]),
    timed=st.booleans(),
)
def test_every_liked_item_has_one_place(rows: list[tuple[int, ...]], protocol: str, timed: bool) -> None:
    table = [(u, 100 * u + i, 1, 0) for u in (8, 9) for i in range(40)] + rows  # so that there are enough negatives
    data = divided(ratings(table, timed), protocol=protocol, eval_negatives=3, negatives=2)
    m = data.num_items
    names = list(dict.fromkeys(u for u, _, r, _ in table if r > 0))
    liked = [{i for v, i, r, _ in table if v == u and r > 0} for u in names]
    assert data.sizes().tolist() == [len(items) - 2 for items in liked if len(items) >= 3]
    assert m == len(set().union(*(items for items in liked if len(items) >= 3)))
    for user, (train, validation, test) in enumerate(_lists(data)):
        items = torch.cat([train, validation[:1], test[:1]]) - m
        assert len(items.unique()) == len(items)
        for part in (validation, test):
            assert part.shape == (4,)
            assert not np.isin(part[1:], items).any()
            assert len(part[1:].unique()) == 3
            assert int(part[1:].max()) < m
        same = validation[1:].tolist() == test[1:].tolist()
        disjoint = not np.isin(validation[1:], test[1:]).any()
        assert same if protocol == "official" else disjoint
        drawn = data.samples(user, 0, 0).reshape(-1, 3)
        assert np.array_equal(drawn[:, 0], train)
        assert not np.isin(drawn[:, 1:], (items if protocol == "official" else train - m)).any()
        assert (drawn[:, 1] != drawn[:, 2]).all()


# --- training negatives ---


def test_arrays() -> None:
    data = tiny()
    assert data.x.tolist() == [*range(20), *range(20)]
    assert data.y.tolist() == [0.0] * 20 + [1.0] * 20
    assert (data.x.dtype, data.y.dtype, data.num_classes) == (torch.int64, torch.float32, 1)
    assert (data.train[0] - 20).tolist() == [0, 1, 2]
    assert data.train[0].dtype == data.test[0].dtype == torch.int64
    assert data.sizes().tolist() == [3, 1, 10]
    assert data.label_counts().tolist() == [[3], [1], [10]]
    assert data.label_counts("test").tolist() == [[1], [1], [1]]


def test_draws_belong_to_seed_user_and_round() -> None:
    data = synthetic()
    first = data.samples(3, 0, 1)
    assert np.array_equal(first, data.samples(3, 0, 1))
    assert not np.array_equal(first, data.samples(3, 0, 2))
    assert not np.array_equal(first, data.samples(3, 1, 1))
    assert np.array_equal(first[::5], data.train[3])
    assert first.dtype == np.int64


@pytest.mark.parametrize("protocol", ["clean", "official", "symmetric"])
def test_negatives_are_uniform(protocol: str) -> None:
    data = tiny(protocol=protocol, negatives=3)
    drawn = np.concatenate([data.samples(0, 0, r).reshape(-1, 4)[:, 1:] for r in range(4000)])  # 3 positives
    counts = np.bincount(drawn.ravel(), minlength=20)
    candidates = torch.cat([data.validation[0], data.test[0]]) % 20
    out = {"clean": [0, 1, 2], "official": [0, 1, 2, 3, 4], "symmetric": [0, 1, 2, *candidates.tolist()]}[protocol]
    assert {3, 4} <= set(candidates.tolist())
    assert (counts[out] == 0).all()
    rest = np.delete(counts, out)
    expected = 36000 / len(rest)
    assert np.abs(rest - expected).max() < 5 * np.sqrt(expected)
    pairs = {frozenset(row) for row in drawn.tolist()}
    assert len(pairs) == len(rest) * (len(rest) - 1) * (len(rest) - 2) // 6  # every set of three comes up


def test_as_many_negatives_as_items_are_left() -> None:
    data = tiny(negatives=10)  # user 2 has 10 training positives of 20
    assert sorted(data.samples(2, 0, 0)[1:11].tolist()) == sorted(set(range(20)) - set((data.train[2] - 20).tolist()))
    with pytest.raises(
        DataError, match=r"made: for user 2 only 10 of 20 items can be training negatives, fewer than data"
    ):
        tiny(negatives=11)


# --- protocols ---


def test_what_a_run_reads() -> None:
    clean, official = tiny(top_k=5), tiny(protocol="official")
    assert (clean.task, official.task) == (Ranking(5), Ranking(10, "official"))
    assert clean.num_items == 20
    assert clean.restrict([0]).task == clean.task


def test_checksum_and_device() -> None:
    same = [tiny(), tiny(), tiny().to("cpu")]
    assert len({data.checksum for data in same}) == 1
    assert isinstance(same[2], RankingData)
    others = [tiny(negatives=2), tiny(protocol="official"), tiny(seed=1), tiny(unseen=1)]
    assert len({data.checksum for data in [*same, *others]}) == 5


def test_unseen_users() -> None:
    data = synthetic(unseen=7)
    assert len(data.unseen) == 7
    assert data.unseen != synthetic(1, unseen=7).unseen


def test_own_seed_of_the_partition() -> None:
    config, split = DatasetConfig("synthetic_ratings"), SplitConfig("leave_one_out")
    sums = {load_federated(config, PartitionConfig("user", seed=4), split, seed).checksum for seed in range(3)}
    assert sums == {synthetic(4).checksum}


# --- errors ---


def test_nobody_has_enough() -> None:
    with pytest.raises(DataError, match=r"made: none of 2 users has dataset\.min_interactions=3 different items\."):
        divided(ratings([(0, 1, 1, 0), (0, 2, 1, 0), (1, 1, 1, 0), (1, 1, 1, 0), (1, 1, 1, 0)]))
    with pytest.raises(DataError, match=r"made: none of 0 users has"):
        divided(ratings([(0, 1, 0, 0)]))


def test_too_few_items_to_rank_among() -> None:
    with pytest.raises(
        DataError, match=r"user 2 has not touched 8 of 20 items, too few for dataset\.eval_negatives=9 for v"
    ):
        tiny(protocol="official", eval_negatives=9)


def test_wrong_arrays() -> None:
    with pytest.raises(DataError, match=r"data: x has 4 entries, expected 2 for each of 3 items"):
        RankingData(
            torch.arange(4), torch.zeros(4), *([[torch.tensor([0])]] * 3), num_classes=1, num_items=3, negatives=0
        )
    with pytest.raises(
        ConfigError, match=r"dataset\.protocol=offical: expected one of clean, official, symmetric \(did you mean"
    ):
        RankingData.of_items(9, *([[np.array([0])]] * 3), protocol="offical")


def test_no_heterogeneity() -> None:
    data = tiny()
    assert apply_heterogeneity(data, HeterogeneityConfig(), 0) is data
    with pytest.raises(ConfigError, match=r"heterogeneity=label_noise: expected none, because made holds ratings\."):
        apply_heterogeneity(data, HeterogeneityConfig("label_noise", 0.5), 0)


# --- the built-in set ---


def test_synthetic_ratings_reward_learning() -> None:
    data = synthetic()
    assert (data.num_clients, data.num_items) == (200, 300)
    assert int(data.sizes().min()) >= 18
    assert synthetic().checksum == data.checksum
    assert synthetic(seed=1).train[0].tolist() == data.train[0].tolist()  # the run's seed leaves tastes alone
    liked = np.zeros((200, 300))
    for user, positions in enumerate(data.train):
        liked[user, positions - 300] = 1
    left, size, right = np.linalg.svd(liked, full_matrices=False)
    popularity = np.tile(liked.sum(0), (200, 1))
    learned = left[:, :16] * size[:16] @ right[:16]
    assert _hit_rate(data, learned) > _hit_rate(data, popularity) + 0.2 > 0.4


def _hit_rate(data: RankingData, scores: np.ndarray[Any, Any]) -> float:
    ranked = [scores[user][data.x[positions]] for user, positions in enumerate(data.test)]
    return float(np.mean([(candidates[1:] >= candidates[0]).sum() < 10 for candidates in ranked]))


def test_synthetic_sizes() -> None:
    config = DatasetConfig("synthetic_ratings", num_users=30, num_items=60, eval_negatives=10, seed=3)
    data = load_federated(config, PartitionConfig("user"), SplitConfig("leave_one_out"), 0)
    assert data.num_clients == 30
    assert int(data.sizes().max()) <= 28
