"""What the server half does with sampling, replies that cannot be used, weights and counts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import flwr.app as flower
import numpy as np
import pytest
import torch
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from torch import nn

from fedpers.client.app import IDENTIFY
from fedpers.cohort import Cohort, Reply, Training, Tree, entries, leaves
from fedpers.errors import TrainingError
from fedpers.flower_private import server_identity
from fedpers.randomness import sample_clients
from fedpers.records import from_record
from fedpers.run import metrics_of, run_rounds
from fedpers.run.progress import Progress
from fedpers.runtime.grid import FIRST_NODE
from fedpers.runtime.local import LocalGrid
from fedpers.server.collect import Entry
from fedpers.strategies import (
    STRATEGIES,
    CohortApp,
    FedAvg,
    FedAvgUpdate,
    LocalUpdate,
    PersonalizedStrategy,
    make_strategy,
)
from tests.problems import SmallNetwork, gaussian_data, problem

SIZES = (20, 9, 13, 7)
DATA = gaussian_data(SIZES)


class Round:
    """One round of a method, with its replies open to change."""

    def __init__(self, method: str = "fedavg", options: dict[str, Any] | None = None, **server: Any) -> None:
        strategy, update = make_strategy(
            method, options, server=server, training=Training(lr=0.1, batch_size=5, epochs=1)
        )
        self.strategy: PersonalizedStrategy = strategy
        self.app: CohortApp = update.client_app(SmallNetwork(), DATA)
        self.grid = LocalGrid(self.app, DATA.num_clients, clients_at_once=2, workers=1)
        self.arrays = self.app.initial_arrays()
        self.config = flower.ConfigRecord()
        self.number = 0
        self.strategy.begin()
        self.ask()

    def ask(self) -> None:
        """Train; the replies wait for :meth:`aggregate`."""
        self.number += 1
        self.messages = list(self.strategy.configure_train(self.number, self.arrays, self.config, self.grid))
        replies = list(self.grid.send_and_receive(self.messages))
        self.replies = {self.strategy.exchange.client_of[reply.metadata.src_node_id]: reply for reply in replies}

    def aggregate(self) -> dict[str, torch.Tensor]:
        new, _ = self.strategy.aggregate_train(self.number, self.replies.values())
        assert new is not None
        self.arrays = new
        return entries(from_record(new))

    def mean_over(self, clients: list[int]) -> dict[str, torch.Tensor]:
        """Average by samples of what these clients sent."""
        sent = [entries(from_record(self.replies[c].content.array_records["arrays"])) for c in clients]
        total = sum(SIZES[c] for c in clients)
        return {
            name: sum(SIZES[c] / total * s[name].double() for c, s in zip(clients, sent, strict=True))  # type: ignore[misc]
            for name in sent[0]
        }


@pytest.fixture(autouse=True)
def _server() -> Iterator[None]:
    with server_identity(1):
        yield


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name].double(), value, rtol=1e-5, atol=0.5 if "num_batches" in name else 1e-6)


Tamper = Callable[[flower.Message], flower.Message | None]


def replaced(name: str, array: Any) -> Tamper:
    def tamper(reply: flower.Message) -> flower.Message:
        record = reply.content.array_records["arrays"].copy()
        record[name] = array if isinstance(array, flower.Array) else flower.Array(np.asarray(array, dtype=np.float32))
        reply.content["arrays"] = record
        return reply

    return tamper


def without(name: str) -> Tamper:
    def tamper(reply: flower.Message) -> flower.Message:
        record = reply.content.array_records["arrays"].copy()
        del record[name]
        reply.content["arrays"] = record
        return reply

    return tamper


def metric(name: str, value: float) -> Tamper:
    def tamper(reply: flower.Message) -> flower.Message:
        reply.content.metric_records["metrics"][name] = value
        return reply

    return tamper


def more_records(reply: flower.Message) -> flower.Message:
    reply.content["more"] = flower.ArrayRecord({"x": flower.Array(np.zeros(2))})
    return reply


def error(reply: flower.Message) -> flower.Message:
    reply._content = None  # type: ignore[attr-defined]
    reply.__dict__["_error"] = flower.Error(7, "out of memory")
    return reply


NAN = [np.nan, 0.0, 0.0, 0.0]
WITHOUT_WEIGHT = "it has no weight by strategy.weighting=samples: its num-examples is "
BAD: dict[str, tuple[Tamper, str]] = {
    "missing": (lambda reply: None, "no reply"),
    "error": (error, "out of memory"),
    "nan": (replaced("head.bias", NAN), "'arrays/head.bias' holds values that are not finite"),
    "inf": (replaced("head.bias", [0, 0, np.inf, 0]), "'arrays/head.bias' holds values that are not finite"),
    "shape": (replaced("head.bias", [0.0]), "'head.bias' has shape [1], expected [4]"),
    "dtype": (replaced("head.bias", flower.Array(np.zeros(4, np.int64))), "'head.bias' has dtype int64, expected "),
    "complex": (replaced("head.bias", flower.Array(np.zeros(4, np.complex64))), "'head.bias' has dtype complex64"),
    "scalar": (replaced("head.bias", 0.0), "'head.bias' has shape [], expected [4]"),
    "less": (without("head.bias"), "'arrays/head.bias' is missing in its reply"),
    "more": (more_records, "'more/x' is in its reply, but the method declares no such entry"),
    "bytes": (replaced("head.bias", flower.Array("float32", (4,), "numpy.ndarray", b"")), "an array cannot be read"),
    "text": (replaced("head.bias", flower.Array(np.array(["a", "b", "c", "d"]))), "an array cannot be read"),
    "no samples": (metric("num-examples", 0), f"{WITHOUT_WEIGHT}0"),
    "negative": (metric("num-examples", -5), f"{WITHOUT_WEIGHT}-5"),
    "infinite": (metric("num-examples", float("inf")), f"{WITHOUT_WEIGHT}inf"),
    "nan samples": (metric("num-examples", float("nan")), f"{WITHOUT_WEIGHT}nan"),
    "nan loss": (metric("train-loss", float("nan")), "train-loss is nan"),
    "nan steps": (metric("steps", float("nan")), "steps is nan"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_an_unusable_reply_is_left_out_counted_and_named(what: str, caplog: pytest.LogCaptureFixture) -> None:
    tamper, reason = BAD[what]
    one = Round()
    expected = one.mean_over([0, 1, 3])
    steps = sum(int(one.replies[c].content.metric_records["metrics"]["steps"]) for c in (0, 1, 3))  # type: ignore[arg-type]
    changed = tamper(one.replies.pop(2))
    if changed is not None:
        one.replies[2] = changed
    with caplog.at_level(logging.WARNING, logger="fedpers"):
        actual = one.aggregate()
    assert_close(actual, expected)
    report = one.strategy.report
    assert list(report.failures) == [2]
    assert report.failures[2].startswith(reason)
    assert f"1 of 4 clients left out, e.g. client 2: {reason}" in caplog.text
    assert report.steps == steps
    assert report.samples == 20 + 9 + 7


class Tampering(LocalGrid):
    """A grid on which the replies of one client to one kind of message are changed, or lost."""

    def __init__(self, app: CohortApp, client: int, kind: str, tamper: Tamper) -> None:
        super().__init__(app, app.data.num_clients, clients_at_once=2, workers=1)
        self.node, self.kind, self.tamper = FIRST_NODE + client, kind, tamper
        self.tampers: Callable[[flower.Message], bool] = lambda reply: True

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        changed = []
        for reply in super().send_and_receive(messages, timeout=timeout):
            ours = reply.metadata.src_node_id == self.node and reply.metadata.message_type == self.kind
            changed.append(self.tamper(reply) if ours and self.tampers(reply) else reply)
        return [reply for reply in changed if reply is not None]


class Asked(FedAvgUpdate):
    """Answers with the bias of the head."""

    def query_bias(self, cohort: Cohort, received: Any, config: Any) -> Reply:
        return Reply({"arrays": cohort.per_client(received["arrays"], ["head.bias"])})


@dataclass(kw_only=True)
class Asking(FedAvg):
    """Asks for it before everything it sends."""

    update = Asked

    def prepare(self, round: int, arrays: Tree, clients: list[int], grid: Grid, kind: str) -> list[int]:
        form = {("arrays", "head.bias"): Entry((4,), "float32")}
        answers = self.query_clients(grid, "bias", round, clients, {"arrays": arrays}, kind, form)
        return [client for client in clients if client in answers]


@pytest.mark.parametrize("what", ["missing", "error", "nan", "inf", "shape", "dtype", "complex", "scalar", "less",
                                  "more", "bytes", "text", "nan loss"])  # fmt: skip
def test_an_unusable_answer_to_a_question_leaves_the_client_out_and_names_it(
    what: str, caplog: pytest.LogCaptureFixture
) -> None:
    tamper, reason = BAD[what]
    app = Asked(training=Training(lr=0.1, batch_size=5)).client_app(SmallNetwork(), DATA)
    grid, strategy = Tampering(app, 2, "query.bias", tamper), Asking()
    strategy.begin()
    arrays, config = app.initial_arrays(), flower.ConfigRecord()
    messages = list(strategy.configure_train(1, arrays, config, grid))
    assert [message.metadata.dst_node_id - FIRST_NODE for message in messages] == [0, 1, 3]
    with caplog.at_level(logging.WARNING, logger="fedpers"):
        strategy.aggregate_train(1, grid.send_and_receive(messages))
    assert list(strategy.report.failures) == [2]
    assert strategy.report.failures[2].startswith(reason)
    assert f"1 of 4 clients left out, e.g. client 2: {reason}" in caplog.text
    assert strategy.report.samples == 20 + 9 + 7
    messages = list(strategy.configure_evaluate(1, arrays, config, grid))
    strategy.aggregate_evaluate(1, grid.send_and_receive(messages))
    assert list(strategy.report.clients) == [0, 1, 3]
    assert list(strategy.report.evaluation_failures) == [2]
    assert strategy.report.evaluation_failures[2].startswith(reason)


def selected(slots: Any) -> Tamper:
    def tamper(reply: flower.Message) -> flower.Message:
        reply.content["selected"] = flower.ArrayRecord({"slots": flower.Array(np.asarray(slots))})
        return reply

    return tamper


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (lambda reply: None, "no reply"),
        (error, "out of memory"),
        (selected([0.0, 1.0]), "'slots' has dtype float64, expected int64"),
        (selected([np.nan, 1.0]), "'slots' has dtype float64, expected int64"),
        (selected([1]), "'slots' has shape [1], expected [2]"),
        (selected([[0, 1]]), "'slots' has shape [1, 2], expected [2]"),
        (selected([1, 7]), "an unusable choice of experts: [1, 7] are not 2 ascending numbers from 0 to 2"),
    ],
)
def test_an_unusable_choice_of_experts_leaves_the_client_out(tamper: Tamper, reason: str) -> None:
    given = problem("fedjets")
    strategy, update = make_strategy("fedjets", given.options, server={"unseen": (6,)}, training=given.training)
    app = update.client_app(given.network, given.data)
    grid = Tampering(app, 4, "query.select", tamper)  # no anchor
    strategy.begin()
    arrays, config = app.initial_arrays(), flower.ConfigRecord()
    strategy.aggregate_train(1, grid.send_and_receive(strategy.configure_train(1, arrays, config, grid)))
    assert strategy.report.failures == {4: reason}
    strategy.aggregate_evaluate(1, grid.send_and_receive(strategy.configure_evaluate(1, arrays, config, grid)))
    assert strategy.report.evaluation_failures == {4: reason}
    assert sorted([*strategy.report.clients, *strategy.report.unseen]) == [0, 1, 2, 3, 5, 6]


def test_the_first_bad_reply_is_not_the_measure_for_the_others() -> None:
    one = Round("scaffold", fraction=0.5)  # the server has no control variate yet to compare with
    clients = sorted(one.replies)
    assert len(clients) == 2
    reply = one.replies[clients[0]]
    for record in ("arrays", "control"):
        arrays = reply.content.array_records[record].copy()
        arrays["head.bias"] = flower.Array(np.zeros(1, dtype=np.float32))
        reply.content[record] = arrays
    one.aggregate()
    assert list(one.strategy.report.failures) == [clients[0]]


def test_a_record_the_server_does_not_hold_must_be_as_declared() -> None:
    one = Round("scaffold")
    control = one.replies[0].content.array_records["control"].copy()
    control["head.bias"] = flower.Array(np.zeros(1, dtype=np.float32))  # would be broadcast in a sum
    one.replies[0].content["control"] = control
    one.aggregate()
    assert one.strategy.report.failures == {0: "'head.bias' has shape [1], expected [4]"}


def test_a_value_is_looked_at_in_every_record_that_has_its_name() -> None:
    one = Round("scaffold")  # arrays and control have the same names
    replaced("head.bias", NAN)(one.replies[1])
    one.aggregate()
    assert one.strategy.report.failures == {1: "'arrays/head.bias' holds values that are not finite"}


def test_order_of_arrival_does_not_matter() -> None:
    first, second = Round(), Round()
    second.replies = dict(reversed(second.replies.items()))
    for a, b in zip(first.aggregate().values(), second.aggregate().values(), strict=True):
        assert torch.equal(a, b)


def test_too_few_replies_end_the_run_with_the_reasons() -> None:
    one = Round(min_replies=3)
    for client in (0, 3):
        one.replies[client] = error(one.replies[client])
    with pytest.raises(
        TrainingError,
        match=r"^round 1: 2 of 4 sampled clients sent a usable reply, 3 needed; out of memory\.$",
    ):
        one.aggregate()


class OneSilent(LocalGrid):
    """A grid of which one node never says which client it holds."""

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        replies = list(super().send_and_receive(messages, timeout=timeout))
        asked = [r for r in replies if r.metadata.message_type == IDENTIFY]
        return [r for r in replies if r not in asked[1:2]]


def test_a_node_that_does_not_identify_itself_is_left_out_and_nobody_is_renumbered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = FedAvgUpdate().client_app(SmallNetwork(norm=False), gaussian_data((6, 5, 7, 8)))
    strategy = FedAvg()
    with caplog.at_level(logging.WARNING):
        nodes = strategy.nodes(OneSilent(app, 4))
    assert nodes == {client: FIRST_NODE + client for client in (0, 2, 3)}
    assert "does not say which client it holds" in caplog.text


class OutOfReachOnce(LocalGrid):
    """A grid of which one node is out of reach when it is first asked."""

    reached = False

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        replies = list(super().send_and_receive(messages, timeout=timeout))
        if not self.reached:
            self.reached = True
            gone = flower.Error(ErrorCode.NODE_UNAVAILABLE, "gone")
            replies[1] = flower.Message(gone, reply_to=messages[1])
        return replies


def test_a_node_that_was_out_of_reach_is_asked_again() -> None:
    app = FedAvgUpdate().client_app(SmallNetwork(norm=False), gaussian_data((6, 5, 7, 8)))
    strategy, grid = FedAvg(), OutOfReachOnce(app, 4)
    assert list(strategy.nodes(grid)) == [0, 2, 3]
    assert sorted(strategy.nodes(grid)) == [0, 1, 2, 3]


def test_no_clients_at_all() -> None:
    class Empty(LocalGrid):
        def get_node_ids(self) -> list[int]:
            return []

    one = Round()
    one.grid.__class__ = Empty
    with pytest.raises(TrainingError, match="round 2: no client is connected"):
        one.ask()


def test_bytes_counted_by_hand() -> None:
    body = 8 * 6 + 4 * 8  # weights without bias; scale, shift, mean and variance
    head = 4 * 8 + 4
    expected = {
        "fedavg": (4 * (body + head) + 8, 4 * (body + head) + 8),
        "fedper": (4 * body + 8, 4 * body + 8),
        "fedbn": (4 * (8 * 6 + head), 4 * (8 * 6 + head)),
        "local": (0, 0),
        "scaffold": (4 * (body + head) + 8, 4 * (body + head) + 8 + 4 * (8 * 6 + 2 * 8 + head)),
    }
    for method, (down, up) in expected.items():
        one = Round(method, fraction=0.5)
        one.aggregate()
        assert (one.strategy.report.bytes_down, one.strategy.report.bytes_up) == (2 * down, 2 * up), method
    one.ask()  # from the second round on the server's control variate goes down too
    assert one.strategy.report.bytes_down == 2 * (down + 4 * (8 * 6 + 2 * 8 + head))


def test_train_loss_is_the_mean_over_samples() -> None:
    one = Round()
    metrics = {c: one.replies[c].content.metric_records["metrics"] for c in range(4)}
    assert [metrics[c]["num-examples"] for c in range(4)] == list(SIZES)
    assert [metrics[c]["steps"] for c in range(4)] == [4, 2, 3, 2]
    one.aggregate()
    expected = sum(float(metrics[c]["train-loss"]) * SIZES[c] for c in range(4)) / sum(SIZES)  # type: ignore[arg-type]
    assert one.strategy.report.train_loss == pytest.approx(expected)


class Shuffled(LocalGrid):
    """The same clients behind other node ids."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.real_id = {1000 - 7 * node: node for node in super().get_node_ids()}

    def get_node_ids(self) -> list[int]:
        return list(self.real_id)

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        back = {node: other for other, node in self.real_id.items()}
        messages = list(messages)
        for message in messages:
            message.metadata.dst_node_id = self.real_id[message.metadata.dst_node_id]
        replies = list(super().send_and_receive(messages, timeout=timeout))
        for reply in replies:
            reply.metadata.__dict__["_src_node_id"] = back[reply.metadata.src_node_id]
        return replies


