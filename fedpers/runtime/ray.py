"""Clients on a Ray cluster: a Flower ``Grid`` over actors.

Each actor owns shards of clients: their data come once, their personal state stays. A round is one message per shard,
what all clients receive is put into the object store once, and replies are folded where they are made. Shards are dealt
by measured costs and keep their members, so that an actor or a node that dies changes no result: a shard is taken over
by another actor, gets its state as last saved, and computes the messages since then once more.
"""

from __future__ import annotations

import heapq
import logging
import os
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import flwr.app as flower
import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from torch import Tensor

from fedpers.cohort.plan import batches_per_epoch
from fedpers.cohort.state import BLOCK_BYTES, Block
from fedpers.cohort.tree import leaves
from fedpers.errors import ConfigError, TrainingError, check
from fedpers.runtime.engine import CohortEngine, check_counts, half_the_memory
from fedpers.runtime.flower_private import give_id, unavailable
from fedpers.runtime.grid import ClientGrid, reply_of
from fedpers.runtime.probe import Choice, cores, costs, probe
from fedpers.runtime.states import read_states, write_states
from fedpers.strategies.client import IDENTIFY, CohortApp, Outcome
from fedpers.strategies.intake import Intake
from fedpers.strategies.records import METRICS, LiveArray
from fedpers.strategies.server import PersonalizedStrategy
from fedpers.threads import one_thread

log = logging.getLogger(__name__)
_DIED = (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    WorkerCrashedError,
)
DEATHS = 3
"""Actors that a shard may lose on one message before the run is given up."""
PATIENCE = 60.0
"""Seconds an actor may take to start."""
SAVE_AFTER = 32
"""Messages of a shard that are kept for computing them again before the grid saves personal state by itself."""
MEASURED = 64
"""Clients, the largest ones, whose data an actor gets to measure cohort sizes and costs."""


@dataclass
class Answer:
    """What a shard makes of one message to its clients."""

    outcomes: list[Outcome]
    intake: Intake | None
    changed: bool


class Worker:
    """Actor: computes the clients of its shards.

    Parameters
    ----------
    folder : str, optional
        Where files of personal state that is too large for the memory are made.
    """

    def __init__(self, folder: str | None = None) -> None:
        logging.getLogger("ray").setLevel(logging.ERROR)
        _register_tensors()
        torch.set_num_threads(1)
        self.device = "cuda:0" if ray.get_gpu_ids() else "cpu"
        if self.device != "cpu":
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cudnn.deterministic = True
        self.folder = None if folder is None else Path(folder)
        self.shards: dict[int, CohortEngine] = {}

    def node(self) -> str:
        """Id of the node this runs on."""
        return str(ray.get_runtime_context().get_node_id())

    def measure(self, app: CohortApp, sampled: int, cohort: int | str) -> tuple[Choice, tuple[float, float] | None]:
        """Choose a cohort size; measure costs (:func:`fedpers.runtime.probe.costs`)."""
        app.to(self.device)
        choice = probe(app, sampled, cohort, 1)
        return choice, costs(app, choice.cohort)

    def host(self, shard: int, app: CohortApp, clients: list[int], choice: Choice, memory: float | None) -> None:
        """Take over a shard, with the state its clients begin with."""
        app.data = replace(app.data, x=app.data.x.clone(), y=app.data.y.clone())  # out of the object store
        app.to(self.device)
        if memory is None and (whole := half_the_memory(app.device)) is not None:
            memory = whole * self._share()
        engine = CohortEngine(app, choice.cohort, 1, clients=clients, memory=memory, folder=self.folder)
        engine.choose(len(clients))
        if shard in self.shards:
            self.shards[shard].close()
        self.shards[shard] = engine

    def _share(self) -> float:
        """Share of the machine, or of its GPU, that this actor has."""
        has = ray.get_runtime_context().get_assigned_resources()
        if self.device != "cpu":
            return min(1.0, float(has.get("GPU", 1.0)))
        return min(1.0, max(1.0, float(has.get("CPU", 1.0))) / (os.cpu_count() or 1))

    def load(self, shard: int, block: Block) -> None:
        """Store personal states."""
        clients, state = block
        self.shards[shard].store.load(clients.tolist(), state.to(self.device))

    def clear(self, shard: int) -> None:
        """Let all clients of a shard hold the initial state again."""
        self.shards[shard].store.clear()

    def written(self, shard: int) -> list[int]:
        """Clients of a shard that have written state, ascending."""
        store = self.shards[shard].store
        return sorted(store.clients[store.written].tolist())

    def states(self, shard: int, clients: list[int]) -> Block:
        """Personal states of some clients."""
        return torch.tensor(clients), self.shards[shard].store.gather(clients).cpu()

    def run(
        self,
        shard: int,
        kind: str,
        clients: list[int],
        which: list[int],
        sent: tuple[list[flower.RecordDict], PersonalizedStrategy | None],
        own: list[flower.RecordDict],
        fold: bool,
    ) -> Answer:
        """Compute a message for clients of a shard.

        Parameters
        ----------
        shard : int
        kind : str
            Message type.
        clients : list of int
        which : list of int
            For each of them, which of `sent` it received, or of `own` counted from behind (-1 is the first).
        sent : (list of RecordDict, strategy)
            What clients of several shards receive, and what folds their replies.
        own : list of RecordDict
            What clients of this shard alone receive.
        fold : bool
            Fold the replies, and return none of them.
        """
        contents, strategy = sent
        engine = self.shards[shard]
        engine.changed = False
        intake = Intake(strategy) if fold and strategy is not None else None
        received = [contents[i] if i >= 0 else own[-1 - i] for i in which]
        with one_thread():
            outcomes = engine.run(kind, clients, received, intake)
        return Answer(outcomes, intake, engine.changed)


