"""Hydra's plugins, which start the jobs of a sweep or say what they are: which there are and what brings the others."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig

from fedpers.errors import ConfigError, one_of, reason

_PLUGINS = {
    "hydra/launcher": {
        "joblib": ("hydra-joblib-launcher", "hydra_joblib_launcher.joblib_launcher"),
        "submitit_local": ("hydra-submitit-launcher", "hydra_submitit_launcher.submitit_launcher"),
        "submitit_slurm": ("hydra-submitit-launcher", "hydra_submitit_launcher.submitit_launcher"),
        "ray": ("hydra-ray-launcher", "hydra_ray_launcher.ray_launcher"),
        "rq": ("hydra-rq-launcher", "hydra_rq_launcher.rq_launcher"),
    },
    "hydra/sweeper": {
        "optuna": ("hydra-optuna-sweeper", "hydra_optuna_sweeper._impl"),
        "ax": ("hydra-ax-sweeper", "hydra_ax_sweeper.ax_sweeper"),
        "nevergrad": ("hydra-nevergrad-sweeper", "hydra_nevergrad_sweeper.nevergrad_sweeper"),
    },
}
"""Choices that come with packages: the package, and what of it must be importable."""
_EXTRA = ("joblib", "submitit_local", "submitit_slurm", "optuna")
"""Those that come with ``fedpers[sweeps]``."""
OF_SWEEPS = ("hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper", "hydra.sweep")
"""Keys that mean something in a sweep only."""


def check_plugins(arguments: Iterable[str]) -> None:
    """Refuse a launcher or sweeper that is typed as something else than a choice.

    Raises
    ------
    ConfigError
    """
    for text in arguments:
        key, _, value = text.lstrip("+").partition("=")
        group = key.lstrip("~").replace(".", "/")
        if group in _PLUGINS and (key != group or value == "null"):
            raise ConfigError(key, value, f"{group}=NAME, where NAME is one of basic, {', '.join(_PLUGINS[group])}")


def unknown(group: str, name: str, installed: Sequence[str]) -> ConfigError:
    """What to say of a choice of one of Hydra's groups that Hydra does not know.

    Parameters
    ----------
    group : str
        E.g. ``hydra/launcher``.
    name : str
    installed : sequence of str
        Choices that Hydra knows.
    """
    plugins = _PLUGINS.get(group, {})
    if name in plugins:
        return ConfigError(group, name, f"one of {', '.join(sorted(installed))}; {name} {_lacks(group, name)}")
    brought: dict[str, list[str]] = defaultdict(list)
    for absent in sorted(set(plugins) - set(installed)):
        brought[_package(group, absent)].append(absent)
    hints = [f"; pip install {package} brings {', '.join(names)}" for package, names in sorted(brought.items())]
    return ConfigError(group, name, one_of({*plugins, *installed}, name) + "".join(hints))


def setting_of_plugin(key: str, siblings: Sequence[str]) -> str:
    """What is allowed instead of a setting that the launcher or sweeper which was chosen does not have.

    Parameters
    ----------
    key : str
        E.g. ``hydra.launcher.n_jobs``.
    siblings : sequence of str
        Settings that it has.
    """
    group = "/".join(key.split(".")[:2])
    known = one_of(siblings, key.rpartition(".")[2]) if siblings else "none, as it has no settings"
    return f"a setting of the {group} that is chosen, {known}; others have more ({', '.join(_PLUGINS[group])})"


def _package(group: str, name: str) -> str:
    """What to install for a choice."""
    return "'fedpers[sweeps]'" if name in _EXTRA else _PLUGINS[group][name][0]


def _lacks(group: str, name: str) -> str:
    package, module = _PLUGINS[group][name]
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"needs a plugin that is not installed: pip install {_package(group, name)}"
    try:
        importlib.import_module(f"hydra_plugins.{module}")
    except Exception as error:  # whatever a package that does not fit raises
        return f"cannot be used as it is installed ({package} {version}: {reason(error)})"
    return f"is not among what {package} {version} brings"


def not_instantiated(error: Exception, arguments: Iterable[str]) -> ConfigError | None:
    """What to say when Hydra could not make a launcher or a sweeper; None if `error` is about something else."""
    if "Could not instantiate plugin" not in str(error) and not str(error).startswith("Error instantiating"):
        return None
    typed = dict(text.partition("=")[::2] for text in arguments)
    for group, plugins in _PLUGINS.items():
        name = typed.get(group, "")
        if name in plugins and plugins[name][1].partition(".")[0] in str(error):
            return ConfigError(group, name, f"another one: {name} {_lacks(group, name)}")
    return None


def check_single(overrides: Iterable[str]) -> None:
    """Refuse what means something in a sweep only, in a single run.

    Raises
    ------
    ConfigError
    """
    for text in overrides:
        key, _, value = text.lstrip("+~").partition("=")
        if key.startswith(OF_SWEEPS):
            raise ConfigError(key, value, "-m with it, as it is about the jobs of a sweep: without -m there is one run")


def with_search_defaults(arguments: Sequence[str]) -> list[str]:
    """Arguments with what a search by Optuna needs here where they do not say otherwise.

    The score of a run is the larger the better, a trial that fails is no reason to end the search, and the same command
    draws the same trials, so that a search which was stopped goes on.
    """
    arguments = list(arguments)
    keys = {text.lstrip("+").partition("=")[0] for text in arguments}
    if "hydra/sweeper=optuna" not in arguments:
        return arguments
    needed = {"hydra.sweeper.direction": "maximize", "hydra.sweeper.max_failure_rate": "1.0"}
    if "hydra/sweeper/sampler=grid" not in arguments:
        needed["hydra.sweeper.sampler.seed"] = "0"
    return [*arguments, *(f"{key}={value}" for key, value in needed.items() if key not in keys)]


@contextmanager
def launching_through(sweep: Any) -> Iterator[None]:
    """Let `sweep` stand between the sweeper that Hydra makes and the launcher that is chosen.

    A sweeper composes every job before the first one starts, to find mistakes early; here those alone that
    :func:`differing` gives.
    """
    plugins = Plugins.instance()
    make_launcher, make_sweeper = plugins.instantiate_launcher, plugins.instantiate_sweeper

    def instantiate_launcher(**parts: Any) -> Launcher:
        launcher: Launcher = sweep.attach(make_launcher(**parts), parts["config"], parts["hydra_context"])
        return launcher

    def instantiate_sweeper(**parts: Any) -> Sweeper:
        sweeper, loader = make_sweeper(**parts), parts["hydra_context"].config_loader
        check, is_group = sweeper.validate_batch_is_legal, cache(lambda key: bool(loader.get_group_options(key)))
        sweeper.validate_batch_is_legal = lambda batch: check(differing(batch, is_group))  # type: ignore[method-assign]
        return sweeper

    plugins.instantiate_launcher = instantiate_launcher  # type: ignore[method-assign, assignment]
    plugins.instantiate_sweeper = instantiate_sweeper  # type: ignore[method-assign]
    try:
        yield
    finally:
        del plugins.instantiate_launcher, plugins.instantiate_sweeper


def differing(batch: Sequence[Sequence[str]], is_group: Callable[[str], bool]) -> list[Sequence[str]]:
    """Jobs of a sweep of which one may be composed and another not: those alike but for values of plain keys stay out.

    Parameters
    ----------
    batch : sequence of jobs
        The overrides of each.
    is_group : callable
        Whether a key chooses from a group, so that its value decides which keys there are.
    """

    def kind(override: str) -> str:
        key = override.partition("=")[0]
        return override if key.startswith("hydra") or is_group(key.lstrip("+~").partition("@")[0]) else key

    return list({tuple(map(kind, job)): job for job in reversed(batch)}.values())[::-1]


def launcher_name(config: DictConfig) -> str:
    """The launcher that was chosen."""
    return str(config.hydra.runtime.choices["hydra/launcher"])
