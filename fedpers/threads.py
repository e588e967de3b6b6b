"""One thread per operation, and signals that processes do not hear."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute each operation on one thread.

    Operations of a cohort are small: threads would wait for one another, most of all on a busy machine. It also keeps
    results independent of the number of workers. The former number of threads is restored.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def blocked(*signals: signal.Signals) -> Iterator[None]:
    """Let this thread hear signals only afterwards, and processes that it starts meanwhile never."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
