"""Sweeps as a user meets them: stopped and continued, in parallel, searched, tuned; and what is said of mistakes."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from fedpers.app import _main
from fedpers.app.sweeps import tuning as tuning_module
from fedpers.app.sweeps.display import Display, Shown
from fedpers.app.sweeps.jobs import outcome
from fedpers.app.sweeps.names import Naming, quoted
from fedpers.app.sweeps.record import Job, Record, check_arguments
from fedpers.app.sweeps.tuning import Tuning
from fedpers.errors import FedpersError
from tests.resume import results, start

SMALL = ["rounds=2", "partition.num_clients=5", "partition.alpha=1.0", "runtime.clients_at_once=5", "runtime.workers=1"]


def needs(plugin: str) -> pytest.MarkDecorator:
    absent = importlib.util.find_spec("hydra_plugins") is None or not importlib.util.find_spec(
        f"hydra_plugins.{plugin}"
    )
    return pytest.mark.skipif(absent, reason=f"{plugin} is not installed")


def sweep(folder: Path, *arguments: str, code: int = 0) -> dict[str, dict[str, Any]]:
    """Run a sweep in this process; what its jobs yield."""
    assert _main(["-m", *SMALL, *arguments, f"hydra.sweep.dir={quoted(str(folder))}"]) == code
    return yielded(folder)


def yielded(folder: Path) -> dict[str, dict[str, Any]]:
    return {str(path.parent.relative_to(folder)): results(path.parent) for path in folder.rglob("summary.json")}


def moments(folder: Path) -> dict[Path, int]:
    """When each job last wrote into ``rounds.jsonl``."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("rounds.jsonl")}


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """The one sentence a wrong command ends in."""
    capsys.readouterr()
    assert _main(list(arguments)) == code
    text = capsys.readouterr().err
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("fedpers: ")]
    return line.removeprefix("fedpers: ")


# ------------------------------------------------------------------ names


def test_names_say_what_is_varied() -> None:
    naming = Naming(("strategy", "strategy.mu", "training.lr", "seed"), {"dataset": "digits"})
    overrides = ["strategy=fedprox", "strategy.mu=0.1", "training.lr=0.012345678", "seed=1", "rounds=2"]
    assert naming.folder(3, overrides) == "3_fedprox_digits_mu=0.1_lr=0.01235_seed1"
    assert naming.label(overrides) == "fedprox mu=0.1 lr=0.01235 seed=1"
    assert naming.label(["strategy=mine\\:Rep", "seed=1"]) == "mine:Rep seed=1"  # as sweepers write it
    assert naming.folder(4, ["strategy=mine\\:Rep", "seed=1"]) == "4_mine.Rep_digits_seed1"


def test_names_are_short_and_of_safe_characters() -> None:
    naming = Naming(
        ("strategy.lr", "training.lr", "heterogeneity"), {"strategy": "my.own:Rep", "dataset": "digits", "seed": "7"}
    )
    overrides = ["strategy.lr=1", "training.lr=2", "heterogeneity='a/b ü'"]
    name = naming.folder(12, overrides)
    assert name == "12_my.own.Rep_digits_strategy.lr=1_training.lr=2_heterogeneity=a-b_seed7"
    long = naming.folder(12, ["strategy.lr=" + "9" * 500])
    assert len(long) == 100
    assert long.startswith("12_my.own.Rep_digits_strategy.lr=9")
    assert long.endswith("_seed7")


# -------------------------------------------------- stopped, and continued