@pytest.mark.slow
def test_clients_are_sampled_alike_by_every_method_and_whatever_their_node_ids() -> None:
    for method in set(STRATEGIES) - {
        "fedjets",
        "ensemble",
        "clustered",
    }:  # anchors; a draw for each; all when clustered
        given = problem(method)
        clients = [client for client in range(given.data.num_clients) if client not in given.data.unseen]
        places = [sample_clients(9, r, len(clients), 0.5) for r in range(1, 9)]
        assert len({tuple(draw) for draw in places}) > 2
        for grid in (LocalGrid, Shuffled):
            server = {"fraction": 0.5, "seed": 9, "unseen": given.data.unseen}
            strategy, update = make_strategy(method, given.options, server=server, training=given.training)
            app = update.client_app(given.network, given.data)
            strategy.nodes(grid(app, given.data.num_clients, clients_at_once=1, workers=1))
            assert [strategy.sample(r) for r in range(1, 9)] == [[clients[place] for place in draw] for draw in places]


def test_node_ids_do_not_change_what_is_learnt() -> None:
    results = []
    for grid in (LocalGrid, Shuffled):
        one = Round("ditto", fraction=0.5)
        one.grid = grid(one.app, DATA.num_clients, clients_at_once=2, workers=1)
        one.number = 0
        one.ask()
        results.append(one.aggregate())
        messages = one.strategy.configure_evaluate(1, one.arrays, one.config, one.grid)
        one.strategy.aggregate_evaluate(1, one.grid.send_and_receive(messages))
        results[-1].update({f"{c}": torch.tensor(m["test-loss"]) for c, m in one.strategy.report.clients.items()})
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_start_evaluates_the_last_round_too() -> None:
    one = Round("fedavg", evaluate_every=2)
    result = one.strategy.start(one.grid, one.app.initial_arrays(), num_rounds=3)
    assert list(result.evaluate_metrics_clientapp) == [2, 3]
    result = one.strategy.start(one.grid, one.app.initial_arrays(), num_rounds=4)
    assert list(result.evaluate_metrics_clientapp) == [2, 4]


