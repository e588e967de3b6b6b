"""What trackers are told of a sweep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fedpers.app.run as single
from fedpers.app import _main
from fedpers.app.sweeps import jobs
from fedpers.run import run
from fedpers.settings import Config, TrackerConfig


@pytest.mark.slow
def test_runs_of_a_sweep_are_one_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[str | None] = []

    def without_tracker(config: Config, folder: Path, resolved: dict[str, Any]) -> dict[str, Any]:
        assert config.tracker.wandb is not None
        assert resolved["tracker"]["wandb"]["group"] == config.tracker.wandb.group
        groups.append(config.tracker.wandb.group)
        return run(replace(config, tracker=TrackerConfig()), folder, resolved)

    monkeypatch.setattr(jobs, "run", without_tracker)
    monkeypatch.setattr(single, "run", without_tracker)
    small = ["tracker=wandb", "rounds=1", "partition.num_clients=3"]
    place = tmp_path / "sweeps"
    assert _main(["-m", "seed=0,1", *small, f"hydra.sweep.dir={place / 'lr'}"]) == 0
    assert _main(["-m", "seed=0,1", "tracker.wandb.group=mine", *small, f"hydra.sweep.dir={place / 'mine'}"]) == 0
    assert _main([*small, f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    assert groups == ["sweeps_lr", "sweeps_lr", "mine", "mine", None]
