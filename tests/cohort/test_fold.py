from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpers.cohort import GroupedMean, Tree, WeightedMean, tree


def records(value: float, count: int = 0, extra: float | None = None) -> dict[str, Tree]:
    arrays = {"w": torch.tensor([value, -2 * value]), "n": torch.tensor(count)}
    if extra is not None:
        arrays["extra"] = torch.tensor([extra])
    return {"arrays": tree(arrays), "control": tree({"w": torch.tensor(10 * value)})}


def folded(replies: list[tuple[dict[str, Tree], float]]) -> WeightedMean:
    fold = WeightedMean()
    for reply, weight in replies:
        fold.add(reply, weight)
    return fold


def test_weighted_mean_by_hand() -> None:
    out = folded([(records(1.0, 3), 1.0), (records(4.0, 4), 3.0)]).result()
    assert out["arrays"]["w"].tolist() == [3.25, -6.5]
    assert out["control"]["w"].item() == 32.5
    assert out["arrays"]["w"].dtype == torch.float32
    assert out["arrays"]["n"].item() == 4  # (3 + 3 * 4) / 4 = 3.75
    assert out["arrays"]["n"].dtype == torch.int64


def test_one_client_comes_back_exactly() -> None:
    reply = records(0.1, 7)
    out = folded([(reply, 0.3)]).result()
    assert torch.equal(out["arrays"]["w"], reply["arrays"]["w"])
    assert out["arrays"]["n"].item() == 7


def test_what_only_some_send_is_averaged_over_those() -> None:
    out = folded([(records(1.0, extra=5.0), 1.0), (records(2.0), 9.0), (records(3.0, extra=1.0), 3.0)]).result()
    assert out["arrays"]["extra"].item() == 2.0


def test_adding_does_not_change_replies_and_merging_not_the_other() -> None:
    reply = records(1.0)
    fold, other = folded([(reply, 2.0)]), folded([(records(5.0, extra=1.0), 1.0)])
    fold.merge(other)
    fold.add(records(7.0, extra=9.0), 1.0)
    assert reply["arrays"]["w"].tolist() == [1.0, -2.0]
    assert other.result()["arrays"]["w"].tolist() == [5.0, -10.0]
    assert other.result()["arrays"]["extra"].item() == 1.0


def test_many_small_values_are_summed_in_double_precision() -> None:
    fold = WeightedMean()
    fold.add({"arrays": tree({"w": torch.tensor(2.0**25)})}, 1.0)
    for _ in range(64):
        fold.add({"arrays": tree({"w": torch.tensor(1.0)})}, 1.0)  # lost one by one in single precision
    assert fold.result()["arrays"]["w"].item() == pytest.approx((2.0**25 + 64) / 65, rel=1e-7, abs=0.01)


values = st.floats(-1e3, 1e3, width=32)
replies_of_clients = st.lists(
    st.tuples(values, st.integers(0, 50), st.none() | values, st.floats(0.5, 100.0)), min_size=1, max_size=9
)


@settings(max_examples=60, deadline=None)
@given(replies_of_clients, st.data())
def test_any_split_and_order_of_merging_agrees(
    clients: list[tuple[float, int, float | None, float]], data: st.DataObject
) -> None:
    replies = [(records(value, count, extra), weight) for value, count, extra, weight in clients]
    whole = folded(replies)
    where = data.draw(st.lists(st.integers(0, 2), min_size=len(replies), max_size=len(replies)))
    order = data.draw(st.permutations([0, 1, 2]))
    parts = [folded([reply for reply, at in zip(replies, where, strict=True) if at == part]) for part in order]
    left = WeightedMean()
    for part in parts:
        left.merge(part)
    right = WeightedMean()
    parts[1].merge(parts[2])
    right.merge(parts[1])
    right.merge(parts[0])
    for fold in (left, right):
        for record, sums in whole.sums.items():
            assert fold.sums[record].keys() == sums.keys()
            for name, total in sums.items():
                torch.testing.assert_close(fold.sums[record][name], total, rtol=1e-12, atol=1e-8)
                assert fold.weights[record][name] == pytest.approx(whole.weights[record][name], rel=1e-12)
        for record, mean in whole.result().items():
            assert fold.result()[record].keys() == mean.keys()


def test_merged_parts_of_groups_are_left_as_they_are() -> None:
    parts = []
    for value in (1.0, 3.0):
        part = GroupedMean({0: 5})
        part.add({"arrays": tree({"w": torch.tensor([value])})}, 1.0, 0)
        parts.append(part)
    whole = GroupedMean({0: 5})
    for part in parts:
        whole.merge(part)
    assert whole.result()["arrays"]["w"].tolist() == [[2.0]]
    assert [part.result()["arrays"]["w"].tolist() for part in parts] == [[[1.0]], [[3.0]]]
