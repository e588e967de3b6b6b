"""A regression on arrays of one's own, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedpers.app import _main


def write(path: Path, targets: int | None) -> Path:
    """400 samples of 4 features; the numbers are smooth functions of them, far from [0, 1]."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 4))
    y = 3 + 2 * x @ rng.normal(size=(4, targets or 1)) + np.abs(x[:, :1])
    np.savez(path, x=x, y=y if targets else y[:, 0])
    return path


@pytest.mark.slow
@pytest.mark.parametrize("targets", [None, 2])
@pytest.mark.parametrize("strategy", ["fedavg", "local", "fedper"])
def test_a_regression_trains_and_is_selected_on_r2(strategy: str, targets: int | None, tmp_path: Path) -> None:
    root = write(tmp_path / "file.npz", targets)
    arguments = ["dataset=npz", f"dataset.root={root}", "partition=iid", "partition.num_clients=5", "model=mlp",
                 f"strategy={strategy}", "rounds=8", "training.lr=0.02", "training.batch_size=10",
                 f"output={tmp_path / 'runs'}"]  # fmt: skip
    assert _main(arguments) == 0
    (folder,) = [path.parent for path in (tmp_path / "runs").rglob("summary.json")]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["task"], summary["headline"], summary["failures"]) == ("regression", "r2", 0)
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()][1:]
    assert summary["selected_round"] == max(rounds, key=lambda row: row["validation/r2"])["round"]
    assert 0.8 < summary["selected"]["test/r2"] <= 1
    assert rounds[-1]["train/loss"] < rounds[0]["train/loss"]
    clients = pd.read_parquet(folder / "clients.parquet")
    assert clients.test_r2_last.mean() == pytest.approx(summary["last"]["test/r2"])
    assert clients.test_mse_last.mean() == pytest.approx(summary["last"]["test/mse"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("partition=dirichlet", "partition=dirichlet: expected one of continuous, domains, grouped_natural, "),
        (
            "heterogeneity=label_noise heterogeneity.strength=0.5",
            "heterogeneity=label_noise: expected a shift of features",
        ),
        ("model.pretrained=public split.public=0.2", "model.pretrained=public: expected null, because pretraining"),
        ("dataset.y=ids", "holds whole numbers as float64; store class ids as whole numbers, or the targets of a"),
    ],
)
def test_what_needs_classes_is_refused(
    setting: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "file.npz"
    rng = np.random.default_rng(0)
    np.savez(root, x=rng.normal(size=(100, 3)), y=rng.normal(size=100), ids=np.arange(100.0))
    arguments = [
        "dataset=npz",
        f"dataset.root={root}",
        "partition=iid",
        "partition.num_clients=4",
        "partition.min_samples=10",
        *setting.split(),
    ]
    assert _main([*arguments, f"output={tmp_path / 'runs'}"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fedpers: ")]
    assert message in line
