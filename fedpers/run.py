"""One run: from settings to a folder of results."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import flwr.app as flower
import numpy as np
import torch
from omegaconf import OmegaConf

from fedpers import __version__
from fedpers.config import Config, convert
from fedpers.data import FederatedData, apply_heterogeneity, load_federated
from fedpers.data.federated import PARTS
from fedpers.errors import ConfigError, FedpersError
from fedpers.evaluation.metrics import distribution
from fedpers.models import build_model
from fedpers.randomness import sample_clients
from fedpers.runtime.flower_private import server_identity
from fedpers.runtime.local import RUN_ID, LocalGrid
from fedpers.strategies import CohortApp, PersonalizedStrategy, RoundReport, make_strategy, option_types
from fedpers.tracking import make_trackers

log = logging.getLogger(__name__)
SELECTED_BY = "validation/accuracy"
TIMES = ("seconds", "train_seconds", "samples_per_second")
"""Metrics that differ between two runs of the same settings."""
_COUNTED = ("bytes_up", "bytes_down", "steps", "samples", "gradients", "failures")
_SPREAD = {"mean": "", "weighted": "_weighted", "std": "_std", "worst_decile": "_worst_decile", "min": "_min"}
_MEASURED = {"accuracy": _SPREAD, "balanced-accuracy": {"mean": ""}, "loss": {"mean": ""}, "auc": {"mean": ""}}


@dataclass
class Setup:
    """Everything a run consists of, made from its settings."""

    data: FederatedData
    strategy: PersonalizedStrategy
    app: CohortApp


@dataclass
class Progress:
    """What a run has yielded so far.

    Attributes
    ----------
    rounds_done : int
        Rounds trained, aggregated and, where due, evaluated.
    best, last : tuple (round, metrics, metrics by client) or None
        Evaluated round with the highest validation accuracy (the first of equals), and the latest evaluated one.
    """

    rounds_done: int = 0
    best: tuple[int, dict[str, float], dict[int, dict[str, float]]] | None = None
    last: tuple[int, dict[str, float], dict[int, dict[str, float]]] | None = None
    totals: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    trained: Counter[int] = field(default_factory=Counter)

    def take(self, report: RoundReport, metrics: dict[str, float]) -> None:
        """Take in a finished round."""
        self.rounds_done = report.round
        self.trained.update(set(report.sampled) - set(report.failures))
        for name in ("bytes_up", "bytes_down", "steps", "samples", "gradients", "seconds", "train_seconds"):
            self.totals[name] = self.totals.get(name, 0) + getattr(report, name)
        failures = len(report.failures) + len(report.evaluation_failures)
        self.totals["failures"] = self.totals.get("failures", 0) + failures
        if report.clients and report.round:
            self.last = (report.round, metrics, report.clients)
            score = metrics.get(SELECTED_BY, math.nan)
            complete = not report.evaluation_failures  # a mean over those that are left would flatter the round
            if complete and (self.best is None or score > self.best[1].get(SELECTED_BY, -math.inf)):
                self.best = self.last


def prepare_run(config: Config) -> Setup:
    """Load data and make network, strategy and client app; all settings are checked here, before training.

    Raises
    ------
    ConfigError, DataError
        If settings or data cannot be used.
    """
    device = config.runtime.torch_device()
    if device.type == "cuda":  # the same digits for every cohort size and in every run are worth some speed
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
    name = str(config.strategy["name"])
    kinds = option_types(name)
    options = {
        key: convert(f"strategy.{key}", value, kinds.get(key, Any))
        for key, value in config.strategy.items()
        if key != "name"
    }
    server = {"fraction": config.fraction, "seed": config.seed, "evaluate_every": config.evaluate_every}
    strategy, update = make_strategy(
        name, options, server={**server, "min_replies": config.min_replies}, training=config.training
    )
    data = load_federated(config.dataset, config.partition, config.split, config.seed)
    shift_seed = config.seed if config.partition.seed is None else config.partition.seed
    data = apply_heterogeneity(data, config.heterogeneity, shift_seed)
    try:
        model = build_model(config.model, tuple(data.x.shape[1:]), data.num_classes, config.seed)
    except (RuntimeError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else "out of memory"
        raise ConfigError("model", config.model.name, f"a network that can be built here ({reason})") from error
    return Setup(data, strategy, update.client_app(model, data, seed=config.seed, device=device))


def run_rounds(
    strategy: PersonalizedStrategy, grid: LocalGrid, arrays: flower.ArrayRecord, rounds: int, *, auc: bool = False
) -> Iterator[RoundReport]:
    """Train and evaluate round by round.

    Round 0 is an evaluation of the initial state; the last round is always evaluated.

    Yields
    ------
    RoundReport
        After each round.
    """
    evaluation = flower.ConfigRecord({"auc": auc})
    for round in range(rounds + 1):
        if round:
            messages = strategy.configure_train(round, arrays, flower.ConfigRecord(), grid)
            new, _ = strategy.aggregate_train(round, grid.send_and_receive(messages))
            arrays = arrays if new is None else new
        due = round % strategy.evaluate_every == 0 or round == rounds
        if due:
            messages = strategy.evaluation_messages(round, arrays, evaluation, grid)
            strategy.aggregate_evaluate(round, grid.send_and_receive(messages))
        yield strategy.report


def metrics_of(report: RoundReport) -> dict[str, float]:
    """Metrics of a round by the names used everywhere, e.g. ``test/accuracy_worst_decile``."""
    found: dict[str, float] = {}
    if report.round:
        found["train/loss"] = report.train_loss
    for part in PARTS[1:]:
        rows = list(report.clients.values())
        weights = [row.get(f"{part}-examples", 0.0) for row in rows]
        for name, spread in _MEASURED.items():
            values = [row.get(f"{part}-{name}", math.nan) for row in rows]
            if any(value == value for value in values):
                statistics = distribution(np.array(values), np.array(weights))
                for statistic, ending in spread.items():
                    found[f"{part}/{name.replace('-', '_')}{ending}"] = statistics[statistic]
    found["clients/sampled"] = len(report.sampled)
    found["clients/failed"] = len(report.failures) + len(report.evaluation_failures)
    adapted = [row.get("adaptation-gradients", 0.0) for row in report.clients.values()]
    if any(adapted):
        found["adaptation_gradients"] = sum(adapted)
    for name in ("bytes_up", "bytes_down", "steps", "samples", "gradients", "seconds", "train_seconds"):
        found[name] = getattr(report, name)
    if report.train_seconds:
        found["samples_per_second"] = report.samples / report.train_seconds
    return found


def run(config: Config, folder: Path, resolved: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run and write the run folder.

    It holds ``config.yaml``, ``manifest.json``, ``rounds.jsonl``, ``clients.parquet`` and ``summary.json``. On Ctrl-C
    what is done so far is written, and ``KeyboardInterrupt`` raised again.

    Parameters
    ----------
    config : Config
    folder : Path
        Made if it does not exist.
    resolved : mapping, optional
        The composed configuration, kept as ``config.yaml``.

    Returns
    -------
    dict
        What is in ``summary.json``.

    Raises
    ------
    FedpersError
        If settings, data or the folder cannot be used or the folder holds a run, or too few clients reply.
    """
    started = time.perf_counter()
    setup = prepare_run(config)
    _make_folder(folder)
    if (folder / "rounds.jsonl").exists():
        raise FedpersError(f"{folder} holds a run already; choose another folder.")
    plain = dict(resolved) if resolved else asdict(config)
    _write(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(plain)))
    grid = LocalGrid(setup.app, setup.data.num_clients, cohort=config.runtime.cohort, workers=config.runtime.workers)
    assert grid.engine is not None
    sampled = len(sample_clients(config.seed, 1, setup.data.num_clients, config.fraction))
    if config.min_replies > sampled:
        grid.close()
        raise ConfigError("min_replies", config.min_replies, f"at most {sampled}, the clients sampled in a round")
    progress = Progress()
    name = f"{config.strategy['name']} {setup.data.name} seed {config.seed}"
    manifest = make_manifest(setup)
    try:
        with server_identity(RUN_ID), make_trackers(config.tracker, folder, name, plain, config.rounds) as trackers:
            choice = grid.engine.choose(sampled)
            log.info("runtime: %s", choice)
            if sys.stderr.isatty():
                print(f"runtime: {choice}", file=sys.stderr)
            manifest["runtime"] = {
                "cohort": choice.cohort, "workers": choice.workers, "chosen": choice.how,
                "microseconds_per_client_step": choice.microseconds,
            }  # fmt: skip
            _write(folder / "manifest.json", json.dumps(manifest, indent=1))
            try:
                arrays = setup.app.initial_arrays()
                for report in run_rounds(setup.strategy, grid, arrays, config.rounds, auc=config.auc):
                    metrics = metrics_of(report)
                    trackers.log(report.round, metrics)
                    progress.take(report, metrics)
            except FedpersError as error:
                progress.error = str(error)
                raise
            finally:
                summary = _summary(config, setup, progress, time.perf_counter() - started)
                _write_clients(folder / "clients.parquet", setup.data, progress)
                _write(folder / "summary.json", json.dumps(summary, indent=1))
                trackers.summary({f"selected/{k}": v for k, v in summary["selected"].items() if v is not None})
    finally:
        grid.close()
    return summary


