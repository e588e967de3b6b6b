"""Scores of candidates to hits and gains, with the numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import vmap

from fedpers.errors import ConfigError
from fedpers.tasks import Ranking
from fedpers.tasks.ranking import hit_and_gain


def test_ranks_by_hand() -> None:
    scores = [
        [3.0, 1, 2, 0],  # first
        [1.0, 2, 0, 3],  # third
        [1.0, 2, 3, 4],  # fourth: not among the first three
        [1.0, 1, 0, 0],  # a tie counts against it: second
        [math.nan, 0, 0, 0],
        [1.0, math.nan, 2, math.nan],  # only one negative is above
    ]
    metrics = hit_and_gain([torch.tensor(row) for row in scores], 3)
    assert list(metrics) == ["examples", "hr@3", "ndcg@3"]
    assert metrics["examples"].tolist() == [1] * 6
    assert metrics["hr@3"].tolist() == [1, 1, 0, 1, 0, 1]
    second, third = math.log(2) / math.log(3), math.log(2) / math.log(4)
    assert metrics["ndcg@3"].tolist() == pytest.approx([1, third, 0, second, 0, second])


def test_without_a_held_out_item_there_is_nothing_to_count() -> None:
    metrics = hit_and_gain([torch.tensor([]), torch.tensor([1.0, 0.0])], 1)
    assert metrics["examples"].tolist() == [0, 1]
    assert metrics["hr@1"].isnan().tolist() == metrics["ndcg@1"].isnan().tolist() == [True, False]


def test_logits_are_compared_as_float32_probabilities() -> None:
    saturated = torch.tensor([[60.0], [50.0]], dtype=torch.float64)  # both are probability 1
    apart = torch.tensor([[6.0], [5.0]], dtype=torch.float64)
    metrics = Ranking(top_k=1).measure([saturated, apart], [torch.tensor([1.0, 0.0])] * 2, 1)
    assert metrics["hr@1"].tolist() == [0, 1]
    assert metrics["hr@1"].dtype == torch.float64


def test_losses_are_binary_cross_entropies() -> None:
    logits, y = torch.tensor([[[0.0], [2.0]], [[2.0], [-3.0]]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    losses = vmap(Ranking().losses)(logits, y)
    expected = [[math.log(2), math.log1p(math.exp(2))], [math.log1p(math.exp(-2)), math.log1p(math.exp(-3))]]
    torch.testing.assert_close(losses, torch.tensor(expected))


def test_what_a_run_reads() -> None:
    clean, official = Ranking(5), Ranking(protocol_name="official")
    assert (clean.headline, clean.also) == ("hr@5", ("ndcg@5",))
    assert (clean.selected_on, clean.latest_wins, clean.protocol) == ("validation", False, "validation-selected")
    assert (official.headline, official.selected_on, official.latest_wins) == ("hr@10", "test", True)
    assert official.protocol == "official"
    assert "no_learning" in clean.baselines
    assert not clean.spread
    assert not clean.classes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"protocol_name": "offical"},
            r"dataset\.protocol=offical: expected one of clean, official, symmetric \(did you mean",
        ),
        ({"top_k": 0}, r"dataset\.top_k=0: expected a whole number >= 1\."),
    ],
)
def test_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Ranking(**values)  # type: ignore[arg-type]
