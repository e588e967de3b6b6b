"""Runs that end before their last round because validation says so."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpers import simulate
from fedpers.app import _main
from fedpers.app.compose import composed
from fedpers.flower_app import server_app
from fedpers.run import prepare_run
from fedpers.run.progress import Progress
from fedpers.settings import StopConfig
from fedpers.strategies import RoundReport
from tests.resume import results

SMALL = [
    "partition.num_clients=5",
    "runtime.clients_at_once=3",
    "runtime.workers=1",
    "model=mlp",
    "model.hidden=[8]",
    "strategy=fedper",
    "training.lr=0.3",
]


def run(folder: Path, *arguments: str) -> Path:
    """Run the command in this process into `folder`."""
    assert _main([*SMALL, *arguments, f"hydra.run.dir={folder}"]) == 0
    return folder


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def scores(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [line["validation/accuracy"] for line in lines]


def report(round: int, *, left_out: bool = False) -> RoundReport:
    return RoundReport(round, clients={0: {"x": 1.0}}, evaluation_failures={1: "gone"} if left_out else {})


@pytest.mark.parametrize(
    ("stop", "course", "ends"),
    [
        (StopConfig(patience=2), [0.5, 0.6, 0.6, 0.5], (4, "stop.patience")),
        (StopConfig(patience=2), [0.5, 0.4, 0.6, 0.5, 0.6], (5, "stop.patience")),
        (StopConfig(patience=1), [np.nan, 0.4], (1, "stop.patience")),
        (StopConfig(target=0.6), [0.5, 0.59, 0.6, 0.1], (3, "stop.target")),
        (StopConfig(patience=1, target=0.5), [0.5], (1, "stop.target")),
        (StopConfig(patience=3), [0.1, 0.2, 0.3], None),
    ],
)
@pytest.mark.parametrize("latest_wins", [False, True])
def test_patience_and_target(
    stop: StopConfig, course: list[float], ends: tuple[int, str] | None, latest_wins: bool
) -> None:
    """Counted by hand; equals are no improvement, whichever of them is selected."""
    progress = Progress("validation/accuracy", latest_wins=latest_wins)
    progress.take(report(0), {"validation/accuracy": 0.9})  # nothing is trained yet
    for number, score in enumerate(course, 1):
        metrics = {"validation/accuracy": score}
        ended_by = progress.ends_by(report(number), metrics, stop)
        progress.take(report(number), metrics)
        again = Progress("validation/accuracy", latest_wins=latest_wins)
        again.restore(json.loads(json.dumps(progress.to_json())) if not np.isnan(course).any() else progress.to_json())
        assert again.waited == progress.waited
        if ended_by is not None:
            assert ends == (number, ended_by)
            return
        assert ends is None or number < ends[0]
    assert ends is None


def test_rounds_that_may_not_be_selected_do_not_end_a_run() -> None:
    progress = Progress("validation/accuracy", first_round=3)
    stop = StopConfig(patience=1, target=0.5)
    for number in (1, 2):  # before a drift
        assert progress.ends_by(report(number), {"validation/accuracy": 0.9}, stop) is None
        progress.take(report(number), {"validation/accuracy": 0.9})
    assert progress.ends_by(report(3, left_out=True), {"validation/accuracy": 0.9}, StopConfig(target=0.5)) is None
    assert progress.ends_by(RoundReport(3), {}, stop) is None  # not evaluated


@pytest.mark.slow
def test_a_run_ends_early_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path / "run", "rounds=40", "stop.patience=2", "split.unseen=1")
    course, summary = scores(folder), summary_of(folder)
    done = summary["rounds_done"]
    assert len(course) == done + 1 < 41
    assert max(course[1:-2]) >= max(course[-2:])
    assert (summary["ended_by"], summary["interrupted"], summary["last_round"]) == ("stop.patience", False, done)
    assert "adapted/accuracy" in summary["last"]
    printed = capsys.readouterr().out
    assert f"The run ended after round {done} of 40 by stop.patience." in printed
    assert _main(["resume", str(folder)]) == 0
    assert capsys.readouterr().out == (
        f"{folder} has ended after round {done} by stop.patience; "
        f"'fedpers resume {folder} stop.patience=null' goes on.\n"
    )
    assert _main(["resume", str(folder), "rounds=50"]) == 0  # it still holds
    assert summary_of(folder)["rounds_done"] == done
    assert _main(["resume", str(folder), "stop.patience=null", f"rounds={done + 2}"]) == 0
    assert (summary_of(folder)["rounds_done"], summary_of(folder)["ended_by"]) == (done + 2, "rounds")
    alone = run(tmp_path / "alone", f"rounds={done + 2}", "split.unseen=1")
    assert (alone / "clients.parquet").read_bytes() == (folder / "clients.parquet").read_bytes()


@pytest.mark.slow
def test_a_resumed_run_ends_where_it_would_have(tmp_path: Path) -> None:
    settings = ["rounds=30", "stop.patience=3", "evaluate_every=2", "checkpoint.best=true"]
    whole = run(tmp_path / "whole", *settings)
    done = summary_of(whole)["rounds_done"]
    assert 6 <= done < 30
    assert done % 2 == 0
    for first in (3, done - 1, done):
        folder = run(tmp_path / f"run-{first}", f"rounds={first}", *settings[1:])
        assert _main(["resume", str(folder), "rounds=30"]) == 0
        assert results(folder) == results(whole)
        assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == sorted(
            p.name for p in (whole / "checkpoints").iterdir()
        )


@pytest.mark.slow
def test_a_run_goes_on_from_its_best_round_if_that_is_the_newest_checkpoint(tmp_path: Path) -> None:
    settings = ["rounds=12", "evaluate_every=2", "checkpoint.best=true"]
    whole = run(tmp_path / "whole", *settings)
    best = summary_of(whole)["selected_round"]
    assert 0 < best < 12
    killed = Path(shutil.copytree(whole, tmp_path / "killed"))
    shutil.rmtree(killed / "checkpoints" / "round_000012")
    for name in ("summary.json", "clients.parquet"):
        (killed / name).unlink()
    assert _main(["resume", str(killed)]) == 0
    assert results(killed) == results(whole)
    manifest = json.loads((killed / "manifest.json").read_text())
    assert [again["after_round"] for again in manifest["resumed"]] == [best]


def test_a_budget_is_named_too(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", "rounds=30", "training.budget=20")
    assert summary_of(folder)["ended_by"] == "training.budget"


def test_tables_name_runs_of_fewer_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path / "run", "rounds=5", "stop.target=0.01")
    capsys.readouterr()
    assert _main(["compare", str(folder)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"Ended early by stop.*, so that runs did different numbers of rounds: {folder} (1 of 5 rounds)." in printed


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("stop.patience=0", "stop.patience=0: expected a whole number >= 1, or null"),
        (
            "split.validation=0 stop.patience=2",
            "stop.patience=2: expected null, for no client has samples for validation",
        ),
    ],
)
def test_what_cannot_be_waited_for(setting: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main([*SMALL, *setting.split()]) == 2
    assert sentence in capsys.readouterr().err


def test_a_flower_app_of_the_same_settings_ends_with_the_same_round(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", "rounds=30", "stop.patience=1")
    typed = [*SMALL, "rounds=30", "stop.patience=1"]
    client_app = prepare_run(composed(typed)).app
    result = tmp_path / "result.json"
    simulate(server_app(), client_app, 5, clients_at_once=3, workers=1,
             run_config={"settings": shlex.join(typed), "result": str(result)})  # fmt: skip
    assert json.loads(result.read_text())["round"] == summary_of(folder)["rounds_done"] < 30


def test_a_target_in_percent_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["stop.target=90"]) == 2
    assert "stop.target=90.0: expected a number <= 1, or null" in capsys.readouterr().err


def test_momentum_without_sgd_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["training.optimizer=adam", "training.momentum=0.9"]) == 2
    assert "training.momentum=0.9: expected 0 with training.optimizer=adam" in capsys.readouterr().err