def test_clients_that_are_unseen_in_the_attached_data_do_not_train() -> None:
    strategy, update = make_strategy("fedavg", server={"unseen": (1,)}, training=Training(lr=0.1, batch_size=5))
    app = update.client_app(SmallNetwork(), replace(DATA, unseen=(3,)))
    strategy.attach(app)
    strategy.start(LocalGrid(app, DATA.num_clients, workers=1), app.initial_arrays(), num_rounds=1)
    assert strategy.unseen == (1, 3)
    assert strategy.report.sampled == [0, 2]


def test_clients_that_a_method_does_not_address_are_named_so_in_every_phase() -> None:
    @dataclass(kw_only=True)
    class Choosy(FedAvg):
        def prepare(self, round: int, arrays: Tree, clients: list[int], grid: Grid, phase: str) -> list[int]:
            return [client for client in clients if client in (1, 3)]

    app = FedAvgUpdate().client_app(SmallNetwork(), replace(DATA, unseen=(2, 3)))
    grid = LocalGrid(app, DATA.num_clients, workers=1)
    (report,) = [r for r in run_rounds(Choosy(unseen=(2, 3)), grid, app.initial_arrays(), 1) if r.round == 1]
    assert report.sampled == [0, 1]
    assert report.failures == {0: "it could not be addressed"}
    assert report.evaluation_failures == dict.fromkeys((0, 2), "it could not be addressed")
    assert list(report.adapted) == [3]