@pytest.mark.slow
def test_a_killed_sweep_does_only_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = ["strategy=fedper", "seed=0,1,2", "rounds=8", "checkpoint.every=1"]
    folder = tmp_path / "killed=it's"
    process = start(["-m", *SMALL, *grid, f"hydra.sweep.dir={quoted(str(folder))}"], Path(os.environ["FEDPERS_CACHE"]))
    second = folder / "1_fedper_digits_seed1"
    while process.poll() is None and not any(second.glob("checkpoints/round_*")):
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [job["folder"] for job in json.loads((folder / "sweep.json").read_text())["jobs"]] == [
        "0_fedper_digits_seed0", "1_fedper_digits_seed1", "2_fedper_digits_seed2"
    ]  # fmt: skip
    assert not (folder / "2_fedper_digits_seed2").exists()
    assert outcome(second).state == "open"
    before = moments(folder / "0_fedper_digits_seed0")

    assert _main(["resume", str(folder)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "1 of 3 jobs were done before"
    assert printed[1].startswith("2 of 3  fedper seed=1: test accuracy ")
    assert printed[-1].startswith("3 of 3 jobs done; ")
    assert moments(folder / "0_fedper_digits_seed0") == before
    assert "resumed after round" in (second / "run.log").read_text()
    assert yielded(folder) == sweep(tmp_path / "whole", *grid)

    everything = moments(folder)
    assert _main(["resume", str(folder)]) == 0
    assert moments(folder) == everything


@pytest.mark.slow
def test_what_all_runs_of_a_sweep_warn_of_is_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(tmp_path / "sweep", "strategy=fedrep", "training.epochs=2", "seed=0,1")
    shown = capsys.readouterr().err.splitlines()
    assert shown
    assert len(shown) == len(set(shown))
    logs = [path.read_text() for path in tmp_path.rglob("run.log")]
    assert len(logs) == 2
    assert all(line in log for line in shown for log in logs)
    assert _main([*SMALL, "strategy=fedrep", "training.epochs=2", f"output={tmp_path / 'runs'}"]) == 0
    assert capsys.readouterr().err.splitlines() == shown


def test_a_sweep_whose_place_was_typed_as_output_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["-m", *SMALL, "seed=0,1", f"output={tmp_path / 'out'}"]) == 0
    (folder,) = (path.parent for path in tmp_path.rglob("sweep.json"))
    whole, everything = yielded(folder), moments(folder)
    capsys.readouterr()
    assert _main(["resume", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "2 of 2 jobs were done before"
    assert moments(folder) == everything

    (folder / "1_fedavg_digits_seed1" / "summary.json").unlink()
    assert _main(["resume", str(folder)]) == 0
    assert len(json.loads((folder / "sweep.json").read_text())["jobs"]) == 2
    assert yielded(folder) == whole


@pytest.mark.slow
def test_a_run_without_checkpoint_begins_anew(tmp_path: Path) -> None:
    whole = sweep(tmp_path / "sweep", "seed=0,1", "checkpoint.every=0")
    broken = tmp_path / "sweep" / "1_fedavg_digits_seed1"
    (broken / "summary.json").unlink()
    (broken / "states-abcdefgh").mkdir()
    assert _main(["resume", str(tmp_path / "sweep")]) == 0
    assert yielded(tmp_path / "sweep") == whole
    assert not (broken / "states-abcdefgh").exists()


@pytest.mark.slow
def test_the_same_command_again_continues_and_another_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    whole = sweep(folder, "strategy=local,fedavg")
    before = moments(folder)
    assert sweep(folder, "strategy=local,fedavg") == whole
    assert moments(folder) == before
    again = error_of(capsys, "-m", *SMALL, "strategy=local,fedper", f"hydra.sweep.dir={folder}")
    assert again.startswith(f"{folder} holds another sweep (")
    (folder / "sweep.json").unlink()
    again = error_of(capsys, "-m", *SMALL, "strategy=local,fedavg", f"hydra.sweep.dir={folder}")
    assert again == f"{folder / '0_local_digits_seed0'} holds a run already; choose another folder."


@pytest.mark.slow
def test_ctrl_c_stops_a_sweep_that_then_goes_on(tmp_path: Path) -> None:
    grid = ["seed=0,1", "rounds=25", "evaluate_every=25"]
    folder = tmp_path / "sweep"
    process = start(["-m", *SMALL, *grid, f"hydra.sweep.dir={folder}"], Path(os.environ["FEDPERS_CACHE"]))
    while process.poll() is None and not list(folder.glob("0_*/rounds.jsonl")):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    last = errors.splitlines()[-1]
    assert last == f"fedpers: stopped; 0 of 2 jobs are done; 'fedpers resume {folder}' goes on."
    assert _main(["resume", str(folder)]) == 0
    assert len(yielded(folder)) == 2


# ---------------------------------------------------------- jobs that fail


@pytest.mark.slow
def test_a_failed_job_is_named_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "sweep"
    sweep(folder, "training.lr=-1,0.1", "strategy=local,fedavg", code=2)
    captured = capsys.readouterr()
    failed = "0_local_digits_lr=-1_seed0"
    assert json.loads((folder / failed / "error.json").read_text()) == {
        "error": "training.lr=-1.0: expected a number > 0", "exit_code": 2
    }  # fmt: skip
    assert captured.err.splitlines() == [
        f"fedpers: 2 of 4 jobs failed; 'fedpers resume {folder}' tries them again:",
        f"  {failed} and 1 more: training.lr=-1.0: expected a number > 0.",
    ]
    assert f"2 of 4 jobs done; {folder}" in captured.out
    assert "local lr=-1: failed" in captured.out
    assert _main(["compare", str(folder)]) == 0
    left_out = capsys.readouterr().err
    assert f"{folder / failed} is left out: its run failed: training.lr=-1.0: expected a number > 0." in left_out
    assert _main(["resume", str(folder)]) == 2
    assert "2 of 4 jobs failed" in capsys.readouterr().err


@pytest.mark.slow
def test_a_mistake_in_ones_own_method_ends_its_jobs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mistaken_sweep.py").write_text(
        "from dataclasses import dataclass\n"
        "from fedpers.strategies import FedAvg\n"
        "@dataclass(kw_only=True)\n"
        "class Mistaken(FedAvg):\n"
        "    def aggregate_train(self, server_round, replies):\n"
        "        if server_round == 2:\n"
        "            raise KeyError('w')\n"
        "        return super().aggregate_train(server_round, replies)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "sweep"
    sweep(folder, "strategy=mistaken_sweep:Mistaken,fedavg", code=1)
    assert "KeyError: 'w' (at " in capsys.readouterr().err
    (failed,) = [path.parent for path in folder.rglob("error.json")]
    assert "Traceback" in (failed / "run.log").read_text()
    assert _main(["compare", str(folder)]) == 0
    assert "rounds: KeyError: 'w' (at" in " ".join(capsys.readouterr().out.split())
    refused = error_of(capsys, "resume", str(folder))
    assert refused.startswith("strategy=mistaken_sweep:Mistaken,fedavg in ")
    assert "counts only when you type it" in refused
    assert _main(["resume", str(folder), "strategy=mistaken_sweep:Mistaken,fedavg"]) == 1


# ------------------------------------------------------ launchers, searches


PERSONAL = ["strategy=fedper", "seed=0,1"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the jobs yield one after another."""
    return sweep(tmp_path_factory.mktemp("alone"), *PERSONAL)


@needs("hydra_joblib_launcher")
@pytest.mark.slow
def test_two_jobs_at_once_yield_the_same(alone: dict[str, Any], tmp_path: Path) -> None:
    together = sweep(tmp_path, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", *PERSONAL)
    assert len(together) == 2
    assert together == alone


@needs("hydra_submitit_launcher")
@pytest.mark.slow
def test_jobs_of_submitit_yield_the_same(alone: dict[str, Any], tmp_path: Path) -> None:
    assert sweep(tmp_path, "hydra/launcher=submitit_local", *PERSONAL) == alone


@needs("hydra_submitit_launcher")
@pytest.mark.slow
def test_a_launcher_that_gives_up_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = tmp_path / "sweep"
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu"]
    text = error_of(capsys, "-m", *SMALL, "seed=0,1", *launcher, f"hydra.sweep.dir={folder}")
    assert text.startswith("hydra/launcher=submitit_slurm gave up (RuntimeError: ")
    refused = error_of(capsys, "resume", str(folder))
    assert refused.startswith("hydra/launcher=submitit_slurm in ")
    assert _main(["resume", str(folder), "hydra/launcher=basic"]) == 0
    assert len(yielded(folder)) == 2


@needs("hydra_optuna_sweeper")
@pytest.mark.slow
def test_a_search_of_ten_trials_that_was_stopped_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = [
        "hydra/sweeper=optuna", "hydra.sweeper.n_trials=10", "hydra.sweeper.n_jobs=1", "strategy=fedper",
        "training.lr=tag(log, interval(0.001, 1))",
    ]  # fmt: skip
    folder = tmp_path / "search"
    whole = sweep(folder, *search)
    printed = capsys.readouterr().out.splitlines()
    assert len(whole) == 10
    scores = {name: one["summary.json"]["selected"]["validation/accuracy"] for name, one in whole.items()}
    best = max(scores, key=lambda name: (scores[name], -int(name.partition("_")[0])))
    assert printed[-2] == f"10 of 10 jobs done; {folder}"
    assert printed[-1].startswith(f"best of the search: lr={best.split('lr=')[1].partition('_')[0]} (validation ")
    assert printed[-1].endswith(f"; {folder / best}")

    record = json.loads((folder / "sweep.json").read_text())
    for job in record["jobs"][6:]:  # killed in the seventh trial
        for path in (folder / job["folder"]).rglob("summary.json"):
            path.unlink()
        if job is not record["jobs"][6]:
            (folder / job["folder"]).rename(tmp_path / job["folder"])
    record["jobs"] = record["jobs"][:7]
    (folder / "sweep.json").write_text(json.dumps(record))
    before = moments(folder / record["jobs"][5]["folder"])
    assert _main(["resume", str(folder)]) == 0
    assert yielded(folder) == whole
    assert moments(folder / record["jobs"][5]["folder"]) == before


@needs("hydra_optuna_sweeper")
@pytest.mark.slow
def test_trials_with_the_same_settings_are_one_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=1", "strategy=local,fedavg"]
    done = sweep(tmp_path / "search", *search)
    printed = capsys.readouterr().out.splitlines()
    assert len(done) == 2
    assert printed[2] == "4 of 6 trials had the settings of an earlier one"
    assert printed[3].startswith("2 of 2 jobs done; ")
    assert not any("before" in line for line in printed)


@needs("hydra_optuna_sweeper")
def test_a_search_of_which_all_trials_fail_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "training.lr=interval(-2.0,-1.0)"]
    text = error_of(capsys, "-m", *SMALL, *search, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert text.startswith("2 of 2 jobs failed; ")
    assert (tmp_path / "sweep" / "sweep.json").exists()


# ----------------------------------------------------------------- tuning


@pytest.mark.slow
def test_settings_are_chosen_on_validation_and_then_run_with_all_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tune"
    command = [
        "tune",
        *SMALL,
        "strategy=local,fedper",
        "training.lr=0.001,0.1",
        "seed=0,1",
        f"hydra.sweep.dir={folder}",
    ]
    assert _main(command) == 0
    printed = capsys.readouterr().out
    whole = yielded(folder)
    assert len(whole) == 2 * 2 + 2 * 2
    choices = json.loads((folder / "sweep.json").read_text())["choices"]
    for choice in choices:
        method = choice["case"]
        scores = {
            f"lr={rate}": one["summary.json"]["selected"]["validation/accuracy"]
            for rate in ("0.001", "0.1")
            for name, one in whole.items()
            if name.startswith("tuning/") and f"{method}_digits_lr={rate}_" in name
        }
        assert choice["scores"] == scores
        best = max(scores, key=lambda rate: scores[rate])
        assert f"training.{best}" in choice["overrides"]
        assert f"-> {best}" in printed
        finals = [name for name in whole if name.startswith("tuned/") and method in name]
        assert sorted(name.rpartition("_")[2] for name in finals) == ["seed0", "seed1"]
        assert all(f"_{best}_" in name for name in finals)
    for name in whole:  # a candidate that is chosen is not run again
        if name.startswith("tuned/") and name.endswith("seed0"):
            (same,) = [one for one in whole if one.startswith("tuning/") and one.endswith(name.partition("_")[2])]
            assert (folder / same / "rounds.jsonl").read_bytes() == (folder / name / "rounds.jsonl").read_bytes()

    before = moments(folder)
    (folder / "tuned" / "3_fedper_digits_lr=0.1_seed1" / "summary.json").unlink()
    assert _main(["resume", str(folder)]) == 0
    assert yielded(folder) == whole
    assert sum(before[path] != moment for path, moment in moments(folder).items()) <= 1


@pytest.mark.slow
def test_a_seed_of_its_own_to_choose_by(tmp_path: Path) -> None:
    folder = tmp_path / "tune"
    grid = ["strategy=local", "training.lr=0.01,0.1", "seed=0,1"]
    assert _main(["tune", "--seed", "100", *SMALL, *grid, f"hydra.sweep.dir={folder}"]) == 0
    assert [name.rpartition("_")[2] for name in yielded(folder) if "tuning" in name] == ["seed100"] * 2
    assert sorted(name.rpartition("_")[2] for name in yielded(folder) if "tuned" in name) == ["seed0", "seed1"]


def test_combinations_are_not_compared_in_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = ["training.lr=0.01,0.1", "hydra.sweeper.max_batch_size=1"]
    text = error_of(capsys, "tune", "strategy=local", *grid, f"hydra.sweep.dir={tmp_path / 'tune'}")
    assert text.startswith("hydra.sweeper.max_batch_size=1: expected null for fedpers tune")


@pytest.mark.slow
def test_without_validation_nothing_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = ["training.lr=0.01,0.1", "split.validation=0", f"hydra.sweep.dir={tmp_path / 'tune'}"]
    text = error_of(capsys, "tune", "strategy=local", *SMALL, *grid)
    assert text.startswith("fedpers tune chooses by validation, and no run of local has a validation score: ")


@pytest.mark.slow
def test_seeds_that_are_typed_with_plus_signs_are_no_candidates(tmp_path: Path) -> None:
    folder = tmp_path / "tune"
    grid = ["strategy=local", "training.lr=0.01,0.1", "++seed=0,1"]
    assert _main(["tune", *SMALL, *grid, f"hydra.sweep.dir={folder}"]) == 0
    assert sorted(name.partition("/")[0] for name in yielded(folder)) == ["tuned", "tuned", "tuning", "tuning"]


def test_a_choice_that_was_made_without_a_run_that_failed_is_named() -> None:
    parse = OverridesParser.create().parse_overrides
    varied = {override.key_or_group: override for override in parse(["training.lr=0.1,0.2"])}
    tuning = Tuning(Naming(tuple(varied), {"strategy": "local", "dataset": "digits", "seed": "0"}), varied, None)
    candidates = tuning.candidates([["training.lr=0.1"], ["training.lr=0.2"]])
    with mock.patch.object(tuning_module.log, "warning") as warning:
        (former,) = tuning.choose(candidates, [0.5, None], [])
        assert tuning.choose(candidates, [0.5, 0.4], [former]) == [former]
        assert not warning.called
        assert tuning.choose(candidates, [0.5, 0.9], [former]) == [former]
    assert warning.call_args.args[1:] == ("local", "lr=0.2")


@given(st.text(st.sampled_from("\\'a b=,"), min_size=1, max_size=12))
def test_a_quoted_value_is_read_as_it_was(text: str) -> None:
    override = OverridesParser.create().parse_override(f"key={quoted(text)}")
    assert override.value() == text


def test_there_must_be_something_to_choose_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = error_of(capsys, "tune", "strategy=local,fedavg", f"hydra.sweep.dir={tmp_path / 'tune'}")
    assert text.startswith("fedpers tune has nothing to choose from: ")


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "sentences"),
    [
        (["hydra/launcher=rq"], ["hydra/launcher=rq: expected one of ", "basic", "pip install hydra-rq-launcher."]),
        (["hydra/sweeper=nevergrad"], ["one of basic", "pip install hydra-nevergrad-sweeper."]),
        (["hydra/launcher=jobblib"], ["hydra/launcher=jobblib: expected one of ", "(did you mean 'joblib'?)"]),
        (["hydra/launcher=slurm"], ["submitit_slurm", "pip install hydra-ray-launcher brings ray"]),
        (["hydra/launcher=qwerty"], ["expected one of basic, joblib, "]),
        (["hydra/sweeper=optima"], ["(did you mean 'optuna'?)"]),
        (["hydra/job_logging=qwerty"], ["hydra/job_logging=qwerty: expected one of ", "fedpers"]),
        (
            ["training.lr=interval(0.01,0.1)"],
            ["training.lr=interval(0.01,0.1): expected a list", "hydra/sweeper=optuna"],
        ),
        (
            ["hydra.sweeper.n_trial=3"],
            ["n_trial=3: expected a setting of the hydra/sweeper that is chosen, one of max_batch_size, params; "],
        ),
        (["hydra.launcher.n_jobs=2"], ["none, as it has no settings; others have more (joblib, submitit_local, "]),
        (["hydra/launcher="], ["hydra/launcher=: expected one of basic, joblib, "]),
        (["hydra/launcher=null"], ["hydra/launcher=null: expected hydra/launcher=NAME, where NAME is one of basic, "]),
        (["hydra.launcher=joblib"], ["hydra.launcher=joblib: expected hydra/launcher=NAME"]),
        (["~hydra/sweeper"], ["expected hydra/sweeper=NAME, where NAME is one of basic, optuna"]),
        (["hydra/launcher=joblib,basic"], ["Sweeping over Hydra's configuration is not supported"]),
        (["hydra.sweeper.max_batch_size=x"], ["hydra.sweeper.max_batch_size=x: expected a whole number."]),
        (["hydra.run.dir=x"], ["hydra.run.dir=x: expected hydra.sweep.dir, as -m makes a sweep."]),
        (["hydra.sweep.subdir=same", "seed=0,1"], ["hydra.sweep.subdir=same: expected a folder for each job"]),
        (["hydra.sweep.subdir=../x"], ["hydra.sweep.subdir=../x: expected a folder below that of the sweep."]),
    ],
)
def test_a_mistake_in_a_sweep_ends_in_one_sentence(
    arguments: list[str], sentences: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = error_of(capsys, "-m", *arguments, f"output={tmp_path}")
    for sentence in sentences:
        assert sentence in text
    assert not list(tmp_path.rglob("summary.json"))


@pytest.mark.slow
def test_jobs_that_differ_in_values_alone_are_composed_beforehand_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    composed = []

    def load(self: ConfigLoaderImpl, master_config: Any, sweep_overrides: list[str]) -> Any:
        composed.append([text for text in sweep_overrides if not text.startswith("hydra")])
        return load_sweep_config(self, master_config, sweep_overrides)

    load_sweep_config = ConfigLoaderImpl.load_sweep_config
    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", load)
    done = sweep(tmp_path / "right", "strategy=local,fedavg", "seed=0,1", "training.lr=0.1,0.2")
    jobs = [
        [*SMALL, f"strategy={name}", f"seed={seed}", f"training.lr={lr}"]
        for name in ("local", "fedavg")
        for seed in (0, 1)
        for lr in (0.1, 0.2)
    ]
    assert composed == [jobs[0], jobs[4], *jobs]
    assert len(done) == 8
    composed.clear()
    mistaken = ["seed=0,1", "strategy=fedrep,fedavg", "strategy.head_epochs=1,2", f"output={tmp_path / 'wrong'}"]
    assert "strategy.head_epochs" in error_of(capsys, "-m", *SMALL, *mistaken)
    assert len(composed) == 2
    assert not list(tmp_path.glob("wrong/**/rounds.jsonl"))


@needs("hydra_joblib_launcher")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["hydra.launcher.n_jobs=two"], "hydra.launcher.n_jobs=two: expected a whole number."),
        (
            ["hydra.launcher.n_job=2"],
            "hydra.launcher.n_job=2: expected a setting of the hydra/launcher that is chosen, one of backend, ",
        ),
        (["hydra.launcher.n_jobs=0"], "hydra/launcher=joblib gave up (ValueError: n_jobs == 0 "),
    ],
)
def test_a_mistake_in_settings_of_a_launcher(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = error_of(capsys, "-m", "hydra/launcher=joblib", *arguments, "seed=0,1", f"output={tmp_path}")
    assert text.startswith(sentence)


@pytest.mark.parametrize("argument", ["hydra/launcher=basic", "hydra.sweep.dir=x", "hydra.sweeper.max_batch_size=2"])
def test_what_is_about_sweeps_needs_one(argument: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = error_of(capsys, argument, *SMALL, f"output={tmp_path}")
    assert text.startswith(f"{argument}: expected -m with it")


def test_a_plugin_that_cannot_be_imported_is_told_from_one_that_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    from fedpers.app.sweeps.plugins import unknown

    monkeypatch.setattr(metadata, "version", lambda name: "0.0")
    monkeypatch.setitem(sys.modules, "hydra_plugins.hydra_rq_launcher.rq_launcher", None)
    text = str(unknown("hydra/launcher", "rq", ["basic"]))
    assert text.startswith("hydra/launcher=rq: expected one of basic; rq cannot be used as it is installed (")
    assert "hydra-rq-launcher 0.0: import of hydra_plugins" in text


# ------------------------------------------------------- folders of strangers


@pytest.mark.parametrize(
    "argument",
    [
        "strategy=mine:Method", "strategy.name=mine:Method", "+dataset=mine:data", "model=mlp,mine:Net",
        "dataset.path=somebody/set", "model.weights=timm:x/y", "runtime.address=1.2.3.4:5",
        "hydra/launcher=submitit_slurm",
        "hydra.launcher._target_=os.system", "hydra.launcher.setup=[reboot]", "+hydra.callbacks.x._target_=os.system",
        "hydra.sweeper.custom_search_space=os.system", "hydra.sweeper.sampler._target_=os.system", "--config-dir=x",
        "+hydra.sweeper.params.strategy=mine:Method", "hydra.searchpath=[file:///x]", "seed=${oc.env:HOME}",
        "hydra.job.env_set={A:b}", "-cd",
    ],
)  # fmt: skip
def test_what_a_strangers_sweep_asks_for_counts_only_when_typed(argument: str, tmp_path: Path) -> None:
    record = Record(["-m", "seed=0,1", argument])
    with pytest.raises(FedpersError, match="counts only when you type it"):
        check_arguments(record, [], tmp_path)
    check_arguments(record, [argument], tmp_path)


@pytest.mark.parametrize(
    "argument",
    [
        "strategy=local,fedavg", "training.groups={head:{lr:1}}", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
        "hydra/sweeper=optuna", "hydra.sweeper.n_trials=10", "training.lr=tag(log,interval(0.01,1))",
        "+experiment=demo",
        "hydra.sweep.subdir=${hydra.job.num}",
    ],
)  # fmt: skip
def test_settings_of_a_sweep_need_not_be_typed_again(argument: str, tmp_path: Path) -> None:
    check_arguments(Record(["-m", argument]), [], tmp_path)


def test_a_strangers_sweep_leads_nowhere_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "sweep"
    folder.mkdir()
    record = Record(["-m", *SMALL, "seed=0,1"], jobs=[Job("../elsewhere", [*SMALL, "seed=0"])])
    (folder / "sweep.json").write_text(record.text())
    assert "expected a folder below that of the sweep" in error_of(capsys, "resume", str(folder))
    (folder / "0").symlink_to(tmp_path)
    assert "is a link that may lead elsewhere" in error_of(capsys, "resume", str(folder))
    assert not (tmp_path / "elsewhere").exists()


def test_folders_that_hold_no_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "multirun.yaml").touch()
    assert "its runs are resumed one by one" in error_of(capsys, "resume", str(tmp_path))
    (tmp_path / "sweep.json").write_text('{"jobs": [')
    assert "sweep.json does not describe a sweep" in error_of(capsys, "resume", str(tmp_path))
    (tmp_path / "sweep.json").write_text(Record(["-m", "seed=0,1"]).text())
    refused = error_of(capsys, "resume", str(tmp_path), "rounds=9")
    assert refused.endswith("only hydra/launcher and hydra.launcher.* may change.")


# ----------------------------------------------------------------- display


def ended(folder: Path, **more: Any) -> None:
    folder.mkdir(exist_ok=True)
    content = {
        "interrupted": False, "headline": "accuracy", "selected_round": 2, "selected": {"test/accuracy": 0.5},
        "last": {}, "last_diverged": 0, "seconds": 1.0, **more,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(content))


def test_a_line_for_each_job_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Display(4) as display:
        display.skip(1, 0)
        display.watch(Shown(f"fedavg seed={seed}", tmp_path / str(seed), 10) for seed in range(3))
        ended(tmp_path / "1")
        (tmp_path / "0").mkdir()
        (tmp_path / "0" / "error.json").write_text('{"error": "no data", "exit_code": 2}')
    assert capsys.readouterr().out.splitlines()[0] == "1 of 4 jobs were done before"
    assert (display.done, display.failed) == (2, 1)


@pytest.mark.slow
def test_runs_of_a_sweep_draw_no_bars_where_colours_are_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in notebooks, and in many a service that runs tests
    monkeypatch.setenv("COLUMNS", "100")
    sweep = ["seed=0,1", "rounds=1", "partition.num_clients=3", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    assert _main(["-m", *sweep]) == 0
    captured = capsys.readouterr()
    assert "2 of 2 jobs done" in captured.out
    assert "rounds/s" not in captured.err
    assert "2 of 2 done, 0 running, 0 failed" in captured.err  # as a bar wrote it, not as a bar printed above a bar
    assert "[1m" not in captured.err


def test_one_bar_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    with Display(4) as display:
        display.watch(Shown(f"fedavg seed={seed}", tmp_path / str(seed), 10) for seed in range(3))
        ended(tmp_path / "0")
        (tmp_path / "1").mkdir()
        (tmp_path / "1" / "rounds.jsonl").write_text('{"round": 0}\n{"round": 4}\n{"rou')
        os.utime(tmp_path / "1" / "rounds.jsonl", (time.time() + 1, time.time() + 1))
        display.look()
        assert display._progress is not None
        (task,) = display._progress.tasks
        assert task.description == "1 of 4 done, 1 running, 0 failed: fedavg seed=1 4/10"
        assert (task.completed, task.total) == (1.4, 4)
    assert capsys.readouterr().out == ""


def test_a_choice_at_an_end_of_the_values_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["strategy=local,fedavg", "training.lr=1e-6,1e-5,1e-4", "training.batch_size=8,16", "rounds=1"]
    assert _main(["tune", *settings, "partition.num_clients=4", f"output={tmp_path}"]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("best at an end of ")]
    assert line.startswith("best at an end of training.lr (1e-06 to 0.0001), so beyond it may be better: ")


@pytest.mark.slow
def test_a_method_of_ones_own_is_tuned_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine_tuned.py").write_text("from fedpers.strategies import FedAvg\nclass Mine(FedAvg): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    settings = ["strategy=mine_tuned:Mine", "training.lr=0.01,0.1", "rounds=1", "partition.num_clients=4"]
    assert _main(["tune", *settings, f"output={tmp_path / 'runs'}"]) == 0
    assert "\n  mine_tuned:Mine  lr=0.01: " in capsys.readouterr().out
