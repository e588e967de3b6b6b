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
from flwr.serverapp import Grid
from omegaconf import OmegaConf

from fedpers import __version__
from fedpers.config import Config, convert
from fedpers.data import FederatedData, apply_heterogeneity, load_federated
from fedpers.data.federated import PARTS
from fedpers.data.ratings import RankingData
from fedpers.errors import ConfigError, FedpersError
from fedpers.evaluation.metrics import distribution
from fedpers.models import build_model
from fedpers.randomness import sample_clients
from fedpers.runtime.launch import launch
from fedpers.strategies import CohortApp, PersonalizedStrategy, RoundReport, make_strategy, option_types
from fedpers.tracking import make_trackers

log = logging.getLogger(__name__)
TIMES = ("seconds", "train_seconds", "samples_per_second")
"""Metrics that differ between two runs of the same settings."""
_COUNTED = ("bytes_up", "bytes_down", "steps", "samples", "gradients", "failures")
_SPREAD = {"mean": "", "weighted": "_weighted", "std": "_std", "worst_decile": "_worst_decile", "min": "_min"}
_GROUPS = (*PARTS[1:], "unseen", "adapted")
"""What the names of measured metrics begin with: parts of the clients that train, and the unseen ones' test part."""
Evaluation = tuple[int, dict[str, float], "RoundReport"]
"""An evaluated round: its number, its metrics, its report."""


@dataclass
class Setup:
    """Everything a run consists of, made from its settings."""

    data: FederatedData
    strategy: PersonalizedStrategy
    app: CohortApp
    pretrained_accuracy: float | None = None


