"""Runs read from their folders, and what must be equal for two of them to be compared."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from fedpers.settings.base import choices
from fedpers.settings.dataset import OWN_FILES
from fedpers.settings.groups import GROUPS, choice_values
from fedpers.settings.training import Training

logger = logging.getLogger(__name__)

IGNORED = frozenset(
    {
        "strategy", "server_optimizer", "training", "seed", "runtime", "tracker", "output", "hydra", "checkpoint",
        "auc", "min_replies",
    }
)  # fmt: skip
"""Top-level config keys in which comparable runs may differ, besides where a data set is found: methods and seeds are
what is compared, the others cannot change a number."""

ERROR_FILE = "error.json"
"""Why a job of a sweep failed, in its folder."""

DEFAULT_CHOICES = {"aggregation": "mean", "privacy": "none", "compression": "none", "clock": "none"}
"""What a run without these settings has; any other stands in a table of its own."""

_NO_SHIFTS = ("none", None, "name", "strength", "groups")
"""Values of ``heterogeneity.name`` and keys below ``heterogeneity`` that name no shift."""

_LATER_OPTIONS = {"personal_layers": None, "finetune_epochs": 0}
"""Options of any method that older runs did not write, with the values that they had."""


@dataclass(frozen=True)
class RunRecord:
    """One finished (or interrupted) run.

    Parameters
    ----------
    folder : Path
        The run folder.
    config : dict
        Its resolved ``config.yaml``.
    summary : dict
        Its ``summary.json``.
    finished : float
        When the summary was written, seconds since the epoch.
    """

    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    finished: float = 0.0

    @property
    def strategy(self) -> str:
        """Name of the strategy."""
        return str(self.summary["strategy"])

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.summary["seed"])

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The config, nested keys joined by dots."""
        return _flatten(self.config)

    @cached_property
    def options(self) -> dict[str, Any]:
        """Options of the strategy and a server optimizer, nested keys joined by dots."""
        strategy = self.config.get("strategy")
        written = _flatten(strategy) if isinstance(strategy, Mapping) else {}
        flat = {**_LATER_OPTIONS, **written}
        return {key: value for key, value in flat.items() if key != "name"} | {"server_optimizer": self._server()}

    def _server(self) -> str:
        """Server optimizer, with those of its settings that are not the defaults: ``adam lr=0.1``."""
        settings = {"name": "none", **self.config.get("server_optimizer", {})}
        defaults = choice_values("server_optimizer", settings["name"])
        changed = [f"{key}={settings[key]}" for key in defaults if settings.get(key, defaults[key]) != defaults[key]]
        return " ".join([settings["name"], *changed])

    @cached_property
    def training(self) -> dict[str, Any]:
        """Settings of local training, which a study may tune for each method; those not written are the defaults."""
        training = self.config.get("training")
        written = _flatten(training) if isinstance(training, Mapping) else {}
        return {key: value for key, value in {**_usual_training(), **written}.items() if value is not None}

    @cached_property
    def comparable(self) -> dict[str, Any]:
        """What must be equal for two runs to stand in one table, nested keys joined by dots."""
        considered = {key: value for key, value in self.config.items() if key not in IGNORED}
        flat = _flatten({key: _in_effect(key, value) for key, value in considered.items()})
        flat.pop("dataset.download", None)
        if flat.get("dataset.name") not in ("ratings", *OWN_FILES):  # there the path says what the data are
            flat.pop("dataset.root", None)
        for key, usual in DEFAULT_CHOICES.items():
            if flat.get(f"{key}.name", usual) == usual:  # nothing else of it matters then
                flat = {name: value for name, value in flat.items() if not name.startswith(f"{key}.")}
        flat = {name: value for name, value in flat.items() if value is not None}  # as in runs of before it was there
        protocol = str(self.summary.get("protocol", "validation-selected"))
        return flat | {"protocol": protocol.partition(":")[0]}

    @cached_property
    def data_checksum(self) -> str | None:
        """Digest of the data its manifest names; None where there is none to compare."""
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
            return str(manifest["data"]["checksum"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def shifts(self) -> list[str]:
        """Names of what makes clients differ beyond the partition."""
        below = (key.split(".")[1] for key in self.comparable if key.startswith("heterogeneity."))
        names = dict.fromkeys([self.comparable.get("heterogeneity.name"), *below])
        return [str(name) for name in names if name not in _NO_SHIFTS]

    @property
    def selected_on(self) -> str:
        """Part on which the selected round was chosen, ``validation`` or ``test``."""
        usual = "validation" if self.comparable["protocol"] == "validation-selected" else "test"
        return str(self.summary.get("selected_on", usual))

    def metric(self, name: str, round: str = "selected") -> float:
        """One metric at the ``"selected"`` or ``"last"`` round; NaN when it was not measured."""
        return number(self.summary[round].get(name))


def find_runs(paths: Iterable[str | os.PathLike[str]]) -> list[RunRecord]:
    """Read all runs at or below the given folders, sorted by folder.

    A folder that cannot be used (it does not exist, its run has no summary yet, a file of it is damaged) is
    named in a logged warning and left out.
    """
    folders: dict[Path, Path] = {}
    marks = {"summary.json", "manifest.json", ERROR_FILE}
    for path in paths:
        if not Path(path).is_dir():
            logger.warning("%s is not a folder and is left out.", path)
        for name, subfolders, files in os.walk(path):
            if not marks.isdisjoint(files):
                folders.setdefault(Path(name).resolve(), Path(name))
                subfolders.clear()  # trackers keep files of the same names inside a run folder
            else:
                subfolders[:] = sorted(sub for sub in subfolders if sub != ".hydra")
    records = []
    for _, folder in sorted(folders.items()):
        try:
            records.append(_read(folder))
        except Exception as error:  # whatever is wrong with one folder must not hide the others
            logger.warning("%s is left out: %s", folder, error)
    return records


def _read(folder: Path) -> RunRecord:
    path = folder / "summary.json"
    failure = _failure(folder)
    if failure and not path.exists():
        raise FileNotFoundError(f"its run failed: {failure}.")
    if not path.exists():
        remedy = f", after which 'fedpers resume {folder}' goes on" if (folder / "checkpoints").is_dir() else ""
        raise FileNotFoundError(f"it has no summary.json; the run is going on or was killed{remedy}.")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"its summary.json is damaged ({error}).") from error
    try:
        config = _load_config(folder / "config.yaml")
    except Exception as error:
        raise ValueError(f"its config.yaml is missing or damaged ({' '.join(str(error).split())}).") from error
    if not isinstance(config, dict) or not isinstance(summary, dict):
        raise ValueError("its config.yaml or summary.json does not hold named values.")
    missing = [key for key in ("strategy", "seed", "selected", "last") if summary.get(key) is None]
    if missing:
        raise ValueError(f"its summary.json lacks {', '.join(missing)}.")
    if not (isinstance(summary["selected"], dict) and isinstance(summary["last"], dict)):
        raise ValueError("its summary.json does not hold metrics by name under selected and last.")
    try:
        int(summary["seed"])
        for value in (*summary["selected"].values(), *summary["last"].values()):
            number(value)
        for key in (
            "bytes_up",
            "bytes_down",
            "gradients",
            "seconds",
            "simulated_seconds",
            "failures",
            "privacy_epsilon",
            "privacy_delta",
        ):
            number(summary.get(key))
    except (TypeError, ValueError) as error:
        raise ValueError(f"its summary.json holds something else where a number belongs ({error}).") from error
    if failure:
        summary["error"] = failure
    return RunRecord(folder, {str(k): v for k, v in config.items()}, summary, path.stat().st_mtime)


def _failure(folder: Path) -> str:
    """Why a job of a sweep failed; nothing if it did not, or nobody can say."""
    try:
        return str(json.loads((folder / ERROR_FILE).read_text(encoding="utf-8"))["error"]).removesuffix(".")
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _load_config(path: Path) -> Any:
    """Values of a config, read as OmegaConf does; by itself that takes 16 ms, which 10,000 runs would wait for."""
    import yaml

    text = path.read_text(encoding="utf-8")
    if "${" in text or not hasattr(yaml, "CSafeLoader"):
        from omegaconf import OmegaConf

        return OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    return yaml.load(text, _yaml_loader())


@cache
def _yaml_loader() -> Any:
    import yaml

    loader: Any = type("ConfigLoader", (yaml.CSafeLoader,), {})
    loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.CSafeLoader.yaml_implicit_resolvers.items()
    }
    loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))
    loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d*\.\d*[eE]\d+$"), list("-+0123456789."))
    return loader


