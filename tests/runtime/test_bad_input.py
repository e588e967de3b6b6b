"""Bad input is refused in a sentence, and whatever ends a run leaves nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import flwr.app as flower
import pytest
import torch
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity

import fedpers
from fedpers import flower_app as app_of_settings
from fedpers.cohort import Cohort, Reply, Training
from fedpers.errors import ConfigError, TrainingError
from fedpers.flower_private import server_identity
from fedpers.runtime.grid import FIRST_NODE, RUN_ID
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import CohortApp, FedAvg, FedAvgUpdate, LocalUpdate, Received
from tests import flower_app
from tests.problems import SmallNetwork, gaussian_data

CLIENTS = gaussian_data().num_clients


def cohort_app(update: LocalUpdate | None = None) -> CohortApp:
    training = Training(lr=0.01, batch_size=8)
    return (update or FedAvgUpdate(training=training)).client_app(SmallNetwork(), gaussian_data())


def server_app(rounds: int = 2, strategy: FedAvg | None = None, app: CohortApp | None = None) -> ServerApp:
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: flower.Context) -> None:
        (strategy or FedAvg()).start(grid, (app or cohort_app()).initial_arrays(), num_rounds=rounds)

    return server


def identity() -> tuple[Any, ...]:
    return TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize("app", [flower_app.client_app, cohort_app])
@pytest.mark.parametrize("number", [0, -1, 2.0, "two", None])
def test_number_of_nodes(app: Callable[[], ClientApp], number: Any) -> None:
    with pytest.raises(ConfigError, match=rf"num_supernodes={number}: expected a whole number >= 1"):
        fedpers.simulate(ServerApp(), app(), num_supernodes=number)


def test_fewer_nodes_than_clients_in_the_data() -> None:
    sentence = f"^num_supernodes={CLIENTS - 1}: expected {CLIENTS}, a node for each client in the data.$"
    with pytest.raises(ConfigError, match=sentence):
        fedpers.simulate(ServerApp(), cohort_app(), CLIENTS - 1)


def test_a_grid_of_another_app_is_refused_and_closed() -> None:
    grid = LocalGrid(cohort_app(), CLIENTS)
    with pytest.raises(ConfigError, match=r"^client_app=CohortApp: expected the app that the grid was made with\.$"):
        fedpers.simulate(ServerApp(), cohort_app(), CLIENTS, grid=grid)
    with pytest.raises(RunNotRunningException):
        grid.push_messages([])


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("clock=devices", r"^clock=devices: expected none in a Flower app"),
        ("tracker=tensorboard", r"^tracker=.*: expected none in a Flower app"),
        ("checkpoint.best=true", r"^checkpoint=.*: expected as by default in a Flower app"),
        ("runtime=ray", r"^runtime=ray: expected none: Flower runs the clients of an app\.$"),
        ("min_replies=9", r"^min_replies=9: expected at most 3, the clients sampled in a round\.$"),
    ],
)
def test_settings_that_a_flower_app_has_no_use_for_are_refused_before_training(typed: str, sentence: str) -> None:
    settings = f"strategy=fedavg dataset=digits partition.num_clients=3 rounds=1 {typed}"
    with pytest.raises(ConfigError, match=sentence):
        fedpers.simulate(
            app_of_settings.server_app(), app_of_settings.client_app(), 3, workers=1, run_config={"settings": settings}
        )


def test_more_nodes_than_clients_in_the_data() -> None:
    allowed = f"num_supernodes={CLIENTS + 1}: expected a whole number >= 1 and <= {CLIENTS}"
    with pytest.raises(ConfigError, match=allowed):
        LocalGrid(cohort_app(), CLIENTS + 1)
    assert len(list(LocalGrid(cohort_app(), 2).get_node_ids())) == 2


@pytest.mark.parametrize("app", [flower_app.client_app, cohort_app])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clients_at_once", 0),
        ("clients_at_once", "many"),
        ("clients_at_once", 1.5),
        ("clients_at_once", None),
        ("workers", -1),
        ("workers", 0),
    ],
)
def test_cohort_and_workers(app: Callable[[], ClientApp], key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"runtime\.{key}={value}: expected a whole number >= 1, or auto"):
        fedpers.simulate(ServerApp(), app(), 2, **{key: value})


def test_a_message_to_a_node_that_does_not_exist_runs_nothing() -> None:
    app = ClientApp()
    calls: list[int] = []

    @app.train()
    def train(message: flower.Message, context: flower.Context) -> flower.Message:
        calls.append(1)
        return flower.Message(flower.RecordDict(), reply_to=message)

    grid = LocalGrid(app, 2)
    for node in (0, FIRST_NODE - 1, FIRST_NODE + 2):
        with server_identity(RUN_ID):
            messages = [flower.Message(flower.RecordDict(), n, "train") for n in (FIRST_NODE, node)]
            with pytest.raises(ValueError, match=rf"node {node} does not exist; .* {FIRST_NODE} to {FIRST_NODE + 1}"):
                grid.send_and_receive(messages)
    assert not calls


def test_no_messages() -> None:
    grid = LocalGrid(cohort_app(), 2)
    assert list(grid.send_and_receive([])) == []


def test_a_partition_outside_the_data_on_another_engine_is_an_error_of_that_client() -> None:
    app = cohort_app()
    context = flower.Context(1, 2, {"partition-id": CLIENTS}, flower.RecordDict(), {})
    with server_identity(RUN_ID):
        message = flower.Message(flower.RecordDict(), 2, "train")
    with pytest.raises(ConfigError, match=rf"partition-id={CLIENTS}: expected a whole number from 0 to {CLIENTS - 1}"):
        app(message, context)


@pytest.mark.parametrize("kind", ["train.unknown", "query", "query.other", "evaluate.more"])
def test_a_message_type_a_method_does_not_know(kind: str) -> None:
    grid = LocalGrid(cohort_app(), 3, clients_at_once=2, workers=1)
    with server_identity(RUN_ID):
        messages = [flower.Message(flower.RecordDict(), n, kind) for n in grid.get_node_ids()]
        replies = list(grid.send_and_receive(messages))
    assert [r.has_error() for r in replies] == [True] * 3
    assert all(kind.replace(".", "_") in r.error.reason for r in replies)


def test_backend_settings_are_accepted_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="backend settings have no effect"):
        fedpers.simulate(
            flower_app.server_app({}, rounds=1),
            flower_app.client_app(),
            2,
            "ray",
            {"client_resources": {"num_cpus": 1}},
        )


# ------------------------------------------------------------- ends of all kinds


class FailingUpdate(FedAvgUpdate):
    """Raises on one client in the second round."""

    error: BaseException

    def train(self, cohort: Cohort, received: Received, config: Any) -> Reply:
        if config["server-round"] == 2 and 1 in cohort.clients:
            raise self.error
        return super().train(cohort, received, config)


def failing(error: BaseException) -> CohortApp:
    update = FailingUpdate(training=Training(lr=0.01, batch_size=8))
    update.error = error
    return cohort_app(update)


@pytest.fixture(autouse=True)
def _leaves_nothing_behind() -> Any:
    before, threads = identity(), set(threading.enumerate())
    count = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert identity() == before
    assert set(threading.enumerate()) <= threads
    assert torch.get_num_threads() == 2
    torch.set_num_threads(count)


@pytest.mark.parametrize(("cohort", "workers"), [(2, 1), (2, 2), (1, 2), ("auto", "auto")])
def test_a_run_leaves_nothing_behind(cohort: Any, workers: Any) -> None:
    fedpers.simulate(server_app(), cohort_app(), CLIENTS, clients_at_once=cohort, workers=workers)


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_while_a_method_computes(workers: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        fedpers.simulate(server_app(5), failing(KeyboardInterrupt()), CLIENTS, clients_at_once=2, workers=workers)


def test_ctrl_c_ends_the_cohorts_that_wait() -> None:
    started: list[tuple[int, ...]] = []

    largest = max(range(CLIENTS), key=lambda c: len(gaussian_data().train[c]))

    class Interrupted(FedAvgUpdate):
        def train(self, cohort: Cohort, received: Received, config: Any) -> Reply:
            started.append(tuple(cohort.clients))
            if largest in cohort.clients:  # the first one
                raise KeyboardInterrupt
            return super().train(cohort, received, config)

    update = Interrupted(training=Training(lr=0.01, epochs=50, batch_size=8))
    app = cohort_app(update)
    grid = LocalGrid(app, CLIENTS, clients_at_once=1, workers=2)
    content = flower.RecordDict({"arrays": app.initial_arrays(), "config": flower.ConfigRecord({"server-round": 1})})
    with server_identity(RUN_ID), pytest.raises(KeyboardInterrupt):
        grid.send_and_receive([flower.Message(content, node, "train") for node in grid.get_node_ids()])
    assert grid.engine is not None
    assert grid.engine._pool is not None
    grid.engine._pool.submit(int).result()  # whatever was to run before has begun
    assert len(started) < CLIENTS
    grid.close()


def test_ctrl_c_in_a_plain_client_and_in_the_server() -> None:
    app = ClientApp()
    calls: list[int] = []

    @app.train()
    def train(message: flower.Message, context: flower.Context) -> flower.Message:
        calls.append(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedpers.simulate(flower_app.server_app({}), app, 5, workers=1)
    assert calls == [1]
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: flower.Context) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedpers.simulate(server, cohort_app(), CLIENTS, workers=2)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_client_of_a_cohort_that_raises_is_left_out_alone(workers: int) -> None:
    strategy = FedAvg()
    fedpers.simulate(
        server_app(2, strategy), failing(ValueError("no luck")), CLIENTS, clients_at_once=3, workers=workers
    )
    assert set(strategy.report.failures) == {1}
    assert strategy.report.failures[1].startswith("ValueError: no luck (at ")
    strategy = FedAvg(min_replies=CLIENTS)
    with pytest.raises(TrainingError, match=r"round 2: .*ValueError: no luck"):
        fedpers.simulate(
            server_app(2, strategy), failing(ValueError("no luck")), CLIENTS, clients_at_once=3, workers=workers
        )


def test_a_second_run_and_one_within_another() -> None:
    results: list[dict[str, Any]] = [{}, {}, {}]
    fedpers.simulate(flower_app.server_app(results[0]), flower_app.client_app(), 3)
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: flower.Context) -> None:
        fedpers.simulate(flower_app.server_app(results[1]), flower_app.client_app(), 3)
        flower_app.server_app(results[2])(grid, context)

    fedpers.simulate(server, flower_app.client_app(), 3)
    for other in results[1:]:
        for name, value in results[0]["arrays"].items():
            assert value == pytest.approx(other["arrays"][name], rel=1e-9)


def test_a_run_within_a_client() -> None:
    app = ClientApp()

    @app.train()
    def train(message: flower.Message, context: flower.Context) -> flower.Message:
        results: dict[str, Any] = {}
        fedpers.simulate(flower_app.server_app(results, rounds=1), flower_app.client_app(), 2)
        metrics = flower.MetricRecord({"rounds": len(results["train"])})
        return flower.Message(flower.RecordDict({"metrics": metrics}), reply_to=message)

    grid = LocalGrid(app, 1)
    with server_identity(RUN_ID):
        (reply,) = grid.send_and_receive([flower.Message(flower.RecordDict(), FIRST_NODE, "train")])
    assert reply.content["metrics"]["rounds"] == 1


def test_a_grid_that_is_closed_says_that_its_run_has_ended() -> None:
    grid = LocalGrid(flower_app.client_app(), 1)
    with server_identity(RUN_ID):
        message = flower.Message(flower.RecordDict(), FIRST_NODE, "query")
    grid.close()
    grid.close()
    with pytest.raises(RunNotRunningException):
        grid.get_node_ids()
    with pytest.raises(RunNotRunningException):
        grid.push_messages([message])
