"""Flower mods around the clients' training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import flwr.app as flower
import numpy as np
import pytest
import torch
from flwr.client.mod import secagg_mod, secaggplus_mod
from flwr.clientapp.mod import LocalDpMod, arrays_size_mod, fixedclipping_mod, message_size_mod
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

import fedpers
from fedpers.cohort import entries
from fedpers.errors import ConfigError, TrainingError
from fedpers.flower_private import server_identity
from fedpers.records import from_record
from fedpers.run import run_rounds
from fedpers.runtime.grid import FIRST_NODE
from fedpers.runtime.local import LocalGrid
from fedpers.server.postprocessors import Privacy
from fedpers.strategies import CohortApp, FedRep, FedRepUpdate, LocalUpdate, RoundReport, make_strategy
from tests.cohort.helpers import assert_same
from tests.problems import SmallNetwork, gaussian_data
from tests.runtime.wire import WireGrid

DATA = gaussian_data((12, 9, 16, 7))


def app_of(mods: Sequence[Any] = (), update: LocalUpdate | None = None) -> CohortApp:
    return (update or FedRepUpdate()).client_app(SmallNetwork(norm=False), DATA, seed=3, mods=mods)


def rounds(
    mods: Sequence[Any], kind: type[LocalGrid] = LocalGrid, **server: Any
) -> tuple[dict[str, Tensor], RoundReport, LocalGrid]:
    """Arrays, last report and grid after three rounds."""
    strategy, update = make_strategy("fedrep", {"weighting": "uniform"}, server={"seed": 3, **server})
    app = app_of(mods, update)
    grid = kind(app, DATA.num_clients)
    with server_identity(1):
        result = strategy.start(grid, app.initial_arrays(), num_rounds=3)
    return dict(entries(from_record(result.arrays))), strategy.report, grid


def nothing(message: flower.Message, context: flower.Context, call_next: Any) -> flower.Message:
    reply: flower.Message = call_next(message, context)
    return reply


@pytest.mark.slow
@pytest.mark.parametrize("mods", [[nothing], [arrays_size_mod, message_size_mod, nothing]], ids=len)
@pytest.mark.parametrize("grid", [LocalGrid, WireGrid])
def test_a_mod_that_changes_nothing_changes_nothing(grid: type[LocalGrid], mods: list[Any]) -> None:
    expected, usual, _ = rounds([])
    actual, report, _ = rounds(mods, grid)
    assert_same(actual, expected)
    assert report.clients.keys() == usual.clients.keys()
    for client, metrics in usual.clients.items():
        assert report.clients[client] == pytest.approx(metrics, rel=1e-4)
    assert (report.bytes_up, report.bytes_down, report.steps) == (usual.bytes_up, usual.bytes_down, usual.steps)


def test_a_mod_sees_each_training_and_nothing_else_and_keeps_state() -> None:
    seen = []

    def counting(message: flower.Message, context: flower.Context, call_next: Any) -> flower.Message:
        seen.append((message.metadata.message_type, message.metadata.dst_node_id - FIRST_NODE))
        before = context.state.metric_records["own"]["calls"] if "own" in context.state else 0
        context.state["own"] = flower.MetricRecord({"calls": before + 1})  # type: ignore[operator]
        reply: flower.Message = call_next(message, context)
        assert "fedpers" in context.state  # the method's own state, beside it
        return reply

    _, _, grid = rounds([counting])
    assert seen == [("train", client) for _ in range(3) for client in range(4)]
    assert [grid.contexts[FIRST_NODE + k].state.metric_records["own"]["calls"] for k in range(4)] == [3] * 4


def test_the_first_mod_is_the_outermost() -> None:
    order: list[str] = []

    def named(name: str) -> Any:
        def mod(message: flower.Message, context: flower.Context, call_next: Any) -> flower.Message:
            order.append(name)
            reply: flower.Message = call_next(message, context)
            order.append(name.upper())
            return reply

        return mod

    rounds([named("a"), named("b")])
    assert "".join(order) == "abBA" * 12


def test_sizes_are_told(caplog: pytest.LogCaptureFixture) -> None:
    flwr = logging.getLogger("flwr")
    before = flwr.propagate
    flwr.propagate = True
    with caplog.at_level(logging.INFO, logger="flwr"):
        _, report, _ = rounds([arrays_size_mod])
    flwr.propagate = before
    messages = [record.getMessage() for record in caplog.records if "elements sent" in record.getMessage()]
    assert len(messages) == 12
    assert int(messages[0].split()[-2]) >= report.bytes_up / 4  # the elements and their headers


def test_local_privacy_clips_as_ours_and_adds_noise() -> None:
    expected, _, _ = rounds([], postprocessors=(Privacy(noise=0.0, norm=0.2),))
    clipped, _, _ = rounds([LocalDpMod(0.2, 0.0, 1.0, 1e-5)])
    assert_same(clipped, expected)
    np.random.seed(0)  # noqa: NPY002 - what the mod draws from
    noisy, report, _ = rounds([LocalDpMod(0.2, 0.01, 1.0, 1e-5)])
    deviation = 0.01 * np.sqrt(2 * np.log(1.25e5)) / 1.0 / np.sqrt(4)  # of a mean over four clients, in each round
    gaps = torch.cat([(noisy[name] - value).flatten() for name, value in clipped.items()])
    assert deviation / 2 < float(gaps.std()) < 6 * deviation
    assert not report.failures


def test_what_a_mod_answers_with_is_booked() -> None:
    """Flower's clipping mod says what it lacks; it gives some of its errors as replies to the reply."""
    with pytest.raises(TrainingError, match="requires the key 'clipping_norm'"):
        rounds([fixedclipping_mod])

    def late(message: flower.Message, context: flower.Context, call_next: Any) -> flower.Message:
        reply = call_next(message, context)
        return flower.Message(flower.Error(7, "too late"), reply_to=reply)

    with pytest.raises(TrainingError, match="4 sampled clients sent a usable reply, 1 needed; too late"):
        rounds([late])


