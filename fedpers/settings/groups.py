"""The groups of which a run chooses by name, as in ``partition=dirichlet``, and the choices there are."""

from __future__ import annotations

import ast
import functools
import pkgutil
from pathlib import Path
from typing import Any

from fedpers.settings.base import Settings, choice_options, choices, options, plain
from fedpers.settings.dataset import DatasetConfig
from fedpers.settings.heterogeneity import HeterogeneityConfig
from fedpers.settings.model import ModelConfig
from fedpers.settings.partition import PartitionConfig
from fedpers.settings.run import ClockConfig, RuntimeConfig, TensorBoardConfig, WandbConfig
from fedpers.settings.server import Aggregation, CompressionConfig, PrivacyConfig, ServerOptimizerConfig
from fedpers.settings.split import SplitConfig

GROUPS: dict[str, type[Settings]] = {
    "dataset": DatasetConfig,
    "partition": PartitionConfig,
    "split": SplitConfig,
    "heterogeneity": HeterogeneityConfig,
    "model": ModelConfig,
    "compression": CompressionConfig,
    "privacy": PrivacyConfig,
    "aggregation": Aggregation,
    "server_optimizer": ServerOptimizerConfig,
    "runtime": RuntimeConfig,
    "clock": ClockConfig,
}
"""Groups with one choice in a run."""
TRACKERS: dict[str, type[Settings]] = {"wandb": WandbConfig, "tensorboard": TensorBoardConfig}
"""Choices of ``tracker``, beside ``none``; a run may have several."""
_NO_METHODS = ("base", "registry")
"""Files beside those of methods."""
_PACKAGE = Path(__file__).parent.parent


def conf_folder() -> Path:
    """Folder of the yaml files: inside an installed package, or beside it in a checkout."""
    inside = _PACKAGE / "conf"
    return inside if inside.is_dir() else _PACKAGE.parent / "conf"


def method_names() -> list[str]:
    """Names of all methods: those of their files."""
    return [file.name for file in pkgutil.iter_modules([str(_PACKAGE / "strategies")]) if file.name not in _NO_METHODS]


def method_file(name: str) -> Path:
    """The file of a method."""
    return _PACKAGE / "strategies" / f"{name}.py"


@functools.cache
def method_title(name: str) -> str:
    """Name of a method as papers write it, with which its file begins; of one's own, ``module:Class``, the class."""
    if name not in method_names():
        return name.rpartition(":")[2]
    return method_docstring(name).partition("\n")[0].partition(":")[0].partition(" (")[0].strip()


def method_docstring(name: str) -> str:
    """What a method's file begins with; the file is read, not imported."""
    return ast.get_docstring(ast.parse(method_file(name).read_text(encoding="utf-8"))) or ""


def group_names(group: str) -> list[str]:
    """What may be chosen in a group, in files of ``conf/`` too; nothing if there is no such group."""
    names = {path.stem for path in (conf_folder() / group).glob("*.yaml")}
    if group == "strategy":
        names.update(method_names())
    elif group == "tracker":
        names.update(("none", *TRACKERS))
    elif group in GROUPS:
        names.update(choices(GROUPS[group]))
    return sorted(names)


def choice_values(group: str, name: str) -> dict[str, Any]:
    """Default values of one choice, as plain values.

    Parameters
    ----------
    group : str
        A key of :data:`GROUPS`, or ``tracker``.
    name : str
    """
    if group == "tracker":
        kind = TRACKERS.get(name)
        return {} if kind is None else {name: {key: plain(option.default) for key, option in options(kind).items()}}
    return {key: plain(option.default) for key, option in choice_options(GROUPS[group], name).items()}
