"""A run from its beginning or from a checkpoint to its end: rounds, checkpoints, signals, results."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import flwr.app as flower
import torch
import yaml
from flwr.serverapp import Grid
from omegaconf import OmegaConf

from fedpers import __version__
from fedpers.cohort import Tree
from fedpers.data.outline import outline_of
from fedpers.errors import ConfigError, FedpersError
from fedpers.records import from_record, to_record
from fedpers.run.checkpoint import Checkpoint, Checkpoints
from fedpers.run.clock import DeviceClock
from fedpers.run.progress import Progress, report_from_json, report_to_json
from fedpers.run.reopen import FinishedError, check_made, clear_leftovers, locked, reopen, to_type
from fedpers.run.results import (
    make_manifest,
    postprocessor_summary,
    read_json,
    rounds_of_finished,
    stopped_early_by,
    summarize,
    values_of_clients,
    write_clients,
    write_text,
    writing,
)
from fedpers.run.rounds import gradient_budget, metrics_of, run_rounds
from fedpers.run.setup import Setup, client_half, prepare_run
from fedpers.run.signals import Interrupted, StopSignals
from fedpers.runtime.launch import launch
from fedpers.runtime.states import DamagedError, read_states
from fedpers.settings import Config
from fedpers.strategies import CohortApp, RoundReport
from fedpers.tracking import Resumed, Trackers, make_trackers

log = logging.getLogger(__name__)


def run(config: Config, folder: Path, resolved: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run and write the run folder.

    It holds ``config.yaml``, ``manifest.json``, ``rounds.jsonl``, ``clients.parquet``, ``summary.json`` and the last
    checkpoint. On Ctrl-C or SIGTERM the round ends, what is done so far is written, and
    :class:`~fedpers.run.signals.Interrupted` raised; a second signal, or one of a run without checkpoints, stops at
    once.

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
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if (folder / "rounds.jsonl").exists():
            raise FedpersError(f"{folder} holds a run already; choose another folder, or go on with 'fedpers resume'.")
        config = replace(config, model=setup.model)
        plain = dict(resolved) if resolved else asdict(config)
        plain["model"] = {**plain["model"], "name": setup.model.name}
        write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(plain)))
        return _Run(config, folder, plain, setup, began).go()


def resume(folder: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Go on with a run that stopped, in its folder, after its last checkpoint.

    The folder may come from anywhere: nothing in it is executed, and nothing outside of it is written.

    Parameters
    ----------
    folder : Path
    overrides : sequence of str
        ``key=value``, see :func:`fedpers.run.reopen.reopen`.

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
            stopped_by = stopped_early_by(folder)
            changed = stopped_by is not None and any(text.startswith("stop.") for text in overrides)
            rounds_done = rounds_of_finished(folder, rounds)
            if rounds_done is not None and not changed:
                done = f"{folder} has done its {rounds_done} rounds"
                if stopped_by is not None:
                    done = f"{folder} has ended after round {rounds_done} by {stopped_by}"
                    raise FinishedError(f"{done}; 'fedpers resume {folder} {stopped_by}=null' goes on.")
                if read_json(folder / "summary.json").get("ended_by") == "training.budget":
                    raise FinishedError(f"{folder} has ended after round {rounds_done}: training.budget is spent.")
                raise FinishedError(f"{done}; 'fedpers resume {folder} rounds=N' goes on to round N.")
            setup = prepare_run(config)
            check_made(folder, checkpoint, setup)
            progress = progress_of(setup)
            try:
                start = _Start.read(checkpoint, setup.app, opened.tracker_ids(checkpoint))
                progress.restore(checkpoint.content["progress"])
            except DamagedError as error:
                log.warning("%s This checkpoint is not used.", error)
                continue
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                reason = f"{type(error).__name__}: {error}"
                log.warning("%s does not describe a run (%s). This checkpoint is not used.", checkpoint.folder, reason)
                log.debug("%s", checkpoint.folder, exc_info=True)
                continue
            clear_leftovers(folder)
            if opened.typed:
                write_text(folder / "config.yaml", yaml.safe_dump(opened.plain, sort_keys=False))
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
        self.progress = progress_of(setup) if progress is None else progress
        self.checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep)
        self.summary: dict[str, Any] = {}
        self.began = began
        self.saved_round: int | None = None if start is None else start.report.round
        self.saved_best: int | None = None if start is None else self._best_with(start.report)
        self.warned = False

    @property
    def seconds(self) -> float:
        """Of all processes that worked on the run."""
        return time.perf_counter() - self.began + (0.0 if self.start is None else self.start.seconds)

    def go(self) -> dict[str, Any]:
        """Run all rounds and write the results."""
        config, data = self.config, self.setup.data
        sampled = self.setup.strategy.most_sampled(data.num_clients - len(data.unseen))
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
            arrays = to_record(start.arrays)
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
            if start is not None:
                self._write_results()  # a run that is killed from here on is not taken for the finished one it was
            written_early = False

            def stopping_now() -> bool:
                nonlocal written_early
                if signals.received is not None and not written_early:
                    written_early = True
                    self._write_results()  # where clients run may be stopped too, and take this process along
                return signals.received is not None

            cast(Any, grid).stopping = stopping_now
            stopping = False

            ended_by: str | None = None

            def stops(report: RoundReport) -> bool:
                nonlocal ended_by
                ended_by = progress.ends_by(report, metrics_of(report, headline), config.stop)
                return ended_by is not None

            def after_round(report: RoundReport, arrays: flower.ArrayRecord, is_last: bool) -> None:
                nonlocal stopping
                stopping = signals.received is not None and not is_last  # else there is nothing left to do
                signals.round = min(report.round + 1, config.rounds)
                if config.checkpoint.best and progress.is_best(report, metrics_of(report, headline)):
                    self._save(report, arrays, grid, trackers, best=True)
                due = report.round and report.round % config.checkpoint.every == 0
                if due or stopping or is_last:
                    self._save(report, arrays, grid, trackers)

            spent = progress.totals.get("gradients", 0.0) + (0 if start is None else start.report.gradients)
            signals.round = 0 if start is None else start.report.round + 1
            try:
                for report in run_rounds(
                    setup.strategy,
                    grid,
                    arrays,
                    config.rounds,
                    auc=config.auc,
                    timeout=config.runtime.timeout,
                    budget=gradient_budget(config, setup.data),
                    spent=spent,
                    stops=stops if config.stop.is_on else None,
                    clock=None if config.clock.name == "none" else DeviceClock(config.clock, config.seed),
                    last_report=None if start is None else start.report,
                    state=None if start is None else start.state,
                    after_round=after_round if saves else None,
                ):
                    metrics = metrics_of(report, headline)
                    trackers.log(report.round, metrics)
                    progress.take(report, metrics)
                    if stopping:
                        break
                else:
                    all_done = progress.rounds_done == config.rounds
                    progress.ended_by = "rounds" if all_done else ended_by or "training.budget"
            except FedpersError as error:
                if signals.received is None:
                    progress.error = str(error)
                    raise
                log.info("the round under way is lost: %s", error)  # its machines were stopped too
            except Interrupted as stop:
                stop.reason = stop.reason or self._stopped()
                raise
            finally:
                self._write_results()
                trackers.summary(
                    {f"{w}/{k}": v for w in ("selected", "last") for k, v in self.summary[w].items() if v is not None}
                )
                trackers.clients(values_of_clients(progress, headline))
        if signals.received is not None:
            raise Interrupted(signals.received, self._stopped())

    def _write_results(self) -> None:
        """Write the summary and the clients' metrics of all rounds so far."""
        self.summary.update(summarize(self.config, self.setup, self.progress, self.seconds))
        write_clients(self.folder / "clients.parquet", self.setup.data, self.progress)
        write_text(self.folder / "summary.json", json.dumps(self.summary, indent=1))

    def _stopped(self) -> str:
        done = self.progress.rounds_done
        if self.progress.ended_by is not None:
            return f"stopped after the last round, {done}; the run is complete"
        if self.saved_round is None:
            return f"stopped after round {done}; there is no checkpoint"
        typed = "".join(f" {key}={value}" for key, value in to_type(self.plain).items())
        return (
            f"stopped after round {done}; 'fedpers resume {self.folder}{typed}' goes on after round {self.saved_round}"
        )

    def _best_with(self, report: RoundReport) -> int | None:
        """The best round, with one that has not been taken in yet."""
        if self.progress.is_best(report, metrics_of(report, self.setup.data.task.headline)):
            return report.round
        return None if self.progress.best is None else self.progress.best[0]

    def _save(
        self,
        report: RoundReport,
        arrays: flower.ArrayRecord,
        grid: Grid,
        trackers: Trackers,
        *,
        best: bool = False,
    ) -> None:
        """Write a checkpoint, or that of the best round; one that cannot be written is no reason to lose the run."""
        described: dict[str, Any] = getattr(grid, "described", dict)()
        content = {
            "versions": {"fedpers": __version__, "torch": torch.__version__},
            "settings": self.plain,
            "data": self.setup.data.checksum,
            "network": self.setup.network,
            "outline": outline_of(self.setup.data),
            "runtime": {"name": self.config.runtime.name, "clients_at_once": described.get("clients_at_once")},
            "device": self.setup.app.device.type,
            "progress": self.progress.to_json(),  # without this round
            "report": report_to_json(report),
            "seconds": self.seconds,
            "trackers": trackers.ids,
        }
        try:
            trackers.sync()
            blocks = cast(Any, grid).blocks()
            state = self.setup.strategy.state
            saved = self.checkpoints.save(report.round, content, from_record(arrays), state, blocks, best=best)
            if best:  # that of the last checkpoint stays: a run that is killed goes on from there
                self.checkpoints.prune_best({report.round, self.saved_best})
                return
            self.saved_round, self.saved_best = report.round, self._best_with(report)
            if hasattr(grid, "saved"):
                grid.saved(saved)
            self.checkpoints.prune(saved)
            self.checkpoints.prune_best({self.saved_best})
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
        manifest = make_manifest(self.setup) | postprocessor_summary(self.config, self.setup, self.config.rounds)
        manifest["runtime"] = getattr(grid, "described", dict)()
        if self.start is not None:
            before = read_json(path)
            resumed = before.get("resumed")
            continued = {"after_round": self.start.report.round, **manifest}
            manifest = {**(before or manifest), "resumed": [*(resumed if isinstance(resumed, list) else []), continued]}
        write_text(path, json.dumps(manifest, indent=1))


def progress_of(setup: Setup) -> Progress:
    """Of a run that begins: nothing yet."""
    task, data = setup.data.task, setup.data
    first = max(1, data.drift_round)  # before it clients had other samples
    if not any(len(positions) for positions in data.part(task.selected_on)):
        return Progress(None, task.latest_wins, data.unseen, first)
    part = "validation" if task.selected_on == "validation" else setup.strategy.published_selection
    return Progress(f"{part}/{task.headline}", task.latest_wins, data.unseen, first)
