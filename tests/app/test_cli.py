"""The command line as a user types it, and errors as a user sees them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from fedpers.app import _main
from fedpers.app.compose import composed
from fedpers.data import PartitionConfig
from fedpers.run import TIMES, run
from fedpers.settings import Config
from fedpers.settings.groups import conf_folder
from fedpers.strategies import STRATEGIES
from tests.app import test_export

SMALL = ["rounds=3", "partition.num_clients=6", "partition.alpha=1.0"]


def run_folders(output: Path) -> list[Path]:
    return sorted(path.parent for path in output.rglob("summary.json"))


def fedpers(*arguments: str, output: Path) -> list[Path]:
    """Run the command in this process; return the run folders."""
    assert _main([*arguments, f"output={output}"]) == 0
    return run_folders(output)


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """The one sentence a wrong command ends in."""
    assert _main(list(arguments)) == code
    text = capsys.readouterr().err
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("fedpers: ")]
    assert len(lines) == 1
    assert text.strip().splitlines()[-1] == lines[0]
    return lines[0]


# ------------------------------------------------------------------- runs


RUN_AND_EXPORTED = test_export.METHODS  # and their folders are read there
RATED = ("fedmf", "fedncf", "fedrap", "no_learning", "pfedrec")  # methods for ratings alone


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [*RATED, "local", "fedavg", "fedper", "fedrep"])
def test_ratings_are_ranked(strategy: str, tmp_path: Path) -> None:
    (folder,) = fedpers(
        f"strategy={strategy}", "dataset=synthetic_ratings", "dataset.num_users=40", "dataset.num_items=300",
        "split.unseen=3", "rounds=2", output=tmp_path,
    )  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["headline"] == "hr@10"
    assert summary["failures"] == 0
    for name in ("test/hr@10", "test/ndcg@10", "unseen/hr@10", "adapted/hr@10"):
        assert 0 <= summary["last"][name] <= 1
    clients = pd.read_parquet(folder / "clients.parquet")
    assert set(clients["test_hr@10_last"]) <= {0.0, 1.0}
    assert clients.unseen.sum() == 3
    assert set(clients.validation_size) == set(clients.test_size) == {1}  # not what a held-out item is ranked among
    samples = json.loads((folder / "manifest.json").read_text())["data"]["samples"]
    assert samples == {"train": clients.train_size.sum(), "validation": 40, "test": 40}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - {"fedbn", *RATED, *RUN_AND_EXPORTED}))
def test_every_strategy_runs(strategy: str, tmp_path: Path) -> None:
    more = ["heterogeneity=rotation", "heterogeneity.groups=2"] if strategy == "group_perfl" else []
    if strategy in ("head_only", "fedvpt", "pfedpg"):  # whose network is a transformer
        more += ["model.dim=16", "model.depth=1"]
    (folder,) = fedpers(f"strategy={strategy}", *SMALL[1:], *more, "rounds=2", output=tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["strategy"] == strategy
    assert summary["rounds_done"] == 2
    assert summary["failures"] == 0
    assert 0.2 < summary["last"]["test/accuracy"] <= 1


@pytest.mark.slow
def test_fedbn_runs_on_a_network_with_batch_norm(tmp_path: Path) -> None:
    (folder,) = fedpers(
        "strategy=fedbn", "model=resnet18_bn", "model.width=4", "partition=iid", "partition.num_clients=3", "rounds=1",
        "training.batch_size=64", output=tmp_path,
    )  # fmt: skip
    assert json.loads((folder / "summary.json").read_text())["failures"] == 0


def test_run_folder_holds_everything(tmp_path: Path) -> None:
    (folder,) = fedpers("strategy=fedper", "fraction=0.5", "seed=4", *SMALL, output=tmp_path)
    config = OmegaConf.load(folder / "config.yaml")
    assert config.strategy.name == "fedper"
    assert config.seed == 4
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["versions"]) >= {"fedpers", "python", "flwr", "torch"}
    assert manifest["data"]["samples"]["train"] > 500
    assert manifest["runtime"]["clients_at_once"] >= 1
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rounds] == [0, 1, 2, 3]
    assert rounds[1]["clients/sampled"] == 3
    assert rounds[1]["bytes_down"] == rounds[1]["bytes_up"] == 3 * 4 * (64 * 64 + 64)  # the body of the MLP
    clients = pd.read_parquet(folder / "clients.parquet")
    assert len(clients) == 6
    assert (clients.train_size + clients.validation_size + clients.test_size).sum() == 1797
    summary = json.loads((folder / "summary.json").read_text())
    assert np.isclose(clients.test_accuracy_last.mean(), summary["last"]["test/accuracy"])
    assert np.isclose(clients.test_accuracy_selected.mean(), summary["selected"]["test/accuracy"])


@pytest.mark.slow
def test_auc_is_measured_on_demand(tmp_path: Path) -> None:
    (folder,) = fedpers("auc=true", *SMALL, output=tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    assert 0.5 < summary["last"]["test/auc"] <= 1
    assert "test_auc_last" in pd.read_parquet(folder / "clients.parquet").columns


def test_the_selected_round_is_the_best_on_validation_never_on_test(tmp_path: Path) -> None:
    (folder,) = fedpers("strategy=fedavg", "rounds=8", *SMALL[1:], output=tmp_path)
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()][1:]
    summary = json.loads((folder / "summary.json").read_text())
    best = max(rounds, key=lambda row: row["validation/accuracy"])  # the first of equals
    assert summary["selected_round"] == best["round"]
    assert summary["selected"]["test/accuracy"] == best["test/accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "part"), [("fedmf", "test"), ("pfedrec", "validation")])
def test_official_ratings_are_selected_where_the_authors_of_a_method_do(
    strategy: str, part: str, tmp_path: Path
) -> None:
    words = ["dataset=synthetic_ratings", "dataset.num_users=40", "dataset.num_items=300", "dataset.protocol=official"]
    (folder,) = fedpers(f"strategy={strategy}", *words, "rounds=6", output=tmp_path)
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()][1:]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["protocol"], summary["selected_on"]) == ("official", part)
    best = max(rounds, key=lambda row: (row[f"{part}/hr@10"], row["round"]))  # the last of equals
    assert summary["selected_round"] == best["round"]


@pytest.mark.slow
def test_same_run_twice_and_with_two_workers_is_identical_but_for_times(tmp_path: Path) -> None:
    runs = []
    for name, extra in (("a", []), ("b", []), ("c", ["runtime.workers=2", "runtime.clients_at_once=2"]),
                        ("d", ["runtime.workers=1", "runtime.clients_at_once=2"])):  # fmt: skip
        (folder,) = fedpers("strategy=ditto", "fraction=0.7", *SMALL, *extra, output=tmp_path / name)
        rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        runs.append([{k: v for k, v in row.items() if k not in TIMES} for row in rows])
    assert runs[0] == runs[1]
    assert runs[2] == runs[3]


def test_evaluate_every_and_the_last_round(tmp_path: Path) -> None:
    (folder,) = fedpers("strategy=local", "rounds=5", "evaluate_every=2", *SMALL[1:], output=tmp_path)
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rounds if "test/accuracy" in row] == [0, 2, 4, 5]


@pytest.mark.slow
def test_multirun_and_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["strategy=local,fedavg,fedrep", "-m", "seed=0,1", *SMALL, f"output={tmp_path}"]) == 0
    assert len(run_folders(tmp_path)) == 6
    capsys.readouterr()
    assert _main(["compare", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "On digits (" in table
    assert "over the clients of 2 seeds" in " ".join(table.split())
    assert all(f"\n {name} " in table for name in ("Local", "FedAvg", "FedRep"))
    assert _main(["compare", "--json", str(tmp_path)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["strategy"]: row["seeds"] for row in rows} == {"local": [0, 1], "fedavg": [0, 1], "fedrep": [0, 1]}


@pytest.mark.slow
def test_a_failing_job_does_not_end_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["-m", "training.lr=-1,0.1", *SMALL, f"output={tmp_path}"]) == 2
    assert "training.lr=-1.0: expected a number > 0" in capsys.readouterr().err
    assert len(run_folders(tmp_path)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("preset", sorted(p.stem for p in (conf_folder() / "experiment").glob("*.yaml")))
def test_every_preset_composes_and_runs_one_round(preset: str, tmp_path: Path) -> None:
    shorter = {  # every method runs by its own name in another test
        "baselines": ["strategy=fedavg,fedrep"],
        "demo": ["strategy=fedavg,fedrep"],
        "fedjets": ["strategy=fedjets,pretrained"],
        "pfedpg": [
            "strategy=fedavg,pfedpg",
            "model.pretrain_epochs=1",
            "model.dim=16",
            "model.depth=1",
            "training.epochs=1",
        ],
        "published": ["dataset=digits", "partition.num_clients=5", "model=mlp"],
        "ranking": ["strategy=fedmf,fedrap", "dataset.num_users=40", "dataset.num_items=300"],
    }
    assert _main([f"+experiment={preset}", "rounds=1", "seed=0", *shorter.get(preset, []), f"output={tmp_path}"]) == 0
    assert run_folders(tmp_path)


@pytest.mark.slow
def test_a_run_never_overwrites_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = f"hydra.run.dir={tmp_path / 'here'}"
    assert _main([*SMALL, place]) == 0
    before = (tmp_path / "here" / "rounds.jsonl").read_bytes()
    assert "holds a run already" in error_of(capsys, *SMALL, "training.lr=0.5", place)
    assert (tmp_path / "here" / "rounds.jsonl").read_bytes() == before


@pytest.mark.slow
def test_runs_of_one_moment_have_folders_of_their_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedpers", *SMALL, "rounds=1", f"output={tmp_path}"]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert len(run_folders(tmp_path)) == 2


@pytest.mark.slow
def test_a_partition_seed_gives_runs_with_different_seeds_the_same_data(tmp_path: Path) -> None:
    checksums = set()
    for seed in (0, 1):
        (folder,) = fedpers(
            *SMALL, "partition.seed=7", "heterogeneity=feature_shift", f"seed={seed}", output=tmp_path / str(seed)
        )
        checksums.add(json.loads((folder / "manifest.json").read_text())["data"]["checksum"])
    assert len(checksums) == 1


def test_a_run_from_python_keeps_its_settings(tmp_path: Path) -> None:
    config = Config(strategy={"name": "ditto", "mu": 0.5}, rounds=1, partition=PartitionConfig("iid", num_clients=4))
    run(config, tmp_path / "run")
    kept = OmegaConf.load(tmp_path / "run" / "config.yaml")
    assert kept.strategy.mu == 0.5
    assert kept.partition.num_clients == 4


def test_help_names_every_option_and_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in (*STRATEGIES, "compare", "plot", "partition.alpha", "runtime.workers", "digits", "resnet18_bn", "demo"):
        assert word in text
    assert _main([]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("key", "line"), [("rounds", "rounds=50  of training"), ("auc", "auc=false  also measure")])
def test_help_of_a_key_that_is_in_no_group(key: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["--help", key]) == 0
    assert line in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["strategy=local"], ["strategy=fedavg", "strategy.personal_layers=[body,head]"]])
def test_a_servers_optimizer_has_nothing_to_do_where_nothing_is_sent(arguments: list[str], tmp_path: Path) -> None:
    assert _main([*arguments, "server_optimizer=adam", "rounds=1", f"output={tmp_path}"]) == 0


@pytest.mark.parametrize("postprocessor", ["compression=topk", "aggregation=median", "server_optimizer=momentum"])
def test_what_fedcp_cannot_have_is_refused_before_its_first_round(
    postprocessor: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["strategy=fedcp", "strategy.variant=pfllib", postprocessor, "rounds=1", f"output={tmp_path}"]
    assert "none for strategy=fedcp strategy.variant=pfllib" in error_of(capsys, *arguments)


@pytest.mark.parametrize("arguments", [["dataset=npz", "dataset.root=nowhere.npz"], ["strategy=fedbn"], ["rounds=0"]])
def test_a_run_that_is_refused_leaves_no_folder(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main([*arguments, f"output={tmp_path / 'runs'}"]) == 2
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_run_that_is_refused_leaves_folders_that_were_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    assert _main(["strategy=fedbn", "output=."]) == 2
    assert _main(["strategy=fedbn", "hydra.run.dir=."]) == 2
    assert _main(["strategy=fedbn", "hydra.run.dir=mine"]) == 2
    assert (tmp_path / "home" / "mine").is_dir()


def test_installed_command(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "fedpers"), "strategy=fedavg", *SMALL, f"output={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # quiet when not on a terminal
    assert done.stdout.startswith("fedavg on digits, seed 0: test accuracy ")
    assert len(done.stdout.splitlines()) == 1


def test_a_command_that_used_ray_does_not_end_in_a_crash_of_its_threads() -> None:
    """What is called when C++'s destructors are stands for them: it aborts the process."""
    script = """
import ctypes, sys, types
libc = ctypes.CDLL(None)
libc.__cxa_atexit(ctypes.cast(libc.abort, ctypes.c_void_p), None, None)
import atexit
import fedpers.app as app
def command(arguments):
    sys.modules["ray"] = types.ModuleType("ray")
    atexit.register(print, "closed")
    print("done")
    return 3
app._main = command
app.main([])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "done\nclosed\n", "")


@pytest.mark.slow
def test_whoever_reads_a_table_may_stop_early(tmp_path: Path) -> None:
    (folder,) = fedpers("rounds=1", output=tmp_path)
    command = f"'{sys.executable}' -m fedpers compare '{folder}' --json | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=True)
    assert (done.stdout, done.stderr) == ("[\n0\n", "")


@pytest.mark.parametrize(
    ("typed", "groups"),
    [
        ("training.groups.head.lr=0.2", {"head": {"lr": 0.2}}),
        ("training.groups={head:{lr:0.2}}", {"head": {"lr": 0.2}}),
        ("+training.groups={head:{lr:0.2}}", {"head": {"lr": 0.2}}),
    ],
)
@pytest.mark.parametrize("strategy", ["fedavg", "fedrap"])
def test_rates_of_some_parameters_are_typed_like_other_settings(typed: str, groups: Any, strategy: str) -> None:
    given = composed([f"strategy={strategy}", typed]).training.groups
    assert given == ({"body": {"lr": 200}, **groups} if strategy == "fedrap" else groups)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg", "fedrep"])
def test_a_run_ends_with_the_round_that_reaches_the_budget(strategy: str, tmp_path: Path) -> None:
    (folder,) = fedpers(
        f"strategy={strategy}", "partition.num_clients=6", "rounds=100", "training.budget=60", "training.batch_size=20",
        "fraction=0.5", "split.unseen=1", "evaluate_every=7", output=tmp_path,
    )  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    spent = np.cumsum([line["gradients"] for line in rounds])
    assert spent[-1] >= 60 * 5 > spent[-2]  # five clients train
    assert summary["gradients"] == spent[-1]
    assert summary["rounds_done"] == summary["last_round"] == len(rounds) - 1 < 100
    assert summary["interrupted"] is False
    assert "adapted/accuracy" in summary["last"]
    assert _main(["resume", str(folder)]) == 0  # says that it is done
    assert json.loads((folder / "summary.json").read_text()) == summary


@pytest.mark.slow
def test_a_run_with_a_budget_is_resumed_to_the_same_end(tmp_path: Path) -> None:
    settings = ["strategy=fedrep", "partition.num_clients=6", "training.budget=300", "training.batch_size=20"]
    (whole,) = fedpers(*settings, "rounds=99", output=tmp_path / "whole")
    (part,) = fedpers(*settings, "rounds=2", output=tmp_path / "part")
    assert _main(["resume", str(part), "rounds=99"]) == 0
    ended, resumed = (json.loads((folder / "summary.json").read_text()) for folder in (whole, part))
    assert 2 < ended["rounds_done"] < 99
    for name in ("rounds_done", "interrupted", "gradients", "selected", "last"):
        assert ended[name] == resumed[name], name


# ------------------------------------------------------------------ diverged runs


def test_a_network_that_diverged_is_measured_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder,) = fedpers("partition.num_clients=6", "rounds=4", "training.lr=1e6", output=tmp_path)
    printed = capsys.readouterr().out
    summary = json.loads((folder / "summary.json").read_text())
    clients = pd.read_parquet(folder / "clients.parquet")
    assert clients.test_accuracy_last.notna().all()  # also of those whose loss is infinite
    assert summary["last"]["test/accuracy"] == pytest.approx(clients.test_accuracy_last.mean())
    diverged = int(np.isinf(clients[["validation_loss_last", "test_loss_last"]]).any(axis=1).sum())
    assert (summary["last_left_out"], summary["last_diverged"]) == (0, diverged)
    assert diverged > 0
    assert f"The network diverged: at round 4 the loss of {diverged} of 6 clients is infinite" in printed
    assert _main(["compare", str(folder)]) == 0
    table = " ".join(capsys.readouterr().out.split())
    assert "The network had diverged at the last round: " in table
    assert f"({diverged} clients)." in table


def test_a_run_of_which_no_round_can_be_selected_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "unmeasured.py").write_text(
        "from dataclasses import dataclass\n"
        "from fedpers.strategies import LocalUpdate, PersonalizedStrategy\n"
        "@dataclass(kw_only=True)\n"
        "class Update(LocalUpdate):\n"
        "    def evaluate(self, cohort, received, config):\n"
        "        if 2 in cohort.clients:\n"
        "            raise ValueError('client 2 cannot be measured')\n"
        "        return super().evaluate(cohort, received, config)\n"
        "@dataclass(kw_only=True)\n"
        "class Method(PersonalizedStrategy):\n"
        "    update = Update\n"
    )
    monkeypatch.chdir(tmp_path)
    assert _main(["strategy=unmeasured:Method", *SMALL, "output=runs"]) == 3
    (folder,) = run_folders(tmp_path)
    printed = capsys.readouterr().out
    assert "no round could be selected; test accuracy " in printed
    assert "% at round 3 (mean over 5 of 6 clients); " in printed
    assert "None" not in printed
    assert _main(["compare", str(folder)]) == 0
    table = " ".join(capsys.readouterr().out.split())
    assert "No round could be selected: " in table
    assert "Not all clients were measured at the last round: " in table


# ------------------------------------------------------------------ errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["strategy=dito"], f"expected one of {len(STRATEGIES)} names (did you mean 'ditto'?), or module:Name."),
        (["strategy=mine.Anchored"], "expected module:Name, of a part of your own: mine:Anchored."),
        (["--rounds", "3"], "'--rounds': settings are typed as key=value, without dashes: rounds=3."),
        (
            ["--training.lr=0.1"],
            "'--training.lr=0.1': settings are typed as key=value, without dashes: training.lr=0.1.",
        ),
        (["strategy=xyzzy"], "strategy=xyzzy: expected one of apfl, clustered, cwfedavg, ditto, "),
        (["strategy=fedavgm"], "strategy=fedavgm: expected fedavg, with server_optimizer=momentum."),
        (["--help", "fedrep"], "fedrep is strategy=fedrep."),
        (["resume", "nowhere"], "nowhere holds no run: there is no such folder."),
        (["partition.alfa=1"], "partition.alfa=1: expected a known key: one of alpha, "),
        (["clock.speed=3"], "expected a known key: one of name; spread is an option of clock=devices only."),
        (["clock=devices", "clock.speed=3"], "samples_per_second, spread, upload (did you mean 'spread'?)."),
        (["path=mnist"], "expected dataset.root or dataset.path, the whole name of that key."),
        (["training.worker=3"], "expected runtime.workers, the whole name of that key."),
        (
            ["strategy.mu=1"],
            "expected a known key: one of finetune_epochs, name, personal_layers, weighting; mu is an option of ",
        ),
        (["strategy.mu=1"], "strategy=ditto, "),
        (
            ["strategy.mu=1"],
            "give it in a command of its own, fedpers compare puts the runs of several into one table.",
        ),
        (
            ["partition=iid", "partition.alpha=1"],
            "alpha is an option of partition=dirichlet, inner_dirichlet, domains, pfllib_dirichlet only.",
        ),
        (["lr=0.1"], "lr=0.1: expected training.lr, the whole name of that key."),
        (["model.lr=0.1"], "model.lr=0.1: expected training.lr, the whole name of that key."),
        (["learning_rate=0.1"], "learning_rate=0.1: expected training.lr, the whole name of that key."),
        (["leraning_rate=0.1"], "leraning_rate=0.1: expected training.lr, the whole name of that key."),
        (["batchsize=3"], "batchsize=3: expected training.batch_size, the whole name of that key."),
        (["alpha=1"], "alpha=1: expected partition.alpha or strategy.alpha, the whole name of that key."),
        (["num_clients=5"], "num_clients=5: expected partition.num_clients, the whole name of that key."),
        (["num_rounds=5"], "num_rounds=5: expected rounds, the whole name of that key."),
        (["runtime.cohort=4"], "runtime.cohort=4: expected runtime.clients_at_once, as it is called now."),
        (["dataset=/some/path"], "dataset=/some/path: expected one of ag_news, "),
        (["dataset=~/some/x.npz"], "data of your own are dataset=npz, csv, parquet or images with dataset.root"),
        (["strategy=./mine.py"], "a method of your own is strategy=module:Class."),
        (["strategy=ditto", "strategy.mu=abc"], "strategy.mu=abc: expected a number."),
        (["strategy=ditto", "strategy.mu=-1"], "strategy.mu=-1.0: expected a number >= 0."),
        (["+round=3"], "round=3: expected a known key: "),
        (["rounds=0"], "rounds=0: expected a whole number >= 1."),
        (["rounds=2.5"], "rounds=2.5: expected a whole number."),
        (["fraction=0"], "fraction=0.0: expected a number > 0 and <= 1."),
        (["fraction=1.5"], "fraction=1.5: expected a number > 0 and <= 1."),
        (["seed=-1"], "seed=-1: expected a whole number >= 0."),
        (["training.lr=nan"], "training.lr=nan: expected a number."),
        (["training.momentum=1"], "training.momentum=1.0: expected a number >= 0 and < 1."),
        (["training.optimizer=sdg"], "training.optimizer=sdg: expected one of adam, adamw, sgd (did you mean 'sgd'?)."),
        (["training.groups={heat:{lr:1}}"], "training.groups=heat: expected one of "),
        (["training.groups={head:{rate:1}}"], "training.groups.head.rate=1: expected one of lr, weight_decay"),
        (["runtime.workers=0"], "runtime.workers=0: expected a whole number >= 1, or auto."),
        (["runtime.device=gpu"], "runtime.device=gpu: expected auto, cpu, cuda or cuda:i."),
        (["partition.num_clients=5000"], "partition.num_clients=5000"),
        (["partition.alpha=0"], "partition.alpha=0"),
        (["dataset=npz"], "dataset.root"),
        (["dataset=npz", "dataset.root=missing.npz"], "missing.npz"),
        (["dataset=mnist", "dataset.download=false", "dataset.root=missing"], "missing"),
        (["model=cnn", "model.width=0"], "model.width=0: expected a whole number >= 1, or null."),
        (["strategy=fedbn"], "model=MLP: expected a network with normalization layers for strategy=fedbn"),
        (["strategy=scaffold", "training.momentum=0.9"], "training.momentum=0.9: expected 0.0 for strategy=scaffold"),
        (["strategy=fedavg,local"], r"strategy=fedavg,local has several values; -m makes"),
        (["seed=["], "'seed=[' cannot be read as key=value"),
        (["trainig.lr=0.1"], "trainig.lr=0.1: expected training.lr, the whole name of that key."),
        (["output="], "output=: expected a folder."),
        (["training.epochs=0"], "training.epochs=0: expected a whole number >= 1"),
        (["min_replies=50"], "min_replies=50: expected at most 10, the clients sampled in a round."),
        (["strategy=scaffold", "strategy.weighting=samples"], "strategy.weighting=samples: expected uniform"),
        (["model=resnet18_bn", "model.width=4", "training.batch_size=9"], "no batch of one sample"),
        (["strategy=pfedpg", "strategy.prompts=0"], "strategy.prompts=0: expected a whole number >= 1."),
        (["strategy=pfedpg", "model=mlp"], "model=MLP: expected a vision transformer with a class token: model=vit"),
        (
            ["stratgy"],
            "'stratgy' is neither a setting (key=value) nor a subcommand: one of compare, export, list, "
            "partition, plot, report, resume, tune",
        ),
        (["plot", "no-such-folder", "--out", "a.svg"], "no run was found in no-such-folder."),
        (["compare", "no-such-folder"], "no finished run was found in no-such-folder."),
    ],
)
def test_wrong_input_ends_in_one_sentence(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sentence in error_of(capsys, *arguments)
    assert not run_folders(tmp_path)


def test_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    text = error_of(capsys, *SMALL, f"output={tmp_path / 'file' / 'runs'}")
    assert "file" in text
    assert "choose another folder with output=" in text


def test_a_loss_that_is_not_finite_ends_the_run_with_the_clients_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = error_of(capsys, "training.lr=1e30", *SMALL, f"output={tmp_path}", code=1)
    assert "round " in text
    assert "0 of 6 sampled clients sent a usable reply" in text
    assert "not finite" in text
    (folder,) = run_folders(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["interrupted"] is True  # a run that failed must not pass for a finished one
    assert summary["error"] == text.removeprefix("fedpers: ")


@pytest.mark.slow
def test_ctrl_c_keeps_and_summarises_what_is_done(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedpers", "rounds=100000", *SMALL[1:], f"output={tmp_path}"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        written = list(tmp_path.rglob("rounds.jsonl"))
        if written and len(written[0].read_text().splitlines()) > 5:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    (folder,) = run_folders(tmp_path)
    assert errors.splitlines()[-1].startswith("fedpers: stopped after round ")
    assert f"'fedpers resume {folder}' goes on" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["interrupted"] is True
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    assert summary["rounds_done"] == json.loads(lines[-1])["round"] >= 4
    assert 0 < summary["selected"]["test/accuracy"] <= 1
    clients = pd.read_parquet(folder / "clients.parquet")
    assert len(clients) == 6
    assert (clients.rounds_trained == summary["rounds_done"]).all()


# ------------------------------------------------------- trackers and odd clients


@pytest.mark.slow
def test_trackers_several_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    (folder,) = fedpers("tracker=[wandb,tensorboard]", *SMALL, output=tmp_path)
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    assert list((folder / "wandb").glob("offline-run-*"))


def test_a_client_with_one_class_and_a_batch_larger_than_any_client(tmp_path: Path) -> None:
    (folder,) = fedpers(
        "strategy=fedper", "partition=pathological", "partition.classes_per_client=1", "partition.num_clients=10",
        "training.batch_size=1000", "rounds=2", output=tmp_path,
    )  # fmt: skip
    clients = pd.read_parquet(folder / "clients.parquet")
    assert (clients.test_accuracy_last > 0.5).all()  # one class: the head learns it at once
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert rounds[1]["steps"] == 10  # one batch each


def test_more_clients_in_a_cohort_than_there_are(tmp_path: Path) -> None:
    (folder,) = fedpers(*SMALL, "runtime.clients_at_once=1000", "runtime.workers=8", output=tmp_path)
    assert json.loads((folder / "manifest.json").read_text())["runtime"]["clients_at_once"] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["=3"], "the settings cannot be read: "),
        (["model=3"], "model=3: expected one of auto, "),
        (["runtime=spark"], "runtime=spark: expected one of flower, local, ray"),
    ],
)
def test_arguments_of_which_hydra_makes_nothing(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert error_of(capsys, *arguments, f"output={tmp_path}").startswith(f"fedpers: {message}")
