"""Small run folders."""

from __future__ import annotations

import json
import os

import pyarrow
import pytest
from pyarrow import parquet


def metrics(accuracy):
    return {
        "test/accuracy": accuracy,
        "test/accuracy_std": 0.1,
        "test/accuracy_worst_decile": accuracy - 0.25,
        "test/loss": None,
    }


def write_clients(folder, values, unseen=(), column="test_accuracy_selected"):
    ids = list(range(len(values)))
    columns = {"client": ids, "unseen": [i in unseen for i in ids], column: [float(value) for value in values]}
    table = pyarrow.table(columns)
    parquet.write_table(table, folder / "clients.parquet")


@pytest.fixture
def write(tmp_path):
    """Write one run folder; keyword arguments that are not named are keys of its summary."""
    count = 0

    def write(strategy, seed, accuracy, last=0.5, options=None, config=None, clients=None, unseen=(), **summary):
        nonlocal count
        count += 1
        folder = tmp_path / f"run{count:02d}"
        folder.mkdir()
        values = {
            "seed": seed,
            "rounds": 50,
            "strategy": {"name": strategy, **(options or {})},
            "dataset": {"name": "digits", "root": None},
            "partition": {"name": "dirichlet", "alpha": 0.1, "num_clients": 20},
            "training": {"lr": 0.1},
            "runtime": {"workers": 1},
            "tracker": {},
            **(config or {}),
        }
        (folder / "config.yaml").write_text(json.dumps(values))  # JSON is YAML
        base = {
            "strategy": strategy, "dataset": "digits", "partition": "dirichlet(alpha=0.1)",
            "model": "mlp", "num_clients": 20, "seed": seed, "rounds": 50, "rounds_done": 50, "interrupted": False,
            "selected_round": 37, "protocol": "validation-selected", "selected": metrics(accuracy),
            "last": metrics(last),
            "bytes_up": 1_500_000, "bytes_down": 500_000, "gradients": 34_500, "seconds": 12.0, "failures": 0,
        }  # fmt: skip
        path = folder / "summary.json"
        path.write_text(json.dumps(base | summary))
        if clients is not None:
            write_clients(folder, clients, unseen)
        os.utime(path, (1_000_000 + count,) * 2)
        return folder

    return write
