"""Any Flower ``ClientApp``, client by client: in this process, or spread over processes as under Flower's engine."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import flwr.app as flower
import numpy as np
import torch
from flwr.clientapp import ClientApp

from fedpers.client.app import CohortApp
from fedpers.failures import FirstOfEachKind, sentence_of, with_traceback
from fedpers.flower_private import delivered
from fedpers.process import blocked, cores, one_thread
from fedpers.records import own_copy
from fedpers.runtime.grid import error_reply

log = logging.getLogger(__name__)
TRIAL_CALLS, MIN_SECONDS_FOR_PROCESSES = 2, 0.02
"""Calls by which ``workers=auto`` decides, and the seconds that the faster one must take for processes to pay."""
ReplyAndContext = tuple[flower.Message, flower.Context | None]
"""A client's reply, and its context as it is then; None if it raised and keeps the former one."""
_app: ClientApp | None = None
"""The app of a client process."""


class ForeignClients:
    """Calls a client app on messages; each client keeps its context.

    Parameters
    ----------
    app : ClientApp
    contexts : dict of int to Context
        By node id.
    workers : int or "auto"
        Processes, each with a fixed part of the clients and one thread for an operation. With 1, and where processes
        cannot be forked (not on Linux, or CUDA is in use), and for methods of this package with mods, clients are
        called in this process, one after the other. ``auto`` calls clients here until :data:`TRIAL_CALLS` have
        answered without an error, and goes on with a process for each core if they took longer than what travels
        between processes.
    """

    def __init__(self, app: ClientApp, contexts: dict[int, flower.Context], workers: int | str = "auto") -> None:
        self.app = app
        self.contexts = contexts
        self._workers = min(cores() if workers == "auto" else int(workers), len(contexts))
        self._trial: list[float] | None = [] if workers == "auto" else None  # seconds of the first calls
        self._processes: dict[int, tuple[ProcessPoolExecutor, int]] = {}  # with the id of the process
        self._starts: Counter[int] = Counter()
        self._failures = FirstOfEachKind(log)

    def call(self, messages: Sequence[flower.Message]) -> list[flower.Message]:
        """Replies to messages, in their order.

        What a client changed in its context is kept unless it raises. When a process dies, all messages it had not
        answered get a reply with an error, since nobody knows which one killed it; another takes its place.
        """
        replies: list[flower.Message] = []
        with one_thread():
            while len(replies) < len(messages) and not self._use_processes():
                replies.append(self._call_here(messages[len(replies)]))
        futures = [(message, *self._submit(message)) for message in messages[len(replies) :]]
        return replies + [self._store_context(f[0], self._result(*f)) for f in futures]

    def _use_processes(self) -> bool:
        """Whether the next client is called in another process."""
        in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        if self._workers == 1 or sys.platform != "linux" or in_use or isinstance(self.app, CohortApp):
            return False
        if self._trial is None:
            return True
        return len(self._trial) == TRIAL_CALLS and min(self._trial) > MIN_SECONDS_FOR_PROCESSES

    def _call_here(self, message: flower.Message) -> flower.Message:
        start = time.perf_counter()
        answer = call_client(self.app, message, self.contexts[message.metadata.dst_node_id])
        if self._trial is not None and len(self._trial) < TRIAL_CALLS and not answer[0].has_error():
            self._trial.append(time.perf_counter() - start)
        return self._store_context(message, answer)

    def _submit(self, message: flower.Message) -> tuple[ProcessPoolExecutor | None, Future[ReplyAndContext]]:
        """Hand a message to the process of its client; a process that has died is replaced once."""
        node = message.metadata.dst_node_id
        failed: Future[ReplyAndContext] = Future()
        for _ in range(2):
            executor = None
            try:
                executor = self._executor(node % self._workers)
                return executor, executor.submit(_call, message, self.contexts[node])
            except BrokenProcessPool as error:
                self._drop(node % self._workers, executor)
                failed = Future()
                failed.set_exception(error)
        return None, failed

    def _executor(self, index: int) -> ProcessPoolExecutor:
        """The running process number `index`, started if there is none."""
        if index not in self._processes:
            seed = torch.initial_seed() + index + self._workers * self._starts[index]
            self._starts[index] += 1
            with blocked(signal.SIGINT):  # in the midst of it, it would leave a process behind that nobody ends
                fork = multiprocessing.get_context("fork")
                initial = (self.app, seed, os.getpid())
                executor = ProcessPoolExecutor(1, fork, initializer=_initialize_process, initargs=initial)
                self._processes[index] = executor, executor.submit(os.getpid).result()
        return self._processes[index][0]

    def _drop(self, index: int, executor: ProcessPoolExecutor | None) -> None:
        """Forget a process that has died, unless another has taken its place."""
        if executor is not None and self._processes.get(index, (None, 0))[0] is executor:
            self._processes.pop(index)[0].shutdown(wait=False)

    def _result(
        self, message: flower.Message, executor: ProcessPoolExecutor | None, future: Future[ReplyAndContext]
    ) -> ReplyAndContext:
        try:
            return future.result()
        except BrokenProcessPool:
            self._drop(message.metadata.dst_node_id % self._workers, executor)
            return error_reply(message, "its process ended before it answered"), None
        except Exception as error:  # what cannot travel from process to process
            return error_reply(message, with_traceback(error)), None

    def _store_context(self, message: flower.Message, answer: ReplyAndContext) -> flower.Message:
        reply, context = answer
        node = message.metadata.dst_node_id
        if context is not None:
            self.contexts[node] = context
        if reply.has_error():
            reason = reply.error.reason or ""
            if self._failures.note(f"the client on node {node}", reason):
                log.warning("the client on node %d raised %s", node, sentence_of(reason))
        return reply

    def close(self) -> None:
        """End the processes at once, whatever they do."""
        for executor, process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            executor.shutdown(cancel_futures=True)
        self._processes = {}


def call_client(app: ClientApp, message: flower.Message, before: flower.Context) -> ReplyAndContext:
    """Call an app on one message with records of its own, as if they had travelled; what it raises is its answer."""
    context = replace(
        before, node_config=dict(before.node_config), state=own_copy(before.state), run_config=dict(before.run_config)
    )
    try:
        reply = app(delivered(message, own_copy(message.content)), context)
        is_message = isinstance(reply, flower.Message)
        if not is_message or reply.metadata.reply_to_message_id != message.metadata.message_id:
            if is_message and reply.has_error():  # Flower's mods give theirs as a reply to the reply
                return error_reply(message, reply.error.reason or f"error {reply.error.code}"), None
            raise TypeError(f"a client app must return a reply to its message, not {reply!r:.100}")
    except (Exception, SystemExit) as error:  # whatever a client's code raises becomes its answer
        return error_reply(message, with_traceback(error)), None
    if reply.has_content():
        reply.content = own_copy(reply.content)
    return reply, context


def _initialize_process(app: ClientApp, seed: int, parent: int) -> None:
    """Prepare a client process: one thread per operation, random numbers of its own, and an end with its parent."""

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    global _app
    _app = app
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (apps draw from it)
    random.seed(seed)


def _call(message: flower.Message, context: flower.Context) -> ReplyAndContext:
    assert _app is not None
    return call_client(_app, message, context)
