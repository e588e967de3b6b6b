"""A run that is killed goes on as if nothing had happened: the comparison ``python -m tests.equivalence resume``.

A run of the command with personal state, partial participation, clients that never train and a checkpoint after every
round is killed (SIGKILL) at 20 drawn moments from the start of the process to its end, some of them while a checkpoint
is being written, some while it is being resumed. Each time it is resumed by ``fedpers resume``, or started anew where
that says that there is no checkpoint yet. ``clients.parquet`` must equal the undisturbed run's byte by byte,
``rounds.jsonl`` and ``summary.json`` in all but times.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpers.run import TIMES
from fedpers.strategies import STRATEGIES

SEQUENCES = (1,) * 14 + (2,) * 3
"""Kills in each run."""
AIMED = 4  # every fourth kill waits for a checkpoint to be under way
SETTINGS = ("fraction=0.5", "split.unseen=3", "evaluate_every=2", "checkpoint.every=1", "checkpoint.keep=2",
            "checkpoint.best=true")  # fmt: skip
TIMED = ("seconds", "train_seconds")  # of summary.json
PATIENCE = 300.0  # seconds that a command may take


@dataclass
class Kill:
    """What a kill met."""

    seconds: float
    rounds: int
    in_checkpoint: bool
    ended: bool = False


def start(arguments: list[str], cache: Path) -> subprocess.Popen[str]:
    """Start the command."""
    environment = {**os.environ, "FEDPERS_CACHE": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-m", "fedpers", *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for the end; what was told on standard error if it failed, a RuntimeError if that is no sentence."""
    _, errors = process.communicate(timeout=PATIENCE)
    if process.returncode and (process.returncode != 2 or "Traceback" in errors):
        raise RuntimeError(f"exit status {process.returncode}: {errors}")
    return errors if process.returncode else ""


def kill(process: subprocess.Popen[str], folder: Path, seconds: float, aimed: bool) -> Kill:
    """Kill a run so many seconds after its start, or when it next writes a checkpoint."""
    began = time.monotonic()
    before = set(folder.glob("checkpoints/.draft-*"))
    while time.monotonic() - began < seconds and process.poll() is None:
        time.sleep(0.002)
    while aimed and process.poll() is None and not set(folder.glob("checkpoints/.draft-*")) - before:
        pass
    ended = process.poll() is not None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    path = folder / "rounds.jsonl"
    rounds = len(path.read_bytes().splitlines()) if path.exists() else 0
    drafts = bool(set(folder.glob("checkpoints/.draft-*")) - before)
    return Kill(time.monotonic() - began, rounds, drafts, ended)


def results(folder: Path) -> dict[str, Any]:
    """What a run yields, without times."""
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "clients.parquet": (folder / "clients.parquet").read_bytes(),
        "rounds.jsonl": [{k: v for k, v in row.items() if k not in TIMES} for row in rounds],
        "summary.json": {k: v for k, v in summary.items() if k not in TIMED},
    }


def killed_runs(method: str, rounds: int, sequences: tuple[int, ...], home: Path, seed: int = 0) -> int:
    """Print a row for each kill; return how many runs ended in other results than the undisturbed one."""
    command = [f"strategy={method}", f"rounds={rounds}", *SETTINGS]
    cache = home / "cache"
    whole = home / "undisturbed"
    for attempt, more in ((home / "first", ["rounds=1"]), (whole, [])):  # the first measures sizes, which are kept
        began = time.monotonic()
        if message := finish(start([*command, *more, f"hydra.run.dir={attempt}"], cache)):
            raise RuntimeError(message)
        duration = time.monotonic() - began
    expected = results(whole)
    print(f"{method}, {rounds} rounds: {duration:.1f} s undisturbed")
    print(f"{'run':>4}{'killed after':>14}{'rounds done':>13}  {'while':<32}{'then':<28}{'results':<10}")
    draws = random.Random(seed)
    count = differing = 0
    for number, kills in enumerate(sequences):
        folder = home / f"run-{number}"
        met: list[Kill] = []
        while len(met) < kills:  # from the beginning again where a run ended before it was killed
            shutil.rmtree(folder, ignore_errors=True)
            met.clear()
            arguments = [*command, f"hydra.run.dir={folder}"]
            while len(met) < kills:
                moment = draws.uniform(0.25, 0.6) if met else draws.uniform(0, 1)  # a resumed run ends earlier
                outcome = kill(start(arguments, cache), folder, moment * duration, (count + len(met)) % AIMED == 0)
                if outcome.ended:
                    duration = duration if met else min(duration, outcome.seconds)  # the machine is less busy by now
                    break
                met.append(outcome)
                arguments = ["resume", str(folder)]
        count += kills
        rows = []
        for place, one in enumerate(met):
            doing = "writing a checkpoint" if one.in_checkpoint else "in a round" if one.rounds else "starting"
            doing = f"resuming, {doing}" if place else doing
            rows.append(f"{number:>4}{one.seconds:>12.2f} s{one.rounds:>13}  {doing:<32}")
        then = "resumed"
        if message := finish(start(arguments, cache)):
            if "anew" not in message and "holds no run" not in message and "there is no folder" not in message:
                raise RuntimeError(message)
            then = "no checkpoint: started anew"
            shutil.rmtree(folder, ignore_errors=True)
            if message := finish(start([*command, f"hydra.run.dir={folder}"], cache)):
                raise RuntimeError(message)
        yielded = results(folder)
        wrong = [name for name in expected if yielded[name] != expected[name]]
        differing += bool(wrong)
        for row in rows[:-1]:
            print(row)
        print(f"{rows[-1]}{then:<28}{'DIFFER: ' + ', '.join(wrong) if wrong else 'identical'}", flush=True)
    print(f"{count} kills in {len(sequences)} runs, {differing} of which ended in other results")
    return differing


def compare_resumed(methods: list[str], device: str = "cpu") -> int:
    """Print a table for each method (default: ditto); 1 when a result differs."""
    chosen = methods if len(methods) < len(STRATEGIES) else ["ditto"]
    with tempfile.TemporaryDirectory(prefix="resume-") as home:
        differing = sum(killed_runs(m, 150, SEQUENCES, Path(home) / m) for m in chosen)
    return 1 if differing else 0