@dataclass
class Progress:
    """What a run has yielded so far.

    Attributes
    ----------
    rounds_done : int
        Rounds trained, aggregated and, where due, evaluated.
    best, last : tuple (round, metrics, report) or None
        Evaluated round with the highest score (the first of equals, or the last if the data's protocol says so), and
        the latest evaluated one.
    """

    selected_by: str = "validation/accuracy"
    latest_wins: bool = False
    unseen: tuple[int, ...] = ()
    rounds_done: int = 0
    best: Evaluation | None = None
    last: Evaluation | None = None
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
            self.last = (report.round, metrics, report)
            left_out = report.evaluation_failures.keys() - set(self.unseen)
            complete = not left_out  # a mean over those that are left would flatter the round
            if complete and self._better(metrics):
                self.best = self.last

    def _better(self, metrics: dict[str, float]) -> bool:
        if self.best is None:
            return True
        score, best = metrics.get(self.selected_by, math.nan), self.best[1].get(self.selected_by, -math.inf)
        return score > best or (self.latest_wins and score == best)


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
    strategy.unseen = data.unseen
    try:
        public = None if data.public is None else (data.x[data.public], data.y[data.public])
        items = data.num_items if isinstance(data, RankingData) else None
        model = build_model(
            config.model,
            tuple(data.x.shape[1:]),
            data.num_classes,
            config.seed,
            num_items=items,
            public=public,
            device=device,
        )
    except (RuntimeError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else "out of memory"
        raise ConfigError("model", config.model.name, f"a network that can be built here ({reason})") from error
    app = update.client_app(model, data, seed=config.seed, device=device)
    return Setup(data, strategy, app, model.pretrained_accuracy)


def run_rounds(
    strategy: PersonalizedStrategy,
    grid: Grid,
    arrays: flower.ArrayRecord,
    rounds: int,
    *,
    auc: bool = False,
    timeout: float | None = None,
) -> Iterator[RoundReport]:
    """Train and evaluate round by round.

    Round 0 is an evaluation of the initial state; the last round is always evaluated, and then the unseen clients
    once more, after they adapted.

    Yields
    ------
    RoundReport
        After each round.
    """
    evaluation = flower.ConfigRecord({"auc": auc})
    strategy.timeout = timeout
    grid = strategy.folding(grid)
    for round in range(rounds + 1):
        if round:
            messages = strategy.configure_train(round, arrays, flower.ConfigRecord(), grid)
            new, _ = strategy.aggregate_train(round, grid.send_and_receive(messages, timeout=timeout))
            arrays = arrays if new is None else new
        due = round % strategy.evaluate_every == 0 or round == rounds
        if due:
            messages = strategy.evaluation_messages(round, arrays, evaluation, grid)
            strategy.aggregate_evaluate(round, grid.send_and_receive(messages, timeout=timeout))
        if round == rounds and strategy.unseen:
            strategy.evaluate_adapted(arrays, evaluation, grid)
        yield strategy.report


def metrics_of(report: RoundReport, headline: str) -> dict[str, float]:
    """Metrics of a round by the names used everywhere, e.g. ``test/accuracy_worst_decile``.

    Parameters
    ----------
    report : RoundReport
    headline : str
        The metric whose distribution over clients is described too (``FederatedData.headline``).
    """
    found: dict[str, float] = {}
    if report.round:
        found["train/loss"] = report.train_loss
        found.update({f"train/{name}": value for name, value in report.extra.items()})
    for group in _GROUPS:
        rows = list({"unseen": report.unseen, "adapted": report.adapted}.get(group, report.clients).values())
        part = group if group in PARTS else "test"
        weights = np.array([row.get(f"{part}-examples", 0.0) for row in rows])
        names = dict.fromkeys(name.removeprefix(f"{part}-") for row in rows for name in row if name.startswith(part))
        for name in names:
            if name == "examples":
                continue
            statistics = distribution(np.array([row.get(f"{part}-{name}", math.nan) for row in rows]), weights)
            for statistic, ending in (_SPREAD if name == headline else {"mean": ""}).items():
                found[f"{group}/{name.replace('-', '_')}{ending}"] = statistics[statistic]
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
    trainable = setup.data.num_clients - len(setup.data.unseen)
    sampled = len(sample_clients(config.seed, 1, trainable, config.fraction))
    if config.min_replies > sampled:
        raise ConfigError("min_replies", config.min_replies, f"at most {sampled}, the clients sampled in a round")
    data = setup.data
    progress = Progress(f"{data.selected_on}/{data.headline}", data.latest_wins, data.unseen)
    name = f"{config.strategy['name']} {setup.data.name} seed {config.seed}"
    manifest = make_manifest(setup)
    summary: dict[str, Any] = {}

    def main(grid: Grid) -> None:
        with make_trackers(
            config.tracker, folder, name, plain, config.rounds, headline=f"validation/{data.headline}"
        ) as trackers:
            log.info("runtime: %s", grid)
            if sys.stderr.isatty():
                print(f"runtime: {grid}", file=sys.stderr)
            described = getattr(grid, "described", dict)
            manifest["runtime"] = described()
            _write(folder / "manifest.json", json.dumps(manifest, indent=1))
            try:
                arrays = setup.app.initial_arrays()
                for report in run_rounds(
                    setup.strategy, grid, arrays, config.rounds, auc=config.auc, timeout=config.runtime.timeout
                ):
                    metrics = metrics_of(report, data.headline)
                    trackers.log(report.round, metrics)
                    progress.take(report, metrics)
            except FedpersError as error:
                progress.error = str(error)
                raise
            finally:
                summary.update(_summary(config, setup, progress, time.perf_counter() - started))
                _write_clients(folder / "clients.parquet", setup.data, progress)
                _write(folder / "summary.json", json.dumps(summary, indent=1))
                trackers.summary({f"selected/{k}": v for k, v in summary["selected"].items() if v is not None})

    launch(config.runtime, setup.app, main, sampled=sampled, folder=folder)
    return summary


def _summary(config: Config, setup: Setup, progress: Progress, seconds: float) -> dict[str, Any]:
    """Contents of ``summary.json``; NaN becomes null."""
    partition = config.partition
    detail = {
        "dirichlet": f"(alpha={partition.alpha:g})",
        "pathological": f"(classes_per_client={partition.classes_per_client})",
        "quantity": f"({partition.skew})",
    }.get(partition.name, "")

    def measured(found: Evaluation | None) -> dict[str, float | None]:
        metrics = {} if found is None else found[1]
        return {k: v if math.isfinite(v) else None for k, v in metrics.items() if k.startswith(_GROUPS)}

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
        "protocol": setup.data.protocol,
        "headline": setup.data.headline,
        "also": list(setup.data.also),
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
    columns["unseen"] = [client in data.unseen for client in range(data.num_clients)]
    columns["rounds_trained"] = [progress.trained[client] for client in range(data.num_clients)]
    for when, found in (("selected", progress.best), ("last", progress.last)):
        rows = {} if found is None else {**found[2].clients, **found[2].unseen}
        _put(columns, rows, when)
    if progress.last is not None and progress.last[2].adapted:
        _put(columns, progress.last[2].adapted, "adapted")
    with _writing(path):
        pd.DataFrame(columns).to_parquet(path, index=False)


def _put(columns: dict[str, list[Any]], rows: Mapping[int, Mapping[str, float]], when: str) -> None:
    """Add a column per metric, NaN for clients without it."""
    names = sorted({name for row in rows.values() for name in row if name.startswith(PARTS[1:])})
    clients = columns["client"]
    for name in names:
        if not name.endswith("-examples"):
            columns[f"{name.replace('-', '_')}_{when}"] = [rows.get(c, {}).get(name, math.nan) for c in clients]


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
            "public": 0 if setup.data.public is None else len(setup.data.public),
            "unseen": list(setup.data.unseen),
        },
        "pretrained_accuracy": setup.pretrained_accuracy,
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