@dataclass(eq=False)
class _Host:
    """An actor, as the driver sees it."""

    actor: Any
    alive: bool = True


@dataclass(eq=False)
class _Shard:
    """Clients that are computed by one actor, and the messages they got since their state was saved."""

    number: int
    clients: list[int]
    cost: float
    host: _Host
    jobs: list[_Job] = field(default_factory=list)
    deaths: int = 0


@dataclass(eq=False)
class _Job:
    """Messages of one kind to clients of one shard.

    Kept for as long as it may have to be computed again; `abandoned` if nobody waits for it any more.
    """

    shard: _Shard
    kind: str
    messages: list[flower.Message]
    arguments: tuple[Any, ...]
    fold: bool
    host: _Host | None = None
    reference: Any = None
    answer: Answer | None = None
    done: bool = False
    abandoned: bool = False


class RayGrid(ClientGrid):
    """Runs messages on the actors of a Ray cluster.

    Node ids are ``FIRST_NODE + client``. Only methods of this package run here; any other Flower app runs in process or
    on Flower's engines.

    Parameters
    ----------
    client_app : CohortApp
    num_clients : int, optional
        All clients of the data if not given.
    address : str, optional
        Of a running cluster; ``RAY_ADDRESS`` if not given, and if there is none, Ray is started on this machine. A
        cluster that this process is connected to already is used as it is.
    actors : int or "auto"
        Number of actors and of shards; ``auto`` is as many as the cluster has room for.
    cpus_per_actor, gpus_per_actor : float
        What an actor reserves; a share of a GPU is fine. Actors with GPUs compute on them.
    cohort : int or "auto"
        Clients that are computed together; ``auto`` is measured on an actor.
    memory : float, optional
        Bytes that personal state may take in each actor before it lies in memory-mapped files; its share of half of its
        machine's memory if not given.
    folder : str, optional
        Where an actor makes these files; default is its machine's folder for temporary files.

    Raises
    ------
    ConfigError
        If a value is out of range, the cluster cannot be reached or has too little room.
    """

    def __init__(
        self,
        client_app: CohortApp,
        num_clients: int | None = None,
        *,
        address: str | None = None,
        actors: int | str = "auto",
        cpus_per_actor: float = 1,
        gpus_per_actor: float = 0,
        cohort: int | str = "auto",
        memory: float | None = None,
        folder: str | None = None,
    ) -> None:
        if not isinstance(client_app, CohortApp):
            allowed = "a client app made by LocalUpdate.client_app; others run with fedpers.simulate or under Flower"
            raise ConfigError("client_app", type(client_app).__name__, allowed)
        if mods := getattr(client_app, "mods", ()):
            names = [getattr(mod, "__name__", type(mod).__name__) for mod in mods]
            raise ConfigError("mods", names, "none on Ray; client mods run in process or under Flower")
        most = client_app.data.num_clients
        super().__init__(most if num_clients is None else num_clients, most)
        check_counts(cohort, 1)
        check(actors == "auto" or (isinstance(actors, int) and actors >= 1), "runtime.actors", actors,
              "a whole number >= 1, or auto")  # fmt: skip
        self.client_app = client_app
        self.memory = memory
        self.folder = folder
        self.shards: list[_Shard] = []
        self.choice: Choice | None = None
        self.costs: tuple[float, float] | None = None
        self._cohort = cohort
        self._keeps_state = bool(leaves(client_app.initial_state))
        self._saved: Path | None = None  # where personal state was last written to
        self._saved_here: tempfile.TemporaryDirectory[str] | None = None
        self._unsaved = False  # whether states were loaded that no saved folder holds
        self._waiting: dict[str, tuple[_Job, int]] = {}  # by message id: its job, and its place there
        self._known: dict[str, flower.Message] = {}  # replies that needed no actor
        self._hosts: list[_Host] = []
        self._resources = {"num_cpus": cpus_per_actor, "num_gpus": gpus_per_actor}
        self._connected_here = _connect(address)
        _register_tensors()
        self._by_value = _by_value(Path.cwd())
        self._remote = ray.remote(Worker)
        room = self._room()
        if actors == "auto":
            check(room >= 1, "runtime.cpus_per_actor", cpus_per_actor, _has())
        elif int(actors) > room:
            raise ConfigError("runtime.actors", actors, f"at most {room}, for which the cluster has room ({_has()})")
        self._wanted = min(room if actors == "auto" else int(actors), self.num_clients)

    # ------------------------------------------------------------------ messages

    def push_messages(self, messages: Iterable[flower.Message]) -> Iterable[str]:
        """Start messages; :meth:`pull_messages` gives their replies as they come.

        Raises
        ------
        ValueError
            If a node does not exist; no message is started then.
        """
        accepted = self._accept(messages)
        for job in self._start(accepted):
            for place, message in enumerate(job.messages):
                self._waiting[message.metadata.message_id] = (job, place)
        return [message.metadata.message_id for message in accepted]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[flower.Message]:
        """Replies that are there, each once; none yet for a message that is still computed."""
        wanted = list(dict.fromkeys(message_ids))
        self._collect([self._waiting[i][0] for i in wanted if i in self._waiting], timeout=0.0)
        replies = [self._reply(i) for i in wanted]
        return [reply for reply in replies if reply is not None]

    def send_and_receive(
        self, messages: Iterable[flower.Message], *, timeout: float | None = None
    ) -> Iterable[flower.Message]:
        """Run messages and return the replies that come within `timeout` seconds (None: all)."""
        ids = list(self.push_messages(messages))
        jobs = {id(job): job for job, _ in (self._waiting[i] for i in ids if i in self._waiting)}
        self._collect(list(jobs.values()), timeout)
        self._abandon(jobs.values())
        replies = [self._reply(i) for i in ids]
        for i in ids:
            self._waiting.pop(i, None)
        return [reply for reply in replies if reply is not None]

    def send_and_fold(
        self, messages: Iterable[flower.Message], intake: Intake, *, timeout: float | None = None
    ) -> None:
        """Run messages; replies are folded in the actors, and `intake` takes in the folds, in the order of shards."""
        jobs = self._start(self._accept(messages), intake.strategy)
        self._collect(jobs, timeout)
        self._abandon(jobs)
        parts = [job.answer.intake for job in jobs if job.answer is not None]
        intake.merge([part for part in parts if part is not None])

    def _reply(self, message_id: str) -> flower.Message | None:
        """Reply to one message if it is there, once; an error for an id that stands for none (any more)."""
        if message_id in self._known:
            return self._known.pop(message_id)
        if message_id not in self._waiting:
            return unavailable(message_id, self._run.run_id)
        job, place = self._waiting[message_id]
        if job.answer is None:
            return None
        del self._waiting[message_id]
        reply = reply_of(job.messages[place], job.answer.outcomes[place])
        give_id(reply)
        return reply

    # ---------------------------------------------------------------------- jobs

    def _start(self, messages: list[flower.Message], strategy: PersonalizedStrategy | None = None) -> list[_Job]:
        """Send messages to the actors, one job for each shard and type of message."""
        self._check_open()
        by_kind: dict[str, list[flower.Message]] = {}
        for message in messages:
            if message.metadata.message_type == IDENTIFY:
                content = flower.RecordDict({METRICS: flower.MetricRecord({"partition-id": self.client_of(message)})})
                reply = flower.Message(content, reply_to=message)
                give_id(reply)
                self._known[message.metadata.message_id] = reply
            else:
                by_kind.setdefault(message.metadata.message_type, []).append(message)
        jobs = []
        for kind, group in by_kind.items():
            self.choose(len(group))
            jobs.extend(self._jobs(kind, group, strategy))
        if self._keeps_state and (self._unsaved or any(len(shard.jobs) >= SAVE_AFTER for shard in self.shards)):
            self._save_here()
        for job in jobs:
            if self._keeps_state:
                job.shard.jobs.append(job)
            self._submit(job)
        return jobs

    def _jobs(self, kind: str, messages: list[flower.Message], strategy: PersonalizedStrategy | None) -> list[_Job]:
        """Jobs of one type of message; what several shards receive is put into the object store once."""
        owner = {client: shard.number for shard in self.shards for client in shard.clients}
        by_shard: dict[int, list[flower.Message]] = {}
        shards_of: dict[int, set[int]] = {}
        for message in messages:
            number = owner[self.client_of(message)]
            by_shard.setdefault(number, []).append(message)
            shards_of.setdefault(id(message.content), set()).add(number)
        common: dict[int, int] = {}
        sent: list[flower.RecordDict] = []
        for message in messages:
            key = id(message.content)
            if len(shards_of[key]) > 1 and key not in common:
                common[key] = len(sent)
                sent.append(message.content)
        folding = None if strategy is None else strategy.to_fold_elsewhere()
        package = ray.put((sent, folding))
        jobs = []
        for number, group in sorted(by_shard.items()):
            own: dict[int, flower.RecordDict] = {}
            which = []
            for message in group:
                key = id(message.content)
                if key not in common:
                    own.setdefault(key, message.content)
                which.append(common[key] if key in common else -1 - list(own).index(key))
            clients = [self.client_of(message) for message in group]
            arguments = (kind, clients, which, package, list(own.values()))
            jobs.append(_Job(self.shards[number], kind, group, arguments, fold=strategy is not None))
        return jobs

    def _submit(self, job: _Job) -> None:
        job.host = job.shard.host
        job.reference = job.host.actor.run.remote(job.shard.number, *job.arguments, job.fold)

    def _collect(self, jobs: Sequence[_Job], timeout: float | None) -> None:
        """Wait for the answers of jobs, at most `timeout` seconds; what a dead actor owes is computed again."""
        end = None if timeout is None else time.monotonic() + timeout
        while waiting := {job.reference: job for job in jobs if not job.done}:
            left = None if end is None else max(0.0, end - time.monotonic())
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=left)
            if not ready:
                return
            for reference in ready:
                self._take(waiting[reference])

    def _take(self, job: _Job) -> None:
        """Take a job's answer; if its actor died, another one takes over and computes it again."""
        shard = job.shard
        try:
            job.answer = ray.get(job.reference)
        except _DIED as reason:
            assert job.host is not None
            self._died(shard, job.host, reason)
            self._submit(job)
            return
        except RayTaskError as error:
            raise TrainingError(
                f"clients {_some(shard.clients)} failed on a Ray actor: {_first_line(error)}"
            ) from error
        shard.deaths = 0
        job.done = True
        if job in shard.jobs and not job.answer.changed:
            shard.jobs.remove(job)

    def _abandon(self, jobs: Iterable[_Job]) -> None:
        """Let go of answers, and of jobs whose time is over; they may still change personal state."""
        for job in jobs:
            job.abandoned = not job.done

    # -------------------------------------------------------------------- shards

    def choose(self, sampled: int) -> None:
        """Start the actors and deal out the clients for rounds of `sampled` clients; only the first call does."""
        if self.shards:
            return
        self._check_open()
        app = self.client_app
        self._hosts = self._new_hosts(self._wanted)
        largest = sorted(range(self.num_clients), key=lambda c: (-app.sizes[c], c))[:MEASURED]
        part = app.restrict(largest).to("cpu")
        in_a_shard = max(1, -(-sampled // self._wanted))
        try:
            measured = self._hosts[0].actor.measure.remote(part, in_a_shard, self._cohort)
            self.choice, self.costs = ray.get(measured)
        except RayError as error:
            raise TrainingError(f"a Ray actor cannot compute these clients: {_first_line(error)}") from error
        base, step = self.costs or (0.0, 1.0)  # else in proportion to steps
        expected = [base + step * _steps(app, client) for client in range(self.num_clients)]
        for number, clients in enumerate(deal(expected, self._wanted)):
            host = self._hosts[number]
            self.shards.append(_Shard(number, clients, sum(expected[c] for c in clients), host))
        references = {shard.number: self._hosting(shard) for shard in self.shards}
        for shard in self.shards:
            host = shard.host
            try:
                ray.get(references[shard.number])
            except _DIED as reason:
                self._died(shard, host, reason)
            except RayTaskError as error:
                raise TrainingError(f"a Ray actor cannot take clients: {_first_line(error)}") from error

    def _hosting(self, shard: _Shard) -> Any:
        part = self.client_app.restrict(shard.clients).to("cpu")
        return shard.host.actor.host.remote(shard.number, part, shard.clients, self.choice, self.memory)

    def _new_hosts(self, count: int) -> list[_Host]:
        """Start actors, spread over the nodes."""
        made = [
            self._remote.options(scheduling_strategy="SPREAD", **self._resources).remote(self.folder)
            for _ in range(count)
        ]
        asked = [actor.node.remote() for actor in made]
        ready, late = ray.wait(asked, num_returns=count, timeout=PATIENCE)
        if late:
            for actor in made:
                ray.kill(actor)
            raise TrainingError(
                f"{len(ready)} of {count} Ray actors started within {PATIENCE:g} s; the cluster has {_has()}, of which "
                f"others may use a part: set runtime.actors."
            )
        try:
            ray.get(asked)
        except RayError as error:
            raise TrainingError(f"a Ray actor cannot start: {_first_line(error)}") from error
        return [_Host(actor) for actor in made]

    def _died(self, shard: _Shard, host: _Host, reason: Exception) -> None:
        """Let others take over the shards of an actor that died, unless that has happened already."""
        if shard.host is not host:
            return
        shard.deaths += 1
        if shard.deaths > DEATHS:
            raise TrainingError(
                f"{shard.deaths} Ray actors in a row died while they computed clients {_some(shard.clients)}: "
                f"{_first_line(reason)}"
            ) from reason
        log.warning(
            "a Ray actor died (%s); its %d clients are taken over and computed again from round to round",
            _first_line(reason), sum(len(s.clients) for s in self.shards if s.host is host),
        )  # fmt: skip
        host.alive = False
        for lost in [other for other in self.shards if other.host is host]:
            self._move(lost)

    def _move(self, shard: _Shard) -> None:
        """Let another actor take over a shard: state as last saved, and all messages since."""
        shard.host = self._replacement()
        host = shard.host
        try:
            ray.get(self._hosting(shard))
            if self._saved is not None:
                for block in read_states(self._saved, self.client_app.initial_state, shard.clients):
                    ray.get(host.actor.load.remote(shard.number, block))
            for job in shard.jobs:
                if job.done or job.abandoned:
                    ray.get(host.actor.run.remote(shard.number, *job.arguments, False))
        except _DIED as reason:
            self._died(shard, host, reason)
        except RayTaskError as error:
            raise TrainingError(
                f"clients {_some(shard.clients)} cannot be computed again: {_first_line(error)}"
            ) from error

    def _replacement(self) -> _Host:
        """Return a new actor if there is room for one, else the one with the least to do."""
        alive = [host for host in self._hosts if host.alive]
        actor = None
        end = time.monotonic() + PATIENCE
        while self._room() > len(alive) and time.monotonic() < end:
            if actor is None:
                actor = self._remote.options(scheduling_strategy="SPREAD", **self._resources).remote(self.folder)
                asked = actor.node.remote()
            try:
                ray.get(asked, timeout=2.0)
            except GetTimeoutError:
                continue  # the node that is gone may still be counted as room
            except RayError as error:
                log.info("an actor could not be started: %s", _first_line(error))
                break
            host = _Host(actor)
            self._hosts.append(host)
            return host
        if actor is not None:
            ray.kill(actor)
        if not alive:
            raise TrainingError(f"the last Ray actor died, and there is no room for another: the cluster has {_has()}.")
        return min(alive, key=lambda host: sum(shard.cost for shard in self.shards if shard.host is host))

    def _room(self) -> int:
        """Actors for which there is room on the nodes that are alive."""
        total = 0
        for node in ray.nodes():
            if node["Alive"]:
                has = {"num_cpus": node["Resources"].get("CPU", 0.0), "num_gpus": node["Resources"].get("GPU", 0.0)}
                fits = [int(has[kind] / need + 1e-6) for kind, need in self._resources.items() if need]
                total += min(fits, default=1)
        return total

    # --------------------------------------------------------------------- state

    def blocks(self) -> Iterator[Block]:
        """Personal state of all clients that have any, a few at a time."""
        if not self._keeps_state:
            return
        size = sum(value.nbytes for value in leaves(self.client_app.initial_state).values())
        width = max(1, BLOCK_BYTES // max(1, size))
        for shard in self.shards:
            written = self._call(shard, "written")
            for start in range(0, len(written), width):
                yield self._call(shard, "states", written[start : start + width])

    def load(self, blocks: Iterable[Block]) -> None:
        """Put personal state that :meth:`blocks` gave in place of all there is."""
        self.choose(self.num_clients)
        owner = {client: shard for shard in self.shards for client in shard.clients}
        self._saved, self._unsaved = None, True
        for shard in self.shards:
            shard.jobs.clear()
            self._call(shard, "clear")
        for clients, state in blocks:
            places: dict[int, list[int]] = {}
            for place, client in enumerate(clients.tolist()):
                places.setdefault(owner[client].number, []).append(place)
            for number, own in places.items():
                self._call(self.shards[number], "load", (clients[own], state[own]))

    def saved(self, folder: Path) -> None:
        """Be told that personal state as of now lies in a folder (:func:`write_states`), until told of another."""
        self._saved, self._unsaved = folder, False
        for shard in self.shards:
            shard.jobs = [job for job in shard.jobs if not job.done and not job.abandoned]
        if self._saved_here is not None and folder != Path(self._saved_here.name):
            self._saved_here.cleanup()
            self._saved_here = None

    def _save_here(self) -> None:
        """Save personal state in a folder of this grid's own, so that messages need not be kept."""
        before, self._saved_here = self._saved_here, None
        new = tempfile.TemporaryDirectory(prefix="states-", ignore_cleanup_errors=True)
        write_states(Path(new.name), self.blocks())
        self.saved(Path(new.name))
        self._saved_here = new
        if before is not None:
            before.cleanup()

    def _call(self, shard: _Shard, method: str, *arguments: Any) -> Any:
        """Call an actor about one of its shards, whichever actor that is."""
        while True:
            host = shard.host
            try:
                return ray.get(getattr(host.actor, method).remote(shard.number, *arguments))
            except _DIED as reason:
                self._died(shard, host, reason)
            except RayTaskError as error:
                raise TrainingError(
                    f"clients {_some(shard.clients)} failed on a Ray actor: {_first_line(error)}"
                ) from error

    # ---------------------------------------------------------------------- rest

    def described(self) -> dict[str, Any]:
        """How clients are computed, for manifests."""
        microseconds = (
            None if self.costs is None else {k: s * 1e6 for k, s in zip(("base", "step"), self.costs, strict=True)}
        )
        return {
            "name": "ray",
            "cohort": self.choice.cohort if self.choice else None,
            "chosen": self.choice.how if self.choice else None,
            "actors": len(self.shards),
            "nodes": sum(node["Alive"] for node in ray.nodes()),
            "clients_per_actor": [len(shard.clients) for shard in self.shards],
            "microseconds_per_client": microseconds,
        }

    def __str__(self) -> str:
        return f"{len(self.shards)} Ray actors, each: {self.choice}"

    def close(self) -> None:
        """Stop the actors, and Ray if it was started here."""
        if self._closed:
            return
        super().close()
        if ray.is_initialized():
            for host in self._hosts:
                if host.alive:
                    ray.kill(host.actor)
        for module in self._by_value:
            ray.cloudpickle.unregister_pickle_by_value(module)
        if self._saved_here is not None:
            self._saved_here.cleanup()
        if self._connected_here:
            ray.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def deal(expected: Sequence[float], shards: int) -> list[list[int]]:
    """Deal clients to shards greedily: the most expensive first, each to the shard with the least to do.

    Parameters
    ----------
    expected : sequence of float
        Cost of each client, > 0.
    shards : int
        >= 1 and <= the number of clients; none stays empty.

    Returns
    -------
    list of list of int
        Clients of each shard, ascending.
    """
    heap = [(0.0, 0, number) for number in range(shards)]
    dealt: list[list[int]] = [[] for _ in range(shards)]
    for client in sorted(range(len(expected)), key=lambda c: (-expected[c], c)):
        load, members, number = heapq.heappop(heap)
        dealt[number].append(client)
        heapq.heappush(heap, (load + expected[client], members + 1, number))
    return [sorted(clients) for clients in dealt]


def _steps(app: CohortApp, client: int) -> int:
    """Steps of one client in a round, as far as training settings tell."""
    training = app.update.training
    if training.steps is not None:
        return training.steps
    return training.epochs * batches_per_epoch(app.sizes[client], training.batch_size, training.drop_last)


def _connect(address: str | None) -> bool:
    """Connect to a cluster, or start Ray here; whether there was no connection before."""
    if ray.is_initialized():
        return False
    given = address or os.environ.get("RAY_ADDRESS")
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    try:
        if given:
            _check_address(given)
            ray.init(address=given, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(
                address="local", num_cpus=cores(), include_dashboard=False, log_to_driver=False,
                logging_level=logging.ERROR,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        if given is None:
            raise TrainingError(f"Ray cannot be started on this machine: {_first_line(error)}") from error
        raise ConfigError(
            "runtime.address", given, f"the address of a running Ray cluster ({_first_line(error)})"
        ) from error
    return True


def _check_address(address: str) -> None:
    """Find out within seconds whether somebody is there: Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not host or "/" in host or not port.isdigit():
        raise ValueError("HOST:PORT, or auto")
    socket.create_connection((host, int(port)), timeout=10).close()


def _has() -> str:
    """What the cluster has, for messages."""
    total = ray.cluster_resources()
    gpus = f" and {total['GPU']:g} GPUs" if total.get("GPU") else ""
    return f"{total.get('CPU', 0):g} CPUs{gpus}"


def _by_value(folder: Path) -> list[ModuleType]:
    """Let code from the working folder travel with what uses it, since actors elsewhere cannot import it."""
    found = []
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not file or name == "__main__" or name.partition(".")[0] == "fedpers" or module.__name__ != name:
            continue
        path = Path(file)
        if path.is_relative_to(folder) and "site-packages" not in path.parts:
            ray.cloudpickle.register_pickle_by_value(module)
            found.append(module)
    return found


def _register_tensors() -> None:
    """Let tensors travel as arrays, which actors of one node read from shared memory without copies."""
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    ray.util.register_serializer(torch.Tensor, serializer=_from_tensor, deserializer=_to_tensor)
    ray.util.register_serializer(LiveArray, serializer=_from_live, deserializer=_to_live)


def _from_tensor(tensor: Tensor) -> tuple[NDArray[Any], str]:
    plain = tensor.detach().cpu().contiguous()
    kind = str(plain.dtype).removeprefix("torch.")
    return (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy(), kind


def _to_tensor(parts: tuple[NDArray[Any], str]) -> Tensor:
    array, kind = parts
    tensor = torch.from_numpy(np.asarray(array))
    return tensor.view(torch.bfloat16) if kind == "bfloat16" else tensor


def _from_live(array: LiveArray) -> Any:
    tensor = array.__dict__.get("tensor")
    return tensor if tensor is not None else (array.dtype, tuple(array.shape), array.stype, array.data)


def _to_live(parts: Any) -> flower.Array:
    return LiveArray(parts) if isinstance(parts, Tensor) else flower.Array(*parts)


def _failed(shard: _Shard, error: Exception) -> TrainingError:
    return TrainingError(f"clients {_some(shard.clients)} failed on a Ray actor: {_first_line(error)}")


def _some(clients: Sequence[int]) -> str:
    """A few of many numbers."""
    shown = ", ".join(str(client) for client in clients[:3])
    return shown if len(clients) <= 3 else f"{shown} and {len(clients) - 3} more"


def _first_line(error: BaseException) -> str:
    """What an error says, in one line; of an error in an actor what was raised there."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return f"{type(cause).__name__}: {cause}".splitlines()[0]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
