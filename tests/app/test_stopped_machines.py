"""The command on other runtimes: the numbers of this process; a scheduler that ends a job ends all its processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpers.run import TIMES
from tests.app.test_cli import fedpers

SECONDS = 30.0
"""Well above what it takes (5 s), well below what Ray waits for its own processes (60 s)."""


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The rounds that are written, without what the clock says."""
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def processes_of(session: int) -> list[int]:
    listed = subprocess.run(["ps", "-s", str(session), "-o", "pid="], capture_output=True, text=True, check=False)
    return [int(number) for number in listed.stdout.split()]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("runtime", ["ray runtime.clients_at_once=1", "flower runtime.cpus_per_actor=2"])
def test_a_run_gives_the_same_numbers_and_when_its_machines_are_stopped_goes_on_elsewhere(
    runtime: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    settings = ["strategy=gpfl", "dataset=digits", "partition.num_clients=3", "checkpoint.every=5"]
    command = [sys.executable, "-m", "fedpers", *f"runtime={runtime} rounds=5000".split(), *settings]
    command += [f"hydra.run.dir={folder}"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL),
    )  # fmt: skip
    log = folder / "rounds.jsonl"
    try:
        wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 8, process)
        for number in processes_of(process.pid):
            os.kill(number, signal.SIGTERM)
        _, screen = process.communicate(timeout=SECONDS)
    finally:
        for number in processes_of(process.pid):
            os.kill(number, signal.SIGKILL)
    assert process.returncode == 143, screen
    assert "Traceback" not in screen
    (alone,) = fedpers(*settings, "rounds=2", "runtime.clients_at_once=1", output=tmp_path / "alone")
    for actual, expected in zip(numbers(folder)[:3], numbers(alone), strict=True):
        assert actual == pytest.approx(expected, rel=1e-6, nan_ok=True)
    summary = json.loads((folder / "summary.json").read_text())
    done = summary["rounds_done"]
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert f"fedpers: stopped after round {done}; 'fedpers resume {folder}' goes on after round " in screen
    saved = int(screen.partition("goes on after round ")[2].partition(".")[0])
    assert f"round_{saved:06}" in checkpoints
    assert done - 5 <= saved <= done
    again = [sys.executable, "-m", "fedpers", "resume", str(folder), f"rounds={done + 2}", "runtime=local"]
    resumed = subprocess.run(again, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((folder / "summary.json").read_text())["rounds_done"] == done + 2