def test_all_clients_are_evaluated_every_so_many_rounds() -> None:
    one = Round("fedper", fraction=0.25, evaluate_every=2)
    assert len(one.replies) == 1
    one.aggregate()
    assert list(one.strategy.configure_evaluate(1, one.arrays, one.config, one.grid)) == []
    one.ask()
    one.aggregate()
    messages = list(one.strategy.configure_evaluate(2, one.arrays, one.config, one.grid))
    replies = list(one.grid.send_and_receive(messages))
    error(next(r for r in replies if one.strategy.exchange.client_of[r.metadata.src_node_id] == 1))
    means = one.strategy.aggregate_evaluate(2, replies)
    report = one.strategy.report
    assert list(report.clients) == [0, 2, 3]
    assert report.evaluation_failures == {1: "out of memory"}
    assert all(m["validation-examples"] == m["test-examples"] == 5 for m in report.clients.values())
    assert means is not None
    assert means["test-accuracy"] == pytest.approx(sum(m["test-accuracy"] for m in report.clients.values()) / 3)
    assert not [name for name in means if name.endswith("examples")]
    one.ask()
    one.aggregate()
    assert list(one.strategy.configure_evaluate(3, one.arrays, one.config, one.grid)) == []
    assert one.strategy.aggregate_evaluate(3, []) is None  # as Flower's loop does
    assert one.strategy.report.evaluation_failures == {}