def _summary(config: Config, setup: Setup, progress: Progress, seconds: float) -> dict[str, Any]:
    """Contents of ``summary.json``; NaN becomes null."""
    partition = config.partition
    detail = {
        "dirichlet": f"(alpha={partition.alpha:g})",
        "pathological": f"(classes_per_client={partition.classes_per_client})",
        "quantity": f"({partition.skew})",
    }.get(partition.name, "")

    def measured(found: tuple[int, dict[str, float], Any] | None) -> dict[str, float | None]:
        metrics = {} if found is None else found[1]
        return {k: v if math.isfinite(v) else None for k, v in metrics.items() if k.startswith(PARTS[1:])}

    totals = progress.totals
    return {
        "strategy": config.strategy["name"],
        "dataset": setup.data.name,
        "partition": partition.name + detail,
        "model": config.model.name,
        "num_clients": setup.data.num_clients,
        "seed": config.seed,
        "rounds": config.rounds,
        "rounds_done": progress.rounds_done,
        "interrupted": progress.rounds_done < config.rounds,
        "error": progress.error,
        "protocol": "validation-selected",
        "selected_round": None if progress.best is None else progress.best[0],
        "last_round": None if progress.last is None else progress.last[0],
        "selected": measured(progress.best),
        "last": measured(progress.last),
        **{name: int(totals.get(name, 0)) for name in _COUNTED},
        "seconds": seconds,
        "train_seconds": totals.get("train_seconds", 0.0),
    }


