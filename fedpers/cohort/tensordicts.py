"""tensordict, imported without torch's compiler, which is half of the time that importing this package took.

While tensordict is imported it marks three of its functions for ``torch.compile``, and each mark imports the compiler.
The marks matter where tensordict's own functions are compiled, which nothing here is. Where the compiler has been
imported already they are made.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch.compiler as compiler


@contextmanager
def _unmarked() -> Iterator[None]:
    """Let marks for the compiler be no-ops."""
    marks = compiler.allow_in_graph, compiler.assume_constant_result
    if "torch._dynamo" not in sys.modules:
        compiler.allow_in_graph = compiler.assume_constant_result = lambda function: function
    try:
        yield
    finally:
        compiler.allow_in_graph, compiler.assume_constant_result = marks


with _unmarked():
    from tensordict import MemoryMappedTensor, TensorDict

__all__ = ["MemoryMappedTensor", "TensorDict"]
