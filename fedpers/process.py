"""What holds for a whole process: threads per operation, signals it does not hear, memory it keeps."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt, see malloc.h
_KEPT, _FROM_SYSTEM = 256 * 2**20, 32 * 2**20


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


def keep_freed_memory() -> None:
    """Let this process keep up to 256 MB of freed memory for what is allocated next, on Linux with glibc.

    Cohorts allocate and free some megabytes in each step. By default glibc hands them back and asks for them anew, and
    the system clears each page: a third of the time of a small network. Environment variables ``MALLOC_...``, by which
    a user says how it should be, are respected.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt(_M_MMAP_THRESHOLD, _FROM_SYSTEM)  # the largest that glibc would go to by itself
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
