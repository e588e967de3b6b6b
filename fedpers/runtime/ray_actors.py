"""The actors of a Ray cluster that a grid computes on: started, called, replaced when they die."""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    WorkerCrashedError,
)

from fedpers.errors import ConfigError, TrainingError, check
from fedpers.runtime.actor import Worker, pack
from fedpers.runtime.cluster import (
    connect,
    end_helpers,
    first_line,
    has_ended,
    kill,
    ship_by_value,
    ship_no_more,
    supply,
)

log = logging.getLogger(__name__)
_DIED = (NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError)
PATIENCE = 60.0
"""Seconds an actor may take to start."""


class ActorDied(Exception):
    """An actor died before it answered."""


@dataclass(eq=False)
class Actor:
    """An actor, as the driver sees it; `remote` is Ray's handle of a :class:`~fedpers.runtime.actor.Worker`."""

    remote: Any
    alive: bool = True


class ActorPool:
    """Actors on a cluster, one for each shard of clients as far as there is room.

    Parameters
    ----------
    address : str, optional
        Of the cluster, see :class:`fedpers.runtime.ray.RayGrid`.
    actors : int or "auto"
        ``auto`` is as many as the cluster has room for.
    most : int
        More are never needed.
    cpus, gpus : float
        What an actor reserves.
    folder : str, optional
        Where an actor makes files of personal state.

    Attributes
    ----------
    size : int
        Actors to be started.
    actors : list of Actor
        Also those that died.

    Raises
    ------
    ConfigError
        If the cluster cannot be reached or has too little room.
    """

    def __init__(
        self, address: str | None, actors: int | str, most: int, *, cpus: float, gpus: float, folder: str | None
    ) -> None:
        self.folder = folder
        self.actors: list[Actor] = []
        self._resources = {"num_cpus": cpus, "num_gpus": gpus}
        self._shipped: list[ModuleType] = []
        self._connected = connect(address)  # to be undone at the end
        try:
            self._class = ray.remote(Worker)
            self._check_resources()
            room = self.room()
            if actors != "auto" and int(actors) > room:
                allowed = f"at most {room}, for which the cluster has room ({supply()})"
                raise ConfigError("runtime.actors", actors, allowed)
            self.size = min(room if actors == "auto" else int(actors), most)
            self._shipped = ship_by_value(Path.cwd())
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Start all actors, spread over the nodes."""
        self.actors = self._started(self.size)

    def restart_first(self) -> None:
        """Replace the first actor, which died before it had any clients."""
        self.actors[:1] = self._started(1)

    def _started(self, count: int) -> list[Actor]:
        handles = [self._new() for _ in range(count)]
        nodes = [handle.node.remote() for handle in handles]
        ready, late = ray.wait(nodes, num_returns=count, timeout=PATIENCE)
        if late:
            for handle in handles:
                kill(handle)
            raise TrainingError(
                f"{len(ready)} of {count} Ray actors started within {PATIENCE:g} s; the cluster has {supply()}, of "
                f"which others may use a part: set runtime.actors."
            )
        try:
            ray.get(nodes)
        except RayError as error:
            raise TrainingError(f"a Ray actor cannot start: {first_line(error)}") from error
        return [Actor(handle) for handle in handles]

    def _new(self) -> Any:
        return self._class.options(scheduling_strategy="SPREAD", **self._resources).remote(self.folder)

    def replacement(self, load: Callable[[Actor], float]) -> Actor:
        """Return a new actor if there is room for one, else the one with the least `load`.

        Raises
        ------
        TrainingError
            If there is neither.
        """
        alive = [actor for actor in self.actors if actor.alive]
        handle, node = None, None
        end = time.monotonic() + PATIENCE
        while self.room() > len(alive) and time.monotonic() < end:
            if handle is None:
                handle = self._new()
                node = handle.node.remote()
            try:
                ray.get(node, timeout=2.0)
            except GetTimeoutError:
                continue  # the node that is gone may still be counted as room
            except RayError as error:
                log.info("an actor could not be started: %s", first_line(error))
                break
            self.actors.append(Actor(handle))
            return self.actors[-1]
        if handle is not None:
            kill(handle)
        if not alive:
            raise TrainingError(
                f"the last Ray actor died, and there is no room for another: the cluster has {supply()}."
            )
        return min(alive, key=load)

    def end(self, actor: Actor) -> None:
        """Take an actor out of use."""
        actor.alive = False
        kill(actor.remote)

    def _check_resources(self) -> None:
        """Refuse actors for which no node has room, naming what is missing."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        for key, kind in (("gpus_per_actor", "GPU"), ("cpus_per_actor", "CPU")):
            need, most = self._resources[f"num_{kind.lower()}s"], max(node.get(kind, 0.0) for node in nodes)
            allowed = f"at most {most:g}, the {kind}s of the largest node (the cluster has {supply()})"
            check(need <= most, f"runtime.{key}", need, allowed)
        cpus, gpus = self._resources["num_cpus"], self._resources["num_gpus"]
        together = f"less, for no node has {cpus:g} CPUs and {gpus:g} GPUs together (the cluster has {supply()})"
        check(self.room() >= 1, "runtime.cpus_per_actor", cpus, together)

    def room(self) -> int:
        """Actors for which there is room on the nodes that are alive."""
        total = 0
        for node in ray.nodes():
            if node["Alive"]:
                has = {"num_cpus": node["Resources"].get("CPU", 0.0), "num_gpus": node["Resources"].get("GPU", 0.0)}
                fits = [int(has[kind] / need + 1e-6) for kind, need in self._resources.items() if need]
                total += min(fits, default=1)
        return total

    def close(self) -> None:
        """Stop the actors, and Ray if it was started for them."""
        if has_ended():
            ship_no_more(self._shipped)
            return
        try:
            if ray.is_initialized():
                for actor in self.actors:
                    if actor.alive:
                        kill(actor.remote)
        finally:
            ship_no_more(self._shipped)
            if self._connected:
                end_helpers()
                ray.shutdown()


def put(value: Any) -> Any:
    """Put something into the object store, once for all actors.

    Raises
    ------
    TrainingError
        If it cannot travel or there is no room.
    """
    try:
        return ray.put(pack(value))
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise TrainingError(f"something cannot be sent to a Ray actor: {first_line(error)}") from error
    except RayError as error:
        raise TrainingError(f"Ray's object store takes no more: {first_line(error)}") from error


def get(reference: Any, clients: Sequence[int] = ()) -> Any:
    """Result of a call about `clients`, of which there is a reference or a future.

    Raises
    ------
    ActorDied
        If the actor died.
    TrainingError
        If the call failed.
    """
    try:
        return reference.result() if isinstance(reference, Future) else ray.get(reference)
    except _DIED as reason:
        raise ActorDied(first_line(reason)) from reason
    except RayError as error:
        whose = f"clients {some(clients)}" if clients else "these clients"
        raise TrainingError(f"{whose} failed on a Ray actor: {first_line(error)}") from error


def some(clients: Sequence[int]) -> str:
    """A few of many numbers."""
    shown = ", ".join(str(client) for client in clients[:3])
    return shown if len(clients) <= 3 else f"{shown} and {len(clients) - 3} more"