@pytest.mark.parametrize(("what", "reason"), [("missing", "no reply"), ("error", "out of memory")])
@pytest.mark.parametrize(("client", "best"), [(1, 2), (3, 3)])
def test_a_round_that_lacks_an_evaluation_is_not_selected(
    what: str, reason: str, client: int, best: int, caplog: pytest.LogCaptureFixture
) -> None:
    """But for clients that never train: they play no part in the selection."""
    app = FedAvgUpdate(training=Training(lr=0.1, batch_size=5)).client_app(SmallNetwork(), DATA)
    grid, strategy = Tampering(app, client, "evaluate", BAD[what][0]), FedAvg(unseen=(3,))
    grid.tampers = lambda reply: strategy.report.round == 3
    progress, reports = Progress("validation/accuracy", unseen=(3,)), []
    for report in run_rounds(strategy, grid, app.initial_arrays(), 4):
        metrics = metrics_of(report, "accuracy") | {"validation/accuracy": {3: 0.9, 2: 0.8}.get(report.round, 0.1)}
        progress.take(report, metrics)
        reports.append(report)
    assert [report.evaluation_failures for report in reports] == [{}, {}, {}, {client: reason}, {}]
    assert client not in {**reports[3].clients, **reports[3].unseen}
    assert f"evaluation of round 3: 1 of 4 clients left out, e.g. client {client}: {reason}" in caplog.text
    assert progress.best is not None
    assert progress.last is not None
    assert (progress.best[0], progress.last[0]) == (best, 4)
    assert progress.totals["failures"] == 1


