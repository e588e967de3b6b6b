"""What server halves are built from, against hand computation and torch's own optimizers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fedpers.cohort import Collect, entries, tree
from fedpers.cohort.fold import REPLIES
from fedpers.errors import ConfigError
from fedpers.server.tools import ClientTable, ServerOptimizer

LIKE: dict[str, Any] = {
    "sgd": lambda x: torch.optim.SGD([x], lr=0.1),
    "momentum": lambda x: torch.optim.SGD([x], lr=0.1, momentum=0.8),
    "adam": lambda x: torch.optim.Adam([x], lr=0.1, betas=(0.7, 0.9), eps=1e-3),
}


def optimizer(name: str) -> ServerOptimizer:
    return ServerOptimizer(name=name, lr=0.1, momentum=0.8, betas=(0.7, 0.9), eps=1e-3)


def directions(count: int = 5) -> list[Tensor]:
    return list(torch.randn(count, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", LIKE)
def test_steps_are_those_of_torch_along_the_negative_gradient(name: str) -> None:
    x = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    theirs, ours, state = LIKE[name](x), torch.zeros(3, 2, dtype=torch.float64), None
    for direction in directions():
        x.grad = -direction
        theirs.step()
        steps, state = optimizer(name).step_tree(tree({"x": direction}), state)
        ours = ours + steps["x"]
        torch.testing.assert_close(ours, x.detach(), rtol=1e-12, atol=1e-12)


def test_yogi_by_hand() -> None:
    """v <- v - (1 - b2) d^2 sign(v - d^2), starting from 0: the second moment grows by what it lacks only in sign."""
    state, x, m, v = None, 0.0, 0.0, 0.0
    for number, d in enumerate((2.0, 1.0, -3.0), start=1):
        m = 0.7 * m + 0.3 * d
        v = v - 0.1 * d * d * (1 if v > d * d else -1 if v < d * d else 0)
        x += 0.1 * (m / (1 - 0.7**number)) / (math.sqrt(v / (1 - 0.9**number)) + 1e-3)
        steps, state = optimizer("yogi").step_tree(tree({"x": torch.tensor(d, dtype=torch.float64)}), state)
        assert float(steps["x"]) == pytest.approx(
            0.1 * (m / (1 - 0.7**number)) / (math.sqrt(v / (1 - 0.9**number)) + 1e-3)
        )


@pytest.mark.parametrize("name", ["momentum", "adam", "yogi"])
def test_rows_that_took_different_numbers_of_steps(name: str) -> None:
    """Each row moves as if it were alone."""
    rows = directions(4)
    made = optimizer(name)
    alone = []
    for k, count in enumerate((1, 3)):
        moments = made.moments(rows[0])
        for number in range(count):
            step, moments = made.step(rows[number + k], moments)
        alone.append((step, moments))
    before = {}
    for k, count in enumerate((0, 2)):
        moments = made.moments(rows[0])
        for number in range(count):
            _, moments = made.step(rows[number + k], moments)
        for key, value in moments.items():
            before.setdefault(key, []).append(value)
    stacked = torch.stack([rows[0], rows[3]])
    step, after = made.step(stacked, {key: torch.stack(values) for key, values in before.items()})
    for k, (expected, moments) in enumerate(alone):
        torch.testing.assert_close(step[k], expected)
        for key, value in moments.items():
            torch.testing.assert_close(after[key][k], value)


@pytest.mark.parametrize(
    ("option", "value"),
    [("name", "adagrad"), ("lr", 0.0), ("lr", math.inf), ("momentum", 1.0), ("betas", (0.9, 1.0)), ("eps", 0.0)],
)
def test_values_out_of_range_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^strategy\.server_"):
        ServerOptimizer(**{option: value})


# ------------------------------------------------------------------------- a table


def first(client: int) -> dict[str, Tensor]:
    return {"value": torch.full((2,), float(client)), "count": torch.tensor(0)}


def test_a_table_keeps_a_row_per_client() -> None:
    table = ClientTable(first)
    assert table.rows([7, 3])["value"].tolist() == [[7, 7], [3, 3]]
    assert table.clients == [3, 7]
    table.put([3, 7], {"value": torch.tensor([[1.0, 2.0], [5.0, 6.0]]), "count": torch.tensor([1, 2])})
    assert table.rows([5, 7, 3])["value"].tolist() == [[5, 5], [5, 6], [1, 2]]  # a new one in between
    assert table.rows([7])["count"].tolist() == [2]
    assert table.mean()["value"].tolist() == [pytest.approx(11 / 3), pytest.approx(13 / 3)]
    again = ClientTable(first, table.values)
    assert again.clients == [3, 5, 7]
    assert again.rows([3, 5, 7])["value"].tolist() == [[1, 2], [5, 5], [5, 6]]
    assert set(entries(table.values)) == {"client", "value", "count"}


def test_what_a_table_gives_is_a_copy() -> None:
    table = ClientTable(first)
    table.rows([1])["value"].zero_()
    assert table.rows([1])["value"].tolist() == [[1, 1]]


# --------------------------------------------------------------------- kept replies


def test_collected_replies_stand_by_client() -> None:
    folds = [Collect(), Collect()]
    for client, fold in ((5, folds[0]), (2, folds[1]), (9, folds[0])):
        fold.add({"arrays": tree({"w": torch.full((2,), float(client))})}, client / 10, client)
    folds[0].merge(folds[1])
    assert folds[0].clients == [2, 5, 9]
    result = folds[0].result()
    assert result["arrays"]["w"].tolist() == [[2, 2], [5, 5], [9, 9]]
    assert result[REPLIES]["client"].tolist() == [2, 5, 9]
    assert result[REPLIES]["weight"].tolist() == [0.2, 0.5, 0.9]
    assert Collect().result() == {}
    stack = Collect()
    stack.add_stack({"arrays": tree({"w": torch.eye(2)}, 2)}, torch.tensor([1.0, 2.0]), [4, 1])
    assert stack.stacked()["arrays"]["w"].tolist() == [[0, 1], [1, 0]]
