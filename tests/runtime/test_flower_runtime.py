"""Flower's simulation engine as a runtime: what travels, who is waited for, faults, and the same numbers."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import flwr.app as flower
import numpy as np
import pytest
import torch
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedpers.client.app import IDENTIFY, STATE, CohortApp
from fedpers.cohort import Cohort, Reply, entries, leaves
from fedpers.errors import ConfigError, TrainingError
from fedpers.failures import sentence_of
from fedpers.flower_private import delivered, give_id, server_identity
from fedpers.records import METRICS, from_record
from fedpers.run import run_rounds
from fedpers.runtime.flower import FlowerGrid, await_clients
from fedpers.runtime.flower_clients import EXCHANGE_STATE, RemoteApp
from fedpers.runtime.flower_simulation import FlowerSimulation, flower_simulation
from fedpers.runtime.grid import FIRST_NODE, context_of
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import PersonalizedStrategy, RoundReport, make_strategy
from fedpers.strategies.fedavg import FedAvg, FedAvgUpdate
from tests.problems import Problem, gaussian_data, problem

METHODS = ("fedjets", "fedrap")  # pfedpg and scaffold: tests/runtime/test_superlink.py


def halves(method: str) -> tuple[PersonalizedStrategy, CohortApp]:
    given = problem(method)
    server = {"fraction": 0.7, "seed": 3, "unseen": given.data.unseen}
    strategy, update = make_strategy(method, given.options, server=server, training=given.training)
    app = update.client_app(given.network, given.data, seed=3)
    strategy.attach(app)
    return strategy, app


def app_of(method: str) -> CohortApp:
    return halves(method)[1]


def outcome(method: str, grid: Any) -> dict[str, Any]:
    """Everything there is after three rounds, by name."""
    strategy, app = halves(method)
    last: list[flower.ArrayRecord] = []
    for report in run_rounds(
        strategy, grid, app.initial_arrays(), 3, after_round=lambda _, arrays, is_last: last.append(arrays)
    ):
        assert not report.failures
        assert not report.evaluation_failures
    results: dict[str, Any] = {f"arrays/{name}": value for name, value in leaves(from_record(last[-1])).items()}
    for role, values in strategy.state.items():
        results.update({f"{role}/{name}": value for name, value in leaves(values).items()})
    for clients, states in grid.blocks():
        for name, value in leaves(states).items():
            results.update({f"kept/{client}/{name}": row for client, row in zip(clients.tolist(), value, strict=True)})
    for group in ("clients", "unseen", "adapted"):
        results.update(
            {f"{group}/{client}/{n}": v for client, row in getattr(report, group).items() for n, v in row.items()}
        )
    return results


def assert_equal(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        wanted = torch.as_tensor(value).double()
        scale = max(float(wanted.abs().max()), 1e-2) if wanted.numel() else 1.0
        torch.testing.assert_close(torch.as_tensor(actual[name]).double(), wanted, rtol=0, atol=1e-5 * scale, msg=name)


def locally(method: str) -> dict[str, Any]:
    app = app_of(method)
    grid = LocalGrid(app, app.data.num_clients, clients_at_once=1, workers=1)
    with server_identity(1):
        results = outcome(method, grid)
    grid.close()
    return results


# -------------------------------------------------------------- what travels


def never(run_config: Any) -> CohortApp:
    raise ConfigError("dataset.root", "nowhere", "a folder")


def failing(run_config: Any) -> CohortApp:
    raise OSError("disk gone")


calls: list[int] = []


def counted(run_config: Any) -> CohortApp:
    calls.append(1)
    return app_of("fedavg")


def ask(app: RemoteApp, context: flower.Context, kind: str, content: flower.RecordDict | None = None) -> flower.Message:
    with server_identity(1):
        message = flower.Message(content or flower.RecordDict(), context.node_id, kind)
        give_id(message)
        return app(delivered(message, message.content), context)


def test_a_client_app_is_light_and_says_which_client_it_holds_without_data() -> None:
    app = RemoteApp(partial(never), "key")
    sent = pickle.dumps(app)
    assert len(sent) < 1000
    restored = pickle.loads(sent)
    reply = ask(restored, context_of(2, 3, {}), IDENTIFY)
    assert reply.content[METRICS]["partition-id"] == 2
    context = context_of(2, 3, {})
    context.node_config = {}
    assert ask(restored, context, IDENTIFY).error.reason.startswith("partition-id=None: expected")


@pytest.mark.parametrize(
    ("make", "reason"),
    [(never, "dataset.root=nowhere: expected a folder."), (failing, "OSError: disk gone")],
)
def test_what_a_client_raises_is_its_answer_in_one_sentence(make: Any, reason: str) -> None:
    reply = ask(RemoteApp(make), context_of(0, 3, {}), "train")
    assert sentence_of(reply.error.reason).partition(" (at ")[0] == reason


def test_personal_state_is_given_away_in_a_simulation_only() -> None:
    for simulated in (False, True):
        app = pickle.loads(pickle.dumps(RemoteApp(counted, "kept", simulated=simulated)))
        context = context_of(1, 7, {})
        ask(app, context, "query.nothing")
        context.state[STATE] = flower.ArrayRecord({"head": flower.Array(np.ones(2))})
        reply = ask(app, context, EXCHANGE_STATE)
        assert reply.has_content() == simulated
        assert STATE in context.state


def test_the_app_is_made_once_in_a_process_and_state_of_another_run_is_dropped() -> None:
    calls.clear()
    context = context_of(1, 7, {"a": 1})
    context.state["other"] = flower.MetricRecord({"kept": 1})
    for key, made in (("a", 1), ("a", 1), ("b", 2)):
        context.state["before"] = flower.MetricRecord({"run": 1})
        app = pickle.loads(pickle.dumps(RemoteApp(counted, key)))
        ask(app, context, "query.nothing")
        assert len(calls) == made
        assert "other" not in context.state
    assert "before" not in context.state


# -------------------------------------------------------------------- nodes


class Moving(Grid):
    """Clients under node ids that change; some nodes are silent, and some are listed though they have ended."""

    def __init__(self, app: CohortApp, clients: int) -> None:
        self.inner = LocalGrid(app, clients, clients_at_once=1, workers=1)
        self.ids = list(range(100, 100 + clients))  # node of each client
        self.silent: set[int] = set()  # on the question which client they hold
        self.ghosts: set[int] = set()
        self.twin: dict[int, int] = {}  # node that holds the client of another
        self.asked: list[list[int]] = []
        self.replies: dict[str, tuple[int, flower.Message]] = {}

    def set_run(self, run: Run) -> None:
        self.inner.set_run(run)

    @property
    def run(self) -> Run:
        return self.inner.run

    def create_message(self, *given: Any, **named: Any) -> flower.Message:
        return self.inner.create_message(*given, **named)

    def get_node_ids(self) -> list[int]:
        return [*reversed(self.ids), *self.ghosts, *self.twin]

    def push_messages(self, messages: Iterable[flower.Message]) -> list[str]:
        sent = list(messages)
        for message in sent:
            key, node = give_id(message), message.metadata.dst_node_id
            if node in self.ghosts:
                continue
            inner = delivered(message, message.content)
            inner.metadata.dst_node_id = FIRST_NODE + self.ids.index(self.twin.get(node, node))
            (reply,) = self.inner.send_and_receive([inner])
            reply.metadata.__dict__["_src_node_id"] = node
            reply.metadata.__dict__["_reply_to_message_id"] = key
            self.replies[key] = (node if message.metadata.message_type == IDENTIFY else -1, reply)
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> list[flower.Message]:
        arrived = [i for i in message_ids if i in self.replies and self.replies[i][0] not in self.silent]
        return [self.replies.pop(i)[1] for i in arrived]

    def send_and_receive(
        self, messages: Iterable[flower.Message], *, timeout: float | None = None
    ) -> list[flower.Message]:
        sent = list(messages)
        if sent and sent[0].metadata.message_type == IDENTIFY:
            self.asked.append(sorted(message.metadata.dst_node_id for message in sent))
        return self.pull_messages(self.push_messages(sent))


class Listing(FlowerGrid):
    """A grid that lists only some nodes."""

    def __init__(self, grid: Grid, listed: list[int]) -> None:
        super().__init__(grid)
        self.listed = listed

    def get_node_ids(self) -> list[int]:
        return self.listed


def moving(sizes: tuple[int, ...] = (6, 5, 7, 8)) -> Moving:
    app = FedAvgUpdate().client_app(problem("fedavg").network, gaussian_data(sizes))
    return Moving(app, len(sizes))


def test_only_nodes_that_came_are_asked() -> None:
    strategy, grid = FedAvg(), moving()
    with server_identity(1):
        assert strategy.nodes(grid) == {0: 100, 1: 101, 2: 102, 3: 103}
        grid.ids[2] = 7
        assert strategy.nodes(grid) == {0: 100, 1: 101, 2: 7, 3: 103}
        grid.ids[0] = 8
        assert strategy.nodes(grid) == {0: 8, 1: 101, 2: 7, 3: 103}
        assert strategy.nodes(Listing(grid, [7, 103])) == {2: 7, 3: 103}
    assert grid.asked == [[100, 101, 102, 103], [7], [8]]


def test_a_silent_node_is_waited_for_once_and_found_when_it_answers(caplog: pytest.LogCaptureFixture) -> None:
    strategy, grid = FedAvg(), moving()
    grid.silent = {102}
    with server_identity(1):
        for _ in range(3):
            assert strategy.nodes(grid) == {0: 100, 1: 101, 3: 103}
        assert grid.asked == [[100, 101, 102, 103]]
        grid.silent = set()
        assert strategy.nodes(grid) == {0: 100, 1: 101, 2: 102, 3: 103}
    assert grid.asked == [[100, 101, 102, 103]]
    assert caplog.text.count("node 102 does not say which client it holds") == 1


def test_nodes_that_do_not_answer_at_all_are_not_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpers.server.nodes.START_SECONDS", 0.0)
    strategy, grid = FedAvg(), moving()
    strategy.begin()
    grid.silent = {100, 101, 102, 103}
    with server_identity(1):
        assert strategy.nodes(grid) == {}
        with pytest.raises(TrainingError, match="round 1: none of 4 nodes says which client it holds"):
            list(strategy.configure_train(1, flower.ArrayRecord(), flower.ConfigRecord(), grid))


class Starting(Moving):
    """A grid whose nodes answer one after the other, the first when it is looked at for the third time."""

    looked = 0

    def pull_messages(self, message_ids: Iterable[str]) -> list[flower.Message]:
        self.looked += 1
        self.silent = set(self.ids[max(0, self.looked - 2) :])
        return super().pull_messages(message_ids)


def test_nodes_that_are_still_starting_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fedpers.server.nodes.POLL_SECONDS", 0.0)
    app = FedAvgUpdate().client_app(problem("fedavg").network, gaussian_data((6, 5, 7, 8)))
    strategy, grid = FedAvg(), Starting(app, 4)
    with server_identity(1):
        assert strategy.nodes(grid) == {0: 100, 1: 101, 2: 102, 3: 103}
    assert grid.asked == [[100, 101, 102, 103]]
    assert "left out" not in caplog.text


def test_a_client_whose_former_node_is_still_listed_is_found_on_the_new_one() -> None:
    strategy, grid = FedAvg(), moving()
    with server_identity(1):
        strategy.nodes(grid)
        grid.ids[1], grid.ghosts = 55, {101}
        for _ in range(2):
            assert strategy.nodes(grid) == {0: 100, 1: 55, 2: 102, 3: 103}
    assert grid.asked == [[100, 101, 102, 103], [55], [101]]


def test_two_living_nodes_with_one_client_end_the_run() -> None:
    strategy, grid = FedAvg(), moving()
    with server_identity(1):
        strategy.nodes(grid)
        grid.twin = {99: 101}
        with pytest.raises(TrainingError, match="two nodes hold the same partition-id"):
            strategy.nodes(grid)


@pytest.mark.slow
def test_server_state_finds_its_client_under_a_new_node_id() -> None:
    results = []
    for moves in (False, True):
        strategy, app = halves("pfedpg")
        grid = Moving(app, app.data.num_clients)
        with server_identity(1):
            for report in run_rounds(strategy, grid, app.initial_arrays(), 3):
                assert not report.failures
                if moves:
                    grid.ids[1], grid.ids[4] = 500 + report.round, 3 + report.round
        results.append((report.clients, {role: leaves(values) for role, values in strategy.state.items()}))
    (clients, state), (moved_clients, moved_state) = results
    assert state
    assert moved_clients == clients
    for role, values in state.items():
        for name, value in values.items():
            assert torch.equal(moved_state[role][name], value), (role, name)


def test_missing_nodes_are_waited_for_and_then_named() -> None:
    silent = moving()
    silent.silent = {102}
    with server_identity(1):
        with pytest.raises(TrainingError, match=r"^2 of 4 nodes are connected after 0\.2 seconds; start one SuperNode"):
            await_clients(Listing(moving(), [100, 103]), FedAvg(), 4, seconds=0.2)
        with pytest.raises(TrainingError, match=r"^no node holds client 2 of 4; each needs a SuperNode"):
            await_clients(silent, FedAvg(), 4, seconds=0.2)
        with pytest.raises(TrainingError, match=r"^a node has partition-id 2, but the data have 2 clients"):
            await_clients(moving(), FedAvg(), 2, seconds=0.2)


def test_whoever_waits_learns_that_the_engine_has_ended() -> None:
    ended: list[str] = []

    def watch() -> None:
        if ended:
            raise TrainingError("it has ended.")

    class Mute(LocalGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Any:
            ended.append("now")
            return []

    app = FedAvgUpdate().client_app(problem("fedavg").network, gaussian_data((6, 5)))
    with server_identity(1), pytest.raises(TrainingError, match="it has ended"):
        FlowerGrid(Mute(app, 2), watch).send_and_receive([flower.Message(flower.RecordDict(), 2, IDENTIFY)])


# -------------------------------------------------------------- the engine itself


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")


@dataclass(kw_only=True)
class Bad(FedAvgUpdate):
    """Client 1 raises, 3 sends NaN, 5 is slow; in round 2 only."""

    nap: float = 0.0

    def train(self, cohort: Cohort, received: Any, config: Any) -> Reply:
        (client,) = cohort.clients
        if config["server-round"] == 2:
            if client == 1:
                raise ValueError("no power")
            if client == 5:
                time.sleep(self.nap)
        reply = super().train(cohort, received, config)
        if config["server-round"] == 2 and client == 3:
            for value in entries(reply.records["arrays"]).values():
                value.copy_(torch.full_like(value, torch.nan) if value.is_floating_point() else value)
        return reply


def bad_app(nap: float) -> CohortApp:
    given: Problem = problem("fedavg")
    return Bad(training=given.training, nap=nap).client_app(given.network, given.data, seed=3)


def failures(grid: Grid, app: CohortApp, timeout: float | None) -> list[dict[int, str]]:
    reports: list[RoundReport] = list(run_rounds(FedAvg(seed=3), grid, app.initial_arrays(), 3, timeout=timeout))
    return [report.failures | report.evaluation_failures for report in reports]


def surroundings() -> tuple[Any, ...]:
    return os.environ.get("PYTHONPATH"), TaskIdentity._run_id, logging.getLogger("flwr").level


@pytest.mark.slow
class TestOneEngine:
    """Several runs in one engine, which starts and ends once."""

    @pytest.fixture(scope="class")
    def engine(self) -> Iterator[FlowerSimulation]:
        before = surroundings()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FLWR_TELEMETRY_ENABLED", "0")
            with FlowerSimulation(7) as engine:
                yield engine
        assert surroundings() == before

    def test_methods_one_after_another_give_what_they_give_here(self, engine: FlowerSimulation) -> None:
        results: dict[str, dict[str, Any]] = {}
        for method in METHODS:
            engine.run(
                partial(app_of, method), lambda grid, method=method: results.update({method: outcome(method, grid)})
            )
        for method in METHODS:
            assert_equal(results[method], locally(method))

    def test_personal_state_can_be_read_and_put_back(self, engine: FlowerSimulation) -> None:
        strategy, app = halves("gpfl")
        local = LocalGrid(app, 7, clients_at_once=1, workers=1)
        with server_identity(1):
            list(run_rounds(strategy, local, app.initial_arrays(), 1))
        ((clients, states),) = local.blocks()
        assert len(clients) < 7

        def main(grid: Any) -> None:
            assert list(grid.blocks()) == []
            grid.load([(clients[:2], states[:2]), (clients[2:], states[2:])])
            ((kept_clients, kept),) = grid.blocks()
            assert torch.equal(kept_clients, clients)
            for name, value in leaves(states).items():
                assert torch.equal(leaves(kept)[name], value), name
            grid.load([(clients[:1], states[:1])])
            ((kept_clients, _),) = grid.blocks()
            assert kept_clients.tolist() == clients[:1].tolist()

        engine.run(partial(app_of, "gpfl"), main)

    def test_clients_that_raise_send_nan_or_nothing_are_left_out_and_named(self, engine: FlowerSimulation) -> None:
        reported: list[list[dict[int, str]]] = []
        app = bad_app(0.0)
        with server_identity(1):
            local = failures(LocalGrid(app, 7, clients_at_once=1, workers=1), app, None)
        assert local[2].keys() == {1, 3}
        engine.run(partial(bad_app, 10.0), lambda grid: reported.append(failures(grid, app, 8.0)))
        assert reported[0][2].pop(5) == "no reply"
        assert reported == [local]

    def test_what_the_server_raises_comes_out(self, engine: FlowerSimulation) -> None:
        def main(grid: Grid) -> None:
            raise TrainingError("round 1: enough.")

        with pytest.raises(TrainingError, match=r"round 1: enough\."):
            engine.run(partial(app_of, "fedavg"), main)


def sleeping_app(nap: float) -> CohortApp:
    given = problem("fedavg")
    return Sleeping(training=given.training).client_app(given.network, given.data, seed=3)


@dataclass(kw_only=True)
class Sleeping(FedAvgUpdate):
    def train(self, cohort: Cohort, received: Any, config: Any) -> Reply:
        time.sleep(600)
        return super().train(cohort, received, config)


def interrupted(grid: Grid) -> None:
    app = app_of("fedavg")
    for report in run_rounds(FedAvg(seed=3), grid, app.initial_arrays(), 1):
        assert report.round == 0
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()


@pytest.mark.slow
def test_ctrl_c_comes_out_and_nothing_goes_on() -> None:
    import ray

    before = set(threading.enumerate())
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            flower_simulation(partial(sleeping_app, 0.0), 7, interrupted, cpus_per_actor=2)  # which is one actor
    finally:
        signal.signal(signal.SIGINT, handler)
    assert not ray.is_initialized()
    left = {t for t in set(threading.enumerate()) - before if not t.daemon}
    for thread in left:
        thread.join(30)
    assert not [t.name for t in left if t.is_alive()]


@pytest.mark.slow
def test_an_engine_that_cannot_start_says_why() -> None:
    with pytest.raises(TrainingError, match=r"^Flower's simulation has ended \(ValueError: ActorPool is empty"):
        flower_simulation(partial(app_of, "fedavg"), 7, partial(outcome, "fedavg"), cpus_per_actor=10_000)