@pytest.mark.parametrize("method", ["fedavg", "fedrep", "pfedpg", "fedjets"])
def test_an_unseen_client_that_is_not_connected_is_named(method: str) -> None:
    given = problem(method)
    data = replace(given.data, unseen=(3, 6))
    strategy, update = make_strategy(method, given.options, server={"unseen": (3, 6)}, training=given.training)
    app = update.client_app(given.network, data)
    strategy.attach(app)
    grid = LocalGrid(app, 6, clients_at_once=6, workers=1)  # the last client is not there
    *_, report = run_rounds(strategy, grid, app.initial_arrays(), 1)
    assert report.evaluation_failures == {6: "it is not connected"}
    assert sorted(report.clients) == [0, 1, 2, 4, 5]
    assert list(report.unseen) == list(report.adapted) == [3]


@pytest.mark.parametrize("method", ["scaffold", "pfedpg", "fedjets", "ensemble", "gpfl"])
def test_a_strategy_that_is_started_twice_begins_anew(method: str) -> None:
    given = problem(method, torch.float64)
    server = {"fraction": 0.5, "seed": 2, "unseen": given.data.unseen}
    strategy, update = make_strategy(method, given.options, server=server, training=given.training)
    results = []
    for _ in range(2):
        app = update.client_app(given.network, given.data, seed=2)
        grid = LocalGrid(app, given.data.num_clients, clients_at_once=3, workers=1)
        result = strategy.start(grid, app.initial_arrays(), num_rounds=2)
        state = {f"{role}/{name}": v for role, values in strategy.state.items() for name, v in leaves(values).items()}
        measured = {f"{c}/{n}": torch.tensor(v) for c, row in strategy.report.clients.items() for n, v in row.items()}
        results.append({**entries(from_record(result.arrays)), **state, **measured})
    first, second = results
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_a_client_that_becomes_non_finite_keeps_its_former_personal_state() -> None:
    one = Round("ditto")
    one.aggregate()
    assert one.grid.engine is not None
    store = one.grid.engine.store
    before = leaves(store.gather(range(4)).clone())
    poisoned = DATA.x.clone()
    poisoned[DATA.train[2][0]] = torch.inf
    object.__setattr__(one.app.data, "x", poisoned)
    one.ask()
    arrays = one.aggregate()
    assert all(torch.isfinite(value).all() for value in arrays.values())
    assert list(one.strategy.report.failures) == [2]
    assert "training gave values that are not finite" in one.strategy.report.failures[2]
    after = leaves(store.gather(range(4)))
    for name, value in before.items():
        assert torch.equal(after[name][2], value[2]), name
    assert not torch.equal(after["model/head.bias"][0], before["model/head.bias"][0])