def _write_clients(path: Path, data: FederatedData, progress: Progress) -> None:
    """Write one row per client: sizes, and metrics at the selected and the last evaluated round."""
    import pandas as pd

    columns: dict[str, list[Any]] = {"client": list(range(data.num_clients))}
    for part in PARTS:
        columns[f"{part}_size"] = data.sizes(part).tolist()
    columns["rounds_trained"] = [progress.trained[client] for client in range(data.num_clients)]
    for when, found in (("selected", progress.best), ("last", progress.last)):
        rows = {} if found is None else found[2]
        names = sorted({name for row in rows.values() for name in row if name.startswith(PARTS[1:])})
        for name in names:
            if not name.endswith("-examples"):
                values = [rows.get(c, {}).get(name, math.nan) for c in range(data.num_clients)]
                columns[f"{name.replace('-', '_')}_{when}"] = values
    with _writing(path):
        pd.DataFrame(columns).to_parquet(path, index=False)


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
            "samples": {part: int(setup.data.sizes(part).sum()) for part in PARTS},
        },
        "machine": {
            "host": platform.node(),
            "system": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "memory_bytes": memory,
            "device": str(device),
            "gpu": gpu,
        },
    }


def _commit() -> str | None:
    """Git commit of the code, with ``+`` when there are changes; None outside a checkout."""
    home = Path(__file__).parent.parent
    if not (home / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(home), "describe", "--always", "--abbrev=40", "--dirty=+"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        log.debug("no git commit: %s", error)
        return None
    return found.stdout.strip()


class _writing:
    """Turn failures to write into one sentence."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            text = f"{self.path} cannot be written ({error.strerror or error}); choose another folder with output=."
            raise FedpersError(text) from error


def _make_folder(folder: Path) -> None:
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _write(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    draft = path.with_name(path.name + ".tmp")
    with _writing(path):
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
