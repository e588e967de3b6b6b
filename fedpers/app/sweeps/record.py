"""The record of a sweep, ``sweep.json`` in its folder: what was typed, and which jobs there are with their settings."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedpers.errors import FedpersError

FILE = "sweep.json"
_WHERE = ("output", "hydra.sweep.dir", "hydra/launcher", "hydra.launcher")
"""Keys that say where a sweep lies and how its jobs are started, not what they are."""


@dataclass
class Job:
    """One run of a sweep.

    Parameters
    ----------
    folder : str
        Within the sweep's.
    overrides : list of str
        ``key=value`` that make the job's settings out of the defaults.
    """

    folder: str
    overrides: list[str]


@dataclass
class Choice:
    """What was chosen by a tuning, for one method on one problem.

    Parameters
    ----------
    case : str
        The method, and what else a sweep varies that is not chosen: ``fedper alpha=0.1``.
    overrides : list of str
        The settings that were chosen, without a seed.
    scores : dict
        Validation score of each candidate, None for one that failed.
    """

    case: str
    overrides: list[str]
    scores: dict[str, float | None]


@dataclass
class Record:
    """What ``sweep.json`` holds.

    Parameters
    ----------
    arguments : list of str
        What was typed, without the folder.
    tunes : bool
        Whether settings are chosen first (``fedpers tune``).
    tuning_seed : str or None
        Seed of the runs by which they are, if not the first.
    jobs : list of Job
        In the order in which they were given to the launcher; those of a search as they become known.
    choices : list of Choice
    """

    arguments: list[str]
    tunes: bool = False
    tuning_seed: str | None = None
    jobs: list[Job] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Read the record of a sweep.

        Raises
        ------
        FedpersError
            If it cannot be read as one.
        """
        path = folder / FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            record = cls(
                _texts(content["arguments"]),
                content["tunes"] is True,
                None if content["tuning_seed"] is None else str(int(content["tuning_seed"])),
                [Job(str(job["folder"]), _texts(job["overrides"])) for job in content["jobs"]],
                [
                    Choice(str(one["case"]), _texts(one["overrides"]), {str(k): v for k, v in one["scores"].items()})
                    for one in content["choices"]
                ],
            )
        except OSError as error:
            raise FedpersError(f"{path} cannot be read ({error.strerror or error}).") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FedpersError(f"{path} does not describe a sweep ({type(error).__name__}: {error}).") from error
        return record

    def text(self) -> str:
        """What is written."""
        return json.dumps(asdict(self), indent=1)


def _texts(values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("text was expected in a list")
    return list(values)


_HARMLESS = re.compile(
    r"-m|--multirun|hydra/launcher=(basic|joblib)|hydra\.launcher\.n_jobs=-?\d+|hydra/sweeper=(basic|optuna)|"
    r"hydra/sweeper/sampler=\w+|hydra\.sweep\.subdir=.*|hydra\.mode=MULTIRUN|"
    r"hydra\.sweeper\.(n_trials|n_jobs|max_batch_size|max_failure_rate|direction|sampler\.seed)=[\w.+-]+"
)
"""What of Hydra a record may ask for: how many jobs, in which order, in which processes of this machine."""
_CODE = ("strategy", "dataset", "model")
_PLACES = ("dataset.path", "model.weights", "runtime.address")


def check_arguments(record: Record, typed: Sequence[str], folder: Path) -> None:
    """Refuse what a record, which may be a stranger's, asks for beyond settings, unless it is typed.

    Raises
    ------
    FedpersError
        Names what would run code from elsewhere, let a server in, or start processes by other means.
    """
    needed = to_type_again(record)
    missing = [text for text in needed if text not in typed]
    if missing:
        raise FedpersError(
            f"{missing[0]} in {folder / FILE} may run what somebody else wrote, or somewhere else: it counts only when "
            f"you type it, as in 'fedpers resume {folder} {' '.join(map(_quoted, needed))}'."
        )


def to_type_again(record: Record) -> list[str]:
    """Arguments of a sweep that may run code from elsewhere or somewhere else."""
    given = [text for text in record.arguments if not text.startswith("hydra.sweep.dir=")]  # the folder that is typed
    return [text for text in given if not _is_harmless(text)]


def resume_command(folder: Path, record: Record) -> str:
    """What goes on with a sweep."""
    return " ".join(["fedpers resume", str(folder), *map(_quoted, to_type_again(record))])


def _is_harmless(text: str) -> bool:
    key, _, value = text.lstrip("+~").partition("=")
    key = key.partition("@")[0].removeprefix("hydra.sweeper.params.")
    if text.startswith("-") or key.startswith("hydra"):
        return _HARMLESS.fullmatch(text) is not None
    names_code = ":" in value and (key in _CODE or key in [f"{group}.name" for group in _CODE])
    return not names_code and not key.startswith(_PLACES) and "${" not in value


def _quoted(text: str) -> str:
    return text if re.fullmatch(r"[\w.=/+:,-]+", text) else f"'{text}'"


def without_place(texts: Sequence[str]) -> list[str]:
    """Arguments that say what a sweep or a job is, not where it lies."""
    return [text for text in texts if not is_about_place(text)]


def is_about_place(text: str) -> bool:
    """Whether an argument says where a sweep lies or how its jobs are started."""
    key = text.lstrip("+~").partition("=")[0]
    return key in _WHERE or key.startswith("hydra.launcher.")
