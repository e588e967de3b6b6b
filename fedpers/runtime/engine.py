"""Computes clients' answers in cohorts, and keeps their personal state."""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import flwr.app as flower
import torch
from torch import nn

from fedpers.cohort import StateStore
from fedpers.errors import check
from fedpers.runtime.probe import Choice, probe
from fedpers.strategies.client import CohortApp, Outcome, Received, config_of
from fedpers.strategies.intake import Intake
from fedpers.strategies.records import stack, trees
from fedpers.threads import one_thread

log = logging.getLogger(__name__)


def check_counts(cohort: int | str, workers: int | str) -> None:
    """Refuse what is no cohort size or number of workers."""
    for key, value in (("runtime.cohort", cohort), ("runtime.workers", workers)):
        good = value == "auto" or (isinstance(value, int) and value >= 1)
        check(good, key, value, "a whole number >= 1, or auto")


def half_the_memory(device: torch.device) -> float | None:
    """Half of the bytes that this machine or a GPU has; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


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
    cohort : int or "auto"
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
    """

    def __init__(
        self,
        app: CohortApp,
        cohort: int | str = "auto",
        workers: int | str = "auto",
        *,
        clients: Sequence[int] | None = None,
        memory: float | None = None,
        folder: Path | None = None,
    ) -> None:
        check_counts(cohort, workers)
        self.app = app
        self.cohort = cohort
        self.workers = workers
        self.choice: Choice | None = None
        self.clients = list(range(app.data.num_clients)) if clients is None else list(clients)
        if memory is None:
            memory = half_the_memory(app.device)
        self.store = StateStore(self.clients, app.initial_state, memory=memory, folder=folder)
        self.changed = False
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

    def run(
        self, kind: str, clients: Sequence[int], contents: Sequence[flower.RecordDict], intake: Intake | None = None
    ) -> list[Outcome]:
        """Handle one message per client.

        Parameters
        ----------
        kind : str
            Message type.
        clients : sequence of int
        contents : sequence of RecordDict
            Theirs, in the same order.
        intake : Intake, optional
            Takes the answers in, cohort by cohort.

        Returns
        -------
        list of Outcome
            In the order of `clients`; empty with an intake.
        """
        if not clients:
            return []
        choice = self.choose(len(clients) if kind.startswith("train") else len(self.clients))
        outcomes: list[Outcome | None] = [None] * len(clients)
        tasks: list[tuple[_Chunk, Callable[[], Received], Mapping[str, Any]]] = []
        for places, received, config in _groups(contents, self.app.device):
            by_size = sorted(places, key=lambda p: (-self.app.sizes[clients[p]], clients[p]))
            for start in range(0, len(by_size), choice.cohort):
                own = by_size[start : start + choice.cohort]
                tasks.append((_Chunk([clients[p] for p in own], own), received(own), config))
        with one_thread():
            for (chunk, _, _), answer in zip(tasks, self._answers(kind, tasks), strict=True):
                if intake is not None:
                    intake.take(dict(zip(chunk.clients, answer, strict=True)))
                    continue
                for place, outcome in zip(chunk.places, answer, strict=True):
                    outcomes[place] = outcome
        return [outcome for outcome in outcomes if outcome is not None]

    def _answers(
        self, kind: str, tasks: Sequence[tuple[_Chunk, Callable[[], Received], Mapping[str, Any]]]
    ) -> Iterator[list[Outcome]]:
        """Answers to tasks in their order, each as soon as it is there."""
        if self._pool is None:
            yield from (self._run_chunk(kind, *task) for task in tasks)
            return
        futures = deque(self._pool.submit(self._run_chunk, kind, *task) for task in tasks)
        try:
            while futures:  # taken out of the queue, so that an answer's memory is free after its use
                yield futures.popleft().result()
        finally:
            for future in futures:
                future.cancel()

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
            self.changed = True
        return outcomes

    def close(self) -> None:
        """End the worker threads and let go of files."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self.store.close()


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
