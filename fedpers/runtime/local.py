"""Clients in this process: a Flower ``Grid`` without polling, serialization or copies of what all clients receive."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flwr.app as flower
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedpers.client.app import IDENTIFY, CohortApp
from fedpers.cohort.state import Block
from fedpers.errors import TrainingError, check
from fedpers.flower_private import SERVER_NODE, give_id, server_identity, unavailable
from fedpers.runtime.engine import CohortEngine, check_counts
from fedpers.runtime.foreign import ForeignClients
from fedpers.runtime.grid import FIRST_NODE, RUN_ID, ClientGrid, context_of, reply_of
from fedpers.server.collect import ReplyCollector, result_of

log = logging.getLogger(__name__)


class LocalGrid(ClientGrid):
    """Runs messages in this process as soon as they are sent.

    Methods of this package run as cohorts; any other ``ClientApp`` runs unchanged, client by client, and gets records
    of its own, as if they had travelled (:class:`~fedpers.runtime.foreign.ForeignClients`). Node ids are ``FIRST_NODE +
    partition_id``. May be used from several threads, which take turns.

    Parameters
    ----------
    client_app : ClientApp
    num_supernodes : int
        Number of clients, >= 1.
    clients_at_once : int or "auto"
        Clients that are computed together. ``auto`` measures (see :mod:`fedpers.runtime.probe`).
    workers : int or "auto"
        Threads that compute cohorts side by side, each with one intra-op thread. They never change a result. Of any
        other app: processes, see :class:`~fedpers.runtime.foreign.ForeignClients`.
    run_config : mapping, optional
        What clients find in ``context.run_config``.
    memory, folder
        For personal state, see :class:`~fedpers.runtime.engine.CohortEngine`.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_supernodes: int,
        *,
        clients_at_once: int | str = "auto",
        workers: int | str = "auto",
        run_config: Mapping[str, Any] | None = None,
        memory: float | None = None,
        folder: Path | None = None,
    ) -> None:
        super().__init__(num_supernodes, client_app.data.num_clients if isinstance(client_app, CohortApp) else None)
        check_counts(clients_at_once, workers)
        self.client_app = client_app
        self.engine: CohortEngine | None = None
        if isinstance(client_app, CohortApp) and not client_app.mods:
            self.engine = CohortEngine(client_app, clients_at_once, workers, memory=memory, folder=folder)
        self.contexts = {
            FIRST_NODE + client: context_of(client, num_supernodes, run_config or {})
            for client in range(num_supernodes)
        }
        self._foreign = ForeignClients(client_app, self.contexts, workers)
        self._replies: dict[str, flower.Message] = {}
        self._turn = threading.Lock()

    def push_messages(self, messages: Iterable[flower.Message]) -> Iterable[str]:
        """Run messages; their replies wait for :meth:`pull_messages`.

        Raises
        ------
        ValueError
            If a node does not exist; no message is run then.
        """
        accepted = self._accept(messages)
        with self._turn:
            self._check_open()
            for reply in self._handle(accepted):
                give_id(reply)
                self._replies[reply.metadata.reply_to_message_id] = reply
        return [message.metadata.message_id for message in accepted]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[flower.Message]:
        """Replies to the messages with these ids, each once; an error for an id that has none (any more)."""
        unique_ids = dict.fromkeys(message_ids)
        return [self._replies.pop(i) if i in self._replies else unavailable(i, self._run.run_id) for i in unique_ids]

    def send_and_receive(
        self, messages: Iterable[flower.Message], *, timeout: float | None = None
    ) -> Iterable[flower.Message]:
        """Run messages and return their replies; a computation in this process is not cut short by `timeout`."""
        return self.pull_messages(self.push_messages(messages))

    def send_and_fold(
        self, messages: Iterable[flower.Message], collector: ReplyCollector, *, timeout: float | None = None
    ) -> None:
        """Run messages; replies are collected cohort by cohort, so that they are never all there at once."""
        accepted = self._accept(messages)
        with self._turn:
            self._check_open()
            if self.engine is None:
                replies = self._handle(accepted)
                pairs = zip(accepted, replies, strict=True)
                collector.take({self.client_of(message): result_of(reply) for message, reply in pairs})
            elif accepted:
                clients = [self.client_of(message) for message in accepted]
                kind = accepted[0].metadata.message_type
                self.engine.run(kind, clients, [message.content for message in accepted], collector)

    def choose(self, sampled: int) -> None:
        """Settle cohort size and workers for rounds of `sampled` clients, which else happens at the first message."""
        if self.engine is not None:
            self.engine.choose(sampled)

    def described(self) -> dict[str, Any]:
        """How clients are computed, for manifests."""
        choice = None if self.engine is None else self.engine.choice
        if choice is None:
            return {"name": "local"}
        return {
            "name": "local",
            "clients_at_once": choice.clients_at_once,
            "workers": choice.workers,
            "chosen": choice.how,
            "microseconds_per_client_step": choice.microseconds,
        }

    def __str__(self) -> str:
        return str(None if self.engine is None else self.engine.choice)

    def blocks(self) -> Iterator[Block]:
        """Personal state of all clients that have any, a few at a time.

        Raises
        ------
        TrainingError
            If clients have mods, whose state is not the method's to save.
        """
        self._check_no_mods()
        return iter(()) if self.engine is None else self.engine.store.blocks()

    def load(self, blocks: Iterable[Block]) -> None:
        """Put personal state that :meth:`blocks` gave back in place of all there is."""
        self._check_no_mods()
        if self.engine is not None:
            self.engine.store.clear()
            for clients, state in blocks:
                self.engine.store.load(clients.tolist(), state)

    def _check_no_mods(self) -> None:
        if isinstance(self.client_app, CohortApp) and self.client_app.mods:
            raise TrainingError(
                "personal state of clients with mods can be neither saved nor loaded: it lies in their contexts, "
                "beside what the mods keep there."
            )

    def close(self) -> None:
        """End the run and its worker threads."""
        super().close()
        self._foreign.close()
        if self.engine is not None:
            self.engine.close()

    # ------------------------------------------------------------------------

    def _handle(self, messages: Sequence[flower.Message]) -> list[flower.Message]:
        if self.engine is None:
            return self._foreign.call(messages)
        single = [m for m in messages if m.metadata.message_type == IDENTIFY]
        replies = self._foreign.call(single)
        kinds = dict.fromkeys(m.metadata.message_type for m in messages if m.metadata.message_type != IDENTIFY)
        for kind in kinds:
            group = [m for m in messages if m.metadata.message_type == kind]
            results = self.engine.run(kind, [self.client_of(m) for m in group], [m.content for m in group])
            replies.extend(reply_of(message, result) for message, result in zip(group, results, strict=True))
        return replies


