"""Opens the folder of a run to go on with it. The folder may be a stranger's: nothing in it is executed.

``config.yaml`` is read as plain values (no tags, no aliases, no interpolation), checkpoints are JSON and safetensors
(:mod:`fedpers.run.checkpoint`). Settings that would run code from elsewhere or let a server in (``module:Class``,
networks from a hub, the address of a cluster) count only when they are typed again. Links that lead out of the folder
are refused.
"""

from __future__ import annotations

import heapq
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from fedpers.errors import ConfigError, FedpersError, one_of
from fedpers.run.checkpoint import Checkpoint, Checkpoints
from fedpers.run.progress import exactly
from fedpers.run.setup import Setup
from fedpers.settings import Config, RuntimeConfig, build, options
from fedpers.settings.base import RENAMED
from fedpers.settings.groups import choice_values, group_names

GROUPS = ("runtime", "tracker")
"""Groups that may be replaced as a whole, by their files in ``conf/``."""
CHANGEABLE = ("rounds", *GROUPS, "checkpoint", "stop")
_MAY = "only rounds, runtime.*, tracker.*, checkpoint.* and stop.* may be changed"
_LONGEST = 2**20
"""Bytes of a ``config.yaml``."""


class FinishedError(FedpersError):
    """A run has nothing left to do."""


