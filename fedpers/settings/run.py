"""The settings of one run as a whole, and where it runs: the groups ``runtime``, ``tracker`` and ``checkpoint``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from fedpers.errors import check
from fedpers.settings.base import Choices, OnlyFor, Settings
from fedpers.settings.dataset import DatasetConfig
from fedpers.settings.heterogeneity import HeterogeneityConfig
from fedpers.settings.model import ModelConfig
from fedpers.settings.partition import PartitionConfig
from fedpers.settings.server import Aggregation, CompressionConfig, PrivacyConfig, ServerOptimizerConfig
from fedpers.settings.split import SplitConfig
from fedpers.settings.training import Training

if TYPE_CHECKING:
    import torch

AutoCount = Annotated[int, Field(ge=1)] | Literal["auto"]
"""A number of clients, threads or actors, or ``auto``."""


@dataclass(kw_only=True)
class RuntimeConfig(Settings, group="runtime"):
    """Where clients run (the group ``runtime``)."""

    name: Annotated[
        str,
        Choices(
            local="in this process",
            ray="on the actors of a Ray cluster",
            flower="Flower's own simulation engine: one client at a time in each actor",
        ),
    ] = "local"
    clients_at_once: Annotated[
        AutoCount,
        Field(description="clients computed as one stacked computation; auto measures"),
        OnlyFor("local", "ray"),
    ] = "auto"
    workers: Annotated[
        AutoCount, Field(description="threads; auto measures; never changes a result"), OnlyFor("local")
    ] = "auto"
    device: Annotated[
        str,
        Field(description="auto (a GPU where there is one), cpu, cuda or cuda:i"),
        OnlyFor("local", "flower"),
    ] = "auto"
    state_memory: Annotated[
        Annotated[float, Field(ge=0)] | Literal["auto"],
        Field(
            title="gigabytes >= 0, or auto",
            description="gigabytes of personal state in memory, the rest lies in memory-mapped files; auto: half of it",
        ),
        OnlyFor("local", "ray"),
    ] = "auto"
    timeout: Annotated[
        float | None,
        Field(
            gt=0,
            title="seconds > 0, or null",
            description="seconds to wait for clients' replies; null: as long as they take. What is computed in this "
            "process is not cut short",
        ),
    ] = None
    address: Annotated[
        str | None,
        Field(description="of a running cluster; null: RAY_ADDRESS, or else Ray is started on this machine"),
        OnlyFor("ray"),
    ] = None
    actors: Annotated[AutoCount, Field(description="auto: as many as the cluster has room for"), OnlyFor("ray")] = (
        "auto"
    )
    cpus_per_actor: Annotated[float, Field(ge=0), OnlyFor("ray", "flower")] = 1.0
    gpus_per_actor: Annotated[
        float, Field(ge=0, description="may be a share; without, clients compute on the CPU"), OnlyFor("ray", "flower")
    ] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        some = self.cpus_per_actor + self.gpus_per_actor > 0
        check(some, "runtime.cpus_per_actor", self.cpus_per_actor, "a number > 0 for actors without a GPU")

    def torch_device(self) -> torch.device:
        """Return the device meant.

        Raises
        ------
        ConfigError
            If there is no such device.
        """
        import torch

        count = torch.cuda.device_count()
        if self.device == "auto":
            return torch.device("cuda:0" if count else "cpu")
        kind, _, number = self.device.partition(":")
        known = kind in ("cpu", "cuda") and (not number or (kind == "cuda" and number.isdigit()))
        check(known, "runtime.device", self.device, "auto, cpu, cuda or cuda:i")
        if kind == "cuda":
            available = f"one of cuda:0 to cuda:{count - 1}" if count else "auto or cpu: torch finds no GPU here"
            check(int(number or 0) < count, "runtime.device", self.device, available)
        return torch.device(self.device)


@dataclass(kw_only=True)
class CheckpointConfig(Settings, group="checkpoint"):
    """When all state of a run is written (:mod:`fedpers.run.checkpoint`), beside its end and a signal that stops it."""

    every: Annotated[int, Field(ge=0, description="rounds between checkpoints; 0 writes none at all")] = 10
    keep: Annotated[int, Field(ge=1, description="the last so many are kept")] = 1
    best: Annotated[
        bool, Field(description="also keep the state of the best round so far, written whenever a round is better")
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.every > 0 or not self.best, "checkpoint.best", self.best, "false with checkpoint.every=0")


@dataclass(kw_only=True)
class StopConfig(Settings, group="stop"):
    """When a run ends before its last round, by the score that rounds are selected by: validation, where there is any.

    Rounds are counted where clients are measured (``evaluate_every``), from the first that may be selected.
    """

    patience: Annotated[
        int | None,
        Field(ge=1, title="a whole number >= 1, or null", description="evaluations without a better score"),
    ] = None
    target: Annotated[
        float | None,
        Field(le=1, title="a number <= 1, or null", description="score that is enough, e.g. an accuracy of 0.9"),
    ] = None

    @property
    def is_on(self) -> bool:
        """Whether there is such a round."""
        return self.patience is not None or self.target is not None


@dataclass
class WandbConfig(Settings, group="tracker.wandb"):
    """Settings of the Weights & Biases tracker."""

    project: str = "fedpers"
    name: Annotated[str | None, Field(description="null: the run's own name")] = None
    group: Annotated[str | None, Field(description="null: one for all runs of a sweep, none for a single run")] = None
    mode: Annotated[
        Literal["auto", "online", "offline"],
        Field(description="auto: as WANDB_MODE says, else offline where there is no login"),
    ] = "auto"


@dataclass
class TensorBoardConfig(Settings, group="tracker.tensorboard"):
    """Settings of the TensorBoard tracker."""

    flush_secs: Annotated[int, Field(ge=1, description="seconds after which events are on disk at the latest")] = 10


@dataclass
class TrackerConfig(Settings, group="tracker"):
    """Which trackers a run has besides ``rounds.jsonl`` and the progress bar; None is off."""

    wandb: WandbConfig | None = None
    tensorboard: TensorBoardConfig | None = None


@dataclass(kw_only=True)
class RoundsConfig(Settings):
    """What every method's server half is told of a run."""

    fraction: Annotated[float, Field(gt=0, le=1, description="share of the clients that train in a round")] = 1.0
    seed: Annotated[int, Field(ge=0, description="all randomness follows from it")] = 0
    evaluate_every: Annotated[
        int, Field(ge=1, description="rounds between evaluations of all clients; the last one is always evaluated")
    ] = 1
    min_replies: Annotated[int, Field(ge=1, description="usable replies a round needs")] = 1