def test_a_mod_that_raises_costs_its_client_the_round() -> None:
    def raising(message: flower.Message, context: flower.Context, call_next: Any) -> flower.Message:
        if context.node_config["partition-id"] == 2:
            raise ArithmeticError("no")
        reply: flower.Message = call_next(message, context)
        return reply

    _, report, _ = rounds([raising])
    assert set(report.failures) == {2}
    assert report.failures[2].startswith("ArithmeticError: no (at ")
    assert len(report.clients) == 4


def test_our_own_rounds_run_with_mods() -> None:
    app = app_of([nothing])
    strategy = FedRep(seed=3)
    grid = LocalGrid(app, 4)
    with server_identity(1):
        reports = list(run_rounds(strategy, grid, app.initial_arrays(), 2))
    assert [len(report.clients) for report in reports] == [4, 4, 4]
    assert not any(report.failures for report in reports)


def test_state_beside_mods_is_neither_saved_nor_loaded() -> None:
    grid = LocalGrid(app_of([nothing]), 4)
    for use in (grid.blocks, lambda: grid.load([])):
        with pytest.raises(
            TrainingError, match=r"^personal state of clients with mods can be neither saved nor loaded: "
        ):
            use()


@pytest.mark.parametrize("mod", [secaggplus_mod, secagg_mod, "clip"], ids=["secagg+", "secagg", "no mod"])
def test_mods_that_need_a_protocol_of_their_own_are_refused(mod: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        app_of([nothing, mod])
    name = getattr(mod, "__name__", "str")
    assert str(caught.value) == f"mods={name}: expected mods that pass one training message on, such as LocalDpMod."


def counted() -> tuple[list[str], Any]:
    """A mod, and the types of the messages it has seen."""
    calls: list[str] = []

    def counting(message: flower.Message, context: flower.Context, call_next: Any) -> flower.Message:
        calls.append(message.metadata.message_type)
        reply: flower.Message = call_next(message, context)
        return reply

    return calls, counting


def test_copies_of_an_app_keep_its_mods() -> None:
    calls, counting = counted()
    app = app_of([counting])
    restricted = app.restrict([1, 2])
    assert restricted.mods == (counting,)
    grid = LocalGrid(restricted, 4)
    content = flower.RecordDict({"arrays": app.initial_arrays(), "config": flower.ConfigRecord({"server-round": 1})})
    with server_identity(1):
        (reply,) = grid.send_and_receive([flower.Message(content, FIRST_NODE + 1, "train")])
    assert reply.has_content()
    assert calls == ["train"]


class TwoTrainings(LocalUpdate):
    """A method with a second kind of training."""

    def train_more(self, *arguments: Any) -> Any:
        return self.train(*arguments)


def test_every_kind_of_training_has_the_mods() -> None:
    calls, counting = counted()
    app = app_of([counting], TwoTrainings())
    grid = LocalGrid(app, 4)
    content = flower.RecordDict({"arrays": app.initial_arrays(), "config": flower.ConfigRecord({"server-round": 1})})
    with server_identity(1):
        for kind in ("train", "train.more", "evaluate"):
            (reply,) = grid.send_and_receive([flower.Message(content, FIRST_NODE, kind)])
            assert reply.has_content()
    assert calls == ["train", "train.more"]


@pytest.mark.slow
def test_under_flowers_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):  # which run_simulation does not restore
        monkeypatch.setattr(TaskIdentity, name, getattr(TaskIdentity, name))
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    results: list[dict[str, Tensor]] = []
    alone = partial(run_simulation, backend_config={"init_args": {"address": "local"}})  # not on some other Ray cluster
    for simulate in (fedpers.simulate, alone):
        app = app_of([LocalDpMod(0.2, 0.0, 1.0, 1e-5)])
        server = ServerApp()

        @server.main()
        def main(grid: Any, context: flower.Context, app: CohortApp = app) -> None:
            while len(list(grid.get_node_ids())) < 4:
                pass
            strategy = FedRep(seed=3, weighting="uniform")
            result = strategy.start(grid, app.initial_arrays(), num_rounds=2)
            assert not strategy.report.failures
            results.append(dict(entries(from_record(result.arrays))))

        simulate(server, app, 4)
    assert_same(results[1], results[0])
