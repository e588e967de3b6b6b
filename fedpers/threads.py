"""One thread per operation."""

from __future__ import annotations

import contextlib
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
