"""What the engine has in flight, and what it does with a cohort that fails."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import flwr.app as flower
import pytest

from fedpers.client.results import CohortResult
from fedpers.cohort import Cohort, Reply
from fedpers.flower_private import server_identity
from fedpers.runtime.engine import AHEAD, CohortEngine
from fedpers.runtime.local import LocalGrid
from fedpers.server.collect import ReplyCollector
from fedpers.strategies import FedAvg, FedAvgUpdate
from tests.problems import SmallNetwork, gaussian_data

CLIENTS = 24
DATA = gaussian_data((9,) * CLIENTS)


@pytest.fixture(autouse=True)
def _server() -> Iterator[None]:
    with server_identity(1):
        yield


class Counting(FedAvgUpdate):
    """Counts the cohorts whose training has begun."""

    def train(self, cohort: Cohort, received: Any, config: Any) -> Reply:
        with LOCK:
            STARTED.append(cohort.clients[0])
        return super().train(cohort, received, config)


LOCK = threading.Lock()
STARTED: list[int] = []


class Slow:
    """Takes its time over each cohort, and notes how many are ahead of it."""

    def __init__(self) -> None:
        self.ahead: list[int] = []
        self.clients: list[int] = []

    def take_cohort(self, result: CohortResult) -> None:
        time.sleep(0.01)
        self.clients += result.clients
        with LOCK:
            self.ahead.append(len(STARTED) - len(self.clients))


def test_a_round_is_divided_into_cohorts_of_nearly_equal_size() -> None:
    sizes: list[int] = []

    class Watched(FedAvgUpdate):
        def train(self, cohort: Cohort, received: Any, config: Any) -> Reply:
            sizes.append(cohort.size)
            return super().train(cohort, received, config)

    app, strategy = Watched().client_app(SmallNetwork(), DATA), FedAvg(seed=1)
    grid = LocalGrid(app, CLIENTS, clients_at_once=10, workers=1)
    strategy.begin()
    list(grid.send_and_receive(strategy.configure_train(1, app.initial_arrays(), flower.ConfigRecord(), grid)))
    grid.close()
    assert sizes == [8, 8, 8]  # not 10, 10 and 4


@pytest.mark.parametrize("workers", [1, 2])
def test_cohorts_in_flight_are_few_however_slowly_they_are_folded(workers: int) -> None:
    STARTED.clear()
    app = Counting().client_app(SmallNetwork(norm=False), DATA)
    engine = CohortEngine(app, 1, workers)
    content = flower.RecordDict({"arrays": app.initial_arrays(), "config": flower.ConfigRecord({"server-round": 1})})
    slow: Any = Slow()
    engine.run("train", list(range(CLIENTS)), [content] * CLIENTS, slow)
    engine.close()
    assert sorted(slow.clients) == list(range(CLIENTS))
    assert max(slow.ahead) <= AHEAD * workers


class Unlucky(FedAvgUpdate):
    """Raises for two clients, whoever they are computed with."""

    def train(self, cohort: Cohort, received: Any, config: Any) -> Reply:
        if {3, 11} & set(cohort.clients):
            raise RuntimeError("out of luck")
        return super().train(cohort, received, config)


class UnluckyAverage(FedAvg):
    """Its server half."""

    update = Unlucky


@pytest.mark.parametrize("cohort", [1, 5, CLIENTS])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_cohort_that_raises_is_folded_client_by_client(
    cohort: int, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    app = Unlucky().client_app(SmallNetwork(norm=False), DATA)
    strategy = UnluckyAverage()
    grid = LocalGrid(app, CLIENTS, clients_at_once=cohort, workers=workers)
    with caplog.at_level(logging.CRITICAL, logger="fedpers"):
        strategy.start(grid, app.initial_arrays(), num_rounds=1)
    grid.close()
    failures = strategy.report.failures
    assert {client: reason.partition(" (at ")[0] for client, reason in failures.items()} == {
        3: "RuntimeError: out of luck",
        11: "RuntimeError: out of luck",
    }
    assert strategy.report.samples == 9 * (CLIENTS - 2)


def test_a_collector_gets_every_client_once() -> None:
    app = FedAvgUpdate().client_app(SmallNetwork(norm=False), DATA)
    strategy, grid = FedAvg(), LocalGrid(app, CLIENTS, clients_at_once=5, workers=2)
    strategy.begin()
    messages = list(strategy.configure_train(1, app.initial_arrays(), flower.ConfigRecord(), grid))
    collector = ReplyCollector(strategy.reply_rules(strategy.training_clients))
    grid.send_and_fold(messages, collector)
    grid.close()
    assert sorted(collector.collected.metrics) == list(range(CLIENTS))
    assert collector.collected.failures == {}
