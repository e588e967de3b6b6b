"""Replies taken in where they are made: parts of several machines give what one intake gives."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import flwr.app as flower
import numpy as np
import pytest
import torch
from torch import Tensor

from fedpers.cohort import leaves
from fedpers.runtime.flower_private import server_identity
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import STRATEGIES, PersonalizedStrategy, make_strategy
from fedpers.strategies.client import Outcome
from fedpers.strategies.intake import Intake, outcome_of
from fedpers.strategies.records import from_record
from tests.problems import problem


@pytest.fixture(autouse=True)
def _server() -> Iterator[None]:
    with server_identity(1):
        yield


def round_of(method: str) -> tuple[PersonalizedStrategy, dict[int, Outcome]]:
    """A method in its second round, and what its clients answered."""
    given = problem(method, torch.float64)
    server = {"unseen": given.data.unseen}
    strategy, update = make_strategy(method, given.options, server=server, training=given.training)
    app = update.client_app(given.network, given.data)
    grid = LocalGrid(app, given.data.num_clients, cohort=100, workers=1)
    arrays, config = app.initial_arrays(), flower.ConfigRecord()
    for r in (1, 2):
        replies = list(grid.send_and_receive(strategy.configure_train(r, arrays, config, grid)))
        if r == 1:
            new, _ = strategy.aggregate_train(r, replies)
            assert new is not None
            arrays = new
    grid.close()
    return strategy, {strategy._clients[reply.metadata.src_node_id]: outcome_of(reply) for reply in replies}


def concluded(strategy: PersonalizedStrategy, intake: Intake) -> dict[str, Tensor]:
    arrays, _ = strategy._conclude(2, intake)
    found = {n: v.clone() for n, v in leaves(from_record(arrays)).items()}
    for role, values in strategy.state.items():
        found.update({f"{role}/{n}": v.clone() for n, v in leaves(values).items()})
    return found


@pytest.mark.parametrize("method", STRATEGIES)
def test_parts_that_travelled_give_what_one_intake_gives(method: str) -> None:
    strategy, outcomes = round_of(method)
    parts = []
    for own in (sorted(outcomes)[::2], sorted(outcomes)[1::2]):
        elsewhere = pickle.loads(pickle.dumps(strategy.to_fold_elsewhere()))
        part = Intake(elsewhere)
        for client in own:  # one by one, as cohorts of one would come
            part.take({client: outcomes[client]})
        parts.append(pickle.loads(pickle.dumps(part)))
    merged = Intake(strategy)
    merged.merge(parts)
    assert sorted(merged.good) == sorted(outcomes)
    assert merged.failures == {}
    other, same = round_of(method)
    whole = Intake(other)
    whole.take(same)
    assert merged.bytes_up == whole.bytes_up
    found, expected = concluded(strategy, merged), concluded(other, whole)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)
    assert strategy.report.steps == other.report.steps
    assert strategy.report.extra == pytest.approx(other.report.extra, rel=1e-9)


def without_bias(outcome: Outcome) -> Outcome:
    assert outcome.content is not None
    content = outcome.content.copy()
    record = content.array_records["arrays"].copy()
    del record["head.bias"]
    content["arrays"] = record
    return Outcome(content)


def part_of(strategy: PersonalizedStrategy, outcomes: dict[int, Outcome], clients: list[int]) -> Intake:
    part = Intake(strategy)
    part.take({client: outcomes[client] for client in clients})
    return part


@pytest.mark.parametrize("first", [0, 1])
def test_parts_that_disagree_on_what_a_reply_holds(first: int) -> None:
    """Most clients are right, whichever part comes first."""
    strategy, outcomes = round_of("fedavg")
    strange = {client: without_bias(outcomes[client]) for client in (0, 1)}
    parts = [part_of(strategy, strange, [0, 1]), part_of(strategy, outcomes, [2, 3, 4, 5, 6])]
    merged = Intake(strategy)
    merged.merge(parts if first else parts[::-1])
    assert sorted(merged.good) == [2, 3, 4, 5, 6]
    reason = "'arrays/head.bias' is in its reply or in those of the other clients, but not in both"
    assert merged.failures == {0: reason, 1: reason}
    expected = part_of(strategy, outcomes, [2, 3, 4, 5, 6]).fold.result()["arrays"]
    found: Any = merged.fold.result()["arrays"]
    for name, value in leaves(expected).items():
        assert torch.equal(found[name], value)


def with_more(outcome: Outcome, size: int) -> Outcome:
    assert outcome.content is not None
    content = outcome.content.copy()
    content["more"] = flower.ArrayRecord({"x": flower.Array(np.zeros(size))})
    return Outcome(content)


def test_parts_whose_arrays_have_other_shapes() -> None:
    strategy, outcomes = round_of("fedavg")
    strange = {client: with_more(outcome, 3 if client < 2 else 2) for client, outcome in outcomes.items()}
    merged = Intake(strategy)
    merged.merge([part_of(strategy, strange, [0, 1]), part_of(strategy, strange, [2, 3, 4, 5, 6])])
    assert merged.failures[0] == "'x' is float64 [3], with most other clients float64 [2]"
    assert sorted(merged.good) == [2, 3, 4, 5, 6]


def test_failures_of_all_parts_are_kept() -> None:
    strategy, outcomes = round_of("fedavg")
    outcomes[3] = Outcome(None, "out of memory")
    merged = Intake(strategy)
    merged.merge([part_of(strategy, outcomes, [0, 1, 2]), part_of(strategy, outcomes, [3]), Intake(strategy)])
    assert merged.failures == {3: "out of memory"}
    assert sorted(merged.good) == [0, 1, 2]
