"""The files of a run's folder: ``manifest.json``, ``summary.json``, ``clients.parquet``."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fedpers import __version__
from fedpers.data import FederatedData
from fedpers.data.federated import EVALUATED_PARTS, PARTS
from fedpers.errors import FedpersError
from fedpers.evaluation.clients import describe_clients
from fedpers.files import whole_file
from fedpers.process import processor
from fedpers.run.progress import Evaluation, Progress
from fedpers.run.rounds import METRIC_PREFIXES
from fedpers.run.setup import Setup
from fedpers.settings import Config

log = logging.getLogger(__name__)
_COUNTED = ("bytes_up", "bytes_down", "steps", "samples", "gradients", "failures")


def make_manifest(setup: Setup) -> dict[str, Any]:
    """What ran where: versions, commit, data and machine."""
    versions = {name: metadata.version(name) for name in ("flwr", "torch", "tensordict", "numpy", "hydra-core")}
    device = setup.app.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": {"fedpers": __version__, "python": platform.python_version(), **versions},
        "commit": _commit(),
        "data": {
            "name": setup.data.name,
            "checksum": setup.data.checksum,
            "clients": setup.data.num_clients,
            "samples": {part: int(setup.data.label_counts(part).sum()) for part in PARTS},
            "public": 0 if setup.data.public is None else len(setup.data.public),
            "global_test": 0 if setup.data.global_test is None else len(setup.data.global_test),
            "unseen": list(setup.data.unseen),
        },
        "pretrained_accuracy": setup.pretrained_accuracy,
        "machine": {
            "host": platform.node(),
            "system": platform.platform(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "memory_bytes": memory,
            "device": str(device),
            "gpu": gpu,
        },
    }


def _commit() -> str | None:
    """Git commit of the code, with ``+`` when there are changes; None outside a checkout."""
    home = Path(__file__).parents[2]
    if not (home / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(home), "describe", "--always", "--abbrev=40", "--dirty=+"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        log.debug("no git commit: %s", error)
        return None
    return described.stdout.strip()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write into one sentence."""
    try:
        yield
    except OSError as error:
        text = f"{path} cannot be written ({error.strerror or error}); choose another folder with output=."
        raise FedpersError(text) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with writing(path), whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def summarize(config: Config, setup: Setup, progress: Progress, seconds: float) -> dict[str, Any]:
    """Contents of ``summary.json``; NaN becomes null."""
    partition = config.partition
    detail = {
        "dirichlet": f"(alpha={partition.alpha:g})",
        "inner_dirichlet": f"(alpha={partition.alpha:g}, {partition.sizes})",
        "pfllib_dirichlet": f"(alpha={partition.alpha:g})",
        "pfllib_pathological": f"(classes_per_client={partition.classes_per_client})",
        "pathological": f"(classes_per_client={partition.classes_per_client})",
        "power_law": f"(classes_per_client={partition.classes_per_client}, sigma={partition.sigma:g})",
        "shards": f"(shards_per_client={partition.shards_per_client})",
        "quantity": f"({partition.skew})",
        "continuous": f"(strictness={partition.strictness:g})",
        "domains": f"(alpha={partition.alpha:g})" if partition.within == "dirichlet" else "",
        "grouped_natural": f"(owners_per_client={partition.owners_per_client})",
    }.get(partition.name, "")

    def measured(evaluation: Evaluation | None) -> dict[str, float | None]:
        metrics = {} if evaluation is None else evaluation[1]
        return {k: v if math.isfinite(v) else None for k, v in metrics.items() if k.startswith(METRIC_PREFIXES)}

    totals, task = progress.totals, setup.data.task
    return {
        "strategy": config.strategy["name"],
        "dataset": setup.data.name,
        "partition": partition.name + detail,
        "model": config.model.label,
        "compression": config.compression.name,
        "privacy": config.privacy.name,
        "aggregation": config.aggregation.name,
        **postprocessor_summary(config, setup, progress.rounds_done),
        "num_clients": setup.data.num_clients,
        "num_unseen": len(setup.data.unseen),
        "global_samples": 0 if setup.data.global_test is None else len(setup.data.global_test),
        "seed": config.seed,
        "rounds": config.rounds,
        "rounds_done": progress.rounds_done,
        "interrupted": progress.ended_by is None and progress.rounds_done < config.rounds,
        "ended_by": progress.ended_by,
        "error": progress.error,
        "task": task.name,
        "protocol": "last round" if progress.selected_by is None else task.protocol,
        "selected_on": "nothing" if progress.selected_by is None else progress.selected_by.partition("/")[0],
        "headline": task.headline,
        "also": list(task.also),
        "spread": task.spread,
        "baselines": list(task.baselines),
        "selected_round": None if progress.best is None else progress.best[0],
        "last_left_out": 0 if progress.last is None else len(progress.left_out(progress.last[2])),
        "last_diverged": 0 if progress.last is None else len(progress.last[2].diverged),
        "last_round": None if progress.last is None else progress.last[0],
        "selected": measured(progress.best),
        "last": measured(progress.last),
        **{name: int(totals.get(name, 0)) for name in _COUNTED},
        "seconds": seconds,
        "train_seconds": totals.get("train_seconds", 0.0),
        "simulated_seconds": None if config.clock.name == "none" else totals.get("simulated_seconds", 0.0),
    }