def simulate(
    server_app: ServerApp,
    client_app: ClientApp,
    num_supernodes: int,
    backend_name: str = "local",
    backend_config: Mapping[str, Any] | None = None,
    enable_tf_gpu_growth: bool = False,
    verbose_logging: bool = False,
    *,
    clients_at_once: int | str = "auto",
    workers: int | str = "auto",
    run_config: Mapping[str, Any] | None = None,
    grid: ClientGrid | None = None,
    cohort: int | str | None = None,
) -> None:
    """Run a Flower app on this machine; takes what Flower's ``run_simulation`` takes.

    Clients' contexts persist over the whole run, with ``partition-id`` and ``num-partitions`` set; an exception in a
    client becomes an error reply; one in the server app is raised here. Returns when the server app ends.

    The server app runs in this process, and so do methods of this package. Clients of other apps run in processes of
    their own, as under Flower, if they take long enough: what they change in this process's memory is lost then, unless
    ``workers=1`` keeps them here.

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
    clients_at_once, workers
        See :class:`LocalGrid`.
    run_config : mapping, optional
        What server and clients find in ``context.run_config``.
    grid : ClientGrid, optional
        Where clients run instead of this process, e.g. :class:`fedpers.runtime.ray.RayGrid`, with settings of its own
        in place of `clients_at_once` and `workers`; closed at the end.
    cohort : int or "auto", optional
        Former name of `clients_at_once`.
    """
    if cohort is not None:
        warnings.warn("cohort is called clients_at_once now", DeprecationWarning, stacklevel=2)
        clients_at_once = cohort
    if backend_config or enable_tf_gpu_growth:
        warnings.warn("fedpers.simulate runs in this process: backend settings have no effect", stacklevel=2)
    if verbose_logging:
        logging.getLogger("flwr").setLevel(logging.DEBUG)
    config = dict(run_config or {})
    given = grid
    if grid is None:
        grid = LocalGrid(
            client_app, num_supernodes, clients_at_once=clients_at_once, workers=workers, run_config=config
        )
    context = flower.Context(RUN_ID, SERVER_NODE, {}, flower.RecordDict(), config)
    try:
        if given is not None:
            same = getattr(given, "client_app", client_app) is client_app
            check(same, "client_app", type(client_app).__name__, "the app that the grid was made with")
            allowed = f"{given.num_clients}, as in the grid"
            check(given.num_clients == num_supernodes, "num_supernodes", num_supernodes, allowed)
        if isinstance(client_app, CohortApp):
            most = client_app.data.num_clients
            allowed = f"{most}, a node for each client in the data"
            check(num_supernodes == most, "num_supernodes", num_supernodes, allowed)
        with server_identity(RUN_ID):
            server_app(grid, context)
    finally:
        grid.close()