@dataclass
class Reopened:
    """A run folder that was read.

    Attributes
    ----------
    config : Config
        Settings with what was typed.
    plain : dict
        The same as they are written to ``config.yaml``.
    typed : bool
        Whether something was.
    """

    config: Config
    plain: dict[str, Any]
    typed: bool

    def checkpoints(self, folder: Path) -> Iterator[Checkpoint]:
        """Whole checkpoints, also those of best rounds, the newest first.

        Raises
        ------
        FedpersError
            If there is none.
        """
        kept = Checkpoints(folder / "checkpoints")
        if not kept.all() and not kept.all(best=True):
            never = self.config.checkpoint.every == 0
            reason = "checkpoint.every is 0" if never else "it was stopped before the first was written"
            raise FedpersError(f"{folder} holds no checkpoint ({reason}): start the run anew.")
        both = (kept.whole(), kept.whole(best=True))
        yield from heapq.merge(*both, key=lambda checkpoint: checkpoint.round, reverse=True)

    def tracker_ids(self, checkpoint: Checkpoint) -> dict[str, str]:
        """What services call the run; others than plain names are left out, as they become names of files."""
        kept = checkpoint.content.get("trackers")
        ids = kept if isinstance(kept, dict) else {}
        return {str(k): v for k, v in ids.items() if isinstance(v, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", v)}

    def nothing_left(self, folder: Path) -> FedpersError:
        """What to say when no checkpoint can be used."""
        return FedpersError(f"no checkpoint in {folder} is whole: start the run anew.")

    def check_settings(self, checkpoint: Checkpoint) -> None:
        """Refuse a ``config.yaml`` that was changed after the checkpoint.

        Raises
        ------
        FedpersError
        """
        kept = checkpoint.content.get("settings")
        before = _flat(kept) if isinstance(kept, dict) else {}
        now = _flat(exactly(self.plain))
        changed = [
            f"{key}: {before.get(key, 'nothing')} in the checkpoint, {now.get(key, 'nothing')} in config.yaml"
            for key in sorted(before.keys() | now.keys())
            if (key in before, before.get(key)) != (key in now, now.get(key))
            and key.partition(".")[0] not in (*CHANGEABLE, "output")
        ]
        if changed:
            raise FedpersError(f"the settings are not those of the run ({'; '.join(changed)}): {_MAY}.")

    def runtime_as_before(self, checkpoint: Checkpoint) -> RuntimeConfig:
        """Runtime with the cohort size of the run so far, where it is left to us: it decides on the last digits."""
        config, kept = self.config.runtime, checkpoint.content.get("runtime")
        if not isinstance(kept, dict) or kept.get("name") != config.name or config.clients_at_once != "auto":
            return config
        size, device = kept.get("clients_at_once"), checkpoint.content.get("device")
        if isinstance(size, int) and size >= 1 and device == config.torch_device().type:
            return replace(config, clients_at_once=size)
        return config


def reopen(folder: Path, overrides: Sequence[str] = (), command: str = "resume") -> Reopened:
    """Read the settings of a run.

    Parameters
    ----------
    folder : Path
    command : str
        Subcommand that does it, for messages.
    overrides : sequence of str
        ``key=value`` of what may change: ``rounds``, ``runtime=NAME``, ``runtime.KEY``, ``tracker``, ``tracker.KEY``,
        ``checkpoint.KEY``, ``stop.KEY``. Others must say what the run has.

    Raises
    ------
    FedpersError
        If the folder holds no run or what does not belong into one, or a value may not be changed.
    """
    check_contents(folder)
    plain = _read_config(folder / "config.yaml")
    for former, name in RENAMED.items():  # in the folder of an older run
        if (value := _get(plain, former)) is not None:
            _put(plain, name, value)
            group, _, key = former.rpartition(".")
            del _get(plain, group)[key]
    typed = _apply(plain, overrides)
    _check_code(plain, typed, folder, command)
    config = build(Config, plain)
    if config.dataset.root is not None:  # a folder that somebody else named
        config = replace(config, dataset=replace(config.dataset, download=False))
    return Reopened(config, plain, bool(typed))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from working on the run in a folder.

    Raises
    ------
    FedpersError
        If one does already, or there is no such folder.
    """
    if not folder.is_dir():
        raise FedpersError(f"there is no folder {folder}.")
    try:
        import fcntl
    except ImportError:  # no POSIX
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FedpersError(f"another process works on the run in {folder}.") from error
        except OSError:  # a file system without locks
            yield
            return
        yield
    finally:
        os.close(descriptor)


def check_made(folder: Path, checkpoint: Checkpoint, setup: Setup) -> None:
    """Refuse data or a network that are not those of the run.

    Raises
    ------
    FedpersError
    """
    for name, checksum in (("data", setup.data.checksum), ("network", setup.network)):
        if checkpoint.content.get(name) != checksum:
            what = "data made here differ" if name == "data" else "initial network made here differs"
            raise FedpersError(f"the {what} from the run's in {folder}, by checksum: its state does not fit them.")


def clear_leftovers(folder: Path) -> None:
    """Remove files of personal state that a run which was killed left behind."""
    for path in folder.glob("states-*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def check_contents(folder: Path) -> None:
    """Refuse a folder without a run, or in which :func:`check_links` refuses something.

    Raises
    ------
    FedpersError
    """
    if not os.path.isfile(folder / "config.yaml"):
        missing = "there is no config.yaml" if os.path.isdir(folder) else "there is no such folder"
        below = ""
        for kind, file in (("run", "rounds.jsonl"), ("sweep", "sweep.json")):
            if places := sorted(path.parent for path in folder.rglob(file)):
                below = f"; below it lies the {kind} {places[-1]}"
        raise FedpersError(f"{folder} holds no run: {missing}{below}.")
    check_links(folder)


def check_links(folder: Path) -> None:
    """Refuse links by which writing below a folder would reach other places, and what is neither file nor folder.

    Raises
    ------
    FedpersError
    """
    home = folder.resolve()
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent) / name
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                if "checkpoints" in path.relative_to(folder).parts or not path.resolve().is_relative_to(home):
                    raise FedpersError(f"{path} is a link that may lead elsewhere: the run is not opened.")
            elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise FedpersError(f"{path} is neither a file nor a folder: the run is not opened.")
    if (folder / "wandb" / "settings").exists():  # wandb would take the address of its server from there
        raise FedpersError(f"{folder / 'wandb' / 'settings'} is no part of a run: the run is not opened.")


class _PlainLoader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads values written out in full; aliases, which can make little text large, are refused."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("it holds an alias")
        return super().compose_node(parent, index)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LONGEST:
            raise FedpersError(f"{path} is larger than settings can be.")
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)
        exactly(content)  # a TypeError for dates, bytes and sets
    except OSError as error:
        raise FedpersError(f"{path} cannot be read ({error.strerror or error}).") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FedpersError(f"{path} cannot be read as settings ({reason}).") from error
    if not isinstance(content, dict) or not _keys_are_text(content):
        raise FedpersError(f"{path} cannot be read as settings (it does not hold values by name).")
    return content


def _keys_are_text(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _keys_are_text(entry) for key, entry in value.items())
    return not isinstance(value, list) or all(_keys_are_text(entry) for entry in value)


def _apply(plain: dict[str, Any], overrides: Sequence[str]) -> set[str]:
    """Put typed values in place; return their keys."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType
    from hydra.errors import HydraException

    typed: dict[str, Any] = {}
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
            if override.type is not OverrideType.CHANGE or override.is_sweep_override() or override.package:
                raise FedpersError(f"'{text}' cannot be read as key=value.")
            key, value = str(override.key_or_group), override.value()
        except HydraException as error:
            raise FedpersError(f"'{text}' cannot be read as key=value.") from error
        if key in RENAMED:
            raise ConfigError(key, value, f"{RENAMED[key]}, as it is called now")
        typed[key] = value
    for key, value in sorted(typed.items(), key=lambda item: item[0] not in GROUPS):  # a group, then its options
        first = key.partition(".")[0]
        if key in GROUPS:
            plain[key] = _group(key, value)
        elif first in CHANGEABLE and (key == "rounds" or "." in key):
            _put(plain, key, value)
        elif (present := _get(plain, key)) != value and _name(present) != value:
            has = "nothing of that name" if present is None else _name(present)
            raise ConfigError(key, value, f"{has}, which the run has; {_MAY}")
    _check_runtime_options(plain, typed)
    return set(typed)


def _check_runtime_options(plain: Mapping[str, Any], typed: Mapping[str, Any]) -> None:
    """Refuse typed options of ``runtime`` that the runtime in use does not have."""
    name = _get(plain, "runtime.name")
    for key, value in typed.items():
        group, _, name_in_group = key.partition(".")
        option = options(RuntimeConfig).get(name_in_group) if group == "runtime" else None
        only = None if option is None else option.only_for
        if only is not None and name not in only:
            raise ConfigError(key, value, f"an option of runtime={' or '.join(only.names)}, and this is runtime={name}")


def _group(group: str, value: Any) -> dict[str, Any]:
    """Values of one or several choices of a group."""
    merged: dict[str, Any] = {}
    for name in value if isinstance(value, list) else [value]:
        if name not in group_names(group):
            raise ConfigError(group, name, one_of(group_names(group), str(name)))
        merged.update(choice_values(group, name))
    return merged


_LEADS_ELSEWHERE = {
    "strategy.name": "names code that would be run",
    "dataset.name": "names code that would be run",
    "model.name": "names code that would be run",
    "dataset.path": "names a set to download: no such folder is here",
    "model.weights": "names a place to load a network from",
    "runtime.address": "names a cluster that would be trusted",
}


def to_type(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run that lead to code, networks or servers from elsewhere: they must be typed to go on with it."""
    values = {key: _get(plain, key) for key in _LEADS_ELSEWHERE}
    path, weights = values["dataset.path"], values["model.weights"]
    leads = {
        **{f"{group}.name": ":" in str(values[f"{group}.name"]) for group in ("strategy", "dataset", "model")},
        "dataset.path": path is not None and not Path(str(path)).exists(),
        "model.weights": isinstance(weights, str) and bool(re.match(r"timm:.*[:/]", weights)),
        "runtime.address": values["runtime.address"] is not None,
    }
    return {key: values[key] for key, elsewhere in leads.items() if elsewhere}


def _check_code(plain: Mapping[str, Any], typed: set[str], folder: Path, command: str) -> None:
    """Refuse settings of :func:`to_type` unless they were typed, a group's name perhaps as the group."""
    needed = to_type(plain)
    if command == "export":  # which computes in this process
        needed.pop("runtime.address", None)
    missing = [key for key in needed if key not in typed and key.removesuffix(".name") not in typed]
    if missing:
        key = missing[0]
        every = " ".join(f"{name}={value}" for name, value in needed.items())
        raise FedpersError(
            f"{key}={needed[key]} in {folder / 'config.yaml'} {_LEADS_ELSEWHERE[key]}: it counts only when you type "
            f"it, as in 'fedpers {command} {folder} {every}'."
        )


def _get(plain: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(plain, Mapping):
            return None
        plain = plain.get(part)
    return plain


def _put(plain: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        if not isinstance(plain.get(part), dict):
            plain[part] = {}
        plain = plain[part]
    plain[last] = value


def _name(value: Any) -> Any:
    """What stands for a group: its name."""
    return value.get("name") if isinstance(value, Mapping) else value


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
