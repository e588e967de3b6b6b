"""Clients that never train, measured after so many local steps."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from fedpers.app import _main
from fedpers.evaluation.leaderboard import leaderboard
from fedpers.evaluation.runs import find_runs
from tests.app.test_cli import error_of

RUN = ["partition=iid", "partition.num_clients=8", "partition.min_samples=10", "split.unseen=3", "rounds=3",
       "training.lr=0.1", "training.batch_size=16"]  # fmt: skip


def at_end(tmp_path: Path, *arguments: str) -> dict[str, float]:
    assert _main([*RUN, *arguments, f"output={tmp_path}"]) == 0
    (path,) = tmp_path.rglob("summary.json")
    last: dict[str, float] = json.loads(path.read_text())["last"]
    return last


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["local", "fedper", "ditto", "fedselect", "self_fl"])
def test_unseen_clients_are_measured_after_steps(strategy: str, tmp_path: Path) -> None:
    last = at_end(tmp_path, f"strategy={strategy}", "split.adapt_steps=[1,5,30]")
    names = [f"adapted/accuracy_after_{steps}" for steps in (1, 5, 30)]
    assert set(names) <= last.keys()
    assert "adapted/accuracy" not in last
    if strategy == "local":  # the initial network, which learns as a client's own does
        assert last["unseen/accuracy"] < last[names[1]] < last[names[2]]
        assert last[names[2]] > 0.6
    (group,) = leaderboard(find_runs([tmp_path]))
    assert [label for _, label in group.also] == ["unseen", "adapted 1", "adapted 5", "adapted 30"]
    (path,) = tmp_path.rglob("clients.parquet")
    assert int(pd.read_parquet(path).test_accuracy_after_5_adapted.notna().sum()) == 3


@pytest.mark.slow
def test_so_many_steps_as_a_round_are_a_round(tmp_path: Path) -> None:
    steps = at_end(tmp_path / "steps", "split.adapt_steps=[9]")
    rounds = at_end(tmp_path / "round")
    (path,) = (tmp_path / "round").rglob("clients.parquet")
    sizes = set(pd.read_parquet(path).train_size)
    assert {-(-size // 16) for size in sizes} == {9}
    assert steps["adapted/accuracy_after_9"] == rounds["adapted/accuracy"]
    assert steps["adapted/loss_after_9"] == pytest.approx(rounds["adapted/loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["split.adapt_steps=[5,1]"], "split.adapt_steps=[5, 1]: expected numbers in ascending order, each once"),
        (["split.adapt_steps=[0]"], "split.adapt_steps"),
        (["split.unseen=0", "split.adapt_steps=[1]"], "expected empty, because no client is unseen (split.unseen)"),
        (["split.unseen=1.0"], "split.unseen=1.0: expected a number of clients >= 0, a share between 0 and 1, or a"),
        (["split.unseen=[7,8]"], "split.unseen=[7, 8]: expected clients from 0 to 7, each once"),
        (["split.unseen=8"], "split.unseen=8: expected a number below 8"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [a for a in RUN if not any(a.split("=")[0] == b.split("=")[0] for b in arguments)]
    if not any(a.startswith("split.unseen") for a in arguments):
        kept.append("split.unseen=2") if "split.unseen=3" not in kept else None
    assert message in error_of(capsys, *kept, *arguments, f"output={tmp_path}")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg", "ditto", "fedrep"])
def test_stages_go_on_from_one_another(strategy: str, tmp_path: Path) -> None:
    """All methods without a state of their optimizer: nine steps at once are a local round, as are four and five."""
    plain = [f"strategy={strategy}", "training.shuffle=false"]
    at_once, in_stages = (
        at_end(tmp_path / name, *plain, f"split.adapt_steps={steps}") for name, steps in (("a", "[9]"), ("b", "[4,9]"))
    )
    for last in (at_once, in_stages):
        assert last["adapted/accuracy_after_9"] > last["unseen/accuracy"] - 0.1
    if strategy == "ditto":  # its personal network moves from the first steps on
        assert in_stages["adapted/loss_after_4"] != in_stages["unseen/loss"]


@pytest.mark.slow
def test_no_round_before_a_drift_is_selected(tmp_path: Path) -> None:
    drift = ["heterogeneity=label_groups", "heterogeneity.drift.round=3", "strategy=fedavg", "rounds=4"]
    assert _main(["partition=iid", "partition.num_clients=8", *drift, f"output={tmp_path}"]) == 0
    (path,) = tmp_path.rglob("summary.json")
    assert json.loads(path.read_text())["selected_round"] in (3, 4)


def test_a_drift_after_the_last_round_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drift = ["heterogeneity=label_groups", "heterogeneity.drift.round=5", "rounds=4", f"output={tmp_path}"]
    assert "heterogeneity.drift.round=5: expected at most rounds=4" in error_of(capsys, "partition=iid", *drift)
