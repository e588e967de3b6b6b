"""Computes clients' answers in cohorts, and keeps their personal state."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import flwr.app as flower
import numpy as np
import torch
from torch import nn

from fedpers.client.app import CohortApp, config_of
from fedpers.client.results import ClientResult, CohortResult
from fedpers.client.update import Received
from fedpers.cohort import StateStore
from fedpers.cohort.modules import copy_network
from fedpers.failures import FirstOfEachKind, sentence_of, with_traceback
from fedpers.process import keep_freed_memory, one_thread, total_memory
from fedpers.records import array_records, stack, trees
from fedpers.runtime.probe import Choice, probe
from fedpers.server.collect import ReplyCollector
from fedpers.settings import RuntimeConfig, options

log = logging.getLogger(__name__)
AHEAD = 2
"""Cohorts per worker that are computed or wait to be folded at once: what is not folded yet takes memory."""


class _Group(NamedTuple):
    """Messages whose clients can be computed together."""

    positions: list[int]
    """Which of the messages."""
    load: Callable[[list[int]], Received]
    """Reads what the messages at some of these positions hold: trees that all share, or stacked ones."""
    config: dict[str, Any]
    """Their configuration."""


class _Task(NamedTuple):
    """A cohort to compute."""

    clients: list[int]
    load: Callable[[], Received]
    """Reads what its clients received, when their turn comes."""
    config: dict[str, Any]


def check_counts(clients_at_once: int | str, workers: int | str) -> None:
    """Refuse what is no cohort size or number of workers."""
    known = options(RuntimeConfig)
    known["clients_at_once"].check(clients_at_once)
    known["workers"].check(workers)


def half_the_memory(device: torch.device) -> float | None:
    """Half of the bytes of :func:`fedpers.process.total_memory`; None where that is not known."""
    total = total_memory(device)
    return None if total is None else total / 2


class CohortEngine:
    """Computes messages for many clients in cohorts, on worker threads; keeps their personal state.

    Parameters
    ----------
    app : CohortApp
    clients_at_once : int or "auto"
        Clients that are computed together. ``auto`` measures (see :mod:`fedpers.runtime.probe`).
    workers : int or "auto"
        Threads that compute cohorts side by side, each with one intra-op thread. They never change a result.
    clients : sequence of int, optional
        Who is computed here; all clients if not given.
    memory : float, optional
        Bytes that personal state may take before it lies in memory-mapped files; half of what the machine or the GPU
        has if not given.
    folder : Path, optional
        Where these files are made.

    Attributes
    ----------
    choice : Choice or None
        Cohort size and workers in use; None until the first message.
    store : StateStore
        Personal state of the clients computed here.
    changed : bool
        Whether any of it has changed since whoever saves it last set this to False.
    """

    def __init__(
        self,
        app: CohortApp,
        clients_at_once: int | str = "auto",
        workers: int | str = "auto",
        *,
        clients: Sequence[int] | None = None,
        memory: float | None = None,
        folder: Path | None = None,
    ) -> None:
        check_counts(clients_at_once, workers)
        keep_freed_memory()
        self.app = app
        self.clients_at_once = clients_at_once
        self.workers = workers
        self.choice: Choice | None = None
        self.clients = list(range(app.data.num_clients)) if clients is None else list(clients)
        if memory is None:
            memory = half_the_memory(app.device)
        self.store = StateStore(self.clients, app.initial_state, memory=memory, folder=folder)
        self.changed = False
        self._failures = FirstOfEachKind(log)
        self._modules: SimpleQueue[nn.Module] = SimpleQueue()
        self._pool: ThreadPoolExecutor | None = None

    def choose(self, num_clients: int) -> Choice:
        """Settle cohort size and number of workers for rounds of `num_clients` clients."""
        if self.choice is None:
            self.choice = probe(self.app, num_clients, self.clients_at_once, self.workers)
            for _ in range(self.choice.workers):  # a module is changed while it computes, so none is shared
                self._modules.put(copy_network(self.app.module))
            if self.choice.workers > 1:
                self._pool = ThreadPoolExecutor(
                    self.choice.workers, thread_name_prefix="cohort", initializer=torch.set_num_threads, initargs=(1,)
                )
        return self.choice

    def run(
        self,
        kind: str,
        clients: Sequence[int],
        contents: Sequence[flower.RecordDict],
        collector: ReplyCollector | None = None,
    ) -> list[ClientResult]:
        """Handle one message per client.

        Parameters
        ----------
        kind : str
            Message type.
        clients : sequence of int
        contents : sequence of RecordDict
            Theirs, in the same order.
        collector : ReplyCollector, optional
            Takes the answers in, cohort by cohort.

        Returns
        -------
        list of ClientResult
            In the order of `clients`; empty with a collector.

        Raises
        ------
        ConfigError
            If a message's configuration has a key that no client reads.
        """
        if not clients:
            return []
        choice = self.choose(len(clients) if kind.startswith("train") else len(self.clients))
        results: dict[int, ClientResult] = {}
        tasks: list[_Task] = []
        for group in _groups(contents, self.app.device):
            self.app.check_config(group.config)
            by_size = sorted(group.positions, key=lambda p: (-self.app.sizes[clients[p]], clients[p]))
            for network in sorted({self.app.kind(clients[p]) for p in by_size}):
                alike = [p for p in by_size if self.app.kind(clients[p]) == network]
                for cohort in np.array_split(alike, -(-len(alike) // choice.clients_at_once)):  # of nearly equal size
                    chunk = cohort.tolist()
                    tasks.append(_Task([clients[p] for p in chunk], partial(group.load, chunk), group.config))
        with one_thread():
            for answers in self._answers(kind, tasks):
                for answer in answers:
                    if collector is not None:
                        collector.take_cohort(answer)
                    else:
                        results.update(zip(answer.clients, answer.rows(), strict=True))
        return [] if collector is not None else [results[client] for client in clients]

    def _answers(self, kind: str, tasks: Sequence[_Task]) -> Iterator[list[CohortResult]]:
        """Answers to tasks in their order, each as soon as it is there; a few tasks are ahead of them."""
        if self._pool is None:
            yield from (self._run_task(kind, task) for task in tasks)
            return
        assert self.choice is not None
        waiting = iter(tasks)
        futures = deque(
            self._pool.submit(self._run_task, kind, task) for task in islice(waiting, AHEAD * self.choice.workers)
        )
        try:
            while futures:  # taken out of the queue, so that an answer's memory is free after its use
                yield futures.popleft().result()
                futures.extend(self._pool.submit(self._run_task, kind, task) for task in islice(waiting, 1))
        finally:
            for future in futures:
                future.cancel()

    def _run_task(self, kind: str, task: _Task) -> list[CohortResult]:
        module = self._modules.get()
        try:
            return self._run_clients(kind, task.clients, task.load(), task.config, module)
        finally:
            self._modules.put(module)

    def _run_clients(
        self, kind: str, clients: list[int], received: Received, config: Mapping[str, Any], module: nn.Module
    ) -> list[CohortResult]:
        """Answers of a cohort; of one that raised, those of each of its clients."""
        try:
            state = self.store.gather(clients)
            result, new_state, finite = self.app.run(kind, clients, state, received, config, module)
            if new_state is not None:
                self.store.scatter(clients, new_state, finite)
                self.changed = True
            return [result]
        except Exception as error:  # whatever a method raises becomes the answer of the client that caused it
            reason = with_traceback(error)
        if len(clients) == 1:
            return [CohortResult(clients, [{}], errors={clients[0]: reason})]
        if self._failures.note(f"a cohort of {len(clients)} clients", reason):
            text = "a cohort of %d clients raised %s; its clients are computed one by one"
            log.warning(text, len(clients), sentence_of(reason))
        alone = []  # here, where the error no longer holds on to the cohort's memory
        for k, client in enumerate(clients):
            alone += self._run_clients(kind, [client], _row_of(received, k, len(clients)), config, module)
        return alone

    def close(self) -> None:
        """End the worker threads and let go of files."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self.store.close()


