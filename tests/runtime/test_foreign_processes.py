"""Clients of apps written for Flower run in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedpers.flower_private import server_identity
from fedpers.process import cores
from fedpers.runtime.grid import FIRST_NODE, RUN_ID
from fedpers.runtime.local import LocalGrid


def content() -> RecordDict:
    return RecordDict({"arrays": ArrayRecord([np.arange(3.0)])})


def counting(start: int = 0) -> ClientApp:
    """Answers with its process, what it drew, and how often its client was called, which its context says."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        calls = context.state.setdefault("calls", MetricRecord({"count": start}))
        calls["count"] = int(calls["count"]) + 1
        drawn = float(torch.rand(()))
        process = MetricRecord({"process": os.getpid(), "threads": torch.get_num_threads(), "drawn": drawn, **calls})
        return Message(RecordDict({"process": process, "arrays": message.content["arrays"]}), reply_to=message)

    return app


def answers_of(grid: LocalGrid, times: int = 1) -> list[list[dict[str, Any]]]:
    answers = []
    with server_identity(RUN_ID):
        for _ in range(times):
            sent = [Message(content(), FIRST_NODE + k, "train") for k in range(grid.num_clients)]
            replies = list(grid.send_and_receive(sent))
            assert [reply.metadata.src_node_id for reply in replies] == [FIRST_NODE + k for k in range(len(replies))]
            answers.append([dict(reply.content["process"]) for reply in replies])
    return answers


def test_clients_are_spread_over_processes_each_with_one_thread_and_keep_their_contexts() -> None:
    grid = LocalGrid(counting(), 5, workers=2)
    first, second = answers_of(grid, 2)
    grid.close()
    processes = [row["process"] for row in first]
    assert len(set(processes)) == 2
    assert os.getpid() not in processes
    assert [row["process"] for row in second] == processes
    assert {row["threads"] for row in first} == {1}
    assert [row["count"] for row in first + second] == [1] * 5 + [2] * 5
    assert len({row["drawn"] for row in first + second}) == 10
    for process in set(processes):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_what_processes_draw_follows_from_the_seed() -> None:
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        grid = LocalGrid(counting(), 4, workers=2)
        draws.append([[row["drawn"] for row in rows] for rows in answers_of(grid, 2)])
        grid.close()
    assert draws[0] == draws[1]


def test_with_one_worker_clients_run_in_this_process() -> None:
    grid = LocalGrid(counting(), 3, workers=1)
    assert {row["process"] for row in answers_of(grid)[0]} == {os.getpid()}
    grid.close()


@pytest.mark.parametrize(("seconds", "spread"), [(0.0, False), (0.05, True)])
def test_clients_that_take_long_enough_are_spread(seconds: float, spread: bool) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        time.sleep(seconds)
        return Message(RecordDict({"process": MetricRecord({"process": os.getpid()})}), reply_to=message)

    grid = LocalGrid(app, 6)
    first, second = ([row["process"] for row in rows] for rows in answers_of(grid, 2))
    grid.close()
    assert first[:2] == [os.getpid()] * 2
    expected = min(cores(), 6) if spread else 1
    assert len(set(second)) == expected
    assert (os.getpid() in second) == (expected == 1)


def test_a_client_process_that_ends_costs_its_clients_the_round() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        calls = context.state.setdefault("calls", MetricRecord({"count": 0}))
        calls["count"] = int(calls["count"]) + 1
        if context.node_config["partition-id"] == 1 and calls["count"] == 2:
            os._exit(9)
        return Message(RecordDict({"process": calls}), reply_to=message)

    grid = LocalGrid(app, 4, workers=2)
    counts = []
    with server_identity(RUN_ID):
        for _ in range(4):
            sent = [Message(content(), FIRST_NODE + k, "train") for k in range(4)]
            replies = list(grid.send_and_receive(sent))
            counts.append([None if r.has_error() else r.content["process"]["count"] for r in replies])
    grid.close()
    assert [row[0] for row in counts] == [row[2] for row in counts] == [1, 2, 3, 4]  # of the other process
    assert counts[0][1] == 1
    assert counts[1][1] is None
    assert counts[2][1] is None  # it tries the same again


def test_a_process_that_died_between_calls_is_replaced() -> None:
    grid = LocalGrid(counting(), 4, workers=2)
    first = answers_of(grid)[0]
    os.kill(first[1]["process"], signal.SIGKILL)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{first[1]['process']}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    second = answers_of(grid)[0]
    grid.close()
    assert [row["count"] for row in second] == [2, 2, 2, 2]
    assert [row["process"] for row in second[::2]] == [row["process"] for row in first[::2]]
    assert second[1]["process"] not in [row["process"] for row in first]
    assert second[1]["drawn"] not in [row["drawn"] for row in first]  # the replacement repeats no numbers


def test_calls_that_fail_say_nothing_about_how_long_clients_take() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        calls = context.state.setdefault("calls", MetricRecord({"count": 0}))
        calls["count"] = int(calls["count"]) + 1
        time.sleep(0.05)
        return Message(RecordDict({"process": MetricRecord({"process": os.getpid()})}), reply_to=message)

    grid = LocalGrid(app, 6)
    with server_identity(RUN_ID):
        refused = [Message(content(), FIRST_NODE + k, "query.unknown") for k in range(6)]
        assert all(reply.has_error() for reply in grid.send_and_receive(refused))
    _, second = answers_of(grid, 2)
    grid.close()
    assert len({row["process"] for row in second}) == min(cores(), 6)


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_clients(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "import time\n"
        "from flwr.app import ArrayRecord\n"
        "from flwr.clientapp import ClientApp\n"
        "from flwr.serverapp import ServerApp\n"
        "from flwr.serverapp.strategy import FedAvg\n"
        "import fedpers\n"
        "app, server = ClientApp(), ServerApp()\n"
        "@app.train()\n"
        "def train(message, context):\n"
        "    print('busy', flush=True)\n"
        "    time.sleep(1000)\n"
        "@server.main()\n"
        "def main(grid, context):\n"
        "    FedAvg().start(grid, ArrayRecord(), num_rounds=1)\n"
        "fedpers.simulate(server, app, 4, workers=2)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "app.py"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "busy"
    os.killpg(process.pid, signal.SIGINT)
    _, screen = process.communicate(timeout=60)
    assert process.returncode != 0
    assert screen.rstrip().endswith("KeyboardInterrupt")
    assert "ForkProcess" not in screen
