"""A Ray cluster, as the driver meets it: connecting, what it has, and whose code travels."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import ray
from ray.exceptions import RayError

from fedpers.errors import ConfigError, TrainingError
from fedpers.process import blocked, cores

log = logging.getLogger(__name__)
_given_up = False
_HELPERS = ("monitor", "dashboard", "log_monitor")
"""Processes of Ray that no actor needs."""
_shipped: Counter[str] = Counter()
"""Modules that travel with what uses them, and how many grids ask for it."""


def connect(address: str | None) -> bool:
    """Connect to a cluster, or start Ray here; whether there was no connection before."""
    if ray.is_initialized():
        return False
    cluster_address = address or os.environ.get("RAY_ADDRESS")
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    try:
        if cluster_address:
            _check_address(cluster_address)
            ray.init(address=cluster_address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            # A scheduler sends SIGTERM to all processes of a job. This one then ends its round, saves it, for which it
            # needs Ray's processes, and ends them.
            with blocked(signal.SIGTERM):
                ray.init(
                    address="local", num_cpus=cores(), include_dashboard=False, log_to_driver=False,
                    logging_level=logging.ERROR,
                )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        if cluster_address is None:
            raise TrainingError(f"Ray cannot be started on this machine: {first_line(error)}") from error
        raise ConfigError(
            "runtime.address", cluster_address, f"the address of a running Ray cluster ({first_line(error)})"
        ) from error
    return True


def end_helpers() -> None:
    """End what no actor needs of the Ray that was started in this process, before ``ray.shutdown``.

    That asks each process to end, which those that do not hear SIGTERM ignore, and waits a second for it.
    """
    node = ray._private.worker._global_node
    for kind in _HELPERS if node is not None else ():
        for info in node.all_processes.get(kind, ()):
            info.process.kill()


def _check_address(address: str) -> None:
    """Find out within seconds whether somebody is there: Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not host or "/" in host or not port.isdigit():
        raise ValueError("HOST:PORT, or auto")
    socket.create_connection((host, int(port)), timeout=10).close()


def has_ended() -> bool:
    """Whether the Ray that this process uses has ended: it must not be called any more, which would end this process.

    It has if a process of it that was started here has, or if :func:`give_up` was called.
    """
    node = ray._private.worker._global_node
    return _given_up or (node is not None and bool(node.dead_processes()))


def give_up(reason: str) -> TrainingError:
    """Never call Ray again in this process: its processes are stopped together with this one."""
    global _given_up
    _given_up = True
    return TrainingError(f"Ray has ended: {reason}")


def check_alive() -> None:
    """Refuse to wait for a Ray that :func:`has_ended`.

    Raises
    ------
    TrainingError
    """
    if has_ended():
        raise give_up("a process of it is gone.")


def supply() -> str:
    """What the cluster has, for messages."""
    total = ray.cluster_resources()
    return f"{total.get('CPU', 0):g} CPUs and {total.get('GPU', 0):g} GPUs"


def kill(actor: Any) -> None:
    """End an actor, if it is still there."""
    try:
        ray.kill(actor)
    except (RayError, ValueError) as error:  # of a Ray that was shut down meanwhile
        log.debug("an actor is gone already: %s", error)


def ship_by_value(folder: Path) -> list[ModuleType]:
    """Let code from the working folder travel with what uses it, since actors elsewhere cannot import it."""
    paths = sysconfig.get_paths()
    installed = {Path(paths[kind]) for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    modules = []
    for name, module in list(sys.modules.items()):
        file, top = getattr(module, "__file__", None), name.partition(".")[0]
        if not file or module.__name__ != name or top in ("__main__", "fedpers", *sys.stdlib_module_names):
            continue
        path = Path(file)
        elsewhere = path.is_relative_to(folder) and not {"site-packages", "dist-packages"} & set(path.parts)
        if elsewhere and not any(path.is_relative_to(root) for root in installed):
            _shipped[name] += 1
            if _shipped[name] == 1:
                ray.cloudpickle.register_pickle_by_value(module)
            modules.append(module)
    return modules


def ship_no_more(modules: Collection[ModuleType]) -> None:
    """Undo :func:`ship_by_value`."""
    for module in modules:
        _shipped[module.__name__] -= 1
        if not _shipped[module.__name__]:
            ray.cloudpickle.unregister_pickle_by_value(module)


def first_line(error: BaseException) -> str:
    """What an error says, in one line; of an error in an actor what was raised there."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return f"{type(cause).__name__}: {cause}".splitlines()[0]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