def _row_of(received: Received, k: int, size: int) -> Received:
    """What one client of a cohort received: the common trees, or its row of stacked ones."""
    return {n: t[k : k + 1] if t.batch_size == torch.Size([size]) else t for n, t in received.items()}


def _groups(contents: Sequence[flower.RecordDict], device: torch.device) -> Iterator[_Group]:
    """Groups of messages that can be computed together: all with one content, or with contents of the same form."""
    alike: dict[Any, list[int]] = {}
    times = Counter(id(content) for content in contents)
    for position, content in enumerate(contents):
        # what several clients received alike need not be stacked
        alike.setdefault(id(content) if times[id(content)] > 1 else _form(content), []).append(position)
    for positions in alike.values():
        first = contents[positions[0]]
        if all(contents[p] is first for p in positions):
            yield _Group(positions, partial(_common_content, trees(first, device)), config_of(first))
        else:
            yield _Group(positions, partial(_stacked_contents, contents, device), config_of(first))


def _common_content(common: Received, positions: list[int]) -> Received:
    return common


def _stacked_contents(contents: Sequence[flower.RecordDict], device: torch.device, positions: list[int]) -> Received:
    return stack([trees(contents[p], device) for p in positions])


def _form(content: flower.RecordDict) -> tuple[Any, ...]:
    """Names, shapes and configuration of a message."""
    arrays = tuple(
        (record, name, tuple(array.shape), array.dtype)
        for record, values in array_records(content).items()
        for name, array in values.items()
    )
    return arrays, tuple(sorted((k, str(v)) for k, v in config_of(content).items()))
