"""Clients in this process: a Flower ``Grid`` without polling, serialization or copies of what all clients receive."""

from __future__ import annotations

import logging
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

import flwr.app as flower
import torch
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from torch import nn

from fedpers.cohort import StateStore
from fedpers.errors import check
from fedpers.runtime.flower_private import (
    SERVER_NODE,
    delivered,
    empty_run,
    ended,
    give_id,
    server_identity,
    unavailable,
)
from fedpers.runtime.probe import Choice, probe
from fedpers.strategies.client import IDENTIFY, CohortApp, Outcome, Received, config_of
from fedpers.strategies.records import own_copy, stack, trees
from fedpers.threads import one_thread

log = logging.getLogger(__name__)
FIRST_NODE = SERVER_NODE + 1
RUN_ID = 1


class LocalGrid(Grid):
    """Runs messages in this process as soon as they are sent.

    Methods of this package run as cohorts; any other ``ClientApp`` runs unchanged, one client at a time, and gets
    records of its own, as if they had travelled. Node ids are ``FIRST_NODE + partition_id``. May be used from several
    threads, which take turns.

    Parameters
    ----------
    client_app : ClientApp
    num_supernodes : int
        Number of clients, >= 1.
    cohort : int or "auto"
        Clients that are computed together. ``auto`` measures (see :mod:`fedpers.runtime.probe`).
    workers : int or "auto"
        Threads that compute cohorts side by side, each with one intra-op thread. They never change a result.
    run_config : mapping, optional
        What clients find in ``context.run_config``.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_supernodes: int,
        *,
        cohort: int | str = "auto",
        workers: int | str = "auto",
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        most = client_app.data.num_clients if isinstance(client_app, CohortApp) else None
        good = isinstance(num_supernodes, int) and 1 <= num_supernodes <= (most or num_supernodes)
        allowed = "a whole number >= 1" + (f" and <= {most}, the clients in the data" if most else "")
        check(good, "num_supernodes", num_supernodes, allowed)
        _check_counts(cohort, workers)
        self.client_app = client_app
        self.contexts = {
            FIRST_NODE + client: flower.Context(
                run_id=RUN_ID,
                node_id=FIRST_NODE + client,
                node_config={"partition-id": client, "num-partitions": num_supernodes},
                state=flower.RecordDict(),
                run_config=dict(run_config or {}),
            )
            for client in range(num_supernodes)
        }
        self.engine = CohortEngine(client_app, cohort, workers) if isinstance(client_app, CohortApp) else None
        self._run = empty_run(RUN_ID)
        self._replies: dict[str, flower.Message] = {}
        self._turn = threading.Lock()
        self._closed = False

    def set_run(self, run: Run) -> None:
        """Set the run this grid operates in."""
        self._run = run

    @property
    def run(self) -> Run:
        """Run information."""
        return self._run

    def create_message(
        self, content: flower.RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> flower.Message:
        """Create a message, as Flower's deprecated way has it."""
        return flower.Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Node ids of all clients."""
        if self._closed:
            raise ended(self._run.run_id)
        return list(self.contexts)

    def push_messages(self, messages: Iterable[flower.Message]) -> Iterable[str]:
        """Run messages; their replies wait for :meth:`pull_messages`.

        Raises
        ------
        ValueError
            If a node does not exist; no message is run then.
        """
        messages = list(messages)
        for message in messages:
            if message.metadata.dst_node_id not in self.contexts:
                nodes = f"{FIRST_NODE} to {FIRST_NODE + len(self.contexts) - 1}"
                raise ValueError(f"node {message.metadata.dst_node_id} does not exist; there are nodes {nodes}")
        ids = [give_id(message) for message in messages]
        with self._turn:
            if self._closed:
                raise ended(self._run.run_id)
            for reply in self._handle(messages):
                give_id(reply)
                self._replies[reply.metadata.reply_to_message_id] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[flower.Message]:
        """Replies to the messages with these ids, each once; an error for an id that has none (any more)."""
        wanted = dict.fromkeys(message_ids)
        return [self._replies.pop(i) if i in self._replies else unavailable(i, self._run.run_id) for i in wanted]

    def send_and_receive(
        self, messages: Iterable[flower.Message], *, timeout: float | None = None
    ) -> Iterable[flower.Message]:
        """Run messages and return their replies; a computation in this process is not cut short by `timeout`."""
        return self.pull_messages(self.push_messages(messages))

    def close(self) -> None:
        """End the run and its worker threads."""
        self._closed = True
        if self.engine is not None:
            self.engine.close()

    # ------------------------------------------------------------------------

    def _handle(self, messages: Sequence[flower.Message]) -> list[flower.Message]:
        if self.engine is None:
            return [self._call(message) for message in messages]
        single = [m for m in messages if m.metadata.message_type == IDENTIFY]
        replies = [self._call(message) for message in single]
        kinds = dict.fromkeys(m.metadata.message_type for m in messages if m.metadata.message_type != IDENTIFY)
        for kind in kinds:
            group = [m for m in messages if m.metadata.message_type == kind]
            clients = [m.metadata.dst_node_id - FIRST_NODE for m in group]
            outcomes = self.engine.run(kind, clients, [m.content for m in group])
            for message, outcome in zip(group, outcomes, strict=True):
                if outcome.content is None:
                    replies.append(_error(message, outcome.error))
                else:
                    replies.append(flower.Message(outcome.content, reply_to=message))
        return replies

    def _call(self, message: flower.Message) -> flower.Message:
        """Run any client app on one message; what it changed in its context is kept unless it raises."""
        node = message.metadata.dst_node_id
        before = self.contexts[node]
        context = replace(
            before,
            node_config=dict(before.node_config),
            state=own_copy(before.state),
            run_config=dict(before.run_config),
        )
        try:
            reply = self.client_app(delivered(message, own_copy(message.content)), context)
            if not isinstance(reply, flower.Message) or (
                reply.metadata.reply_to_message_id != message.metadata.message_id
            ):
                raise TypeError(f"a client app must return a reply to its message, not {reply!r:.100}")
        except (Exception, SystemExit) as error:  # whatever a client's code raises becomes its answer
            log.debug("client on node %d raised", node, exc_info=True)
            return _error(message, f"{type(error).__name__}: {error}")
        self.contexts[node] = context
        if reply.has_content():
            reply.content = own_copy(reply.content)
        return reply


def _error(message: flower.Message, reason: str) -> flower.Message:
    return flower.Message(flower.Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def _check_counts(cohort: int | str, workers: int | str) -> None:
    for key, value in (("runtime.cohort", cohort), ("runtime.workers", workers)):
        good = value == "auto" or (isinstance(value, int) and value >= 1)
        check(good, key, value, "a whole number >= 1, or auto")


@dataclass
class _Chunk:
    """Clients that are computed together, and where they stand in the caller's list."""

    clients: list[int]
    places: list[int]


