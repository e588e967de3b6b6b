"""Settings composed by Hydra from ``conf/`` and the options' own defaults, and its errors as one sentence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedpers.app.keys import SERVER_OPTIMIZERS, check_choices, meant, with_open_keys
from fedpers.app.sweeps.plugins import setting_of_plugin, unknown
from fedpers.errors import ConfigError, FedpersError, one_of
from fedpers.settings import Config, build
from fedpers.settings.base import CUSTOM, choices, options, plain
from fedpers.settings.groups import GROUPS, TRACKERS, choice_values, conf_folder, group_names, method_names
from fedpers.strategies.registry import default_options

_CHOSEN = (*GROUPS, "strategy", "tracker")
"""Fields of a run's settings that are chosen by name."""
_DEFAULT_METHOD = "fedavg"
_KINDS = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
"""What Hydra's own options may be, by the names that it gives their types."""
# ``conf/config.yaml`` names folders by it: not every file system takes the colon of ``module:Name``
OmegaConf.register_new_resolver("file_name", lambda name: str(name).replace(":", "."), replace=True)


def register_choices(overrides: Sequence[str] = ()) -> None:
    """Give Hydra every choice that may be meant with its default values, as plain values.

    A choice is known to Hydra as ``GROUP/NAME``; one for which ``conf/`` has a file as ``options/GROUP/NAME``, for that
    file's own list of defaults. All other settings are ``settings``.

    Parameters
    ----------
    overrides : sequence of str
        What was typed. Of methods those are registered whose names are typed, ``module:Class`` too, and the default;
        all of them where a preset, a sweeper or a configuration of one's own may choose.

    Raises
    ------
    ConfigError
        If a typed ``module:Class`` cannot be imported.
    """
    _register_groups()
    typed = [text.lstrip("+").partition("=")[::2] for text in overrides]
    names = [name for key, value in typed if key == "strategy" for name in value.split(",")]
    by_name = all(not key.startswith(("experiment", "hydra", "-")) or key in ("-m", "--multirun") for key, _ in typed)
    if not by_name or not all(re.fullmatch(r"[\w:.]+", name) for name in names):
        names = [*names, *method_names()]
    for key, value in typed:
        for name in value.split(",") if key in ("dataset", "model") else ():
            if re.fullmatch(r"[\w.]+:\w+", name):
                _store(key, name, choice_values(key, name))
    for name in {_DEFAULT_METHOD, *names}:
        if ":" in name or name in method_names():
            _register_method(name)


@cache
def _register_groups() -> None:
    others = {name: plain(option.default) for name, option in options(Config).items() if name not in _CHOSEN}
    store = ConfigStore.instance()
    # Hydra copies it for each composition, which takes a third of the time, and copies again what it reads from it
    store.__deepcopy__ = lambda memo: store  # type: ignore[attr-defined]
    store.store("settings", others)
    for group, kind in GROUPS.items():
        for name in choices(kind):
            _store(group, name, choice_values(group, name))
    for name in ("none", *TRACKERS):
        _store("tracker", name, choice_values("tracker", name))


@cache
def _register_method(name: str) -> None:
    _store("strategy", name, {"name": name, **default_options(name)})


def _store(group: str, name: str, values: dict[str, Any]) -> None:
    brings_more = (conf_folder() / group / f"{name}.yaml").exists()
    node = {key: plain(value) for key, value in values.items()}
    ConfigStore.instance().store(name, node, group=f"options/{group}" if brings_more else group)


def composed(overrides: Sequence[str]) -> Config:
    """Settings made of ``key=value`` overrides, as the command makes them, without starting a run.

    Raises
    ------
    FedpersError
        If an override cannot be used.
    """
    check_choices(overrides)
    overrides = with_open_keys(overrides)
    register_choices(overrides)
    try:
        with initialize_config_dir(str(conf_folder().resolve()), version_base="1.3"):
            cfg = compose("config", overrides=list(overrides))
        return build(Config, cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)))
    except (HydraException, OmegaConfBaseException) as error:
        raise sentence(error, overrides) from error


def sentence(error: Exception, arguments: Sequence[str]) -> FedpersError:
    """One sentence for what Hydra says in several lines."""
    text = str(error)
    if match := re.search(r"Could not find '([\w/]+)/([^'/]*)'", text):
        group, name = match.groups()
        if group.startswith("hydra/"):
            return unknown(group, name, getattr(error, "options", None) or [])
        custom = f", or {CUSTOM}" if group in ("dataset", "model", "strategy") else ""
        module, dot, part = name.rpartition(".")
        if custom and dot and module not in group_names(group):
            return ConfigError(group, name, f"{CUSTOM}, of a part of your own: {module}:{part}")
        if group == "strategy" and name in SERVER_OPTIMIZERS:
            return ConfigError(group, name, f"fedavg, with server_optimizer={SERVER_OPTIMIZERS[name]}")
        return ConfigError(group, name, one_of(group_names(group), name) + custom)
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match.group(1)
        given = next((a.partition("=")[2] for a in arguments if a.lstrip("+~").partition("=")[0] == key), "")
        cfg = _without(key, arguments)
        parents = key.split(".")[:-1]
        if key.startswith(("hydra.launcher.", "hydra.sweeper.")):
            return ConfigError(key, given, setting_of_plugin(key, _keys(cfg, parents)))
        while parents and not _keys(cfg, parents):  # the mistake is further up
            parents.pop()
        return ConfigError(key, given, meant(key, _keys(cfg, parents)))
    if match := re.search(r"Error merging override ([^=\s]+)=(.*)", text):
        problem = str(error.__cause__).partition("\n")[0]
        kind = re.search(r"could not be converted to (\w+)", problem)
        allowed = _KINDS.get(kind[1], kind[1]) if kind else f"something else ({problem})"
        return ConfigError(match[1], match[2], allowed)
    if match := re.search(r"does not support sweep type : \w+", text):
        ranges = [a for a in arguments if "=" in a and re.match(r"(tag\(.*)?interval\(", a.partition("=")[2])]
        key, _, value = (ranges or ["the range"])[0].partition("=")
        return ConfigError(key, value, "a list of values, or hydra/sweeper=optuna to search in a range")
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return FedpersError(f"{match[1]} has several values; -m makes a run with each, and key=[a,b] is one list.")
    if isinstance(error, OverrideParseException):
        hint = "values with special characters need quotes within quotes, as in 'output=\"my runs\"'"
        return FedpersError(f"'{error.override}' cannot be read as key=value; {hint}.")
    first = " ".join(line.strip() for line in text.splitlines() if line.strip())
    return FedpersError(first.removesuffix(".") + ".")


def _without(offending: str, arguments: Sequence[str]) -> DictConfig:
    """Settings as composed when the offending override is left out."""
    kept = [a for a in arguments if "=" in a and "," not in a and not a.startswith("-") and not a.startswith(offending)]
    with initialize_config_dir(str(conf_folder().resolve()), version_base="1.3"):
        try:
            return compose("config", overrides=kept, return_hydra_config=offending.startswith("hydra"))
        except Exception:  # another override is wrong as well: the keys of the defaults are named
            return compose("config", return_hydra_config=offending.startswith("hydra"))


def _keys(cfg: DictConfig, parents: Sequence[str]) -> list[str]:
    """Keys that exist under the last of the nested `parents`."""
    node = OmegaConf.select(cfg, ".".join(parents)) if parents else cfg
    return [str(key) for key in node if not str(key).startswith("_")] if isinstance(node, DictConfig) else []