@dataclass(kw_only=True)
class ClockConfig(Settings, group="clock"):
    """Time that training would take on the clients' own devices (the group ``clock``), see :mod:`fedpers.run.clock`."""

    name: Annotated[
        str,
        Choices(
            none="only the time that this computation takes is told",
            devices="also the time on clients' own devices and links: the slowest client ends a round",
        ),
    ] = "none"
    samples_per_second: Annotated[
        float, Field(gt=0, description="gradients of samples that a client computes, at the median"), OnlyFor("devices")
    ] = 100.0
    download: Annotated[
        float, Field(gt=0, description="megabits a second from the server, at the median"), OnlyFor("devices")
    ] = 20.0
    upload: Annotated[
        float, Field(gt=0, description="megabits a second to the server, at the median"), OnlyFor("devices")
    ] = 5.0
    spread: Annotated[
        float,
        Field(ge=0, description="standard deviation over clients of the logarithm of each speed; 0: all alike"),
        OnlyFor("devices"),
    ] = 0.5


@dataclass(kw_only=True)
class Config(RoundsConfig):
    """All settings of one run, as composed from ``conf/``.

    Parameters
    ----------
    strategy : mapping
        ``name`` and the method's own settings (:func:`fedpers.strategies.default_options`).
    """

    rounds: Annotated[int, Field(ge=1, description="of training")] = 50
    auc: Annotated[
        bool, Field(description="also measure each client's area under the ROC curve (one against the rest)")
    ] = False
    output: Annotated[str, Field(min_length=1, title="a folder", description="run folders go below it")] = "runs"
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    training: Training = field(default_factory=Training)
    strategy: Mapping[str, Any] = field(default_factory=lambda: {"name": "fedavg"})
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    heterogeneity: HeterogeneityConfig = field(default_factory=HeterogeneityConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    aggregation: Aggregation = field(default_factory=Aggregation)
    server_optimizer: ServerOptimizerConfig = field(default_factory=ServerOptimizerConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    clock: ClockConfig = field(default_factory=ClockConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        key = "training.epochs" if self.training.steps is None else "training.steps"
        budget = self.training.epochs if self.training.steps is None else self.training.steps
        check(budget >= 1, key, budget, "a whole number >= 1")
        check("name" in self.strategy, "strategy", dict(self.strategy), "a mapping with a name")
