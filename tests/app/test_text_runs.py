"""Runs on text: the next character of each client's, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedpers.app import _main
from tests.app.test_cli import error_of


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Eight clients; half of them say abcd again and again, half of them dcba, with a letter in eight at random."""
    rng = np.random.default_rng(0)
    said = {}
    for client in range(8):
        order = "abcd" if client % 2 else "dcba"
        letters = [order[n % 4] if rng.random() > 0.125 else "abcd"[rng.integers(4)] for n in range(1200)]
        said[f"c{client}"] = "".join(letters)
    root = tmp_path / "said.json"
    root.write_text(json.dumps(said))
    return ["dataset=text", f"dataset.root={root}", "partition=natural", "partition.min_samples=10",
            "dataset.sequence_length=20", "training.lr=0.5", "training.epochs=1", "training.batch_size=8"]  # fmt: skip


def run(output: Path, *arguments: str) -> Path:
    assert _main([*arguments, f"output={output}"]) == 0
    (path,) = output.rglob("summary.json")
    return path.parent


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["local", "ditto"])
def test_the_next_character_is_learned(strategy: str, texts: list[str], tmp_path: Path) -> None:
    folder = run(tmp_path / "runs", *texts, f"strategy={strategy}", "rounds=12")
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["task"], summary["model"], summary["headline"]) == ("next_token", "lstm", "accuracy")
    clients = pd.read_parquet(folder / "clients.parquet")
    assert set(clients["name"]) == {f"c{n}" for n in range(8)}
    assert np.allclose(np.exp(clients.test_loss_last), clients.test_perplexity_last, rtol=1e-6)
    assert clients.test_accuracy_last.min() > 0.6  # after two characters both orders are known; 0.9 at best
    assert clients.test_perplexity_last.max() < 3


@pytest.mark.slow
def test_a_transformer_gives_the_same_for_any_number_of_clients_at_once(texts: list[str], tmp_path: Path) -> None:
    small = ["model=transformer", "model.dim=16", "model.tied=true", "rounds=3", "strategy=ditto"]
    one, four = (
        pd.read_parquet(
            run(tmp_path / str(size), *texts, *small, f"runtime.clients_at_once={size}") / "clients.parquet"
        )
        for size in (1, 4)
    )
    assert np.allclose(one.test_loss_last, four.test_loss_last, rtol=1e-4)
    assert one.test_loss_last.mean() < 1.2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["strategy=gpfl"], "strategy=gpfl: expected"),
        (["strategy=fedproto"], "strategy=fedproto: expected"),
        (["model=mlp"], "model.name=mlp: expected one of lstm, transformer for tokens"),
        (["model.hidden=[8]"], "model.hidden=(8,): expected no value: lstm has the options embedding"),
        (["partition=dirichlet"], "partition=dirichlet: expected one of continuous, domains"),
        (["heterogeneity=noise"], "heterogeneity=noise: expected"),
        (["heterogeneity=label_groups"], "heterogeneity=label_groups: expected"),
        (["dataset.root=nowhere.json"], "nowhere.json is missing"),
    ],
)
def test_what_needs_other_data_is_refused(
    arguments: list[str], message: str, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = {argument.split("=")[0] for argument in arguments}
    kept = [argument for argument in texts if argument.split("=")[0] not in typed]
    assert message in error_of(capsys, *kept, *arguments, "rounds=1", f"output={tmp_path / 'runs'}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [["fraction=0.125"], ["split.unseen=7"], ["split.unseen=7", "runtime.clients_at_once=4"]]
)
def test_a_recurrent_network_runs_with_one_client_in_a_round(more: list[str], texts: list[str], tmp_path: Path) -> None:
    folder = run(tmp_path / "runs", *texts, *more, "rounds=1", "model=lstm", "model.hidden_size=8")
    assert json.loads((folder / "summary.json").read_text())["failures"] == 0
