"""The next token at each position: losses and measures by hand, and what is no text."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from fedpers.data import FederatedData
from fedpers.errors import ConfigError, DataError
from fedpers.tasks import NextToken

TASK = NextToken()
Y = torch.tensor([[1, 2, 0, 1], [2, -1, -1, -1]])


def test_a_sequence_loses_the_mean_over_its_tokens() -> None:
    scores = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    expected = [F.cross_entropy(s, y, ignore_index=-1) for s, y in zip(scores, Y, strict=True)]
    torch.testing.assert_close(TASK.losses(scores, Y), torch.stack(expected))
    nothing = TASK.losses(scores, torch.full_like(Y, -1))
    assert nothing.tolist() == [0, 0]


def test_padding_has_no_gradient() -> None:
    scores = torch.randn(2, 4, 3, requires_grad=True)
    TASK.losses(scores, Y).sum().backward()
    assert scores.grad is not None
    assert bool((scores.grad[1, 1:] == 0).all())
    assert bool((scores.grad[0] != 0).all())


def test_measures_count_tokens_by_hand() -> None:
    """Two of five tokens are predicted; the scores make each right token e times as likely as each wrong one."""
    right = torch.tensor([[True, True, False, False], [False, True, True, True]])
    scores = torch.zeros(2, 4, 3)
    for n in range(2):
        for t in range(4):
            answer = int(Y[n, t].clamp(min=0))
            scores[n, t, answer if right[n, t] else (answer + 1) % 3] = 1.0
    metrics = TASK.measure([scores, scores[:0]], [Y, Y[:0]], 3)
    assert metrics["examples"].tolist() == [5, 0]
    assert metrics["accuracy"][0] == 2 / 5
    normalizer = math.log(math.e + 2)
    loss = (2 * (normalizer - 1) + 3 * normalizer) / 5
    assert float(metrics["loss"][0]) == pytest.approx(loss)
    assert float(metrics["perplexity"][0]) == pytest.approx(math.exp(loss))
    assert all(bool(column[1:].isnan().all()) for name, column in metrics.items() if name != "examples")


def test_scores_that_are_not_finite_are_wrong() -> None:
    scores = torch.full((2, 4, 3), math.nan)
    metrics = TASK.measure([scores], [Y], 3)
    assert metrics["accuracy"].tolist() == [0]
    assert metrics["perplexity"].tolist() == [math.inf]


def data(x: object, y: object, vocabulary: int = 3, **options: int) -> FederatedData:
    return FederatedData(x, y, [[0]], [[1]], [[1]][:0] or [[]], vocabulary, "text", task=TASK, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([[0, 1], [1, 2]], [[1, 3], [0, 1]], "next tokens run from 0 to 3, expected ids 0 to 2"),
        ([[0, 1], [1, 2]], [[1, -2], [0, 1]], "next tokens run from -2 to 1"),
        ([[0, 1], [1, 2]], [[-1, -1], [-1, -1]], "next tokens run from -1 to -1"),
        ([[0, 1], [1, 2]], [1, 0], r"y is int64 \[2\], expected the next token at each position"),
        ([[0, 1], [1, 2]], [[0.5, 1], [1, 1]], r"y is float32 \[2, 2\], expected the next token"),
        ([[0, -1], [1, 2]], [[1, 1], [0, 1]], "tokens in x run from -1 to 2, expected 0 or more"),
    ],
)
def test_what_is_no_text_is_refused(x: object, y: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        data(x, y)


def test_the_vocabulary_is_what_is_said_or_occurs() -> None:
    x, y = [[0, 1], [1, 2]], [[1, 2], [2, 0]]
    assert data(x, y).num_tokens == 3
    assert data(x, y, num_tokens=7).num_tokens == 7
    assert data(x, y, num_tokens=7).restrict([0]).num_tokens == 7
    with pytest.raises(DataError, match="tokens in x run from 0 to 2, expected 0 to 1, because num_tokens=2"):
        data(x, y, num_tokens=2)


@pytest.mark.parametrize("shape", [(2, 3), (2, 2, 2), (2, 3, 3), (2,)])
def test_networks_that_do_not_score_each_position_are_refused(shape: tuple[int, ...]) -> None:
    text = data([[0, 1], [1, 2]], [[1, 2], [2, 0]])
    TASK.check_outputs(torch.zeros(2, 2, 3), text)
    with pytest.raises(ConfigError, match=r"model=network: expected a network with outputs \[2, 3\] for each sequence"):
        TASK.check_outputs(torch.zeros(shape), text)


def test_what_is_unknown_is_never_predicted_rightly() -> None:
    scores = torch.nn.functional.one_hot(Y.clamp(min=0), 3).float()  # each token is predicted
    assert TASK.measure([scores], [Y], 3)["accuracy"].tolist() == [1]
    assert NextToken(unknown=0).measure([scores], [Y], 3)["accuracy"].tolist() == [4 / 5]
