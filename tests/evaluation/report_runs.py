"""Run folders made up for reports, as small or large as a test wants them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

GAINS = {"local": 0.0, "fedavg": -0.3, "fedper": 0.1, "fedrep": 0.05}
"""By how much a method's clients score above training alone."""


def write_run(
    folder: Path,
    strategy: str = "local",
    seed: int = 0,
    *,
    clients: int = 30,
    rounds: int = 10,
    headline: str = "accuracy",
    level: float = 0.6,
    names: list[str] | None = None,
    classes: int = 4,
    class_names: list[str] | None = None,
    options: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    extra: dict[str, float] | None = None,
    **summary: Any,
) -> Path:
    """Write a run whose clients' scores are drawn around `level` plus the method's gain; `summary` replaces entries."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    train = draw.integers(20, 400, clients)
    base = draw.normal(level, 0.1, clients)
    noise = np.random.default_rng([seed, len(strategy)]).normal(0, 0.03, clients)
    score = np.clip(base + GAINS.get(strategy, 0.0) + noise, -5, 1)
    columns: dict[str, Any] = {"client": range(clients)}
    if names:
        columns["name"] = names
    columns |= {
        "train_size": train,
        "validation_size": train // 4,
        "test_size": train // 3,
        "unseen": [False] * clients,
    }
    if classes:
        counts = draw.multinomial(50, draw.dirichlet([0.3] * classes, clients).mean(0), clients)
        counts[:, 0] = np.arange(clients) % 40
        shares = counts / counts.sum(1, keepdims=True)
        columns["divergence"] = np.abs(shares - counts.sum(0) / counts.sum()).sum(1) / 2
        columns |= {f"class {(class_names or range(classes))[i]}": counts[:, i] for i in range(classes)}
    columns |= {
        "rounds_trained": [rounds] * clients,
        f"test_{headline}_selected": score,
        f"test_{headline}_last": score,
    }
    pd.DataFrame(columns).to_parquet(folder / "clients.parquet", index=False)

    final = float(score.mean())
    with (folder / "rounds.jsonl").open("w") as file:
        for r in range(rounds + 1):
            row = {"round": r, "bytes_up": 0 if strategy == "local" else 1_000_000, "bytes_down": 0, "gradients": 100,
                   "seconds": 0.5, f"test/{headline}": final * r / rounds, "train/loss": 1.0}  # fmt: skip
            if r and extra:
                row |= {f"train/{name}": value * r / rounds for name, value in extra.items()}
            file.write(json.dumps(row) + "\n")
    settings = {
        "seed": seed, "rounds": rounds, "fraction": 1.0, "strategy": {"name": strategy, **(options or {})},
        "dataset": {"name": "digits", "root": None}, "partition": {"name": "iid", "num_clients": clients},
        "training": {"lr": 0.1}, "runtime": {"workers": 1}, "tracker": {}, **(config or {}),
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    measured = {
        f"test/{headline}": final, f"test/{headline}_weighted": float(np.average(score, weights=train)),
        f"test/{headline}_std": float(score.std()), f"test/{headline}_worst_decile": float(np.sort(score)[:3].mean()),
    }  # fmt: skip
    values = {
        "strategy": strategy, "dataset": "digits", "partition": "iid", "model": "mlp", "num_clients": clients,
        "seed": seed, "rounds": rounds, "rounds_done": rounds, "interrupted": False, "task": "classification",
        "protocol": "validation-selected", "selected_on": "validation", "headline": headline, "also": [],
        "spread": True, "baselines": ["local", "fedavg"], "selected_round": rounds, "selected": measured,
        "last": measured, "bytes_up": 0, "bytes_down": 0, "gradients": 1000, "seconds": 5.0, "failures": 0,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(values | summary))
    manifest = {"versions": {"fedpers": "0.1.0", "flwr": "1.41.0", "torch": "2.13.0"}, "commit": "abcdef0123456789",
                "data": {"checksum": "c0ffee", "samples": {"train": 1000, "validation": 250, "test": 333}}}  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def write_sweep(root: Path, strategies: tuple[str, ...] = tuple(GAINS), seeds: int = 3, **run: Any) -> Path:
    """Write a run of each method and seed."""
    for strategy in strategies:
        for seed in range(seeds):
            write_run(root / f"{strategy}_{seed}", strategy, seed, **run)
    return root
