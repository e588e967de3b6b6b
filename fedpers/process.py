"""What holds for a whole process: threads, signals it does not hear, kernels of a GPU, cores and memory it may take."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt, see malloc.h
_KEPT, _FROM_SYSTEM = 256 * 2**20, 32 * 2**20
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


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


def reproducible_convolutions(device: torch.device | str) -> None:
    """On a GPU, compute convolutions without TensorFloat-32 and always by the same algorithm; for the whole process.

    A run then gives the same digits each time. They still depend on how many clients are computed together: which
    algorithm cuDNN takes depends on the shapes, and some give gradients of weights that are exact to 1e-3 only.
    """
    if torch.device(device).type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Model of this machine's processor as the system names it, or its architecture."""
    named = re.search(r"^model name\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()


def available_memory(device: torch.device) -> float:
    """Bytes free on the machine or the GPU, at most the limit of a container; infinite where that is not known."""
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return free_bytes + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return float("inf")
    return min(_free_memory(), _container_limit())


def total_memory(device: torch.device) -> float | None:
    """Bytes that the machine or the GPU has, at most the limit of a container; None where that is not known."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    if not hasattr(os, "sysconf"):
        return None
    return min(float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), _container_limit())


def _container_limit() -> float:
    """Bytes that a container's processes may take; infinite without a limit."""
    limits = [_read(Path(file)).strip() for file in _LIMITS]
    return min([float(limit) for limit in limits if limit.isdigit()], default=float("inf"))


def _free_memory() -> float:
    """Bytes that programs can take before the machine has to swap."""
    if line := re.search(r"^MemAvailable:\s+(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE):
        return 1024.0 * int(line[1])
    for pages in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        if pages in getattr(os, "sysconf_names", {}):
            return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages))
    return float("inf")


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # no such file on this kind of machine
        return ""
