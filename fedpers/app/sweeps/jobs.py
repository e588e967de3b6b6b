"""One job of a sweep: it begins, or goes on where it stopped, in its folder, which then says how it ended."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO, cast

from fedpers.app.result import exit_code
from fedpers.app.sweeps.names import quoted
from fedpers.errors import FedpersError, TrainingError
from fedpers.evaluation.runs import ERROR_FILE
from fedpers.failures import described, frames_of_user
from fedpers.run import resume, run
from fedpers.run.checkpoint import Checkpoints
from fedpers.run.reopen import locked
from fedpers.run.results import read_json, write_text
from fedpers.settings import Config, build
from fedpers.tracking.console import WithoutProgress

log = logging.getLogger(__name__)
_NAMING_CODE = ("strategy.name", "dataset.name", "model.name", "dataset.path", "model.weights", "runtime.address")
"""Settings that count in a run that goes on only when they are given again (:mod:`fedpers.run.reopen`)."""


@dataclass(frozen=True)
class Outcome:
    """Where a job stands.

    Parameters
    ----------
    state : str
        ``open`` if it has not begun or not ended.
    text : str
        Its result, or why it failed.
    score : float or None
        Validation score of the selected round.
    exit_code : int
        As of a single run.
    """

    state: Literal["open", "done", "failed"]
    text: str = ""
    score: float | None = None
    exit_code: int = 0


def outcome(folder: Path) -> Outcome:
    """Where the job in a folder stands, as its files say."""
    if (folder / ERROR_FILE).exists():
        failure = read_json(folder / ERROR_FILE)
        return Outcome("failed", str(failure.get("error")), exit_code=2 if failure.get("exit_code") == 2 else 1)
    summary = read_json(folder / "summary.json") if (folder / "summary.json").exists() else {}
    if summary.get("interrupted") is not False:
        return Outcome("open")
    try:
        return Outcome("done", _result(summary), score_of(summary), exit_code(summary))
    except (KeyError, TypeError, AttributeError):  # not a summary of ours
        return Outcome("open")


def score_of(summary: Mapping[str, Any]) -> float | None:
    """What sweepers optimize: the validation score of the selected round."""
    score: float | None = summary["selected"].get(f"validation/{summary['headline']}")
    return score


def _result(summary: Mapping[str, Any]) -> str:
    chosen = "selected" if summary["selected_round"] is not None else "last"
    value = summary[chosen].get(f"test/{summary['headline']}")
    measured = "-" if value is None else f"{100 * value:.2f} %"
    notes = "" if chosen == "selected" else " at the last round (none selected)"
    notes += ", diverged" * bool(summary["last_diverged"])
    return f"test {summary['headline']} {measured}{notes}, {summary['seconds']:.1f} s"


def perform(resolved: dict[str, Any], folder: Path) -> float | None:
    """Do a job, in whichever process a launcher has chosen for it.

    Why it failed, if it does, is written to ``error.json`` and ``run.log``; nothing is raised: the others go on.

    Returns
    -------
    float or None
        Validation score of the selected round.
    """
    try:
        with contextlib.redirect_stderr(cast(TextIO, WithoutProgress(sys.stderr))):
            summary = _begin_or_go_on(resolved, folder)
    except Exception as error:
        _write_error(folder, error)
        return None
    return score_of(summary)


def _begin_or_go_on(resolved: dict[str, Any], folder: Path) -> dict[str, Any]:
    summary = read_json(folder / "summary.json") if (folder / "summary.json").exists() else {}
    if summary.get("interrupted") is False and not (folder / ERROR_FILE).exists():
        return summary  # a job that a scheduler starts again
    (folder / ERROR_FILE).unlink(missing_ok=True)
    if (folder / "config.yaml").exists() and next(Checkpoints(folder / "checkpoints").whole(), None):
        return resume(folder, _given_again(resolved))
    if (folder / "config.yaml").exists():
        _clear(folder)
    return run(build(Config, resolved), folder, resolved)


def _clear(folder: Path) -> None:
    """Remove a run that cannot go on, but for its log."""
    with locked(folder):
        for path in folder.iterdir():
            if path.name in (".hydra", "run.log"):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _given_again(resolved: Mapping[str, Any]) -> list[str]:
    """The settings that :func:`fedpers.run.resume` takes from its caller only, whose they are."""
    overrides = []
    for key in _NAMING_CODE:
        group, _, name = key.partition(".")
        value = resolved[group].get(name)
        if value is not None and (name != "name" or ":" in str(value)):
            overrides.append(f"{key}={quoted(str(value))}")
    return overrides


def _write_error(folder: Path, error: Exception) -> None:
    meant = isinstance(error, FedpersError)
    log.info("the run ended:" if not meant else "the run ended: %s", *([error] if meant else []), exc_info=not meant)
    text = described(error).removesuffix(".")
    if not meant and not frames_of_user(error):
        text += "; the traceback is in run.log"
    code = 2 if meant and not isinstance(error, TrainingError) else 1
    try:
        with locked(folder):
            write_text(folder / ERROR_FILE, json.dumps({"error": text, "exit_code": code}, indent=1))
    except FedpersError as obstacle:  # another process works on the run, or the disk is full
        log.warning("%s", obstacle)


def rounds_done(folder: Path) -> int:
    """Rounds in ``rounds.jsonl``; 0 before there are any."""
    try:
        with (folder / "rounds.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, io.SEEK_END) - 2**16))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["round"])
    return 0