def test_personal_state_with_other_names_than_the_initial_one_is_refused() -> None:
    class Forgetful(LocalUpdate):
        def train(self, cohort: Cohort, received: Any, config: Any) -> Reply:
            return cohort.reply(cohort.assemble(received["arrays"]), state={"momentum": torch.zeros(cohort.size)})

    app = Forgetful().client_app(SmallNetwork(), DATA)
    with pytest.raises(ValueError, match="keeps 'momentum', which its initial state does not declare as personal"):
        app.run("train", [0], app.initial_state.expand(1), {"arrays": app.template}, {})


@pytest.mark.parametrize("cohort", [1, 4])
def test_personal_state_of_another_type_leaves_its_clients_out(cohort: int) -> None:
    class Doubling(LocalUpdate):
        personal = "head"

        def train(self, cohort: Cohort, received: Any, config: Any) -> Reply:
            params = cohort.assemble(received["arrays"])
            kept = params.select(*cohort.names("head")).double()
            return cohort.reply(params, state={"model": kept})

    class Careless(PersonalizedStrategy):
        update = Doubling

    app = Doubling().client_app(SmallNetwork(), DATA)
    grid = LocalGrid(app, DATA.num_clients, clients_at_once=cohort, workers=1)
    reason = r"keeps 'model/head\.\w+' as torch.float64 \[.*\], which its initial state declares as torch.float32"
    with pytest.raises(TrainingError, match=f"^round 1: 0 of 4 .*{reason}"):
        Careless().start(grid, app.initial_arrays(), num_rounds=1)


@pytest.mark.parametrize("cohort", [1, 4])
def test_forgetting_to_keep_what_is_personal_is_refused_in_the_first_round(cohort: int) -> None:
    class Forgetful(LocalUpdate):
        shared = "body"
        personal = "head"

        def train(self, cohort: Cohort, received: Any, config: Any) -> Reply:
            params = cohort.assemble(received["arrays"])
            cohort.fit(params, self.loss)
            return cohort.reply(params, keep="none")

    class Careless(PersonalizedStrategy):
        update = Forgetful

    app = Forgetful().client_app(SmallNetwork(), DATA)
    grid = LocalGrid(app, DATA.num_clients, clients_at_once=cohort, workers=1)
    reason = "Forgetful does not keep 'model/head.bias', which its initial state declares as personal"
    with pytest.raises(TrainingError, match=f"^round 1: 0 of 4 .*{reason}"):
        Careless().start(grid, app.initial_arrays(), num_rounds=1)


def test_parameter_groups_with_unknown_names_are_refused_before_training() -> None:
    _, update = make_strategy("fedavg", training=Training(groups={"heat": {"lr": 0.1}}))
    with pytest.raises(ValueError, match="heat"):
        update.client_app(SmallNetwork(), DATA)


def test_fedbn_refuses_a_network_without_normalization() -> None:
    _, update = make_strategy("fedbn")
    with pytest.raises(ValueError, match="normalization"):
        update.client_app(SmallNetwork(norm=False), DATA)
    with pytest.raises(ValueError, match="'head'"):
        make_strategy("fedper")[1].client_app(nn.Linear(6, 4), DATA)
