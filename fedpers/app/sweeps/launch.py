"""A sweep as a whole: between Hydra's sweeper, which says what the jobs are, and its launcher, which starts them."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from fedpers.app.result import shown
from fedpers.app.sweeps.display import Display, Shown
from fedpers.app.sweeps.jobs import Outcome, outcome
from fedpers.app.sweeps.names import Naming, as_typed, count_of, quoted, swept, values_of
from fedpers.app.sweeps.plugins import launcher_name
from fedpers.app.sweeps.record import FILE, Job, Record, resume_command, without_place
from fedpers.app.sweeps.tuning import Tuning
from fedpers.errors import ConfigError, FedpersError, reason
from fedpers.evaluation.runs import ERROR_FILE
from fedpers.run.reopen import locked
from fedpers.run.results import write_text, writing
from fedpers.run.signals import Interrupted, StopSignals

log = logging.getLogger(__name__)
_AUTO = "auto"
"""``hydra.sweep.subdir`` that leaves the names of the jobs' folders to us."""


class Sweep(Launcher):
    """Gives to Hydra's launcher those jobs of a sweep that are not done yet, and keeps the sweep's record.

    Parameters
    ----------
    record : Record
        With what was typed; a record that lies in the sweep's folder takes its place.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.folder: Path | None = None
        self._context = ExitStack()
        self._taken: list[Job] = []  # of this command, in order

    def attach(self, launcher: Launcher, config: DictConfig, hydra_context: HydraContext) -> Sweep:
        """Stand before a launcher.

        Parameters
        ----------
        launcher : Launcher
        config : DictConfig
            What Hydra composed for the sweep as a whole.
        hydra_context : HydraContext

        Raises
        ------
        FedpersError
            If the sweep's folder holds another one, or another process works on it.
        """
        for text in as_typed(config.hydra.overrides.hydra):
            if text.startswith("hydra.run.dir="):
                raise ConfigError("hydra.run.dir", text.partition("=")[2], "hydra.sweep.dir, as -m makes a sweep")
        self._launcher, self._config, self._hydra_context = launcher, config, hydra_context
        self._subdir = str(as_typed(config.hydra.sweep)["subdir"])
        self._naming, varied = Naming.of(config), swept(config)
        self._searches = config.hydra.runtime.choices["hydra/sweeper"] != "basic"
        if self._searches:
            logging.getLogger("optuna").setLevel(logging.WARNING)  # it would say that it begins, and each trial's end
        self._tuning = Tuning(self._naming, varied, self.record.tuning_seed) if self.record.tunes else None
        if self._tuning is not None and self._searches:
            raise FedpersError("fedpers tune compares all combinations: hydra/sweeper is for -m.")
        batch = config.hydra.sweeper.get("max_batch_size")
        if self._tuning is not None and batch is not None:
            raise ConfigError(
                "hydra.sweeper.max_batch_size", batch, "null for fedpers tune, which compares all combinations at once"
            )
        total = config.hydra.sweeper.get("n_trials") if self._searches else count_of(varied)
        self._display = Display(total if self._tuning is None else self._tuning.total)
        self.folder = Path(config.hydra.sweep.dir)
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._context.enter_context(locked(self.folder))
        if (self.folder / FILE).exists():
            before = Record.read(self.folder)
            same = (_settings(before), before.tunes) == (_settings(self.record), self.record.tunes)
            if not same or before.tuning_seed != self.record.tuning_seed:
                raise FedpersError(
                    f"{self.folder} holds another sweep ({' '.join(before.arguments)}): choose another folder, or go "
                    f"on with 'fedpers resume {shown(self.folder)}'."
                )
            self.record = replace(before, arguments=self.record.arguments)
        return self

    def setup(self, **parts: Any) -> None:
        """Do nothing: the launcher is set up already."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Do what is not done yet of a batch of jobs; the results of all of them.

        With :attr:`Record.tunes` the batch holds all combinations: those of one seed are done, then those of all seeds
        with the settings that were chosen.
        """
        if self._tuning is None:
            return self._perform([self._job(list(overrides)) for overrides in job_overrides])
        candidates = self._tuning.candidates(job_overrides)
        jobs = [self._job(overrides, "tuning/") for overrides in candidates]
        results = list(self._perform(jobs))
        scores = [self.outcome(job).score for job in jobs]
        self.record.choices = self._tuning.choose(candidates, scores, self.record.choices)
        self._write()
        self._tuning.print_choices(self.record.choices)
        finished = [
            overrides for overrides, job in zip(candidates, jobs, strict=True) if self.outcome(job).state == "done"
        ]
        if unscored := self._tuning.without_choice(finished, self.record.choices):
            raise FedpersError(
                f"fedpers tune chooses by validation, and no run of {', '.join(unscored)} has a validation score: "
                "give split.validation a share above 0, and on ratings a dataset.protocol that selects on validation."
            )
        final = [self._job(overrides, "tuned/") for overrides in self._tuning.final(self.record.choices)]
        self._write()
        for job in final:
            if job.overrides in candidates:
                self._tuning.copy(self._path(jobs[candidates.index(job.overrides)]), self._path(job))
        return [*results, *self._perform(final)]

    def close(self) -> None:
        """End the display and let other processes work on the sweep."""
        self._context.close()

    def outcome(self, job: Job) -> Outcome:
        """Where a job stands."""
        return outcome(self._path(job))

    def _perform(self, jobs: list[Job]) -> list[JobReturn]:
        if not self._taken:
            self._write()
            self._context.enter_context(self._display)
        unique = list({job.folder: job for job in jobs}.values())
        waiting = [job for job in unique if self.outcome(job).state != "done"]
        before = sum(job not in waiting and job not in self._taken for job in unique)
        self._display.skip(before, len(jobs) - len(waiting) - before)
        self._taken += [job for job in unique if job not in self._taken]
        self._write()
        for job in waiting:
            if self._path(job).is_dir():
                with locked(self._path(job)):  # else a process that outlived its sweep is still at it
                    (self._path(job) / ERROR_FILE).unlink(missing_ok=True)
        self._display.watch(self._shown(job) for job in waiting)
        if waiting:
            self._start(waiting)
        self._display.look()
        return [_returned(self.outcome(job)) for job in jobs]

    def _start(self, jobs: list[Job]) -> None:
        """Let the launcher do jobs."""
        assert self.folder is not None
        overrides = [[*job.overrides, f"hydra.sweep.subdir={quoted(job.folder)}"] for job in jobs]
        try:
            with StopSignals(patient=False):
                self._launcher.launch(overrides, initial_job_idx=self.record.jobs.index(jobs[0]))
        except KeyboardInterrupt as stop:
            done = sum(self.outcome(job).state == "done" for job in self._taken)
            of = f" of {self._display.total}" if self._display.total else ""
            text = f"stopped; {done}{of} jobs are done; '{resume_command(shown(self.folder), self.record)}' goes on"
            raise Interrupted(int(getattr(stop, "exit_code", 130)) - 128, text) from stop
        except (FedpersError, HydraException, OmegaConfBaseException):
            raise
        except Exception as error:  # of a launcher: no Slurm on this machine, a process that was killed
            log.info("the launcher gave up:", exc_info=error)
            raise FedpersError(
                f"hydra/launcher={launcher_name(self._config)} gave up ({type(error).__name__}: {reason(error)}); "
                f"'{resume_command(shown(self.folder), self.record)}' goes on with what is not done."
            ) from error

    def _job(self, overrides: list[str], stage: str = "") -> Job:
        """The job with these overrides, a new one if the record has none."""
        settings = without_place(overrides)
        for job in self.record.jobs:
            if without_place(job.overrides) == settings and job.folder.startswith(stage):
                return job
        number = sum(job.folder.startswith(stage) for job in self.record.jobs)
        subfolder = stage + self._subfolder(number, overrides)
        job = Job(subfolder, overrides)
        path = self._path(job)
        if any(other.folder == subfolder for other in self.record.jobs):
            raise ConfigError("hydra.sweep.subdir", self._subdir, "a folder for each job: two have the same")
        if path.is_dir() and any(path.iterdir()):
            raise FedpersError(f"{path} holds a run already; choose another folder.")
        self.record.jobs.append(job)
        return job

    def _subfolder(self, number: int, overrides: list[str]) -> str:
        if self._subdir == _AUTO:
            return self._naming.folder(number, overrides)
        config = self._hydra_context.config_loader.load_sweep_config(self._config, overrides)
        with open_dict(config):
            config.hydra.job.num = config.hydra.job.id = number
        before = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(config)
        try:
            return str(config.hydra.sweep.subdir)
        finally:
            HydraConfig.instance().cfg = before

    def _path(self, job: Job) -> Path:
        """Folder of a job.

        Raises
        ------
        ConfigError
            If it is not below the sweep's.
        """
        assert self.folder is not None
        path, home = self.folder / job.folder, self.folder.resolve()
        if path.resolve() == home or not path.resolve().is_relative_to(home):
            raise ConfigError("hydra.sweep.subdir", job.folder, "a folder below that of the sweep")
        return path

    def _shown(self, job: Job) -> Shown:
        rounds = values_of(job.overrides).get("rounds", "")
        return Shown(
            self._naming.label(job.overrides), self._path(job), int(rounds) if rounds.isdigit() else self._config.rounds
        )

    def _write(self) -> None:
        assert self.folder is not None
        write_text(self.folder / FILE, self.record.text())

    @property
    def has_begun(self) -> bool:
        """Whether there were jobs."""
        return bool(self._taken)

    def has_failed_only(self) -> bool:
        """Whether there were jobs of which none has a score."""
        return self.has_begun and all(self.outcome(job).score is None for job in self._taken)

    def report(self) -> tuple[list[str], list[str]]:
        """Lines on how the sweep ended, the best of a search among them; and on jobs that failed, with reasons."""
        assert self.folder is not None
        ended = {job.folder: self.outcome(job) for job in self._taken}
        done = sum(result.state == "done" for result in ended.values())
        lines = [f"{done} of {len(ended)} jobs done; {shown(self.folder)}"]
        best = self._best(ended) if self._searches else None
        if self._searches and best is None:
            lines.append("no run of the search has a validation score")
        if best is not None:
            settings = self._naming.settings(best.overrides, self._naming.varied)
            score = ended[best.folder].score or 0.0
            lines.append(
                f"best of the search: {settings} (validation {100 * score:.2f} %, {ended[best.folder].text}); "
                f"{shown(self._path(best))}"
            )
        by_reason: dict[str, list[str]] = defaultdict(list)
        for folder, result in ended.items():
            if result.state != "done":
                by_reason[result.text or "it ended without a result, see its run.log"].append(folder)
        failures = []
        if by_reason:
            again = f"'fedpers resume {shown(self.folder)}' tries them again"
            failures.append(f"fedpers: {len(ended) - done} of {len(ended)} jobs failed; {again}:")
        for text, folders in by_reason.items():
            others = f" and {len(folders) - 1} more" if len(folders) > 1 else ""
            failures.append(f"  {folders[0]}{others}: {text.removesuffix('.')}.")
        return lines, failures

    def _best(self, ended: dict[str, Outcome]) -> Job | None:
        scored = [job for job in self._taken if ended[job.folder].score is not None]
        smallest = str(self._config.hydra.sweeper.get("direction")).endswith("minimize")
        sign = -1 if smallest else 1
        return max(scored, key=lambda job: sign * (ended[job.folder].score or 0.0), default=None)

    def exit_code(self) -> int:
        """The worst of the jobs' exit statuses."""
        return max((1 if r.state == "open" else r.exit_code for r in map(self.outcome, self._taken)), default=0)


def _returned(result: Outcome) -> JobReturn:
    """What a sweeper is given for a job."""
    return JobReturn(status=JobStatus.COMPLETED, _return_value=result.score)


def _settings(record: Record) -> list[str]:
    """What was typed, without where."""
    return sorted(text for text in without_place(record.arguments) if text not in ("-m", "--multirun"))
