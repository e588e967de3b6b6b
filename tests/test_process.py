from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from fedpers.process import keep_freed_memory

keep_freed_memory()
for _ in range(5):
    [torch.ones(2**20) for _ in range(10)]  # 4 MB each
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    [torch.ones(2**20) for _ in range(10)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment: str) -> int:
    """How often the system had to give a page while 2 GB were allocated and freed, 40 MB at a time."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env={**ours, **environment}
    )
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is handed back by another rule")
def test_freed_memory_is_kept_unless_the_user_says_how_it_should_be() -> None:
    assert faults() < 1_000
    assert faults(MALLOC_MMAP_THRESHOLD_="131072") > 100_000
