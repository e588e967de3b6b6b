"""The choice of cohort size and workers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import fedpers.runtime.probe as module
from fedpers.cohort import Training
from fedpers.data.cache import cache_root
from fedpers.runtime.engine import CohortEngine
from fedpers.runtime.probe import Choice, probe
from fedpers.strategies import CohortApp, FedAvgUpdate
from tests.problems import SmallNetwork, gaussian_data


@pytest.fixture
def app() -> CohortApp:
    return FedAvgUpdate(training=Training(lr=0.01, batch_size=8)).client_app(SmallNetwork(), gaussian_data())


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "SECONDS_PER_SIZE", 0.002)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was measured, with fixed times: larger cohorts are better up to 4, a second worker helps."""
    calls: list[Any] = []

    def time_steps(size: int, device: torch.device) -> float:
        calls.append(size)
        return {1: 9.0, 4: 12.0}.get(size, 4.0 * size) * 1e-6

    monkeypatch.setattr(module, "_stepper", lambda app, size: size)
    monkeypatch.setattr(module, "_time_steps", time_steps)
    monkeypatch.setattr(module, "_time_together", lambda sizes: 1e-6)
    monkeypatch.setattr(module, "cores", lambda: 2)
    return calls


def test_a_choice_is_measured_once_and_kept(app: CohortApp) -> None:
    torch.set_num_threads(2)
    first = probe(app, 7, "auto", 1)
    assert torch.get_num_threads() == 2
    assert first.how == "measured"
    assert 1 <= first.cohort <= 7
    assert "1" in first.microseconds
    assert all(us > 0 for us in first.microseconds.values())
    again = probe(app, 7, "auto", 1)
    assert again == Choice(first.cohort, 1, "cached", first.microseconds)
    assert json.loads((cache_root() / "probe.json").read_text())
    assert [p.name for p in cache_root().iterdir()] == ["probe.json"]


def test_workers_are_measured_for_real(app: CohortApp) -> None:
    assert probe(app, 7, 1, "auto").workers in (1, min(module.cores(), 7))


def test_other_questions_are_measured_anew(app: CohortApp, measured: list[Any]) -> None:
    probe(app, 7, "auto", 1)
    probe(app, 6, "auto", 1)
    other = FedAvgUpdate(training=Training(lr=0.01, batch_size=16)).client_app(SmallNetwork(), gaussian_data())
    probe(other, 7, "auto", 1)
    assert measured == [1, 4, 7, 1, 4, 6, 1, 4, 7]
    assert [probe(app, n, "auto", 1).how for n in (7, 6)] == ["cached"] * 2
    assert len(measured) == 9


def test_given_values_are_kept(app: CohortApp, measured: list[Any]) -> None:
    assert probe(app, 7, 3, 2) == Choice(3, 2, "given")
    assert probe(app, 7, 30, 1) == Choice(7, 1, "given")
    assert not measured
    assert probe(app, 7, "auto", 1).workers == 1
    assert probe(app, 7, 2, "auto").cohort == 2


def test_the_cohort_does_not_depend_on_the_workers(app: CohortApp, measured: list[Any]) -> None:
    choices = [probe(app, 7, "auto", workers) for workers in (1, 2, "auto")]
    assert [c.cohort for c in choices] == [4] * 3
    assert [c.workers for c in choices] == [1, 2, 2]


def test_a_second_worker_must_be_clearly_faster(
    app: CohortApp, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert probe(app, 7, 1, "auto").workers == 2
    monkeypatch.setattr(module, "_time_together", lambda sizes: 17e-6)  # two clients in the time of 1.9
    assert probe(app, 7, 1, "auto").workers == 1


def test_no_more_workers_than_cohorts(app: CohortApp, measured: list[Any]) -> None:
    assert probe(app, 7, 7, 8).workers == 1
    assert probe(app, 7, 5, 8).workers == 2


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"KEY": 5}', '{"KEY": {"cohort": 0, "microseconds": {}}}',
             '{"KEY": {"cohort": "x"}}', '{"KEY": {"cohort": 4, "microseconds": 3}}', "\x00\xff"],
)  # fmt: skip
def test_a_damaged_cache_is_measured_again_and_repaired(text: str, app: CohortApp, measured: list[Any]) -> None:
    key = module._key(app, 7)
    cache_root().mkdir()
    (cache_root() / "probe.json").write_bytes(text.replace("KEY", key).encode("latin-1"))
    assert probe(app, 7, "auto", 1).how == "measured"
    assert probe(app, 7, "auto", 1).how == "cached"
    assert len(measured) == 3


def test_a_cache_that_cannot_be_written_is_a_warning(
    app: CohortApp,
    measured: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDPERS_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert probe(app, 7, "auto", 1).cohort == 4
    assert "could not be kept" in caplog.text
    assert str(tmp_path / "file") in caplog.text


def test_an_engine_settles_once(app: CohortApp, measured: list[Any]) -> None:
    engine = CohortEngine(app)
    assert engine.choice is None
    choice = engine.choose(7)
    assert engine.choose(3) is choice is engine.choice
    engine.close()


def test_choices_read_well() -> None:
    assert str(Choice(1, 1, "given")) == "cohorts of 1 client, 1 worker, given"
    text = str(Choice(4, 2, "measured", {"1": 9.4, "4": 3.0}))
    assert text == "cohorts of 4 clients, 2 workers, measured (per client and step 1: 9 us, 4: 3 us)"
