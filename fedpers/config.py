"""The typed settings of a run, and how they are made from composed configuration."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import torch

from fedpers.cohort import Training
from fedpers.data import DatasetConfig, HeterogeneityConfig, PartitionConfig, SplitConfig
from fedpers.errors import ConfigError, check, one_of
from fedpers.models import ModelConfig
from fedpers.server.postprocessors import Aggregation, CompressionConfig, Postprocessor, Privacy
from fedpers.tracking import TrackerConfig

T = TypeVar("T")
RUNTIMES = ("local", "ray", "flower")


@dataclass(kw_only=True)
class RuntimeConfig:
    """Where clients run.

    Parameters
    ----------
    name : {"local", "ray", "flower"}
        ``flower`` is Flower's own simulation engine, see :class:`fedpers.runtime.flower.FlowerSimulation`.
    cohort, workers : int or "auto"
        See :class:`fedpers.runtime.local.LocalGrid`.
    device : str
        ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:i``.
    state_memory : float or "auto"
        Gigabytes of memory that personal state may take, >= 0; more of it lies in memory-mapped files. ``auto`` is half
        of the memory of the machine or the GPU.
    timeout : float, optional
        Seconds to wait for the clients' replies, > 0; None waits for as long as they take.
    address, actors, cpus_per_actor, gpus_per_actor
        See :class:`fedpers.runtime.ray.RayGrid`; of these, ``flower`` knows the last two.
    """

    name: str = "local"
    cohort: int | str = "auto"
    workers: int | str = "auto"
    device: str = "auto"
    state_memory: float | str = "auto"
    timeout: float | None = None
    address: str | None = None
    actors: int | str = "auto"
    cpus_per_actor: float = 1.0
    gpus_per_actor: float = 0.0

    def __post_init__(self) -> None:
        enough = self.state_memory == "auto" or (not isinstance(self.state_memory, str) and self.state_memory >= 0)
        check(enough, "runtime.state_memory", self.state_memory, "gigabytes >= 0, or auto")
        check(self.timeout is None or self.timeout > 0, "runtime.timeout", self.timeout, "seconds > 0, or null")
        check(self.name in RUNTIMES, "runtime", self.name, one_of(RUNTIMES, self.name))
        for key, value in (("runtime.cohort", self.cohort), ("runtime.workers", self.workers)):
            good = value == "auto" or (isinstance(value, int) and value >= 1)
            check(good, key, value, "a whole number >= 1, or auto")
        good = self.actors == "auto" or (isinstance(self.actors, int) and self.actors >= 1)
        check(good, "runtime.actors", self.actors, "a whole number >= 1, or auto")
        check(self.cpus_per_actor >= 0, "runtime.cpus_per_actor", self.cpus_per_actor, "a number >= 0")
        check(self.gpus_per_actor >= 0, "runtime.gpus_per_actor", self.gpus_per_actor, "a number >= 0")
        some = self.cpus_per_actor + self.gpus_per_actor > 0
        check(some, "runtime.cpus_per_actor", self.cpus_per_actor, "a number > 0 for actors without a GPU")
        self.torch_device()

    def torch_device(self) -> torch.device:
        """Return the device meant.

        Raises
        ------
        ConfigError
            If there is no such device here.
        """
        count = torch.cuda.device_count()
        if self.device == "auto":
            return torch.device("cuda:0" if count else "cpu")
        kind, _, number = self.device.partition(":")
        known = kind in ("cpu", "cuda") and (not number or (kind == "cuda" and number.isdigit()))
        check(known, "runtime.device", self.device, "auto, cpu, cuda or cuda:i")
        if kind == "cuda":
            here = f"one of cuda:0 to cuda:{count - 1}" if count else "auto or cpu: torch finds no GPU here"
            check(int(number or 0) < count, "runtime.device", self.device, here)
        return torch.device(self.device)


@dataclass(kw_only=True)
class CheckpointConfig:
    """When all state of a run is written, see :mod:`fedpers.checkpoint`.

    Parameters
    ----------
    every : int
        Rounds between checkpoints, >= 0; one more is written at the end of a run and when a signal stops it. 0 writes
        none at all.
    keep : int
        The last so many are kept, >= 1.
    """

    every: int = 10
    keep: int = 1

    def __post_init__(self) -> None:
        check(self.every >= 0, "checkpoint.every", self.every, "a whole number >= 0")
        check(self.keep >= 1, "checkpoint.keep", self.keep, "a whole number >= 1")


@dataclass(kw_only=True)
class Config:
    """All settings of one run, as composed from ``conf/``.

    Parameters
    ----------
    strategy : mapping
        ``name`` and the method's own settings (:func:`fedpers.strategies.options_of`).
    dataset, partition, split, heterogeneity, model, training, compression, privacy, aggregation
        See their classes.
    runtime, tracker, checkpoint
        See their classes.
    rounds : int
        >= 1.
    fraction : float
        Share of clients that train in a round, in (0, 1].
    seed : int
        >= 0; all randomness follows from it.
    evaluate_every : int
        Rounds between evaluations of all clients, >= 1; the last round is always evaluated.
    min_replies : int
        Usable replies a round needs, >= 1.
    auc : bool
        Also measure the area under the ROC curve (one against the rest, micro-averaged) of each client.
    output : str
        Folder under which run folders are made.
    """

    strategy: Mapping[str, Any] = field(default_factory=lambda: {"name": "fedavg"})
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    heterogeneity: HeterogeneityConfig = field(default_factory=HeterogeneityConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: Training = field(default_factory=Training)
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    privacy: Privacy = field(default_factory=lambda: Privacy(name="none"))
    aggregation: Aggregation = field(default_factory=Aggregation)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    rounds: int = 50
    fraction: float = 1.0
    seed: int = 0
    evaluate_every: int = 1
    min_replies: int = 1
    auc: bool = False
    output: str = "runs"

    def __post_init__(self) -> None:
        budget = self.training.steps if self.training.steps is not None else self.training.epochs
        key = "training.epochs" if self.training.steps is None else "training.steps"
        check(budget >= 1, key, budget, "a whole number >= 1")
        check(self.rounds >= 1, "rounds", self.rounds, "a whole number >= 1")
        check(0 < self.fraction <= 1, "fraction", self.fraction, "a number > 0 and <= 1")
        check(self.seed >= 0, "seed", self.seed, "a whole number >= 0")
        check(self.evaluate_every >= 1, "evaluate_every", self.evaluate_every, "a whole number >= 1")
        check(self.min_replies >= 1, "min_replies", self.min_replies, "a whole number >= 1")
        check("name" in self.strategy, "strategy", dict(self.strategy), "a mapping with a name")


def postprocessors(config: Config) -> tuple[Postprocessor, ...]:
    """What a run does around the mean, in its order; made anew, for they have state."""
    privacy = None if config.privacy.name == "none" else replace(config.privacy)
    chosen = (config.compression.postprocessor(), privacy, config.aggregation.postprocessor())
    return tuple(postprocessor for postprocessor in chosen if postprocessor is not None)


def conf_folder() -> Path:
    """Folder of the configuration groups: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "conf"


