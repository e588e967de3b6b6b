"""Flower's simulation engine as a runtime of this process."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, cast
from uuid import uuid4

import flwr.app as flower
import torch
from flwr.serverapp import Grid, ServerApp

from fedpers.client.app import STATE, CohortApp
from fedpers.cohort import Tree, leaves
from fedpers.cohort.state import BLOCK_BYTES, Block
from fedpers.errors import TrainingError
from fedpers.flower_private import kill_simulated_clients, server_identity
from fedpers.process import blocked
from fedpers.records import CONFIG, flatten_state, unflatten_state
from fedpers.runtime.flower import PATIENCE, FlowerGrid
from fedpers.runtime.flower_clients import EXCHANGE_STATE, RemoteApp
from fedpers.runtime.grid import RUN_ID
from fedpers.server.collect import result_of
from fedpers.server.exchange import Exchange

log = logging.getLogger(__name__)


class SimulationGrid(FlowerGrid):
    """The grid of a run in :class:`FlowerSimulation`.

    Parameters
    ----------
    grid, watch
        See :class:`FlowerGrid`.
    template : Tree
        A client's initial personal state, batch size [].
    """

    def __init__(self, grid: Grid, watch: Callable[[], None], template: Tree) -> None:
        super().__init__(grid, watch)
        self._template = template

    def blocks(self) -> Iterator[Block]:
        """Personal state of all clients that have any, a few at a time."""
        size = sum(value.nbytes for value in leaves(self._template).values())
        if not size:
            return
        for nodes in self._chunks(max(1, BLOCK_BYTES // size)):
            answers = self._exchange({client: (node, flower.RecordDict()) for client, node in nodes.items()})
            records = {
                c: content.array_records[STATE] for c, content in answers.items() if STATE in content.array_records
            }
            if records:
                states = [unflatten_state(record, self._template) for record in records.values()]
                yield torch.tensor(list(records)), cast(Tree, torch.cat(cast(Any, states)))

    def load(self, blocks: Iterable[Block]) -> None:
        """Replace all clients' personal state by what :meth:`blocks` gave."""
        nodes = Exchange().connect(self)
        overwrite = flower.ConfigRecord()  # in a message it says that the state is to be replaced, not only read
        self._exchange({c: (node, flower.RecordDict({CONFIG: overwrite})) for c, node in nodes.items()})
        for clients, states in blocks:
            contents = {}
            for row, client in enumerate(clients.tolist()):
                content = flower.RecordDict({CONFIG: overwrite, STATE: flatten_state(states[row : row + 1])})
                contents[client] = (nodes[client], content)
            self._exchange(contents)

    def _chunks(self, size: int) -> Iterator[dict[int, int]]:
        """Nodes by client, `size` at a time."""
        nodes = list(Exchange().connect(self).items())
        for start in range(0, len(nodes), size):
            yield dict(nodes[start : start + size])

    def _exchange(self, contents: Mapping[int, tuple[int, flower.RecordDict]]) -> dict[int, flower.RecordDict]:
        """Answers of clients on the state they keep."""
        messages = [flower.Message(content, node, EXCHANGE_STATE) for node, content in contents.values()]
        answered = {reply.metadata.src_node_id: reply for reply in self.send_and_receive(messages)}
        answers = {}
        for client, (node, _) in contents.items():
            result = result_of(answered.get(node))
            if result.content is None:
                raise TrainingError(f"client {client} does not give its personal state: {result.error}.")
            answers[client] = result.content
        return answers


