"""Replies taken in where they are made: parts of several machines give what one collector gives."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import flwr.app as flower
import numpy as np
import pytest
import torch
from torch import Tensor

from fedpers.client.results import ClientResult, CohortResult
from fedpers.cohort import Collect, Fold, Training, WeightedMean, entries, leaves, tree
from fedpers.flower_private import server_identity
from fedpers.records import num_bytes
from fedpers.runtime.actor import pack, unpack
from fedpers.runtime.local import LocalGrid
from fedpers.server.collect import Collected, Entry, ReplyCollector, ReplyRules, result_of, schema_of
from fedpers.strategies import STRATEGIES, FedAvg, FedAvgUpdate, PersonalizedStrategy, make_strategy
from tests.problems import SmallNetwork, gaussian_data, problem

SMALL = 64_000
"""Bytes beside the arrays that may go to another machine to fold there."""

MISSING = (
    "'arrays/head.bias' is missing in its reply; a server begins with what clients share, client_app.initial_arrays()"
)


@pytest.fixture(autouse=True)
def _server() -> Iterator[None]:
    with server_identity(1):
        yield


def round_of(method: str, dtype: torch.dtype = torch.float64) -> tuple[PersonalizedStrategy, dict[int, ClientResult]]:
    """A method in its second round, and what its clients answered."""
    given = problem(method, dtype)
    server = {"unseen": given.data.unseen}
    strategy, update = make_strategy(method, given.options, server=server, training=given.training)
    app = update.client_app(given.network, given.data)
    strategy.attach(app)
    grid = LocalGrid(app, given.data.num_clients, clients_at_once=100, workers=1)
    arrays, config = app.initial_arrays(), flower.ConfigRecord()
    strategy.begin()
    for r in (1, 2):
        replies = list(grid.send_and_receive(strategy.configure_train(r, arrays, config, grid)))
        if r == 1:
            new, _ = strategy.aggregate_train(r, replies)
            assert new is not None
            arrays = new
    grid.close()
    return strategy, {strategy.exchange.client_of[r.metadata.src_node_id]: result_of(r) for r in replies}


def rules_of(strategy: PersonalizedStrategy) -> ReplyRules:
    return strategy.reply_rules(strategy.report.sampled)


def concluded(strategy: PersonalizedStrategy, collected: Collected) -> dict[str, Tensor]:
    values = {n: v.clone() for n, v in leaves(strategy._conclude(2, collected)).items()}
    for role, kept in strategy.state.items():
        values.update({f"{role}/{n}": v.clone() for n, v in leaves(kept).items()})
    return values


def assert_little_but_arrays(strategy: PersonalizedStrategy) -> None:
    """What goes to another machine to fold."""
    pickled, buffers = pack(rules_of(strategy))
    arrays = sum(value.nbytes for value in entries(strategy.sent_arrays).values())
    assert len(pickled) + sum(buffer.nbytes for buffer in buffers) <= arrays + SMALL
    # no tensor but the arrays: an actor's is a view of memory that others read, and must not be written
    assert sum(buffer.nbytes for buffer in buffers) <= arrays
    restored = pickle.loads(pickled, buffers=buffers)
    assert vars(restored).keys() == {"arrays", "schema", "fold", "postprocessors", "weighting", "by_client"}


@pytest.mark.slow
@pytest.mark.parametrize("method", STRATEGIES)
def test_parts_that_travelled_give_what_one_collector_gives(method: str) -> None:
    strategy, results = round_of(method)
    assert_little_but_arrays(strategy)
    parts = []
    for clients in (sorted(results)[::2], sorted(results)[1::2]):
        part = ReplyCollector(unpack(pack(rules_of(strategy))))
        for client in clients:  # one by one, as cohorts of one would come
            part.take({client: results[client]})
        parts.append(unpack(pack(part.partial())))
    merged = ReplyCollector(rules_of(strategy)).collected
    merged.merge(parts)
    assert sorted(merged.metrics) == sorted(results)
    assert merged.failures == {}
    other, same = round_of(method)
    whole = ReplyCollector(rules_of(other))
    whole.take(same)
    assert merged.bytes_up == whole.collected.bytes_up
    actual, expected = concluded(strategy, merged), concluded(other, whole.collected)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-12, msg=name)
    assert strategy.report.steps == other.report.steps
    assert strategy.report.extra == pytest.approx(other.report.extra, rel=1e-9)


def with_other(result: ClientResult, name: str, array: Any) -> ClientResult:
    assert result.content is not None
    content = result.content.copy()
    record = content.array_records["arrays"].copy()
    if array is None:
        del record[name]
    else:
        record[name] = flower.Array(np.asarray(array))
    content["arrays"] = record
    return ClientResult(content)


def part_of(strategy: PersonalizedStrategy, results: dict[int, ClientResult], clients: Sequence[int]) -> ReplyCollector:
    part = ReplyCollector(rules_of(strategy))
    part.take({client: results[client] for client in clients})
    return part


@pytest.mark.parametrize("alone", [True, False])
def test_who_answers_less_than_declared_is_left_out_however_replies_are_divided(alone: bool) -> None:
    """Also where those that do are most, or first: nothing is voted on."""
    strategy, results = round_of("fedavg")
    for client in (0, 1, 2, 3):
        results[client] = with_other(results[client], "head.bias", None)
    lots = [[client] for client in results] if alone else [[0, 1, 2, 3], [4, 5, 6]]
    merged = ReplyCollector(rules_of(strategy)).collected
    merged.merge(part_of(strategy, results, lot).collected for lot in lots)
    assert sorted(merged.metrics) == [4, 5, 6]
    assert merged.failures == dict.fromkeys(range(4), MISSING)
    expected = part_of(strategy, results, [4, 5, 6]).collected.fold.result()["arrays"]
    for name, value in leaves(expected).items():
        torch.testing.assert_close(merged.fold.result()["arrays"][name], value, rtol=1e-12, atol=1e-12)


def test_failures_of_all_parts_are_kept() -> None:
    strategy, results = round_of("fedavg")
    results[3] = ClientResult(None, "out of memory")
    merged = ReplyCollector(rules_of(strategy)).collected
    merged.merge(part_of(strategy, results, clients).collected for clients in ([0, 1, 2], [3], []))
    assert merged.failures == {3: "out of memory"}
    assert sorted(merged.metrics) == [0, 1, 2]


# ------------------------------------------------------------------- stacked replies


def stacked(**changes: Any) -> CohortResult:
    """Answers of clients 5, 2 and 7: a matrix and a count."""
    records = {"arrays": tree({"w": torch.arange(12.0).view(3, 2, 2), "n": torch.tensor([3, 4, 8])}, 3)}
    metrics = [{"num-examples": n, "steps": 1, "samples": n, "train-loss": 0.5} for n in (6, 3, 1)]
    return CohortResult(**{"clients": [5, 2, 7], "metrics": metrics, "records": records, **changes})


def collector(weighting: str = "samples") -> ReplyCollector:
    arrays = tree({"w": torch.zeros(2, 2), "n": torch.tensor(0)})
    return ReplyCollector(ReplyRules(arrays, schema_of("arrays", entries(arrays)), FedAvg().fold(), (), weighting))


def test_a_stack_is_folded_as_its_rows_are() -> None:
    whole, rows = collector(), collector()
    whole.take_cohort(stacked())
    rows.take(dict(zip([5, 2, 7], stacked().rows(), strict=True)))
    assert whole.collected.metrics == rows.collected.metrics
    assert whole.collected.bytes_up == rows.collected.bytes_up == 3 * (16 + 8)
    means = [taker.collected.fold.result()["arrays"] for taker in (whole, rows)]
    assert torch.allclose(means[0]["w"], means[1]["w"])
    expected = (6 * torch.arange(4.0) + 3 * torch.arange(4.0, 8) + torch.arange(8.0, 12)) / 10
    assert torch.allclose(means[0]["w"], expected.view(2, 2))
    assert means[0]["n"] == means[1]["n"] == 4  # (18 + 12 + 8) / 10, rounded


def test_rows_of_clients_that_failed_are_not_folded() -> None:
    taker = collector("uniform")
    taker.take_cohort(stacked(errors={2: "out of memory"}))
    assert taker.collected.failures == {2: "out of memory"}
    assert list(taker.collected.metrics) == [5, 7]
    assert torch.equal(taker.collected.fold.result()["arrays"]["w"], torch.tensor([[4.0, 5.0], [6.0, 7.0]]))


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (("arrays", "w", torch.zeros(3, 2)), "'w' has shape [2], expected [2, 2]"),
        (("arrays", "w", torch.zeros(3, 2, 2, dtype=torch.float64)), "'w' has dtype float64, expected float32"),
        (("arrays", "x", torch.zeros(3)), "'arrays/x' is in its reply, but the method declares no such entry"),
    ],
)
def test_a_stack_that_is_not_as_declared_is_left_out_whole(entry: tuple[str, str, Tensor], problem: str) -> None:
    taker, result = collector(), stacked()
    result.records[entry[0]][entry[1]] = entry[2]
    taker.take_cohort(result)
    assert taker.collected.failures == dict.fromkeys([5, 2, 7], problem)
    assert taker.collected.metrics == {}


def test_a_client_without_samples_is_left_out_where_samples_weigh() -> None:
    result = stacked()
    result.metrics[1]["num-examples"] = 0  # type: ignore[index]
    taker, uniform = collector(), collector("uniform")
    taker.take_cohort(result)
    uniform.take_cohort(result)
    assert taker.collected.failures == {2: "it has no weight by strategy.weighting=samples: its num-examples is 0"}
    assert uniform.collected.failures == {}


def test_an_optional_entry_may_be_missing_and_counts_for_those_that_sent_it() -> None:
    taker = collector("uniform")
    taker.rules.schema["more", "x"] = Entry((-1,), "float32", optional=True)
    taker.take_cohort(stacked())
    more = stacked(clients=[1, 3, 4])
    more.records["more"] = tree({"x": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 0.0]])}, 3)
    taker.take_cohort(more)
    assert taker.collected.failures == {}
    assert taker.collected.fold.result()["more"]["x"].tolist() == [3, 2]


def test_what_each_client_must_hold_may_differ() -> None:
    taker = collector("uniform")
    taker.rules.by_client[2] = schema_of("arrays", {"w": torch.zeros(2, 2)})
    taker.take_cohort(stacked())
    assert taker.collected.failures == {2: "'arrays/n' is in its reply, but the method declares no such entry"}


class SometimesLess(FedAvgUpdate):
    """A client that prefers the second class to the first leaves the bias of its head away when it travels."""

    def encode(self, records: Any) -> Any:
        sent = entries(records["arrays"])
        left = {n: v for n, v in sent.items() if n != "head.bias" or float(v[0]) > float(v[1])}
        return {"arrays": tree(left)}


class AllowsLess(FedAvg):
    """Server that says so, or does not."""

    update = SometimesLess
    allows = True

    def reply_schema(self, clients: list[int]) -> Any:
        schema = dict(super().reply_schema(clients))  # type: ignore[arg-type]
        schema["arrays", "head.bias"] = schema["arrays", "head.bias"]._replace(optional=self.allows)
        return schema


@pytest.mark.parametrize("allows", [True, False])
def test_who_is_left_out_does_not_depend_on_cohorts(allows: bool) -> None:
    outcomes = []
    for cohort in (1, 2, 7):
        app = SometimesLess(training=Training(lr=0.5)).client_app(SmallNetwork(norm=False), gaussian_data())
        strategy = AllowsLess()
        strategy.allows = allows
        grid = LocalGrid(app, 7, clients_at_once=cohort, workers=1)
        result = strategy.start(grid, app.initial_arrays(), num_rounds=1)
        assert result.arrays is not None
        outcomes.append((dict(strategy.report.failures), strategy.report.bytes_up))
        grid.close()
    assert outcomes[0] == outcomes[1] == outcomes[2]
    failures, sent = outcomes[0]
    less = 7 * num_bytes(flower.RecordDict({"arrays": app.initial_arrays()})) - sent
    if allows:
        assert not failures
        assert less in {16 * n for n in range(1, 7)}  # some left it away
    else:
        assert 0 < len(failures) < 7
        assert set(failures.values()) == {MISSING}


class Picky(Fold):
    """A sum that refuses client 7."""

    def __init__(self) -> None:
        self.total, self.clients = torch.zeros(2, 2), list[int]()

    def add(self, records: Any, weight: float, client: int) -> None:
        if client == 7:
            raise ValueError("too strange")
        self.total += records["arrays"]["w"]
        self.clients.append(client)

    def merge(self, other: Picky) -> None:
        self.total += other.total
        self.clients += other.clients

    def result(self) -> Any:
        return {"arrays": tree({"w": self.total})}


@pytest.mark.parametrize("whole", [True, False])
def test_a_reply_that_a_fold_refuses_counts_nobody_twice(whole: bool) -> None:
    taker = ReplyCollector(ReplyRules(collector().rules.arrays, collector().rules.schema, Picky(), (), "uniform"))
    result = stacked(clients=[5, 7, 2])
    if whole:
        taker.take_cohort(result)
    else:
        for client, row in zip([5, 7, 2], result.rows(), strict=True):
            taker.take({client: row})
    assert taker.rules.fold.clients == [5, 2]  # type: ignore[attr-defined]
    assert taker.collected.failures == {7: "too strange"}
    assert list(taker.collected.metrics) == [5, 2]
    assert taker.collected.bytes_up == 2 * 24


def test_kept_replies_must_hold_the_same_entries() -> None:
    fold = Collect()
    fold.add({"arrays": tree({"w": torch.zeros(1)})}, 1.0, 3)
    fold.add({"arrays": tree({"w": torch.zeros(1)}), "more": tree({"x": torch.zeros(1)})}, 1.0, 5)
    with pytest.raises(ValueError, match=r"^replies of clients 3 and 5 do not hold the same entries$"):
        fold.result()


class Flat(Picky):
    """Looks at tensors as they lie in memory."""

    def add(self, records: Any, weight: float, client: int) -> None:
        super().add({"arrays": tree({"w": records["arrays"]["w"].view(-1).view(2, 2)})}, weight, client)


@pytest.mark.parametrize("mean", [True, False])
def test_how_replies_lay_in_a_cohort_is_not_seen(mean: bool) -> None:
    rules = collector("uniform").rules
    results = []
    for transposed in (False, True):
        taker = ReplyCollector(replace(rules, fold=WeightedMean() if mean else Flat()))
        result = stacked(clients=[5, 3, 2])
        w = result.records["arrays"]["w"]
        w = w.mT.contiguous().mT if transposed else w
        result.records["arrays"] = tree({**entries(result.records["arrays"]), "w": w}, 3)
        taker.take_cohort(result)
        assert not taker.collected.failures
        results.append(taker.collected.fold.result()["arrays"]["w"])
    assert torch.equal(*results)
    assert all(value.is_contiguous() for value in results)
