"""Runs that stop and go on, as a user meets them."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml

import fedpers.run.execute as module
import fedpers.run.setup as run_setup
from fedpers.app import _main
from fedpers.run.reopen import locked, reopen
from fedpers.strategies import FedAvg
from tests.resume import results, start

SMALL = [
    "partition.num_clients=6",
    "partition.alpha=1.0",
    "fraction=0.5",
    "runtime.clients_at_once=3",
    "runtime.workers=1",
]


def run(folder: Path, *arguments: str) -> Path:
    """Run the command in this process into `folder`."""
    assert _main([*SMALL, *arguments, f"hydra.run.dir={folder}"]) == 0
    return folder


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """The one sentence a wrong command ends in."""
    capsys.readouterr()
    assert _main(list(arguments)) == code
    text = capsys.readouterr().err
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("fedpers: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("fedpers: ")


def rounds_of(folder: Path) -> list[int]:
    return [json.loads(line)["round"] for line in (folder / "rounds.jsonl").read_text().splitlines()]


def checkpoints_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 3 rounds; to be copied, not changed."""
    return run(tmp_path_factory.mktemp("finished") / "run", "strategy=fedper", "rounds=3")


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


# ------------------------------------------------------------------ going on


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedrep", "ditto", "scaffold"])
def test_a_run_that_is_extended_equals_one_that_was_as_long(method: str, tmp_path: Path) -> None:
    settings = [f"strategy={method}", "split.unseen=2", "evaluate_every=2"]
    parts = run(tmp_path / "parts", *settings, "rounds=3")
    assert checkpoints_of(parts) == ["round_000003"]
    assert _main(["resume", str(parts), "rounds=6"]) == 0
    assert checkpoints_of(parts) == ["round_000006"]
    assert yaml.safe_load((parts / "config.yaml").read_text())["rounds"] == 6
    assert results(parts) == results(run(tmp_path / "whole", *settings, "rounds=6"))
    manifest = json.loads((parts / "manifest.json").read_text())
    assert [row["after_round"] for row in manifest["resumed"]] == [3]
    assert "resumed after round 3" in (parts / "run.log").read_text()


def test_rounds_after_the_last_checkpoint_are_run_again(tmp_path: Path) -> None:
    """What a run wrote after its last checkpoint gives way, whether whole lines or half ones."""
    whole = run(tmp_path / "run", "strategy=fedper", "rounds=5", "checkpoint.every=2", "checkpoint.keep=3")
    expected = results(whole)
    assert checkpoints_of(whole) == ["round_000002", "round_000004", "round_000005"]
    shutil.rmtree(whole / "checkpoints" / "round_000005")
    for name in ("clients.parquet", "summary.json"):
        (whole / name).unlink()
    with (whole / "rounds.jsonl").open("a") as file:
        file.write('{"round": 6, "train/lo')
    (whole / "states-abcdefgh").mkdir()  # memory-mapped files of a run that was killed
    assert _main(["resume", str(whole)]) == 0
    assert results(whole) == expected
    assert not (whole / "states-abcdefgh").exists()


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run(tmp_path / "run", "strategy=fedper", "rounds=4", "checkpoint.every=2", "checkpoint.keep=2")
    expected = results(whole)
    (whole / "summary.json").unlink()
    (whole / "checkpoints" / "round_000004" / "server.safetensors").write_bytes(b"\0" * 100)
    assert _main(["resume", str(whole)]) == 0
    assert "round_000004/server.safetensors is damaged" in capsys.readouterr().err
    assert results(whole) == expected
    assert checkpoints_of(whole) == ["round_000002", "round_000004"]
    for name in checkpoints_of(whole):
        (whole / "checkpoints" / name / "checkpoint.json").unlink()
    assert error_of(capsys, "resume", str(whole), "rounds=5") == (
        f"no checkpoint in {whole} is whole: start the run anew."
    )