class CohortEngine:
    """Computes messages for many clients in cohorts, on worker threads; keeps their personal state.

    Parameters
    ----------
    app : CohortApp
    cohort, workers : int or "auto"
        See :class:`LocalGrid`.

    Attributes
    ----------
    choice : Choice or None
        Cohort size and workers in use; None until the first message.
    store : StateStore
        Personal state of all clients.
    """

    def __init__(self, app: CohortApp, cohort: int | str = "auto", workers: int | str = "auto") -> None:
        _check_counts(cohort, workers)
        self.app = app
        self.cohort = cohort
        self.workers = workers
        self.choice: Choice | None = None
        self.store = StateStore(app.data.num_clients, app.initial_state)
        self._modules: SimpleQueue[nn.Module] = SimpleQueue()
        self._pool: ThreadPoolExecutor | None = None

    def choose(self, num_clients: int) -> Choice:
        """Settle cohort size and number of workers for rounds of `num_clients` clients."""
        if self.choice is None:
            self.choice = probe(self.app, num_clients, self.cohort, self.workers)
            for _ in range(self.choice.workers):  # a module is changed while it computes, so none is shared
                self._modules.put(deepcopy(self.app.module))
            if self.choice.workers > 1:
                self._pool = ThreadPoolExecutor(
                    self.choice.workers, thread_name_prefix="cohort", initializer=torch.set_num_threads, initargs=(1,)
                )
        return self.choice

    def run(self, kind: str, clients: Sequence[int], contents: Sequence[flower.RecordDict]) -> list[Outcome]:
        """Handle one message per client; the answers stand in the order of `clients`."""
        if not clients:
            return []
        choice = self.choose(len(clients) if kind.startswith("train") else self.app.data.num_clients)
        outcomes: list[Outcome | None] = [None] * len(clients)
        tasks: list[tuple[_Chunk, Callable[[], Received], Mapping[str, Any]]] = []
        for places, received, config in _groups(contents, self.app.device):
            by_size = sorted(places, key=lambda p: (-self.app.sizes[clients[p]], clients[p]))
            for start in range(0, len(by_size), choice.cohort):
                own = by_size[start : start + choice.cohort]
                tasks.append((_Chunk([clients[p] for p in own], own), received(own), config))
        with one_thread():
            if self._pool is None:
                answers: Iterable[list[Outcome]] = (self._run_chunk(kind, *task) for task in tasks)
            else:
                futures = [self._pool.submit(self._run_chunk, kind, *task) for task in tasks]
                try:
                    answers = [future.result() for future in futures]
                except BaseException:
                    for future in futures:
                        future.cancel()
                    raise
            for (chunk, _, _), answer in zip(tasks, answers, strict=True):
                for place, outcome in zip(chunk.places, answer, strict=True):
                    outcomes[place] = outcome
        return [outcome for outcome in outcomes if outcome is not None]

    def _run_chunk(
        self, kind: str, chunk: _Chunk, received: Callable[[], Received], config: Mapping[str, Any]
    ) -> list[Outcome]:
        module = self._modules.get()
        try:
            return self._run_clients(kind, chunk.clients, received(), config, module)
        finally:
            self._modules.put(module)

    def _run_clients(
        self, kind: str, clients: list[int], received: Received, config: Mapping[str, Any], module: nn.Module
    ) -> list[Outcome]:
        try:
            state = self.store.gather(clients)
            outcomes, new, keep = self.app.run(kind, clients, state, received, config, module)
        except Exception as error:  # whatever a method raises becomes the answer of the client that caused it
            log.debug("clients %s raised", clients, exc_info=True)
            if len(clients) == 1:
                return [Outcome(None, f"{type(error).__name__}: {error}")]
            log.warning(
                "a cohort of %d clients raised %s: %s; its clients are computed one by one",
                len(clients), type(error).__name__, error,
            )  # fmt: skip
            rows = [_own_row(received, k, len(clients)) for k in range(len(clients))]
            return [self._run_clients(kind, [c], row, config, module)[0] for c, row in zip(clients, rows, strict=True)]
        if new is not None:
            self.store.scatter(clients, new, keep)
        return outcomes

    def close(self) -> None:
        """End the worker threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _own_row(received: Received, k: int, size: int) -> Received:
    """What one client of a cohort received: the common trees, or its row of stacked ones."""
    return {n: t[k : k + 1] if t.batch_size == torch.Size([size]) else t for n, t in received.items()}


def _groups(
    contents: Sequence[flower.RecordDict], device: torch.device
) -> Iterator[tuple[list[int], Callable[[list[int]], Callable[[], Received]], dict[str, Any]]]:
    """Messages that can be computed together: all with one content, or with contents of the same form."""
    kinds: dict[Any, list[int]] = {}
    times = Counter(id(content) for content in contents)
    for place, content in enumerate(contents):
        # what several clients received alike need not be stacked
        kinds.setdefault(id(content) if times[id(content)] > 1 else _form(content), []).append(place)
    for places in kinds.values():
        config = config_of(contents[places[0]])
        if all(contents[p] is contents[places[0]] for p in places):
            common = trees(contents[places[0]], device)

            def for_all(own: list[int], common: Received = common) -> Callable[[], Received]:
                return lambda: common

            yield places, for_all, config
        else:

            def for_each(own: list[int]) -> Callable[[], Received]:
                return lambda: stack([trees(contents[p], device) for p in own])

            yield places, for_each, config


def _form(content: flower.RecordDict) -> tuple[Any, ...]:
    """Names, shapes and configuration of a message."""
    arrays = tuple(
        (record, name, tuple(array.shape), array.dtype)
        for record, values in content.array_records.items()
        for name, array in values.items()
    )
    return arrays, tuple(sorted((k, str(v)) for k, v in config_of(content).items()))


def simulate(
    server_app: ServerApp,
    client_app: ClientApp,
    num_supernodes: int,
    backend_name: str = "local",
    backend_config: Mapping[str, Any] | None = None,
    enable_tf_gpu_growth: bool = False,
    verbose_logging: bool = False,
    *,
    cohort: int | str = "auto",
    workers: int | str = "auto",
    run_config: Mapping[str, Any] | None = None,
) -> None:
    """Run a Flower app in this process; takes what Flower's ``run_simulation`` takes.

    Clients' contexts persist over the whole run, with ``partition-id`` and ``num-partitions`` set; an exception in a
    client becomes an error reply; one in the server app is raised here. Returns when the server app ends.

    Parameters
    ----------
    server_app : ServerApp
    client_app : ClientApp
        Any; those made by :meth:`LocalUpdate.client_app` run as cohorts.
    num_supernodes : int
        Number of clients, >= 1.
    backend_name, backend_config, enable_tf_gpu_growth
        Accepted so that a call of ``run_simulation`` needs no other change; there is no backend to configure, and a
        warning says so when one is.
    verbose_logging : bool
        Show Flower's debug messages.
    cohort, workers
        See :class:`LocalGrid`.
    run_config : mapping, optional
        What server and clients find in ``context.run_config``.
    """
    if backend_config or enable_tf_gpu_growth:
        warnings.warn("fedpers.simulate runs in this process: backend settings have no effect", stacklevel=2)
    if verbose_logging:
        logging.getLogger("flwr").setLevel(logging.DEBUG)
    config = dict(run_config or {})
    grid = LocalGrid(client_app, num_supernodes, cohort=cohort, workers=workers, run_config=config)
    context = flower.Context(RUN_ID, SERVER_NODE, {}, flower.RecordDict(), config)
    try:
        with server_identity(RUN_ID):
            server_app(grid, context)
    finally:
        grid.close()
