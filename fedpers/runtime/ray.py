"""Clients on a Ray cluster: a Flower ``Grid`` over actors.

Each actor owns shards of clients: the network comes once for all of them, their data once, and their personal state
stays. A round is one message per shard, what all clients receive is put into the object store once, and replies are
folded where they are made. Shards are dealt by measured costs and keep their members, so that an actor or a node that
dies changes no result: a shard is taken over by another actor, gets its state as last saved, and computes the messages
since then once more.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import flwr.app as flower
import ray

from fedpers.client.app import IDENTIFY, CohortApp, config_of
from fedpers.cohort.state import BLOCK_BYTES, Block
from fedpers.cohort.tree import leaves
from fedpers.errors import ConfigError, TrainingError
from fedpers.flower_private import give_id, unavailable
from fedpers.records import num_bytes
from fedpers.runtime.actor import Packed, unpack
from fedpers.runtime.cluster import check_alive, give_up
from fedpers.runtime.engine import check_counts
from fedpers.runtime.grid import ClientGrid, reply_of
from fedpers.runtime.probe import Choice
from fedpers.runtime.ray_actors import Actor, ActorDied, ActorPool, get, put, some
from fedpers.runtime.ray_shards import Job, Shard, deal, steps_of
from fedpers.runtime.states import read_states, write_states
from fedpers.server.collect import ReplyCollector, ReplyRules
from fedpers.settings import RuntimeConfig, options

log = logging.getLogger(__name__)
DEATHS = 3
"""Actors that a shard may lose on one message before the run is given up."""
POLL = 0.1
"""Seconds after which whoever waits for actors looks whether the run is to stop."""
SAVE_AFTER = 32
"""Messages of a shard that are kept for computing them again before the grid saves personal state by itself."""
SAVE_AFTER_BYTES = 2**30
"""Bytes that these messages may hold."""
MEASURED = 64
"""Clients, the largest ones, whose data an actor gets to measure cohort sizes and costs."""


class RayGrid(ClientGrid):
    """Runs messages on the actors of a Ray cluster.

    Node ids are ``FIRST_NODE + client``. Only methods of this package run here; any other Flower app runs in process or
    on Flower's engines. To be used from one thread.

    Parameters
    ----------
    client_app : CohortApp
    num_clients : int, optional
        All clients of the data if not given.
    address : str, optional
        ``HOST:PORT`` of a running cluster, or ``auto`` for that of this machine; ``RAY_ADDRESS`` if not given, and if
        there is none, Ray is started on this machine. A cluster that this process is connected to already is used as
        it is.
    actors : int or "auto"
        Number of actors and of shards; ``auto`` is as many as the cluster has room for.
    cpus_per_actor, gpus_per_actor : float
        What an actor reserves; a share of a GPU is fine. Actors with GPUs compute on them.
    clients_at_once : int or "auto"
        Clients that are computed together; ``auto`` is measured on an actor.
    memory : float, optional
        Bytes that personal state of a shard may take before it lies in memory-mapped files; the actor's share of half
        of its machine's memory if not given.
    folder : str, optional
        Where an actor makes these files; default is its machine's folder for temporary files.

    Attributes
    ----------
    shards : list
        Clients by the actor that computes them.
    choice : Choice or None
        Cohort size, once it is chosen.
    costs : tuple of float or None
        Seconds of a client in a round: beside its steps, and for each of them; None: not measured.

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
        clients_at_once: int | str = "auto",
        memory: float | None = None,
        folder: str | None = None,
    ) -> None:
        if not isinstance(client_app, CohortApp):
            allowed = "a client app made by LocalUpdate.client_app; others run with fedpers.simulate or under Flower"
            raise ConfigError("client_app", type(client_app).__name__, allowed)
        if client_app.mods:
            names = [getattr(mod, "__name__", type(mod).__name__) for mod in client_app.mods]
            raise ConfigError("mods", names, "none on Ray; client mods run in process or under Flower")
        max_clients = client_app.data.num_clients
        super().__init__(max_clients if num_clients is None else num_clients, max_clients)
        check_counts(clients_at_once, 1)
        options(RuntimeConfig)["actors"].check(actors)
        self.client_app = client_app
        self.memory = memory
        self.shards: list[Shard] = []
        self.choice: Choice | None = None
        self.costs: tuple[float, float] | None = None
        self._clients_at_once = clients_at_once
        self._keeps_state = bool(leaves(client_app.initial_state))
        self._saved: Path | None = None  # where personal state was last written to
        self._saved_by_grid: tempfile.TemporaryDirectory[str] | None = None
        self._waiting: dict[str, tuple[Job, int, flower.Message]] = {}  # by message id: its place in which job
        self._known: dict[str, flower.Message] = {}  # replies that needed no actor
        self._nodes = 0
        self._app: Any = None  # the app without data, in the object store once
        self._pool = ActorPool(
            address, actors, self.num_clients, cpus=cpus_per_actor, gpus=gpus_per_actor, folder=folder
        )

    # ------------------------------------------------------------------ messages

    def push_messages(self, messages: Iterable[flower.Message]) -> Iterable[str]:
        """Start messages; :meth:`pull_messages` gives their replies as they come.

        Raises
        ------
        ValueError
            If a node does not exist; no message is started then.
        """
        accepted = self._accept(messages)
        self._start(accepted)
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
        """Run messages and return the replies that come within `timeout` seconds (None: all).

        A shard that takes longer is given up: its actor is replaced, and its clients keep the state they had.
        """
        accepted = self._accept(messages)
        jobs = self._start(accepted)
        self._collect(jobs, timeout)
        replies = [self._reply(message.metadata.message_id) for message in accepted]
        for message in accepted:
            self._waiting.pop(message.metadata.message_id, None)
        self._give_up(jobs)
        return [reply for reply in replies if reply is not None]

    def send_and_fold(
        self, messages: Iterable[flower.Message], collector: ReplyCollector, *, timeout: float | None = None
    ) -> None:
        """Run messages; replies are folded in the actors, and their folds merged in the order of shards.

        For `timeout` see :meth:`send_and_receive`.
        """
        accepted = self._accept(messages)
        jobs = self._start(accepted, collector.rules)
        self._collect(jobs, timeout)
        for message in accepted:
            self._waiting.pop(message.metadata.message_id, None)
        parts = [job.answer.collected for job in jobs if job.answer is not None]
        collector.collected.merge(part for part in parts if part is not None)
        for job in jobs:
            job.answer = None
        self._give_up(jobs)

    def _reply(self, message_id: str) -> flower.Message | None:
        """Reply to one message if it is there, once; an error for an id that stands for none (any more)."""
        if message_id in self._known:
            return self._known.pop(message_id)
        if message_id not in self._waiting:
            return unavailable(message_id, self._run.run_id)
        job, place, message = self._waiting[message_id]
        if not job.done:
            return None
        del self._waiting[message_id]
        reply = reply_of(message, job.read().results[place])
        give_id(reply)
        return reply

    # ---------------------------------------------------------------------- jobs

    def _start(self, messages: list[flower.Message], rules: ReplyRules | None = None) -> list[Job]:
        """Send messages to the actors, one job for each shard and type of message."""
        self._check_open()
        by_kind: dict[str, list[flower.Message]] = {}
        for message in messages:
            if message.metadata.message_type == IDENTIFY:
                reply = flower.Message(self.client_app.identify_reply(self.client_of(message)), reply_to=message)
                give_id(reply)
                self._known[message.metadata.message_id] = reply
            else:
                by_kind.setdefault(message.metadata.message_type, []).append(message)
        jobs = []
        for kind, group in by_kind.items():
            self.choose(len(group))
            jobs.extend(self._jobs(kind, group, rules))
        if self._keeps_state and any(self._is_long(shard.jobs) for shard in self.shards):
            self._save_here()
        for job in jobs:
            job.shard.jobs.append(job)
            self._submit(job)
        return jobs

    def _is_long(self, jobs: Sequence[Job]) -> bool:
        return len(jobs) >= SAVE_AFTER or sum(job.size for job in jobs) > SAVE_AFTER_BYTES

    def _jobs(self, kind: str, messages: list[flower.Message], rules: ReplyRules | None) -> list[Job]:
        """Jobs of one type of message; what several shards receive is put into the object store once."""
        for content in {id(message.content): message.content for message in messages}.values():
            self.client_app.check_config(config_of(content))
        owner = {client: shard.number for shard in self.shards for client in shard.clients}
        by_shard: dict[int, list[flower.Message]] = {}
        shards_of: dict[int, set[int]] = {}
        for message in messages:
            number = owner[self.client_of(message)]
            by_shard.setdefault(number, []).append(message)
            shards_of.setdefault(id(message.content), set()).add(number)
        common = {id(m.content): m.content for m in messages if len(shards_of[id(m.content)]) > 1}
        places = {key: place for place, key in enumerate(common)}
        size = sum(num_bytes(content) for content in common.values())
        sent = put((list(common.values()), rules))
        jobs = []
        for number, group in sorted(by_shard.items()):
            of_shard = {id(m.content): m.content for m in group if id(m.content) not in common}
            behind = {key: -1 - place for place, key in enumerate(of_shard)}
            which = [places[key] if key in common else behind[key] for key in (id(m.content) for m in group)]
            clients = [self.client_of(message) for message in group]
            # as they are now: whoever sent them may change them before they have to be computed again
            arguments = (kind, clients, which, sent, put(list(of_shard.values())))
            job = Job(self.shards[number], arguments, size + sum(map(num_bytes, of_shard.values())), len(group))
            for place, message in enumerate(group):
                self._waiting[message.metadata.message_id] = (job, place, message)
            jobs.append(job)
        return jobs

    def _submit(self, job: Job) -> None:
        """Send a job to its shard's actor; the answer of one that is done is not wanted again."""
        job.actor = job.shard.actor
        reference = job.actor.remote.run.remote(job.shard.number, *job.arguments, not job.done)
        job.future = None if job.done else reference.future()

    def _collect(self, jobs: Sequence[Job], timeout: float | None) -> None:
        """Wait for the answers of jobs, at most `timeout` seconds; what a dead actor owes is computed again."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        while waiting := {job.future: job for job in jobs if job.future is not None}:
            left = max(0.0, end - time.monotonic())
            # not with ray.wait: in it a signal is not seen, and it ends this process when Ray's own are stopped
            ready, _ = wait(waiting, timeout=min(left, POLL), return_when=FIRST_COMPLETED)
            if self.stopping():
                check_alive()
            if not ready and left <= POLL:
                return
            for future in ready:
                if waiting[future].future is future:  # else its actor died meanwhile and it was sent anew
                    self._take(waiting[future])

    def _take(self, job: Job) -> None:
        """Take a job's answer; if its actor died, others take its shards over and compute it again."""
        shard = job.shard
        assert job.actor is not None
        try:
            packed: Packed = get(job.future, shard.clients)
        except ActorDied as reason:
            self._died(shard, job.actor, reason)
            return
        job.answer, job.done, job.future, shard.deaths = unpack(packed), True, None, 0
        if not job.answer.changed:
            shard.jobs.remove(job)

    def _give_up(self, jobs: Sequence[Job]) -> None:
        """Replace the actors of jobs whose time is over: they would hold up everything that comes after."""
        late = [job for job in jobs if not job.done]
        for job in late:
            job.shard.jobs.remove(job)
        for actor in {job.actor for job in late if job.actor is not None and job.actor.alive}:
            log.warning("a Ray actor took longer than the timeout and is replaced")
            self._replace(actor)

    # -------------------------------------------------------------------- shards

    def choose(self, sampled: int) -> None:
        """Start the actors and deal out the clients for rounds of `sampled` clients; only the first call does."""
        if self.shards:
            return
        self._check_open()
        app = self.client_app
        self._pool.start()
        self._nodes = sum(node["Alive"] for node in ray.nodes())
        self._app = put(app.restrict(()).to("cpu"))
        self.choice, self.costs = self._measured(max(1, -(-sampled // self._pool.size)))
        base, step = self.costs or (0.0, 1.0)  # else in proportion to steps
        expected = [base + step * steps_of(app, client) for client in range(self.num_clients)]
        self.shards = [
            Shard(number, clients, sum(expected[c] for c in clients), self._pool.actors[number])
            for number, clients in enumerate(deal(expected, self._pool.size))
        ]
        hosting = [(shard, shard.actor, self._hosting(shard)) for shard in self.shards]
        for shard, actor, reference in hosting:
            try:
                get(reference, shard.clients)
            except ActorDied as reason:
                self._died(shard, actor, reason)

    def _measured(self, sampled: int) -> tuple[Choice, tuple[float, float] | None]:
        """Cohort size and costs, as the first actor measures them."""
        app = self.client_app
        largest = sorted(range(self.num_clients), key=lambda c: (-app.sizes[c], c))[:MEASURED]
        part = put(app.data.restrict(largest).to("cpu"))
        for _ in range(DEATHS):
            try:
                first = self._pool.actors[0].remote
                measured: tuple[Choice, tuple[float, float] | None] = get(
                    first.measure.remote(self._app, part, sampled, self._clients_at_once)
                )
                return measured
            except ActorDied as reason:
                log.warning("a Ray actor died while it measured (%s)", reason)
                self._pool.restart_first()
        raise TrainingError(f"{DEATHS} Ray actors in a row died while they measured how long clients take.")

    def _hosting(self, shard: Shard) -> Any:
        """Send a shard's data to its actor, and what all shards share."""
        part = put(self.client_app.data.restrict(shard.clients).to("cpu"))
        return shard.actor.remote.host.remote(shard.number, self._app, part, shard.clients, self.choice, self.memory)

    def _died(self, shard: Shard, actor: Actor, reason: ActorDied) -> None:
        """Let others take over the shards of an actor that died, unless that has happened already."""
        if self.stopping():
            raise give_up(f"an actor is gone ({reason}).") from reason
        if shard.actor is not actor:
            return
        shard.deaths += 1
        if shard.deaths > DEATHS:
            raise TrainingError(
                f"{shard.deaths} Ray actors in a row died while they computed clients {some(shard.clients)}: {reason}"
            ) from reason
        lost = sum(len(other.clients) for other in self.shards if other.actor is actor)
        log.warning("a Ray actor died (%s); its %d clients are computed again by others", reason, lost)
        self._replace(actor)

    def _replace(self, actor: Actor) -> None:
        """Let other actors compute the shards of one that is, or shall be, no more."""
        self._pool.end(actor)
        for shard in [shard for shard in self.shards if shard.actor is actor]:
            self._restore(shard)

    def _restore(self, shard: Shard) -> None:
        """Give a shard to another actor: with its state as last saved, and all messages since then once more."""
        actor = shard.actor = self._pool.replacement(self._cost_of)
        try:
            get(self._hosting(shard), shard.clients)
            self._load_saved(shard)
        except ActorDied as reason:
            self._died(shard, actor, reason)
            return
        for job in shard.jobs:  # in their order, which is that in which an actor works
            self._submit(job)

    def _cost_of(self, actor: Actor) -> float:
        """Cost of all that an actor has to compute."""
        return sum(shard.cost for shard in self.shards if shard.actor is actor)

    def _load_saved(self, shard: Shard) -> None:
        if self._saved is not None:
            for block in read_states(self._saved, self.client_app.initial_state, shard.clients):
                get(shard.actor.remote.load.remote(shard.number, put(block)), shard.clients)

    # --------------------------------------------------------------------- state

    def blocks(self) -> Iterator[Block]:
        """Personal state of all clients that have any, a few at a time, after all messages that were sent."""
        if not self._keeps_state:
            return
        self._collect([job for shard in self.shards for job in shard.jobs], None)
        size = sum(value.nbytes for value in leaves(self.client_app.initial_state).values())
        width = max(1, BLOCK_BYTES // max(1, size))
        for shard in self.shards:
            written = self._call(shard, "written")
            for start in range(0, len(written), width):
                yield unpack(self._call(shard, "states", written[start : start + width]))

    def load(self, blocks: Iterable[Block]) -> None:
        """Put personal state that :meth:`blocks` gave in place of all there is."""
        self.choose(self.num_clients)
        self._collect([job for shard in self.shards for job in shard.jobs], None)
        self._save_here(blocks)  # first: an actor may die while it is loaded
        for shard in self.shards:
            while True:
                actor = shard.actor
                try:
                    get(actor.remote.clear.remote(shard.number), shard.clients)
                    self._load_saved(shard)
                    break
                except ActorDied as reason:
                    self._died(shard, actor, reason)

    def saved(self, folder: Path) -> None:
        """Be told that personal state as :meth:`blocks` gave it last lies in a folder, until told of another.

        (:func:`~fedpers.runtime.states.write_states` made it.)
        """
        self._saved = folder
        for shard in self.shards:
            shard.jobs = [job for job in shard.jobs if not job.done]
        if self._saved_by_grid is not None and folder != Path(self._saved_by_grid.name):
            self._saved_by_grid.cleanup()
            self._saved_by_grid = None

    def _save_here(self, blocks: Iterable[Block] | None = None) -> None:
        """Save personal state in a folder of this grid's own, so that messages need not be kept."""
        new = tempfile.TemporaryDirectory(prefix="states-", ignore_cleanup_errors=True)
        try:
            write_states(Path(new.name), self.blocks() if blocks is None else blocks)
        except OSError as error:
            new.cleanup()
            reason = error.strerror or error
            raise TrainingError(f"personal state cannot be kept in {new.name} ({reason}); set TMPDIR.") from error
        before, self._saved_by_grid = self._saved_by_grid, new
        self.saved(Path(new.name))
        if before is not None:
            before.cleanup()

    def _call(self, shard: Shard, method: str, *arguments: Any) -> Any:
        """Call an actor about one of its shards, whichever actor that is."""
        while True:
            actor = shard.actor
            try:
                return get(getattr(actor.remote, method).remote(shard.number, *arguments), shard.clients)
            except ActorDied as reason:
                self._died(shard, actor, reason)

    # ---------------------------------------------------------------------- rest

    def described(self) -> dict[str, Any]:
        """How clients are computed, for manifests."""
        base, step = (None, None) if self.costs is None else (1e6 * self.costs[0], 1e6 * self.costs[1])
        return {
            "name": "ray",
            "clients_at_once": self.choice.clients_at_once if self.choice else None,
            "chosen": self.choice.how if self.choice else None,
            "actors": len(self.shards),
            "nodes": self._nodes,
            "clients_per_actor": [len(shard.clients) for shard in self.shards],
            "microseconds_per_client": base,
            "microseconds_per_client_step": step,
        }

    def __str__(self) -> str:
        return f"{len(self.shards)} Ray actors, each: {self.choice}"

    def close(self) -> None:
        """Stop the actors, and Ray if it was started here."""
        if self._closed:
            return
        super().close()
        try:
            self._pool.close()
        finally:
            if self._saved_by_grid is not None:
                self._saved_by_grid.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