class FlowerSimulation:
    """Flower's simulation engine with this many nodes; a context manager, in which several runs may follow each other.

    Starting it takes seconds: it starts Ray, and ends it. The server's side runs in the thread that calls :meth:`run`,
    so that what it raises, Ctrl-C included, comes out there as it would from a run without Flower.

    Parameters
    ----------
    num_clients : int
        >= 1; node k holds client k.
    cpus_per_actor, gpus_per_actor : float
        What a client process takes of the machine, which says how many there are.
    """

    def __init__(self, num_clients: int, *, cpus_per_actor: float = 1, gpus_per_actor: float = 0) -> None:
        self.num_clients = num_clients
        self.cpus_per_actor = cpus_per_actor
        self.gpus_per_actor = gpus_per_actor
        self._app = RemoteApp(_nothing, simulated=True)
        self._grids: SimpleQueue[Grid] = SimpleQueue()
        self._done = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._engine, name="flower", daemon=True)
        self._grid: FlowerGrid | None = None
        self._process_settings = ExitStack()  # what the engine changes in this process, undone at its end

    def __enter__(self) -> Self:
        import ray

        self._process_settings.enter_context(server_identity(RUN_ID))
        self._process_settings.enter_context(_quiet())
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Tip: In future versions of Ray", category=FutureWarning)
                self._thread.start()
                self._await(lambda: ray.is_initialized() and not self._grids.empty(), "Flower's simulation has started")
            self._grid = FlowerGrid(self._grids.get(), self._check_alive)
            self._await(
                lambda: len(list(self._nodes())) == self.num_clients, f"{self.num_clients} nodes have registered"
            )
        except BaseException:
            self._stop(at_once=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop(at_once=error is not None)

    def run(
        self, make_app: Callable[[], CohortApp], main: Callable[[Grid], None], app: CohortApp | None = None
    ) -> None:
        """Call `main` with a grid of nodes that run the app that `make_app` makes.

        Parameters
        ----------
        make_app : callable
            Called once in each client process, into which it is pickled: what it holds travels with every message.
        main : callable
            What a server does.
        app : CohortApp, optional
            What `make_app` makes, if it was made here already.

        Raises
        ------
        TrainingError
            If the engine ends before `main` does.
        Exception
            What `main` raises.
        """
        if self._grid is None:
            raise RuntimeError("FlowerSimulation.run outside of its with block")
        cohort_app = app or make_app()
        self._app.make, self._app.key = partial(_made_by, make_app), uuid4().hex
        self._app.identify = partial(_same_identity, cohort_app.identity)
        main(SimulationGrid(self._grid, self._check_alive, cohort_app.initial_state))

    def _nodes(self) -> Iterable[int]:
        assert self._grid is not None
        return self._grid.get_node_ids()

    def _engine(self) -> None:
        from flwr.simulation import run_simulation

        server = ServerApp()

        @server.main()
        def serve(grid: Grid, context: flower.Context) -> None:
            self._grids.put(grid)
            self._done.wait()

        try:
            with blocked(signal.SIGTERM):  # see fedpers.runtime.cluster.connect
                run_simulation(
                    server,
                    self._app,
                    self.num_clients,
                    backend_config={
                        # a Ray of its own: any other that runs on the machine may end at any time
                        "init_args": {"address": "local", "logging_level": "ERROR", "log_to_driver": False},
                        "client_resources": {"num_cpus": self.cpus_per_actor, "num_gpus": self.gpus_per_actor},
                    },
                )
        except (Exception, SystemExit) as error:  # told to whoever waits for replies
            self._failure = error

    def _check_alive(self) -> None:
        if not self._thread.is_alive():
            reason = self._failure
            while reason is not None and (reason.__cause__ or reason.__context__) is not None:
                reason = reason.__cause__ or reason.__context__
            cause = f" ({type(reason).__name__}: {reason})" if reason is not None else ""
            raise TrainingError(f"Flower's simulation has ended{cause}.")

    def _await(self, happened: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not happened():
            self._check_alive()
            if time.monotonic() > deadline:
                raise TrainingError(f"{PATIENCE:g} seconds have passed before {what}.")
            time.sleep(0.02)

    def _stop(self, *, at_once: bool) -> None:
        """End the engine; `at_once` does not wait for clients that still compute."""
        from fedpers.runtime.cluster import end_helpers, has_ended

        end_helpers()
        self._done.set()
        if has_ended():  # the engine waits for it, and cannot be told to stop
            self._process_settings.close()
            return
        try:
            self._thread.join(0 if at_once else PATIENCE)
            if self._thread.is_alive():
                logging.getLogger("flwr").setLevel(logging.CRITICAL)  # that actors end is no news
                kill_simulated_clients()
                self._thread.join(PATIENCE)
        finally:
            self._process_settings.close()
        if self._thread.is_alive():
            log.warning("Flower's simulation has not ended after %g seconds", PATIENCE)


def flower_simulation(
    make_app: Callable[[], CohortApp],
    num_clients: int,
    main: Callable[[Grid], None],
    *,
    app: CohortApp | None = None,
    cpus_per_actor: float = 1,
    gpus_per_actor: float = 0,
) -> None:
    """Call `main` with a grid of Flower's simulation engine; see :class:`FlowerSimulation`.

    Parameters
    ----------
    make_app, main, app
        See :meth:`FlowerSimulation.run`.
    num_clients, cpus_per_actor, gpus_per_actor
        See :class:`FlowerSimulation`.
    """
    with FlowerSimulation(num_clients, cpus_per_actor=cpus_per_actor, gpus_per_actor=gpus_per_actor) as engine:
        engine.run(make_app, main, app)


def _nothing(run_config: Mapping[str, Any]) -> CohortApp:
    raise TrainingError("no run has begun.")


def _same_identity(identity: flower.ConfigRecord, run_config: Mapping[str, Any]) -> flower.ConfigRecord:
    return identity


def _made_by(make_app: Callable[[], CohortApp], run_config: Mapping[str, Any]) -> CohortApp:
    return make_app()


@contextmanager
def _quiet() -> Iterator[None]:
    """Let Flower's log show warnings only, unless ``FLWR_LOG_LEVEL`` asks for more; undone afterwards.

    Tracebacks are left out: what they are about is raised, or is a client's answer.
    """
    logger, path = logging.getLogger("flwr"), os.environ.get("PYTHONPATH")
    migrations = logging.getLogger("alembic")  # of Flower's in-memory database
    levels = logger.level, migrations.level

    def useful(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "Traceback (most recent call last)" not in text and "`run_simulation` function is deprecated" not in text

    if not os.environ.get("FLWR_LOG_LEVEL"):
        logger.setLevel(logging.WARNING)
        migrations.setLevel(logging.WARNING)
        logger.addFilter(useful)
    try:
        yield
    finally:
        logger.setLevel(levels[0])
        migrations.setLevel(levels[1])
        logger.removeFilter(useful)
        if path is None:  # which Flower sets for Ray's workers
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = path
