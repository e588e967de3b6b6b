"""Simulated time on clients' own devices."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fedpers.app import _main
from fedpers.run.clock import DeviceClock
from fedpers.settings.run import ClockConfig
from fedpers.strategies import RoundReport

ALIKE = ClockConfig(name="devices", samples_per_second=50.0, download=8.0, upload=2.0, spread=0.0)
RUN = ["dataset=digits", "model=mlp", "partition.num_clients=4", "rounds=2", "clock=devices", "clock.spread=0"]


def test_the_slowest_client_ends_a_round() -> None:
    report = RoundReport(1, [0, 1, 2], bytes_down=6_000_000, bytes_up=1_000_000)
    replies = {0: {"samples": 100.0}, 2: {"samples": 25.0}}  # client 1 failed
    # 2 MB at 8 Mbit/s, 100 samples at 50 a second, 0.5 MB at 2 Mbit/s
    assert DeviceClock(ALIKE, 0).seconds(report, replies) == pytest.approx(2 + 2 + 2)
    more = RoundReport(1, [0, 1, 2], bytes_down=9_000_000, bytes_up=1_000_000, bytes_to_others=3_000_000)
    assert DeviceClock(ALIKE, 0).seconds(more, replies) == pytest.approx(2 + 2 + 2)  # nobody waits for others
    assert DeviceClock(ALIKE, 0).seconds(RoundReport(1, [0]), {}) == 0
    twice = {0: {"samples": 100.0, "steps": 10.0, "gradients": 20.0}}  # of each batch two gradients, nothing sent
    assert DeviceClock(ALIKE, 0).seconds(RoundReport(1, [0]), twice) == pytest.approx(4)


def test_speeds_are_drawn_for_each_client_of_a_seed() -> None:
    config = ClockConfig(name="devices", spread=0.5)
    one, again, other = DeviceClock(config, 0), DeviceClock(config, 0), DeviceClock(config, 1)
    assert one.speeds(3) == again.speeds(3)
    assert len({one.speeds(3), one.speeds(4), other.speeds(3)}) == 3
    logs = [math.log(one.speeds(client)[0] / config.samples_per_second) for client in range(2000)]
    mean = sum(logs) / len(logs)
    assert mean == pytest.approx(0, abs=0.05)
    assert math.sqrt(sum((x - mean) ** 2 for x in logs) / len(logs)) == pytest.approx(0.5, rel=0.05)


def test_a_run_tells_it_and_the_same_after_a_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert _main([*RUN, f"hydra.run.dir={whole}"]) == 0
    assert _main([*RUN, "rounds=1", f"hydra.run.dir={stopped}"]) == 0
    assert _main(["resume", str(stopped), "rounds=2"]) == 0
    rows = [json.loads(line) for line in (whole / "rounds.jsonl").read_text().splitlines()]
    summary = json.loads((whole / "summary.json").read_text())
    per_client = [rows[1]["bytes_down"] / 4, rows[1]["bytes_up"] / 4]
    assert "simulated_seconds" not in rows[0]  # nothing is trained
    links = 8e-6 * (per_client[0] / 20 + per_client[1] / 5)
    assert links < rows[1]["simulated_seconds"] <= links + rows[1]["samples"] / 100
    assert summary["simulated_seconds"] == pytest.approx(rows[1]["simulated_seconds"] + rows[2]["simulated_seconds"])
    assert summary["simulated_seconds"] == json.loads((stopped / "summary.json").read_text())["simulated_seconds"]
    capsys.readouterr()
    assert _main(["compare", str(whole), "--columns", "score,simulated"]) == 0
    assert "simulated" in capsys.readouterr().out


def test_without_it_nothing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main([*RUN[:4], f"hydra.run.dir={tmp_path}"]) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["simulated_seconds"] is None
    capsys.readouterr()
    assert _main(["compare", str(tmp_path), "--columns", "simulated"]) == 2
    assert "--columns" in capsys.readouterr().err
    assert _main([*RUN[:4], "clock.spread=1", f"hydra.run.dir={tmp_path / 'other'}"]) == 2
    assert "clock.spread" in capsys.readouterr().err
