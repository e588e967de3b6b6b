"""Seconds of whole Flower apps under both engines: ``python -m benchmarks.flower_apps FOLDER...``.

Each folder holds an app as Flower's examples are: its ``pyproject.toml`` names server app, client app and settings.
Each run is a process of its own, in which importing is not timed; engines take turns, and medians and spread are
printed. Data that an app downloads must be there.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import statistics
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

ENGINES = ("fedpers", "flower")
FAILED = "ClientAppException"
"""What an engine writes when a client fails; a round of failing clients is no measurement."""


def app_of(folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """Server app, client app and settings of the app in a folder."""
    settings = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    sys.path.insert(0, str(folder.resolve()))
    os.chdir(folder)

    def load(place: str) -> Any:
        module, _, name = place.partition(":")
        return getattr(importlib.import_module(module), name)

    return load(settings["components"]["serverapp"]), load(settings["components"]["clientapp"]), settings["config"]


def run_one(folder: Path, engine: str, nodes: int) -> float:
    """Seconds of one run in this process."""
    server_app, client_app, config = app_of(folder)
    if engine == "fedpers":
        import fedpers

        start = time.perf_counter()
        fedpers.simulate(server_app, client_app, nodes, run_config=config)
        return time.perf_counter() - start
    from flwr.simulation import run_simulation

    # run_simulation has no place for an app's settings: what it and `flwr run` call has. Without the folder of the app
    # its clients would get no settings, and fail.
    private = sys.modules[run_simulation.__module__]
    run = private.Run.create_empty(run_id=1)
    run.primary_task_id, run.federation_id = 1, private.NOOP_FEDERATION_ID
    private.TaskIdentity.task_id, private.TaskIdentity.run_id = 1, 1
    private.TaskIdentity.node_id = private.SUPERLINK_NODE_ID
    context = private.Context(1, 0, {}, private.RecordDict(), config)
    event = private.EventType.PYTHON_API_RUN_SIMULATION_ENTER
    components = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["components"]
    start = time.perf_counter()
    private._run_simulation(
        nodes, event, client_app_attr=components["clientapp"], server_app_attr=components["serverapp"],
        app_dir=str(folder), is_app=True, server_app_context=context, run=run,
    )  # fmt: skip
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--nodes", type=int, default=10)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--engine", choices=ENGINES, help="run the app once, in this process, and print its seconds")
    chosen = parser.parse_args()
    if chosen.engine:
        logging.getLogger("flwr").setLevel(logging.ERROR)
        took = run_one(chosen.folders[0].resolve(), chosen.engine, chosen.nodes)
        print(json.dumps(took), flush=True)
        return
    print(f"{'app':32}{'fedpers.simulate':>26}{'Flower':>26}   ratio")
    root = str(Path(__file__).parents[1])
    for folder in chosen.folders:
        seconds: dict[str, list[float]] = {engine: [] for engine in ENGINES}
        for turn in range(chosen.turns):
            for engine in ENGINES[:: 1 if turn % 2 == 0 else -1]:
                command = [sys.executable, "-m", "benchmarks.flower_apps", str(folder), "--engine", engine]
                done = subprocess.run(
                    [*command, "--nodes", str(chosen.nodes)], capture_output=True, text=True, check=False, cwd=root,
                    env={**os.environ, "PYTHONPATH": root},
                )  # fmt: skip
                if done.returncode or FAILED in done.stdout + done.stderr:
                    sys.exit(f"{folder.name} under {engine} failed:\n{done.stderr[-3000:]}")
                seconds[engine].append(json.loads(done.stdout.splitlines()[-1]))
        medians = {engine: statistics.median(times) for engine, times in seconds.items()}
        cells = [f"{medians[e]:8.2f} ({min(seconds[e]):.2f} to {max(seconds[e]):.2f})" for e in ENGINES]
        print(
            f"{folder.name:32}{cells[0]:>26}{cells[1]:>26}{medians['flower'] / medians['fedpers']:8.1f} x", flush=True
        )


if __name__ == "__main__":
    main()