def build(kind: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Make a settings dataclass from plain values, checking names and types on the way.

    Parameters
    ----------
    kind : type
        A dataclass; its field types say what is allowed, its ``__post_init__`` the ranges.
    values : mapping
        By field name; nested dataclasses as mappings.
    prefix : str
        Key of the whole, for messages: ``"partition"``.

    Raises
    ------
    ConfigError
        If a name is unknown or a value has the wrong type or range.
    """
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    arguments = {}
    for name, value in values.items():
        key = f"{prefix}.{name}" if prefix else name
        if name not in known:
            raise ConfigError(key, value, f"a known key: {one_of(known, name)}")
        arguments[name] = convert(key, value, hints[name])
    for name, f in known.items():
        if name not in arguments and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"{prefix}.{name}" if prefix else name, None, "a value")
    return kind(**arguments)


def convert(key: str, value: Any, hint: Any) -> Any:
    """Return `value` as the type `hint`, or raise :class:`ConfigError` for `key`."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if is_dataclass(option) and isinstance(option, type) and isinstance(value, Mapping):
            return build(option, value, key)
    for option in options:
        if _fits(value, option):
            return _as(value, option)
    raise ConfigError(key, value, " or ".join(_named(option) for option in options))


def _fits(value: Any, option: Any) -> bool:
    origin = get_origin(option) or option
    if origin is Any:
        return True
    if origin is bool:
        return isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    if origin is str:
        return isinstance(value, str)
    if origin in (tuple, list, Sequence):
        inner = [a for a in get_args(option) if a is not Ellipsis]
        plain = isinstance(value, Sequence) and not isinstance(value, str)
        return plain and all(_fits(v, inner[min(i, len(inner) - 1)]) for i, v in enumerate(value))
    return origin in (dict, Mapping) and isinstance(value, Mapping)


def _as(value: Any, option: Any) -> Any:
    origin = get_origin(option) or option
    if origin is float:
        return float(value)
    return tuple(value) if origin is tuple else value


def _named(option: Any) -> str:
    origin = get_origin(option) or option
    if origin is type(None):
        return "null"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if origin in names:
        return names[origin]
    return "a list" if origin in (tuple, list, Sequence) else "a mapping of keys to values"