def differing(settings: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[str]:
    """``key=value`` of `settings` for every key in which `others` have another value somewhere."""
    return assignments(settings, varying([settings, *others]))


def varying(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys in which not all have the same value."""
    first = settings[0]
    keys = set().union(*settings)
    return sorted(key for key in keys if any(other.get(key) != first.get(key) for other in settings))


def usual_values(settings: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What most of a method's settings have in common, by key, as text: their names need not say it.

    Empty where a single key varies, or all combinations of the values are there, as in a grid.
    """
    counts = {key: Counter(str(one.get(key)) for one in settings) for key in varying(settings)}
    present = {tuple(str(one.get(key)) for key in counts) for one in settings}
    if len(counts) < 2 or len(present) == math.prod(map(len, counts.values())):
        return {}
    return {key: max(count, key=lambda value: (count[value], value)) for key, count in counts.items()}


def assignments(settings: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """``key=value`` for each of the keys."""
    return [f"{key}={settings.get(key)}" for key in keys]


def _in_effect(group: str, settings: Any) -> Any:
    """Settings of a group without those that the chosen one does not read, and with defaults of those not written."""
    name = settings.get("name") if isinstance(settings, Mapping) else None
    defaults = _defaults(group, str(name))
    if defaults is None:
        return settings
    return {"name": name, **defaults, **{key: value for key, value in settings.items() if key in defaults}}


@cache
def _usual_training() -> Mapping[str, Any]:
    return asdict(Training())


@cache
def _defaults(group: str, name: str) -> Mapping[str, Any] | None:
    """Default values of a choice; None if there is no such choice."""
    return choice_values(group, name) if group in GROUPS and name in choices(GROUPS[group]) else None


def settings_key(settings: Any) -> str:
    """JSON text that is the same for equal settings, also where one has ``1`` and the other ``1.0``."""
    return json.dumps(_whole_numbers_as_ints(settings), sort_keys=True, default=str)


def _whole_numbers_as_ints(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _whole_numbers_as_ints(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_whole_numbers_as_ints(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def number(value: Any) -> float:
    """A number of a summary; NaN for null."""
    return math.nan if value is None else float(value)
