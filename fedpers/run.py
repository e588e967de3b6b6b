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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import flwr.app as flower
import numpy as np
import torch
import yaml
from flwr.serverapp import Grid
from omegaconf import OmegaConf

from fedpers import __version__
from fedpers.checkpoint import Checkpoint, Checkpoints, network_checksum
from fedpers.client.update import LocalUpdate
from fedpers.cohort import Tree
from fedpers.data import FederatedData, apply_heterogeneity, load_federated
from fedpers.data.federated import PARTS
from fedpers.errors import ConfigError, FedpersError
from fedpers.evaluation.metrics import distribution
from fedpers.models import build_model
from fedpers.progress import Evaluation, Progress, report_from_json, report_to_json
from fedpers.randomness import sample_clients
from fedpers.records import from_record, to_record
from fedpers.resume import FinishedError, clear_leftovers, locked, reopen
from fedpers.runtime.launch import launch
from fedpers.runtime.states import DamagedError, read_states
from fedpers.server.postprocessors import make_postprocessors
from fedpers.settings import Config, build
from fedpers.signals import Interrupted, StopSignals
from fedpers.strategies import CohortApp, PersonalizedStrategy, RoundReport, make_strategy
from fedpers.tracking import Resumed, Trackers, make_trackers

log = logging.getLogger(__name__)
TIMES = ("seconds", "train_seconds", "samples_per_second")
"""Metrics that differ between two runs of the same settings."""
_COUNTED = ("bytes_up", "bytes_down", "steps", "samples", "gradients", "failures")
_SPREAD = {"mean": "", "weighted": "_weighted", "std": "_std", "worst_decile": "_worst_decile", "min": "_min"}
_GROUPS = (*PARTS[1:], "unseen", "adapted")
"""What the names of measured metrics begin with: parts of the clients that train, and the unseen ones' test part."""


@dataclass
class Setup:
    """Everything a run consists of, made from its settings; `network` is the digest of the initial network."""

    data: FederatedData
    strategy: PersonalizedStrategy
    app: CohortApp
    network: str
    pretrained_accuracy: float | None = None


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
    strategy, update = make_halves(config)
    data = load_federated(config.dataset, config.partition, config.split, config.seed)
    shift_seed = config.seed if config.partition.seed is None else config.partition.seed
    data = apply_heterogeneity(data, config.heterogeneity, shift_seed)
    strategy.unseen = data.unseen
    sampled = len(sample_clients(config.seed, 1, data.num_clients - len(data.unseen), config.fraction))
    strategy.min_replies = max(config.min_replies, config.aggregation.replies(sampled))
    try:
        public = None if data.public is None else (data.x[data.public], data.y[data.public])
        model = build_model(
            config.model,
            tuple(data.x.shape[1:]),
            data.num_classes,
            config.seed,
            num_items=data.num_items or None,
            public=public,
            device=device,
        )
    except (RuntimeError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else "out of memory"
        raise ConfigError("model", config.model.name, f"a network that can be built here ({reason})") from error
    app = update.client_app(model, data, seed=config.seed, device=device, postprocessors=strategy.postprocessors)
    strategy.attach(app)
    strategy.check_arrays(from_record(app.initial_arrays()), sampled)
    return Setup(data, strategy, app, network_checksum(model), model.pretrained_accuracy)


def make_halves(config: Config) -> tuple[PersonalizedStrategy, LocalUpdate]:
    """Make both halves of a run's method, without data.

    Raises
    ------
    ConfigError
        If a setting of the method cannot be used.
    """
    name = str(config.strategy["name"])
    options = {key: value for key, value in config.strategy.items() if key != "name"}
    server = {
        "fraction": config.fraction,
        "seed": config.seed,
        "evaluate_every": config.evaluate_every,
        "min_replies": config.min_replies,
        "postprocessors": make_postprocessors(config),
    }
    return make_strategy(name, options, server=server, training=config.training)


def client_half(settings: Mapping[str, Any]) -> CohortApp:
    """Make the client app of a run in another process, from ``asdict`` of its :class:`Config`."""
    return prepare_run(build(Config, settings)).app


def run_rounds(
    strategy: PersonalizedStrategy,
    grid: Grid,
    arrays: flower.ArrayRecord,
    rounds: int,
    *,
    auc: bool = False,
    timeout: float | None = None,
    done: RoundReport | None = None,
    keep: Callable[[RoundReport, flower.ArrayRecord], None] | None = None,
) -> Iterator[RoundReport]:
    """Train and evaluate round by round.

    Round 0 is an evaluation of the initial state; the last round is always evaluated, and then the unseen clients
    once more, after they adapted.

    Parameters
    ----------
    strategy : PersonalizedStrategy
    grid : Grid
    arrays : ArrayRecord
        What the server starts from.
    rounds : int
    auc : bool
    timeout : float, optional
    done : RoundReport, optional
        Of the last round that ran already, as `keep` was given it; `arrays`, ``strategy.state`` and the clients' state
        are those after it.
    keep : callable, optional
        Called with the report and the arrays after each round, before what is done only after the last one.

    Yields
    ------
    RoundReport
        After each round, that of `done` first.
    """
    evaluation = flower.ConfigRecord({"auc": auc})
    if done is None:
        strategy.begin(timeout)
    else:
        strategy.restore(done, strategy.state, timeout)
    grid = strategy.folding(grid)
    for round in range(0 if done is None else done.round, rounds + 1):
        if done is None or round > done.round:
            if round:
                messages = strategy.configure_train(round, arrays, flower.ConfigRecord(), grid)
                new, _ = strategy.aggregate_train(round, grid.send_and_receive(messages, timeout=timeout))
                arrays = arrays if new is None else new
            if round % strategy.evaluate_every == 0:
                messages = strategy.evaluation_messages(round, arrays, evaluation, grid)
                strategy.aggregate_evaluate(round, grid.send_and_receive(messages, timeout=timeout))
            if keep is not None:
                keep(strategy.report, arrays)
        if round == rounds and round % strategy.evaluate_every:
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
        The metric whose distribution over clients is described too (``data.task.headline``).
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

    It holds ``config.yaml``, ``manifest.json``, ``rounds.jsonl``, ``clients.parquet``, ``summary.json`` and the last
    checkpoint. On Ctrl-C or SIGTERM the round ends, what is done so far is written, and
    :class:`~fedpers.signals.Interrupted` raised; a second signal, or one of a run without checkpoints, stops at once.

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
    began = time.perf_counter()
    setup = prepare_run(config)
    _make_folder(folder)
    with locked(folder):
        if (folder / "rounds.jsonl").exists():
            raise FedpersError(f"{folder} holds a run already; choose another folder, or go on with 'fedpers resume'.")
        plain = dict(resolved) if resolved else asdict(config)
        _write(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(plain)))
        return _Run(config, folder, plain, setup, began).go()


