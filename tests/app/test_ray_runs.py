"""``fedpers runtime=ray`` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedpers.run import TIMES
from tests.app.test_cli import error_of, fedpers

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_machine")]


def rounds(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


@pytest.mark.parametrize(
    ("settings", "actors"),
    [
        ("strategy=ditto fraction=0.5 split.unseen=2 partition.num_clients=8 aggregation=median", 2),
        (
            "strategy=fedavg privacy=adaptive privacy.noise=0.5 strategy.weighting=uniform partition.num_clients=8",
            1,
        ),
    ],
)
def test_the_same_settings_give_the_same_numbers(settings: str, actors: int, tmp_path: Path) -> None:
    common = [*settings.split(), "rounds=3"]
    (local,) = fedpers(*common, output=tmp_path / "local")
    (ray,) = fedpers(*common, "runtime=ray", f"runtime.actors={actors}", output=tmp_path / "ray")
    for expected, round in zip(rounds(local), rounds(ray), strict=True):
        assert expected == pytest.approx(round, rel=1e-5, abs=1e-7, nan_ok=True)
    columns = [pd.read_parquet(folder / "clients.parquet") for folder in (local, ray)]
    pd.testing.assert_frame_equal(*columns, rtol=1e-5, atol=1e-7)
    runtime = json.loads((ray / "manifest.json").read_text())["runtime"]
    assert (runtime["name"], runtime["actors"]) == ("ray", actors)


def test_more_actors_than_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(capsys, "runtime=ray", "runtime.actors=99", "rounds=1", f"output={tmp_path}")
    allowed = "at most 5, for which the cluster has room (5 CPUs and 0 GPUs)"
    assert error == f"fedpers: runtime.actors=99: expected {allowed}."
