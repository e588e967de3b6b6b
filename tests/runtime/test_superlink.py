"""A SuperLink and SuperNodes on this machine, and ``flwr run`` with Flower's simulation, run the example app."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

import flwr.app as flower
import pytest
import torch

from fedpers.app.compose import composed
from fedpers.cohort import leaves
from fedpers.flower_private import server_identity
from fedpers.records import from_record
from fedpers.run import prepare_run, run_rounds
from fedpers.runtime.flower import FlowerGrid
from fedpers.runtime.grid import FIRST_NODE
from fedpers.runtime.local import LocalGrid

APP = Path(__file__).parents[2] / "experiments" / "flower_app"
SCRIPT = APP / "federation.py"
MARK = "FEDPERS_TEST"


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("federation", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment() -> dict[str, str]:
    """Surroundings of programs, marked so that they can be told from those of others on the machine."""
    return {
        **os.environ,
        MARK: uuid4().hex,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


class Losing(FlowerGrid):
    """A grid on which some clients are not reached when they should train: ``{round: {client: reason}}``.

    The personal state of `anew`, which trained in round 1 or was away then, begins anew after it.
    """

    def __init__(self, grid: LocalGrid, lost: dict[str, dict[str, str]], anew: int | None = None) -> None:
        super().__init__(grid)
        self.local, self.anew = grid, anew
        self.lost = {(int(r), FIRST_NODE + int(client)) for r, clients in lost.items() for client in clients}

    def send_and_receive(self, messages: Iterable[flower.Message], *, timeout: float | None = None) -> Any:
        messages = list(messages)
        if self.anew is not None and [m for m in messages if _round_of(m) == 2]:
            blocks = [
                (clients[clients != self.anew], states[clients != self.anew]) for clients, states in self.local.blocks()
            ]
            self.local.load(blocks)
            self.anew = None
        kept = [
            m
            for m in messages
            if m.metadata.message_type != "train" or (_round_of(m), m.metadata.dst_node_id) not in self.lost
        ]
        return super().send_and_receive(kept, timeout=timeout)


def _round_of(message: flower.Message) -> int:
    return int(message.content["config"]["server-round"]) if "config" in message.content else -1  # type: ignore[arg-type]


def assert_as_here(written: dict[str, Any], settings: str, anew: int | None = None, tolerance: float = 1e-5) -> None:
    """What a server wrote is what a run in this process gives, in which the same replies to training are missing.

    `tolerance` is relative to the largest value of a tensor.
    """
    config = composed(settings.split())
    setup = prepare_run(config)
    last = []
    grid = Losing(LocalGrid(setup.app, setup.data.num_clients, clients_at_once=1, workers=1), written["failures"], anew)
    with server_identity(1):
        for report in run_rounds(
            setup.strategy,
            grid,
            setup.app.initial_arrays(),
            config.rounds,
            after_round=lambda _, arrays, is_last: last.append(arrays),
        ):
            assert {str(client) for client in report.failures} == written["failures"].get(str(report.round), {}).keys()
    assert written["round"] == report.round == config.rounds
    assert written["clients"].keys() == {str(client) for client in report.clients}
    for client, metrics in report.clients.items():
        assert written["clients"][str(client)] == pytest.approx(metrics, rel=1e-5)
    pairs = [(written["arrays"], leaves(from_record(last[-1])))]
    assert written["state"].keys() == setup.strategy.state.keys()
    pairs += [(written["state"][role], leaves(values)) for role, values in setup.strategy.state.items()]
    for theirs, ours in pairs:
        assert theirs.keys() == ours.keys()
        for name, value in ours.items():
            close = torch.tensor(theirs[name], dtype=torch.float64)
            scale = max(float(value.abs().max()), 1e-2) if value.numel() else 1.0
            torch.testing.assert_close(close, value.double(), rtol=0, atol=tolerance * scale, msg=name)


def programs(mark: str) -> set[str]:
    """Process ids of Flower's programs that run with this mark in their environment."""
    ids = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if not any(word.rpartition(b"/")[2].startswith((b"flower-super", b"flwr-")) for word in words[:2]):
                continue
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                ids.add(folder.name)
        except OSError:  # it has ended, or is not ours to look at
            continue
    return ids