def postprocessor_summary(config: Config, setup: Setup, rounds: int) -> dict[str, Any]:
    """What the postprocessors say of so many rounds, e.g. the privacy that is spent."""
    trainable = setup.data.num_clients - len(setup.data.unseen)
    sampled = setup.strategy.most_sampled(trainable)
    stated: dict[str, Any] = {}
    for postprocessor in setup.strategy.postprocessors:
        stated.update(postprocessor.summary(rounds, sampled, trainable))
    return stated


def write_clients(path: Path, data: FederatedData, progress: Progress) -> None:
    """Write one row per client: sizes and labels, and metrics at the selected and the last evaluated round."""
    import pandas as pd

    sizes: dict[str, str] = {part: f"{part}_size" for part in PARTS}
    columns = {sizes.get(str(name), str(name)): column.tolist() for name, column in describe_clients(data).items()}
    columns["rounds_trained"] = [progress.trained[client] for client in range(data.num_clients)]
    for when, evaluation in (("selected", progress.best), ("last", progress.last)):
        rows = {} if evaluation is None else {**evaluation[2].clients, **evaluation[2].unseen}
        _add_metrics(columns, rows, when)
    if progress.last is not None and progress.last[2].adapted:
        _add_metrics(columns, progress.last[2].adapted, "adapted")
    with writing(path):
        pd.DataFrame(columns).to_parquet(path, index=False)


def values_of_clients(progress: Progress, headline: str) -> dict[str, list[float]]:
    """Headline of the clients that have one, ascending, as ``selected/test/accuracy``; of those that train."""
    values: dict[str, list[float]] = {}
    for when, evaluation in (("selected", progress.best), ("last", progress.last)):
        rows = {} if evaluation is None else evaluation[2].clients
        for part in EVALUATED_PARTS:
            column = [row[f"{part}-{headline}"] for _, row in sorted(rows.items()) if f"{part}-{headline}" in row]
            if finite := [value for value in column if math.isfinite(value)]:
                values[f"{when}/{part}/{headline}"] = finite
    return values


def _add_metrics(columns: dict[str, list[Any]], rows: Mapping[int, Mapping[str, float]], when: str) -> None:
    """Add a column per metric, NaN for clients without it."""
    names = sorted({name for row in rows.values() for name in row if name.startswith(EVALUATED_PARTS)})
    clients = columns["client"]
    for name in names:
        if not name.endswith("-examples"):
            columns[f"{name.replace('-', '_')}_{when}"] = [rows.get(c, {}).get(name, math.nan) for c in clients]


def rounds_of_finished(folder: Path, rounds: int) -> int | None:
    """Rounds that a run of `rounds` has done if all its results are there; None if it is not finished."""
    summary = read_json(folder / "summary.json")
    finished = summary.get("interrupted") is False and summary.get("rounds") == rounds
    return summary.get("rounds_done") if finished else None


def stopped_early_by(folder: Path) -> str | None:
    """Setting of ``stop`` that ended the run in a folder; None if it goes on, or ended otherwise."""
    ended_by = read_json(folder / "summary.json").get("ended_by")
    return ended_by if ended_by in ("stop.patience", "stop.target") else None


def read_json(path: Path) -> dict[str, Any]:
    """What a file of ours holds; nothing if it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        log.info("%s is not read: %s", path, error)
        return {}
    return content if isinstance(content, dict) else {}