def resume(folder: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Go on with a run that stopped, in its folder, after its last checkpoint.

    The folder may come from anywhere: nothing in it is executed, and nothing outside of it is written.

    Parameters
    ----------
    folder : Path
    overrides : sequence of str
        ``key=value``, see :func:`fedpers.resume.reopen`.

    Returns
    -------
    dict
        What is in ``summary.json``.

    Raises
    ------
    FinishedError
        If the run has done all its rounds.
    FedpersError
        If there is no checkpoint, or settings, data or network are not those of the run.
    """
    began = time.perf_counter()
    with locked(folder):
        opened = reopen(folder, overrides)
        config = opened.config
        for checkpoint in opened.checkpoints(folder):
            opened.check_settings(checkpoint)
            rounds = config.rounds
            if rounds < checkpoint.round:
                raise ConfigError("rounds", rounds, f"a whole number >= {checkpoint.round}, the rounds done")
            if checkpoint.round == rounds and _is_finished(folder, rounds):
                raise FinishedError(
                    f"{folder} has done its {rounds} rounds; 'fedpers resume {folder} rounds=N' goes on to round N."
                )
            setup = prepare_run(config)
            for name, ours in (("data", setup.data.checksum), ("network", setup.network)):
                if checkpoint.content.get(name) != ours:
                    what = "data made here differ" if name == "data" else "initial network made here differs"
                    raise FedpersError(f"the {what} from the run's in {folder}, by checksum: it cannot be resumed.")
            try:
                start = _Start.read(checkpoint, setup.app, opened.tracker_ids(checkpoint))
                progress = _progress(setup.data)
                progress.restore(checkpoint.content["progress"])
            except DamagedError as error:
                log.warning("%s This checkpoint is not used.", error)
                continue
            except (KeyError, TypeError, ValueError, AttributeError):
                log.warning("%s does not describe a run. This checkpoint is not used.", checkpoint.folder)
                continue
            clear_leftovers(folder)
            if opened.typed:
                _write(folder / "config.yaml", yaml.safe_dump(opened.plain, sort_keys=False))
            config = replace(config, runtime=opened.runtime_as_before(checkpoint))
            return _Run(config, folder, opened.plain, setup, began, start, progress).go()
        raise opened.nothing_left(folder)


@dataclass
class _Start:
    """Where a resumed run goes on."""

    checkpoint: Checkpoint
    report: RoundReport
    arrays: Tree
    state: dict[str, Tree]
    seconds: float
    tracker_ids: dict[str, str]

    @classmethod
    def read(cls, checkpoint: Checkpoint, app: CohortApp, tracker_ids: dict[str, str]) -> _Start:
        """Read and check a checkpoint."""
        arrays, state = checkpoint.read_server(app)
        checkpoint.check_clients(app)
        report = report_from_json(checkpoint.content["report"])
        if report.round != checkpoint.round:
            raise ValueError(f"a report of round {report.round} in the checkpoint of round {checkpoint.round}")
        return cls(checkpoint, report, arrays, state, float(checkpoint.content["seconds"]), tracker_ids)


class _Run:
    """The rounds of one process, from the beginning or from a checkpoint."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        plain: dict[str, Any],
        setup: Setup,
        began: float,
        start: _Start | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.config, self.folder, self.plain, self.setup, self.start = config, folder, plain, setup, start
        self.progress = _progress(setup.data) if progress is None else progress
        self.checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep)
        self.summary: dict[str, Any] = {}
        self.began = began
        self.kept: int | None = None if start is None else start.report.round
        self.warned = False

    @property
    def seconds(self) -> float:
        """Of all processes that worked on the run."""
        return time.perf_counter() - self.began + (0.0 if self.start is None else self.start.seconds)

    def go(self) -> dict[str, Any]:
        """Run all rounds and write the results."""
        config, data = self.config, self.setup.data
        trainable = data.num_clients - len(data.unseen)
        sampled = len(sample_clients(config.seed, 1, trainable, config.fraction))
        if config.min_replies > sampled:
            raise ConfigError("min_replies", config.min_replies, f"at most {sampled}, the clients sampled in a round")
        make_app = partial(client_half, asdict(config))
        launch(config.runtime, self.setup.app, self.main, sampled=sampled, folder=self.folder, make_app=make_app)
        return self.summary

    def main(self, grid: Grid) -> None:
        """What the server does."""
        config, setup, start, progress = self.config, self.setup, self.start, self.progress
        log.info("runtime: %s", grid)
        if sys.stderr.isatty():
            print(f"runtime: {grid}", file=sys.stderr)
        saves = config.checkpoint.every > 0
        if saves and not hasattr(grid, "blocks"):
            log.info("no checkpoints are written: on this runtime clients keep their state themselves")
            saves = False
        arrays = setup.app.initial_arrays()
        resumed = None
        if start is not None:
            log.info("resumed after round %d", start.report.round)
            if not hasattr(grid, "load"):
                raise FedpersError(f"runtime={config.runtime.name} cannot take over clients' personal state.")
            grid.load(read_states(start.checkpoint.folder, setup.app.initial_state))
            arrays, setup.strategy.state = to_record(start.arrays), start.state
            resumed = Resumed(start.report.round, start.tracker_ids)
        name = f"{config.strategy['name']} {setup.data.name} seed {config.seed}"
        headline = setup.data.task.headline
        with (
            make_trackers(
                config.tracker, self.folder, name, self.plain, config.rounds, f"validation/{headline}", resumed
            ) as trackers,
            StopSignals(patient=saves) as signals,
        ):
            self._write_manifest(grid)
            stopping = False

            def keep(report: RoundReport, arrays: flower.ArrayRecord) -> None:
                nonlocal stopping
                stopping = signals.received is not None
                signals.round = report.round + 1
                due = report.round and report.round % config.checkpoint.every == 0
                if due or stopping or report.round == config.rounds:
                    self._save(report, arrays, grid, trackers)

            signals.round = 0 if start is None else start.report.round + 1
            try:
                for report in run_rounds(
                    setup.strategy,
                    grid,
                    arrays,
                    config.rounds,
                    auc=config.auc,
                    timeout=config.runtime.timeout,
                    done=None if start is None else start.report,
                    keep=keep if saves else None,
                ):
                    metrics = metrics_of(report, headline)
                    trackers.log(report.round, metrics)
                    progress.take(report, metrics)
                    if stopping:
                        break
            except FedpersError as error:
                progress.error = str(error)
                raise
            finally:
                self.summary.update(_summary(config, setup, progress, self.seconds))
                _write_clients(self.folder / "clients.parquet", setup.data, progress)
                _write(self.folder / "summary.json", json.dumps(self.summary, indent=1))
                trackers.summary({f"selected/{k}": v for k, v in self.summary["selected"].items() if v is not None})
        if signals.received is not None:
            raise Interrupted(signals.received, self._stopped())

    def _stopped(self) -> str:
        done = self.progress.rounds_done
        if done == self.config.rounds:
            return f"stopped after the last round, {done}; the run is complete"
        if self.kept is None:
            return f"stopped after round {done}; there is no checkpoint"
        return f"stopped after round {done}; 'fedpers resume {self.folder}' goes on after round {self.kept}"

    def _save(self, report: RoundReport, arrays: flower.ArrayRecord, grid: Grid, trackers: Trackers) -> None:
        """Write a checkpoint; one that cannot be written is no reason to lose the run."""
        described: dict[str, Any] = getattr(grid, "described", dict)()
        content = {
            "versions": {"fedpers": __version__, "torch": torch.__version__},
            "settings": self.plain,
            "data": self.setup.data.checksum,
            "network": self.setup.network,
            "runtime": {"name": self.config.runtime.name, "cohort": described.get("cohort")},
            "device": self.setup.app.device.type,
            "progress": self.progress.to_json(),  # without this round
            "report": report_to_json(report),
            "seconds": self.seconds,
            "trackers": trackers.ids,
        }
        try:
            trackers.sync()
            blocks = cast(Any, grid).blocks()
            saved = self.checkpoints.save(report.round, content, from_record(arrays), self.setup.strategy.state, blocks)
            self.kept = report.round
            if hasattr(grid, "saved"):
                grid.saved(saved)
            self.checkpoints.prune(saved)
        except OSError as error:
            text = f"round {report.round}: no checkpoint could be written ({error.strerror or error})"
            if not self.warned:
                log.warning("%s; the run goes on, and the last one before it stays.", text)
            else:
                log.info("%s", text)
            self.warned = True

    def _write_manifest(self, grid: Grid) -> None:
        """Write what ran where; a resumed run adds what goes on where."""
        path = self.folder / "manifest.json"
        manifest = make_manifest(self.setup) | _stated(self.config, self.setup, self.config.rounds)
        manifest["runtime"] = getattr(grid, "described", dict)()
        if self.start is not None:
            before = _read_json(path)
            resumed = before.get("resumed")
            again = {"after_round": self.start.report.round, **manifest}
            manifest = {**(before or manifest), "resumed": [*(resumed if isinstance(resumed, list) else []), again]}
        _write(path, json.dumps(manifest, indent=1))