def assert_none_is_left(surroundings: dict[str, str]) -> None:
    """What was told to end may take a moment on a busy machine."""
    deadline = time.monotonic() + 60
    while programs(surroundings[MARK]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert programs(surroundings[MARK]) == set()


WAITING = """
import os, time
from pathlib import Path
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from fedpers.flower_app import client_app, server_app
from fedpers.runtime.flower import FlowerGrid

inner_server, inner_client = server_app(), client_app()

class Telling(FlowerGrid):
    def pull_messages(self, message_ids):
        replies = list(super().pull_messages(message_ids))
        if any(reply.metadata.message_type == "train" for reply in replies):
            Path(os.environ["HAS_TRAINED"]).touch()
        return replies

server = ServerApp()

@server.main()
def main(grid, context):
    inner_server(Telling(grid), context)

class Waiting(ClientApp):
    def __call__(self, message, context):
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 0:
            while not Path(os.environ["MAY_TRAIN"]).exists():
                time.sleep(0.1)
        return inner_client(message, context)

client = Waiting()
"""
"""The app. A file tells that the first reply to training has come; client 0 does not train until another is there."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_server_state_finds_a_client_whose_supernode_was_started_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script as it is run, encrypted; a node is away between its training in round 1 and the end of that round."""
    settings = (
        "strategy=pfedpg dataset=digits rounds=2 evaluate_every=2 model=vit model.dim=16 "
        "model.depth=1 model.heads=2 model.pretrained=null"
    )
    app, result = tmp_path / "app", tmp_path / "found.json"
    has_trained, may_train = tmp_path / "has_trained", tmp_path / "may_train"
    shutil.copytree(APP, app, ignore=shutil.ignore_patterns("__pycache__"))
    (app / "personalized" / "app.py").write_text(WAITING)
    federation = loaded()

    class Restarting(federation.Federation):  # type: ignore[misc, name-defined]
        """Stops and starts node 1 once it has trained, then lets client 0 train."""

        anew = False

        def run(self, *arguments: Any, **more: Any) -> Any:
            return super().run(*arguments, app=app, **more)

        def check(self) -> None:
            super().check()
            if not self.anew and has_trained.exists():
                self.stop_node(1)
                self.start_node(1)
                self.anew = True
            elif self.anew and (self.folder / "supernode-1.log").read_bytes().count(b"SuperNode ID:") == 2:
                may_train.touch()

    surroundings = {**environment(), "HAS_TRAINED": str(has_trained), "MAY_TRAIN": str(may_train)}
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(federation, "Federation", Restarting)
    typed = ["--nodes", "2", "--tls", "--timeout", "1500", "--settings", settings, "--result", str(result)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *typed])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert federation.main() == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert may_train.exists()
    written = json.loads(result.read_text())
    assert written["failures"] == {}
    assert "after round 2:" in capsys.readouterr().out
    # Adam on the server: rounding grows
    assert_as_here(written, f"{settings} partition.num_clients=2", anew=1, tolerance=1e-4)
    assert_none_is_left(surroundings)


def test_a_signal_while_a_process_starts_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    script = loaded()
    started = []

    class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(script.subprocess, "Popen", Interrupted)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    federation = script.Federation(1)
    try:
        with pytest.raises(KeyboardInterrupt):
            federation._launch("sleeper", [Path(sys.executable).name, "-c", "import time; time.sleep(300)"])
    finally:
        federation.stop()
        signal.signal(signal.SIGINT, handler)
    assert [process.poll() for process in started] == [-signal.SIGTERM]


@pytest.mark.slow
def test_the_script_stops_everything_when_it_is_told_to(tmp_path: Path) -> None:
    surroundings = environment()
    script = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--nodes", "2"],
        env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may have it ignored
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while len(programs(surroundings[MARK])) < 4 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len(programs(surroundings[MARK])) >= 4
    script.send_signal(signal.SIGINT)
    script.communicate(timeout=60)
    assert script.returncode == 130
    assert_none_is_left(surroundings)


@pytest.mark.slow
def test_the_script_says_what_went_wrong(tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text("{}")
    command = [sys.executable, str(SCRIPT), "--nodes", "1", "--result", str(tmp_path / "found.json")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 1
    assert "found.json exists already; choose another file with --result." in done.stderr


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_flwr_run_with_flowers_simulation_gives_what_this_process_gives(tmp_path: Path) -> None:
    settings = "strategy=scaffold dataset=digits rounds=2 partition.num_clients=3"
    config = tmp_path / "run.toml"
    config.write_text(f'settings = "{settings}"\nresult = "{tmp_path / "found.json"}"\n')
    surroundings = {
        **environment(),
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": free_port(),
        "FLWR_LOCAL_CONTROL_API_PORT": free_port(),
        "RAY_ADDRESS": "local",  # not on some other Ray cluster
    }
    flwr = str(Path(sys.executable).parent / "flwr")
    try:
        done = subprocess.run(
            [
                flwr, "run", ".", "--stream", "--run-config", str(config),
                "--federation-config", "num-supernodes=3 client-resources-num-cpus=2",
            ],
            cwd=APP, env=surroundings, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
    finally:  # flwr leaves its local SuperLink running
        for process in programs(surroundings[MARK]):
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGTERM)
        assert_none_is_left(surroundings)
    assert "round 2: train loss" in done.stdout, done.stdout + done.stderr
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["failures"] == {}
    assert_as_here(written, settings)