def test_a_finished_run_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "rounds.jsonl").read_bytes()
    assert _main(["resume", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert printed == f"{folder} has done its 3 rounds; 'fedpers resume {folder} rounds=N' goes on to round N.\n"
    assert (folder / "rounds.jsonl").read_bytes() == before
    (folder / "summary.json").unlink()  # killed before its results were written
    (folder / "clients.parquet").unlink()
    assert _main(["resume", str(folder)]) == 0
    assert (folder / "clients.parquet").exists()
    assert rounds_of(folder) == [0, 1, 2, 3]


def test_a_folder_above_a_run_or_a_sweep_names_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    above = folder.parent
    assert error_of(capsys, "resume", str(above)) == (
        f"{above} holds no run: there is no config.yaml; below it lies the run {folder}."
    )
    (above / "sweep").mkdir()
    (above / "sweep" / "sweep.json").write_text("{}")
    assert error_of(capsys, "resume", str(above)).endswith(f"; below it lies the sweep {above / 'sweep'}.")


def test_a_finished_run_that_goes_on_is_no_finished_one_from_its_start(folder: Path) -> None:
    seen: list[dict[str, Any]] = []
    run_rounds = module.run_rounds

    def watched(*arguments: Any, **options: Any) -> Any:
        seen.append(json.loads((folder / "summary.json").read_text()))
        return run_rounds(*arguments, **options)

    with mock.patch.object(module, "run_rounds", watched):
        assert _main(["resume", str(folder), "rounds=5"]) == 0
    (begun,) = seen
    assert (begun["interrupted"], begun["rounds"], begun["rounds_done"]) == (True, 5, 2)  # as of the checkpoint


def test_a_finished_run_whose_last_round_has_no_checkpoint_is_finished(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(["resume", str(folder), "rounds=4", "checkpoint.every=0"]) == 0
    assert checkpoints_of(folder) == ["round_000003"]
    before = (folder / "rounds.jsonl").read_bytes()
    capsys.readouterr()
    assert _main(["resume", str(folder)]) == 0
    assert capsys.readouterr().out.startswith(f"{folder} has done its 4 rounds; ")
    assert (folder / "rounds.jsonl").read_bytes() == before
    assert _main(["resume", str(folder), "rounds=5"]) == 0
    assert rounds_of(folder) == [0, 1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_run_whose_budget_is_spent_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["strategy=fedavg", "training.budget=3", "rounds=9", f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    capsys.readouterr()
    assert _main(["resume", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.endswith(": training.budget is spent.\n")


def test_the_cohort_size_of_the_run_is_kept(tmp_path: Path) -> None:
    run_folder = run(tmp_path / "run", "strategy=fedper", "rounds=1")  # cohorts of 3
    settings = yaml.safe_load((run_folder / "config.yaml").read_text())
    settings["runtime"]["clients_at_once"] = "auto"
    (run_folder / "config.yaml").write_text(yaml.safe_dump(settings))
    assert _main(["resume", str(run_folder), "rounds=2"]) == 0
    (resumed,) = json.loads((run_folder / "manifest.json").read_text())["resumed"]
    assert resumed["runtime"]["clients_at_once"] == 3
    assert yaml.safe_load((run_folder / "config.yaml").read_text())["runtime"]["clients_at_once"] == "auto"


@pytest.mark.slow
def test_trackers_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    run(tmp_path / "before", "rounds=1", "tracker=wandb")  # wandb's background process is one for all runs of a process
    run_folder = run(tmp_path / "run", "rounds=2", "tracker=[wandb,tensorboard]")
    (first,) = (run_folder / "wandb").glob("offline-run-*/run-*.wandb")
    assert _main(["resume", str(run_folder), "rounds=4"]) == 0
    runs = [path.name for path in (run_folder / "wandb").glob("offline-run-*/run-*.wandb")]
    assert runs == [first.name] * 2  # one id
    events = EventAccumulator(str(run_folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert _main(["resume", str(run_folder), "rounds=5", "tracker=none"]) == 0
    assert yaml.safe_load((run_folder / "config.yaml").read_text())["tracker"] == {}


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.lr=0.1", "training.lr=0.1: expected 0.05, which the run has; only rounds, runtime.*, tracker.*, "
                            "checkpoint.* and stop.* may be changed."),
        ("strategy=ditto", "strategy=ditto: expected fedper, which the run has; "),
        ("seed=1", "seed=1: expected 0, which the run has; "),
        ("checkpoint=3", "checkpoint=3: expected "),
        ("colour=red", "colour=red: expected nothing of that name, which the run has; "),
        ("rounds=2", "rounds=2: expected a whole number >= 3, the rounds done."),
        ("rounds=many", "rounds=many: expected a whole number."),
        ("runtime=rey", "runtime=rey: expected one of flower, local, ray (did you mean 'ray'?)."),
        ("runtime.worker=2", "runtime.worker=2: expected a known key: one of "),
        ("tracker.wandb.mode=x", "tracker.wandb.mode=x: expected one of auto, offline, online"),
        ("checkpoint.keep=0", "checkpoint.keep=0: expected a whole number >= 1."),
        ("+rounds=4", "'+rounds=4' cannot be read as key=value."),
        ("~rounds", "'~rounds' cannot be read as key=value."),
        ("rounds=4,5", "'rounds=4,5' cannot be read as key=value."),
        ("rounds", "'rounds' cannot be read as key=value."),
        ("runtime.actors=2", "runtime.actors=2: expected an option of runtime=ray, and this is runtime=local."),
        ("runtime.gpus_per_actor=1",
         "runtime.gpus_per_actor=1: expected an option of runtime=ray or flower, and this is runtime=local."),
    ],
)  # fmt: skip
def test_what_may_not_change_is_refused(
    override: str, sentence: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "run.log"}
    assert error_of(capsys, "resume", str(folder), override).startswith(sentence)
    assert {path: path.read_bytes() for path in before} == before


def test_options_of_a_group_may_stand_before_it(folder: Path) -> None:
    for typed in (["runtime=ray", "runtime.actors=2"], ["runtime.actors=2", "runtime=ray"]):
        runtime = reopen(folder, typed).config.runtime
        assert (runtime.name, runtime.actors) == ("ray", 2)


def test_what_says_the_same_is_no_change(folder: Path) -> None:
    assert _main(["resume", str(folder), "strategy=fedper", "training.lr=0.05", "fraction=0.5", "rounds=4"]) == 0
    assert rounds_of(folder) == [0, 1, 2, 3, 4]


def edited(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    change(settings)
    path.write_text(yaml.safe_dump(settings))


def test_a_config_that_was_edited_is_refused_with_the_difference(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited(folder, lambda s: (s["training"].update(lr=0.1), s.update(auc=True), s["split"].pop("public")))
    assert error_of(capsys, "resume", str(folder), "rounds=4") == (
        "the settings are not those of the run (auc: False in the checkpoint, True in config.yaml; split.public: 0.0 "
        "in the checkpoint, nothing in config.yaml; training.lr: 0.05 in the checkpoint, 0.1 in config.yaml): only "
        "rounds, runtime.*, tracker.*, checkpoint.* and stop.* may be changed."
    )


@pytest.mark.parametrize(
    ("what", "sentence"), [("data", "the data made here differ"), ("network", "the initial network")]
)
def test_other_data_or_another_initial_network_are_refused(
    what: str, sentence: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = module.prepare_run

    def other(config: Any) -> Any:
        setup = prepare(config)
        if what == "data":
            object.__setattr__(setup.data, "checksum", "other")
        else:
            setup.network = "other"
        return setup

    monkeypatch.setattr(module, "prepare_run", other)
    assert error_of(capsys, "resume", str(folder), "rounds=4").startswith(sentence)


def test_a_frozen_backbone_that_is_another_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its values are in no checkpoint."""
    settings = ["strategy=head_only", "model.pretrain_epochs=1", "model.depth=1", "rounds=1"]
    run_folder = run(tmp_path / "run", *settings)
    assert _main(["resume", str(run_folder), "rounds=2"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        build = run_setup.build_model

        def other(*arguments: Any, **more: Any) -> Any:
            model = build(*arguments, **more)
            with torch.no_grad():
                next(model.body.parameters()).add_(1e-6)
            return model

        patch.setattr(run_setup, "build_model", other)
        assert error_of(capsys, "resume", str(run_folder), "rounds=3").startswith(
            "the initial network made here differs"
        )


def test_runs_without_checkpoints_say_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder = run(tmp_path / "run", "rounds=1", "checkpoint.every=0")
    assert not (run_folder / "checkpoints").exists()
    assert error_of(capsys, "resume", str(run_folder)) == (
        f"{run_folder} holds no checkpoint (checkpoint.every is 0): start the run anew."
    )
    edited(run_folder, lambda s: s["checkpoint"].update(every=5))
    assert "it was stopped before the first was written" in error_of(capsys, "resume", str(run_folder))
    assert "there is no such folder" in error_of(capsys, "resume", str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "there is no config.yaml" in error_of(capsys, "resume", str(tmp_path / "empty"))


def test_a_run_that_is_going_on_is_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(folder):
        assert error_of(capsys, "resume", str(folder)) == f"another process works on the run in {folder}."


def test_rounds_that_are_missing_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (folder / "rounds.jsonl").read_text().splitlines(keepends=True)
    (folder / "rounds.jsonl").write_text("".join(lines[:2]))
    text = error_of(capsys, "resume", str(folder), "rounds=4")
    assert text == f"{folder / 'rounds.jsonl'} lacks round 2, after which the run would be resumed."


# ------------------------------------------------------------------ strangers' folders


class Own(FedAvg):
    """A method of one's own."""


def test_code_named_in_a_folder_is_run_only_when_it_is_typed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stranger.py").write_text("open('executed', 'w')")
    monkeypatch.chdir(tmp_path)
    edited(folder, lambda s: s["strategy"].update(name="stranger:Method"))
    text = error_of(capsys, "resume", str(folder), "rounds=4")
    assert "strategy.name=stranger:Method" in text
    assert f"'fedpers resume {folder} strategy.name=stranger:Method'" in text
    assert "which the run has" in error_of(capsys, "resume", str(folder), "rounds=4", "strategy.name=other:Method")
    assert not (tmp_path / "executed").exists()
    assert "stranger" not in sys.modules


def test_a_method_of_ones_own_goes_on_when_it_is_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method = f"strategy.name={__name__}:Own"
    run_folder = run(tmp_path / "run", method, "rounds=1")
    assert "names code that would be run" in error_of(capsys, "resume", str(run_folder), "rounds=2")
    assert _main(["resume", str(run_folder), method, "rounds=2"]) == 0
    assert rounds_of(run_folder) == [0, 1, 2]


def test_all_code_of_ones_own_is_asked_for_at_once_and_may_be_typed_as_at_first(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited(folder, lambda s: (s["strategy"].update(name="mine:Method"), s["dataset"].update(name="mine:load")))
    everything = "strategy.name=mine:Method dataset.name=mine:load"
    for typed in ([], ["strategy=mine:Method"], ["dataset.name=mine:load"]):
        assert f"as in 'fedpers resume {folder} {everything}'." in error_of(capsys, "resume", str(folder), *typed)
    text = error_of(capsys, "resume", str(folder), "strategy=mine:Method", "dataset=mine:load")
    assert text.startswith("the settings are not those of the run (dataset.name: digits in the checkpoint")
    run_folder = run(tmp_path / "own", f"strategy={__name__}:Own", "rounds=1")
    assert _main(["resume", str(run_folder), f"strategy={__name__}:Own", "rounds=2"]) == 0
    assert rounds_of(run_folder) == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s["model"].update(weights="timm:hf-hub:somebody/model"), "names a place to load a network from"),
        (lambda s: s["runtime"].update(address="ray://example.org:10001"), "names a cluster that would be trusted"),
        (lambda s: s["strategy"].update(name=["os:system"]), "names code that would be run"),
    ],
)
def test_settings_that_lead_elsewhere_must_be_typed(
    change: Callable[[dict[str, Any]], Any], sentence: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited(folder, change)
    assert sentence in error_of(capsys, "resume", str(folder), "rounds=4")


def test_an_export_computes_here_whatever_cluster_the_run_used(folder: Path) -> None:
    edited(folder, lambda settings: settings["runtime"].update(address="ray://example.org:10001"))
    assert _main(["export", str(folder), "--client", "0", "--out", str(folder.parent / "zero.safetensors")]) == 0
    assert (folder.parent / "zero.safetensors").exists()


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch executed']",
        "strategy: !!python/name:os.system",
        "a: &a [1]\nb: *a",
        "seed: 2001-01-01",
        "seed: !!binary aGVsbG8=",
        "[" * 5000,
        "- 1",
        "a: [",
        "a: " + "x" * 2**21,
        "_target_: os.system",
        "seed: ${oc.env:HOME}",
        "1: 2",
    ],
)
def test_a_config_is_plain_values_and_nothing_else(
    text: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    (folder / "config.yaml").write_text(text)
    error_text = error_of(capsys, "resume", str(folder))
    assert os.environ["HOME"] not in error_text.replace(str(folder), "")
    assert len(error_text) < 500
    assert not (folder.parent / "executed").exists()


@pytest.mark.parametrize(
    "name",
    ["rounds.jsonl", "summary.json.tmp", "run.log", "clients.parquet", "tensorboard", "checkpoints/round_000003/more"],
)
def test_links_out_of_the_folder_are_refused(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = tmp_path / "outside"
    outside.write_text("precious")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    assert error_of(capsys, "resume", str(folder), "rounds=4") == (
        f"{folder / name} is a link that may lead elsewhere: the run is not opened."
    )
    assert outside.read_text() == "precious"


def test_what_would_block_or_redirect_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "wandb").mkdir()
    (folder / "wandb" / "settings").write_text("[default]\nbase_url = http://example.org\n")
    assert "wandb/settings is no part of a run" in error_of(capsys, "resume", str(folder), "rounds=4")
    os.mkfifo(folder / "summary.json.tmp")
    assert "is neither a file nor a folder" in error_of(capsys, "resume", str(folder), "rounds=4")


def test_nothing_is_downloaded_to_a_folder_that_a_stranger_named(folder: Path) -> None:
    assert reopen(folder).config.dataset.download
    edited(folder, lambda s: s["dataset"].update(name="mnist", root=str(folder), download=True))
    assert not reopen(folder).config.dataset.download


# ------------------------------------------------------------------ signals and full disks


def started(folder: Path, *arguments: str, **more: Any) -> subprocess.Popen[str]:
    """Start a long run as a process of its own and wait until it has done some rounds."""
    place = [] if "-m" in arguments else [f"hydra.run.dir={folder}"]
    command = [sys.executable, "-m", "fedpers", *arguments, *SMALL, "rounds=100000", *place]

    def with_signals() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)

    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=with_signals, **more)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "rounds.jsonl").exists() and len(rounds_of_lines(folder)) > 3:
            return process
        time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate()[1])


def rounds_of_lines(folder: Path) -> list[str]:
    return (folder / "rounds.jsonl").read_text().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_round_and_writes_a_checkpoint(number: signal.Signals, code: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = started(folder, "strategy=fedper", "checkpoint.every=90000")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    done = rounds_of(folder)[-1]
    again = "Ctrl-C again" if number == signal.SIGINT else "a second signal"
    assert errors.splitlines() == [
        "",
        f"fedpers: finishing round {done}, then stopping; {again} stops at once.",
        f"fedpers: stopped after round {done}; 'fedpers resume {folder}' goes on after round {done}.",
    ]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["interrupted"] is True
    assert summary["rounds_done"] == done
    assert checkpoints_of(folder) == [f"round_{done:06d}"]
    assert _main(["resume", str(folder), f"rounds={done + 2}"]) == 0
    assert results(folder) == results(run(tmp_path / "whole", "strategy=fedper", f"rounds={done + 2}"))


@pytest.mark.slow
def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    script = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores in the background
from fedpers.run import execute as module
from fedpers.app import main
slow = module.run_rounds
def rounds(*arguments, **more):
    for report in slow(*arguments, **more):
        yield report
        if report.round == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(100)
module.run_rounds = rounds
main(sys.argv[1:])
"""
    command = [sys.executable, "-c", script, *SMALL, "rounds=100", "checkpoint.every=2", f"hydra.run.dir={folder}"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert process.returncode == 143
    assert process.stderr.splitlines()[1:] == [
        "fedpers: finishing round 4, then stopping; Ctrl-C again stops at once.",
        f"fedpers: stopped after round 3; 'fedpers resume {folder}' goes on after round 2.",
    ]
    assert checkpoints_of(folder) == ["round_000002"]
    assert json.loads((folder / "summary.json").read_text())["rounds_done"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "done", "ended_by"),
    [(["rounds=2"], 2, "rounds"), (["rounds=100", "stop.patience=1", "training.lr=1e-9"], 2, "stop.patience")],
)
def test_a_signal_in_the_last_round_leaves_a_complete_run(
    arguments: list[str], done: int, ended_by: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    script = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from fedpers.app import main
from fedpers.strategies import FedAvg
aggregate = FedAvg.aggregate_train
def interrupted(self, round, replies):
    if round == {done}:
        os.kill(os.getpid(), signal.SIGINT)
    return aggregate(self, round, replies)
FedAvg.aggregate_train = interrupted
main(sys.argv[1:])
"""
    command = [sys.executable, "-c", script, *SMALL, "strategy=fedavg", *arguments, f"hydra.run.dir={folder}"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert process.returncode == 130
    assert process.stderr.splitlines()[-1] == (f"fedpers: stopped after the last round, {done}; the run is complete.")
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["rounds_done"], summary["ended_by"], summary["interrupted"]) == (done, ended_by, False)


@pytest.mark.slow
def test_without_checkpoints_a_signal_stops_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = started(folder, "checkpoint.every=0")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["interrupted"] is True
    assert errors == f"fedpers: stopped after round {summary['rounds_done']}; there is no checkpoint.\n"


@pytest.mark.slow
def test_ctrl_c_before_the_first_round_names_the_folder(tmp_path: Path) -> None:
    script = """
import signal, sys
from fedpers.app import main
from fedpers.app import run as module
def interrupted(*arguments):
    signal.default_int_handler(signal.SIGINT, None)
module.run = interrupted
main(sys.argv[1:])
"""
    command = [sys.executable, "-c", script, *SMALL, f"hydra.run.dir={tmp_path / 'run'}"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert process.returncode == 130
    assert process.stderr == f"fedpers: interrupted; what the run has done is in {tmp_path / 'run'}.\n"


@pytest.mark.slow
def test_a_signal_ends_a_sweep(tmp_path: Path) -> None:
    folder = tmp_path / "sweep" / "0"
    command = ["-m", "seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}", "hydra.sweep.subdir=${hydra.job.num}"]
    process = started(folder, *command)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert [path.parent.name for path in tmp_path.rglob("summary.json")] == ["0"]


def test_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run(tmp_path / "run", "rounds=1")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_goes_on(tmp_path: Path) -> None:
    """A limit on the size of files stands for it: the server's arrays fit, then all of a sudden no longer."""
    script = """
import resource, sys
from fedpers.run import execute as module
from fedpers.app import main
save = module.Checkpoints.save
def limited(self, round, *arguments, **options):
    most = {4: 10_000, 6: 50_000}.get(round, resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    try:
        return save(self, round, *arguments, **options)
    finally:
        print(round, sorted(path.name for path in self.folder.iterdir()), file=sys.stderr)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
module.Checkpoints.save = limited
main(sys.argv[1:])
"""
    folder = tmp_path / "run"
    settings = ["strategy=ditto", "checkpoint.every=2", f"hydra.run.dir={folder}"]
    command = [sys.executable, "-c", script, *SMALL, *settings, "rounds=7"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stderr.splitlines() == [
        "2 ['round_000002']",
        "4 ['round_000002']",
        "round 4: no checkpoint could be written (File too large); the run goes on, and the last one before it stays.",
        "6 ['round_000002']",
        "7 ['round_000002', 'round_000007']",
    ]
    assert rounds_of(folder) == list(range(8))
    assert checkpoints_of(folder) == ["round_000007"]
    assert "round 6: no checkpoint could be written" in (folder / "run.log").read_text()


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """With personal heads and what compression held back; twenty kills: ``python -m tests.equivalence resume``."""
    common = ["strategy=fedper", "compression=topk", "rounds=15", "checkpoint.every=1"]
    common += ["runtime.clients_at_once=5", "runtime.workers=1"]
    folder = tmp_path / "killed"
    process = start([*common, f"hydra.run.dir={folder}"], tmp_path)
    while process.poll() is None and not any(folder.glob("checkpoints/round_*")):
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert _main(["resume", str(folder)]) == 0
    assert _main([*common, f"hydra.run.dir={tmp_path / 'whole'}"]) == 0
    assert results(folder) == results(tmp_path / "whole")


def test_usage_names_resume(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["--help"]) == 0
    assert "fedpers resume FOLDER" in capsys.readouterr().out


def test_a_log_that_may_not_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "run.log").write_text("")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root
    assert _main(["resume", str(tmp_path)]) == 2
    assert capsys.readouterr().err.strip().endswith("run.log may not be written: the run is not resumed.")