def _progress(data: FederatedData) -> Progress:
    task = data.task
    return Progress(f"{task.selected_on}/{task.headline}", task.latest_wins, data.unseen)


def _is_finished(folder: Path, rounds: int) -> bool:
    """Whether the results of all rounds are there; they are written after the last checkpoint."""
    found = _read_json(folder / "summary.json")
    return found.get("rounds") == found.get("rounds_done") == rounds


def _read_json(path: Path) -> dict[str, Any]:
    """What a file of ours holds; nothing if it is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        log.info("%s is not read: %s", path, error)
        return {}
    return found if isinstance(found, dict) else {}


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

    totals, task = progress.totals, setup.data.task
    return {
        "strategy": config.strategy["name"],
        "dataset": setup.data.name,
        "partition": partition.name + detail,
        "model": config.model.name,
        "compression": config.compression.name,
        "privacy": config.privacy.name,
        "aggregation": config.aggregation.name,
        **_stated(config, setup, progress.rounds_done),
        "num_clients": setup.data.num_clients,
        "seed": config.seed,
        "rounds": config.rounds,
        "rounds_done": progress.rounds_done,
        "interrupted": progress.rounds_done < config.rounds,
        "error": progress.error,
        "task": task.name,
        "protocol": task.protocol,
        "headline": task.headline,
        "also": list(task.also),
        "spread": task.spread,
        "baselines": list(task.baselines),
        "selected_round": None if progress.best is None else progress.best[0],
        "last_round": None if progress.last is None else progress.last[0],
        "selected": measured(progress.best),
        "last": measured(progress.last),
        **{name: int(totals.get(name, 0)) for name in _COUNTED},
        "seconds": seconds,
        "train_seconds": totals.get("train_seconds", 0.0),
    }


def _stated(config: Config, setup: Setup, rounds: int) -> dict[str, Any]:
    """What the postprocessors say of so many rounds, e.g. the privacy that is spent."""
    trainable = setup.data.num_clients - len(setup.data.unseen)
    sampled = len(sample_clients(config.seed, 1, trainable, config.fraction))
    stated: dict[str, Any] = {}
    for postprocessor in setup.strategy.postprocessors:
        stated.update(postprocessor.summary(rounds, sampled, trainable))
    return stated


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
