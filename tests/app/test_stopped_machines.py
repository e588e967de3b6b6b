"""A scheduler that ends a job ends all its processes, those of Ray too: the run ends at once and can be resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SECONDS = 30.0
"""Well above what it takes (5 s), well below what Ray waits for its own processes (60 s)."""


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)


def processes_of(session: int) -> list[int]:
    listed = subprocess.run(["ps", "-s", str(session), "-o", "pid="], capture_output=True, text=True, check=False)
    return [int(number) for number in listed.stdout.split()]


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["ray", "flower"])
def test_a_run_whose_machines_are_stopped_ends_and_goes_on_elsewhere(runtime: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = ["strategy=fedper", "partition.num_clients=3", "checkpoint.every=5", f"hydra.run.dir={folder}"]
    command = [sys.executable, "-m", "fedpers", f"runtime={runtime}", "rounds=5000", *settings]
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
