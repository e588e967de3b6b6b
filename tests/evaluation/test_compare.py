"""Leaderboards of small run folders, with the statistics worked out by hand."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from fedpers.evaluation import runs
from fedpers.evaluation.leaderboard import leaderboard, leaderboard_rows
from fedpers.evaluation.pivot import pivots
from fedpers.evaluation.runs import find_runs
from fedpers.evaluation.tables import print_leaderboard


def board(folder):
    (group,) = leaderboard(find_runs([folder]))
    return group


def printed(folder, width=120):
    console = Console(file=io.StringIO(), width=width)
    print_leaderboard(leaderboard(find_runs([folder])), console)
    return console.file.getvalue()


def line_of(text, name):
    (line,) = [line for line in text.splitlines() if line.startswith(f" {name} ")]
    return line


def test_runs_with_privacy_or_another_aggregate_have_tables_of_their_own(write, tmp_path):
    write("fedrep", 0, 0.8)  # of a time when there was no other way
    write("fedavg", 0, 0.7, config={"aggregation": {"name": "mean"}, "privacy": {"name": "none"}})
    for noise in (0.5, 1.0):
        write("fedrep", 0, 0.6, config={"privacy": {"name": "fixed", "noise": noise, "norm": 1.0}})
    write("fedrep", 0, 0.5, config={"aggregation": {"name": "krum", "malicious": 1}, "privacy": {"name": "none"}})
    groups = leaderboard(find_runs([tmp_path]))
    usual = "digits · dirichlet(alpha=0.1) · mlp · 20 clients · 50 rounds"
    assert {group.title: [row.method for row in group.rows] for group in groups} == {
        usual: ["fedrep", "fedavg"],
        f"{usual} · aggregation krum": ["fedrep"],
        f"{usual} · privacy fixed · privacy.noise=0.5": ["fedrep"],
        f"{usual} · privacy fixed · privacy.noise=1.0": ["fedrep"],
    }


def test_compressed_runs_have_tables_of_their_own(write, tmp_path):
    write("fedrep", 0, 0.8)  # of a time without compression
    write("fedavg", 0, 0.7, config={"compression": {"name": "none", "share": 0.01, "bits": 8}})
    for share in (0.1, 0.01):
        write("fedrep", 0, 0.6, config={"compression": {"name": "topk", "share": share}})
    usual = "digits · dirichlet(alpha=0.1) · mlp · 20 clients · 50 rounds"
    assert {group.title: len(group.rows) for group in leaderboard(find_runs([tmp_path]))} == {
        usual: 2,
        f"{usual} · compression topk · compression.share=0.1": 1,
        f"{usual} · compression topk · compression.share=0.01": 1,
    }


def test_privacy_is_stated(write, tmp_path):
    def note(*epsilons, noise=1.0):
        for folder in tmp_path.iterdir():
            shutil.rmtree(folder)
        for name, spent in zip(("fedavg", "fedrep", "ditto"), epsilons, strict=False):
            privacy = {"name": "fixed", "noise": noise}
            write(name, 0, 0.5, config={"privacy": privacy}, privacy_epsilon=spent, privacy_delta=1e-5)
        (privacy_note,) = (line for line in board(tmp_path).notes if line.startswith("Privacy"))
        return privacy_note

    end = "at delta 1e-05, of a client's data in the arrays; metrics travel as they are."
    assert note(12.3456, 12.3456) == f"Privacy: epsilon 12.3 {end}"
    assert board(tmp_path).rows[0].epsilon == 12.3456
    privacy_note = note(3.0, 2.5, None)
    assert privacy_note.endswith(end)
    spent = privacy_note.removeprefix("Privacy: epsilon ").removesuffix(f" {end}")
    assert set(spent.split(", ")) == {"3 (fedavg)", "2.5 (fedrep)", "unknown (ditto)"}
    assert note(None, None, noise=0) == "Privacy: changes are clipped and get no noise, which guarantees nothing."
    assert note(None).endswith("it takes a library for it (pip install 'fedpers[privacy]'), and some noise.")
    assert leaderboard_rows(leaderboard(find_runs([tmp_path])))[0]["epsilon"] is None


def test_the_most_of_what_seeds_spend(write, tmp_path):
    for seed, spent in ((0, 1.0), (1, 3.0), (2, 2.0)):
        write("fedavg", seed, 0.5, config={"privacy": {"name": "fixed"}}, privacy_epsilon=spent, privacy_delta=1e-5)
    assert board(tmp_path).rows[0].epsilon == 3.0


def test_numbers_of_a_row_by_hand(write, tmp_path):
    for seed, accuracy, last in ((0, 0.8, 0.6), (1, 0.9, 0.7), (2, 0.85, 0.65)):
        write("fedrep", seed, accuracy, last, bytes_up=1_000_000 * seed)
    group = board(tmp_path)
    assert group.title == "digits · dirichlet(alpha=0.1) · mlp · 20 clients · 50 rounds"
    (row,) = group.rows
    assert (row.method, row.seeds, row.best, row.baseline, row.interrupted) == ("fedrep", (0, 1, 2), True, False, False)
    assert row.score == pytest.approx(0.85)
    # Student's t with 2 degrees of freedom: 4.302653; sample standard deviation 0.05
    assert row.interval == pytest.approx(4.302653 * 0.05 / math.sqrt(3), rel=1e-6)
    assert row.std == pytest.approx(0.1)
    assert row.worst_decile == pytest.approx(0.6)
    assert row.last == pytest.approx(0.65)
    assert row.megabytes == pytest.approx(1.5)
    assert row.seconds == 12
    assert math.isnan(row.selected["test/loss"])
    assert row.comparisons == ()
    assert [Path(folder).name for folder in row.folders] == ["run01", "run02", "run03"]


def test_adaptation_is_measured_at_the_end_whichever_round_was_selected(write, tmp_path):
    end = {"test/accuracy": 0.8, "unseen/accuracy": 0.7, "adapted/accuracy": 0.9}
    write("fedrep", 0, 0.8, selected=end)  # the last round is the selected one
    write("fedrep", 1, 0.8, selected=end | {"unseen/accuracy": 0.5})
    for path in tmp_path.rglob("summary.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"last": end}))
    assert line_of(printed(tmp_path), "FedRep").split()[:4] == ["FedRep", "80.0", "60.0", "90.0"]


def test_what_a_run_says_about_its_task_shapes_the_table(write, tmp_path):
    ranked = {"test/hr@10": 0.6, "test/ndcg@10": 0.4, "test/hr@10_std": 0.49, "test/hr@10_worst_decile": 0.0}
    old = {"headline": "hr@10", "also": ["ndcg@10"]}
    new = {**old, "task": "ranking", "spread": False, "baselines": ["local", "fedavg", "no_learning"]}
    write("fedrap", 0, 0, selected=ranked, **old)  # of a time when runs did not name their task
    assert "std over" in printed(tmp_path)
    assert "there is no run of Local or FedAvg to compare with" in board(tmp_path).sentence
    write("no_learning", 0, 0, selected={**ranked, "test/hr@10": 0.1}, **new)
    write("fedavg", 0, 0, selected={**ranked, "test/hr@10": 0.5}, **new)
    group = board(tmp_path)
    assert (group.headline, group.spread) == ("hr@10", False)
    assert [row.baseline for row in group.rows] == [False, True, True]
    assert "there is no run of Local to compare with" in group.sentence
    assert group.references == ("fedavg", "no_learning")
    assert group.notes[0] == "Test hr@10: mean over clients at the selected round."
    text = printed(tmp_path)
    assert not any(word in text for word in ("std", "worst"))
    words = "FedRAP 60.0 untested +10.0 untested +50.0 40.0 1 - 2.00 MB 34.5 k 12 s".split()  # noqa: SIM905
    assert line_of(text, "FedRAP").split() == words


def test_a_method_without_a_score_comes_last_and_keeps_the_metrics_of_its_other_seeds(write, tmp_path):
    write("zebra", 0, 0.0, selected={}, selected_round=None)
    write("ape", 0, 0.0, selected={}, selected_round=None)
    write("ape", 1, 0.5)
    write("local", 0, 0.2)
    rows = board(tmp_path).rows
    assert [row.method for row in rows] == ["local", "ape", "zebra"]
    assert [row.best for row in rows] == [True, False, False]
    assert "test/accuracy" in rows[1].selected
    assert math.isnan(rows[1].selected["test/accuracy"])


def test_options_that_differ_name_the_rows(write, tmp_path):
    write("ditto", 0, 0.9, options={"mu": 0.1, "server": {"momentum": 0.9}, "kept": 3})
    write("ditto", 0, 0.8, options={"mu": 1.0, "server": {"momentum": 0.9}, "kept": 3})
    write("ditto", 0, 0.7, options={"mu": 1.0, "server": {"momentum": 0.0}, "kept": 3})
    write("fedrep", 0, 0.6, options={"mu": 5})
    group = board(tmp_path)  # what most have alike is said once
    assert [row.method for row in group.rows] == ["ditto mu=0.1", "ditto", "ditto server.momentum=0.0", "fedrep"]
    note = "Ditto has mu=1.0 server.momentum=0.9 where the name does not say otherwise."
    assert note in group.notes
    write("ditto", 0, 0.6, options={"mu": 0.1, "server": {"momentum": 0.0}, "kept": 3})
    group = board(tmp_path)  # a grid
    assert [row.method for row in group.rows[:3]] == [
        "ditto mu=0.1 server.momentum=0.9",
        "ditto mu=1.0 server.momentum=0.9",
        "ditto mu=1.0 server.momentum=0.0",
    ]
    assert note not in group.notes


def test_only_comparable_runs_share_a_table(write, tmp_path):
    write("fedrep", 0, 0.9)
    data = {"name": "digits", "root": "/elsewhere", "download": True}
    write("fedavg", 1, 0.8, config={"runtime": {"workers": 8}, "tracker": {"wandb": {"mode": "auto"}}, "dataset": data})
    write("fedrep", 0, 0.7, config={"training": {"lr": 0.01}})
    write("fedrep", 0, 0.6, protocol="official")
    groups = leaderboard(find_runs([tmp_path]))
    assert {group.title.split(" · ")[-1]: [row.method for row in group.rows] for group in groups} == {
        "50 rounds": ["fedrep lr=0.1", "fedavg", "fedrep lr=0.01"],
        "protocol official": ["fedrep"],
    }
    notes = [note for group in groups for note in group.notes]
    assert notes.count("Rows differ in training settings (training.*): named beside the method.") == 1


@pytest.mark.parametrize(
    "other",
    [
        {"checkpoint": {"every": 0, "keep": 3}},
        {"auc": True},
        {"min_replies": 2},
        {"split": {"name": "fractions"}},  # the other options have their defaults
        {"dataset": {"name": "digits", "x": "pictures"}},  # which digits do not read
        {"aggregation": {"name": "mean", "malicious": 3}},
    ],
)
def test_settings_that_change_no_number_do_not_part_runs(write, tmp_path, other):
    usual = {"checkpoint": {"every": 10}, "auc": False, "min_replies": 1, "split": {"name": "fractions", "test": 0.25}}
    write("fedrep", 0, 0.9, config=usual)
    write("fedavg", 0, 0.8, config=usual | other)
    assert [row.method for row in board(tmp_path).rows] == ["fedrep", "fedavg"]


@pytest.mark.parametrize("newer", [{"lr": 0.1, "budget": None}, {"lr": 0.1, "epochs": 1, "groups": None}])
def test_training_settings_that_an_older_run_did_not_write_are_the_defaults(write, tmp_path, newer):
    write("fedrep", 0, 0.8)
    write("fedrep", 1, 0.7, config={"training": newer})
    (row,) = board(tmp_path).rows
    assert row.seeds == (0, 1)


def test_a_folder_of_settings_is_no_run(write, tmp_path):
    write("fedrep", 0, 0.8)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("rounds: 3")
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "manifest.json").write_text("{}")
    with mock.patch.object(runs.logger, "warning") as warning:
        assert len(find_runs([tmp_path])) == 1
    ((_, folder, reason), _) = warning.call_args
    assert folder == begun
    assert str(reason).startswith("it has no summary.json")
    assert warning.call_count == 1


def test_a_whole_number_is_one_setting_however_it_was_typed(write, tmp_path):
    for seed, lr in enumerate((1, 1.0)):
        write("fedrep", seed, 0.8, config={"partition": {"name": "dirichlet", "alpha": lr}, "training": {"lr": lr}})
    (row,) = board(tmp_path).rows
    assert row.seeds == (0, 1)
    (pivot,) = pivots(find_runs([tmp_path]), "partition.alpha")
    assert list(pivot.groups) == ["1"]


def test_options_that_an_older_run_did_not_write_are_the_defaults(write, tmp_path):
    write("fedrep", 0, 0.8)
    write("fedrep", 1, 0.7, options={"finetune_epochs": 0, "personal_layers": None})
    write("fedrep", 0, 0.6, options={"finetune_epochs": 1})
    rows = board(tmp_path).rows
    assert {row.method: row.seeds for row in rows} == {
        "fedrep finetune_epochs=0": (0, 1),
        "fedrep finetune_epochs=1": (0,),
    }


def test_a_method_with_a_training_of_its_own_is_told_apart_in_a_note(write, tmp_path):
    for seed in (0, 1):
        write("fedrep", seed, 0.9)
        write("fedavg", seed, 0.8)
        write("pfedrec", seed, 0.7, config={"training": {"lr": 0.01, "epochs": 2}})
    group = board(tmp_path)
    assert [row.method for row in group.rows] == ["fedrep", "fedavg", "pfedrec"]
    note = "Rows differ in training settings (training.*): pfedrec has epochs=2 lr=0.01; the others epochs=1 lr=0.1."
    assert note in group.notes


@pytest.mark.parametrize("name", ["npz", "ratings"])
def test_data_of_different_files_are_not_comparable(write, tmp_path, name):
    for root in ("a.npz", "b.npz", "a.npz"):
        write(
            "fedrep", len(list(tmp_path.iterdir())), 0.9, config={"dataset": {"name": name, "root": root}}, dataset=name
        )
    groups = leaderboard(find_runs([tmp_path]))
    assert [group.title.split(" · ")[-1] for group in groups] == ["dataset.root=a.npz", "dataset.root=b.npz"]
    assert [group.rows[0].seeds for group in groups] == [(0, 2), (1,)]


def test_the_newest_of_equal_runs_counts(write, tmp_path):
    old, new = write("fedrep", 0, 0.9), write("fedrep", 0, 0.5)
    write("fedrep", 1, 0.7)
    group = board(tmp_path)
    assert group.rows[0].score == pytest.approx(0.6)
    assert group.rows[0].folders[0] == str(new)
    assert any(note.startswith("Left out because a newer or finished run") and str(old) in note for note in group.notes)


def test_a_finished_run_counts_before_a_newer_interrupted_one(write, tmp_path):
    finished = write("fedrep", 0, 0.9)
    write("fedrep", 0, 0.5, interrupted=True, rounds_done=12)
    (row,) = board(tmp_path).rows
    assert row.folders == (str(finished),)


def test_interrupted_runs_and_unusable_replies_are_told(write, tmp_path):
    folder = write("fedrep", 0, 0.9, interrupted=True, rounds_done=12, failures=3)
    write("local", 0, 0.8)
    group = board(tmp_path)
    assert [row.interrupted for row in group.rows] == [True, False]
    assert f"Interrupted: {folder} (12 of 50 rounds)." in group.notes
    assert "3 client replies were unusable and left out (fedrep)." in group.notes
    assert line_of(printed(tmp_path), "FedRep (interrupted)")


def test_unmeasured_accuracy_is_last_and_null_in_json(write, tmp_path):
    write("fedrep", 0, 0.1)
    write("fedper", 0, 0.5, selected={"test/accuracy": None})
    rows = leaderboard_rows(leaderboard(find_runs([tmp_path])))
    assert [(row["method"], row["score"]) for row in rows] == [("fedrep", 0.1), ("fedper", None)]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert rows[0]["group"].startswith("digits · ")
    assert rows[0]["seeds"] == [0]


def test_unusable_folders_are_named_and_left_out(write, tmp_path, caplog):
    good = write("fedrep", 0, 0.9)
    cases = {
        "running": (
            {"config.yaml": "seed: 1", "manifest.json": "{}"},
            "no summary.json; the run is going on or was killed.",
        ),
        "killed": (
            {"config.yaml": "seed: 1", "manifest.json": "{}", "checkpoints/a": ""},
            f"was killed, after which 'fedpers resume {tmp_path / 'killed'}' goes on.",
        ),
        "damaged": ({"config.yaml": "seed: 1", "summary.json": '{"strategy":'}, "summary.json is damaged"),
        "unconfigured": ({"summary.json": (good / "summary.json").read_text()}, "config.yaml is missing or damaged"),
        "misconfigured": (
            {"config.yaml": "a: [1", "summary.json": (good / "summary.json").read_text()},
            "config.yaml is missing or damaged",
        ),
        "list": ({"config.yaml": "seed: 1", "summary.json": "[]"}, "does not hold named values"),
        "empty": ({"config.yaml": "seed: 1", "summary.json": "{}"}, "lacks strategy, seed, selected, last"),
        "words": (
            {
                "config.yaml": "seed: 1",
                "summary.json": '{"strategy": "a", "seed": 0, "selected": {"test/accuracy": "high"}, "last": {}}',
            },
            "where a number belongs",
        ),
        "flat": (
            {"config.yaml": "seed: 1", "summary.json": '{"strategy": "a", "seed": 0, "selected": 0.5, "last": 0.5}'},
            "does not hold metrics by name",
        ),
    }
    for name, (files, _) in cases.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).parent.mkdir(exist_ok=True)
            (tmp_path / name / file).write_text(text)
    runs = find_runs([tmp_path, tmp_path / "nowhere"])
    assert [run.folder for run in runs] == [good]
    messages = [record.getMessage() for record in caplog.records]
    for name, (_, sentence) in cases.items():
        (message,) = [m for m in messages if m.startswith(f"{tmp_path / name} ")]
        assert sentence in message
    assert f"{tmp_path / 'nowhere'} is not a folder and is left out." in messages
    assert len(messages) == len(cases) + 1


def test_each_run_is_found_once_and_tracker_files_are_no_runs(write, tmp_path, caplog):
    folder = write("fedrep", 0, 0.9)
    for inner in (folder / "wandb" / "offline-run" / "files", tmp_path / "sweep" / ".hydra"):
        inner.mkdir(parents=True)
        (inner / "config.yaml").write_text("seed: 1")
    assert len(find_runs([tmp_path, folder, tmp_path])) == 1
    assert caplog.text == ""


def test_nothing_found(tmp_path):
    assert printed(tmp_path) == "No finished runs found.\n"
    assert leaderboard([]) == leaderboard_rows([]) == []


@pytest.mark.parametrize("width", [50, 80, 120])
def test_tables_fit_80_columns_and_never_lose_a_digit(write, tmp_path, width):
    for seed in (0, 1, 2):
        write("ditto", seed, 0.9 + seed / 100, options={"mu": 0.1, "personal_lr": 0.05}, bytes_up=12_345_600_000)
        write("ditto", seed, 0.8 + seed / 100, options={"mu": 1.0, "personal_lr": 0.01}, seconds=86_400.0)
        write("fedavg", seed, 0.6 + seed / 10)
    text = printed(tmp_path, width)
    assert width < 80 or max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    for piece in ("91.0 ±2.5", "70.0 ±24.8", "mu=0.1", "personal_lr=0.05"):
        assert piece in text
    assert ("+21.0 ±22.4" in text) == (width >= 80)  # columns that find no room are named below the table
    assert ("--columns" in text) == (width <= 80)
    wide = printed(tmp_path, 200)
    for piece in ("12.3 GB", "24.0 h", "34.5 k"):
        assert piece in wide


def test_names_with_brackets_are_printed_as_they_are(write, tmp_path):
    write("ditto", 0, 0.9, options={"groups": ["[red]"]})
    write("ditto", 0, 0.8, options={"groups": ["[bold]x"]})
    text = printed(tmp_path)
    assert "Ditto groups=['[red]']" in text
    assert "Ditto groups=['[bold]x']" in text


def test_import_is_cheap():
    script = "import sys, fedpers.evaluation; print(*{'scipy', 'pandas', 'sklearn'} & set(sys.modules))"
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "\n"


@pytest.mark.parametrize(
    "text", ["1e-3", "1E5", "+2e+3", "1.5e3", ".5", "1.0e-08", "2026-11-27", "'1e-3'", "null", "on"]
)
def test_values_of_a_config_are_read_as_omegaconf_does(write, tmp_path, text):
    folder = write("fedrep", 0, 0.9)
    (folder / "config.yaml").write_text(f"training:\n  lr: {text}\ncopy: [{text}]\n")
    (run,) = find_runs([tmp_path])
    assert run.config == OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    assert type(run.config["training"]["lr"]) is type(OmegaConf.load(folder / "config.yaml").training.lr)


def test_interpolations_of_a_config_are_resolved(write, tmp_path):
    folder = write("fedrep", 0, 0.9)
    (folder / "config.yaml").write_text("a: 1\nb: ${a}\n")
    assert find_runs([tmp_path])[0].config == {"a": 1, "b": 1}
