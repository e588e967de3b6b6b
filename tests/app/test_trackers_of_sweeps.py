"""What trackers are told of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedpers.app.run as module
from fedpers.app import _main
from fedpers.settings import Config


@pytest.mark.slow
def test_runs_of_a_sweep_are_one_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[str | None] = []

    def run(config: Config, folder: Path, resolved: dict[str, Any]) -> dict[str, Any]:
        assert config.tracker.wandb is not None
        assert resolved["tracker"]["wandb"]["group"] == config.tracker.wandb.group
        groups.append(config.tracker.wandb.group)
        return {}

    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(module, "print_result", lambda summary, folder: None)
    monkeypatch.setattr(module, "exit_code", lambda summary: 0)
    sweep = ["tracker=wandb", f"hydra.sweep.dir={tmp_path / 'sweeps' / 'lr'}"]
    assert _main(["-m", "seed=0,1", *sweep]) == 0
    assert _main(["-m", "seed=0,1", "tracker.wandb.group=mine", *sweep]) == 0
    assert _main(["tracker=wandb", f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    assert groups == ["sweeps_lr", "sweeps_lr", "mine", "mine", None]
