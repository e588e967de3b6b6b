from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedpers import process
from fedpers.runtime.engine import half_the_memory

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


FILES = {
    "/proc/meminfo": "MemTotal:  900 kB\nMemFree:  100 kB\nMemAvailable:    300 kB\n",
    "/sys/fs/cgroup/memory.max": "max\n",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": "",
}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, 300 * 1024),
        ({"/sys/fs/cgroup/memory.max": "5000\n"}, 5000),
        ({"/sys/fs/cgroup/memory/memory.limit_in_bytes": "6000\n"}, 6000),
        ({"/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, 300 * 1024),
        ({"/proc/meminfo": ""}, 7 * 4096),
    ],
)
def test_available_memory(monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], expected: int) -> None:
    files = FILES | changed
    monkeypatch.setattr(process, "_read", lambda file: files[str(file)])
    monkeypatch.setattr(process.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_AVPHYS_PAGES": 7}.__getitem__)
    assert process.available_memory(torch.device("cpu")) == expected


def test_total_memory_is_at_most_that_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 7}.__getitem__)
    for limit, expected in (("max\n", 7 * 4096), ("5000\n", 5000), ("1000000\n", 7 * 4096)):
        files = FILES | {"/sys/fs/cgroup/memory.max": limit}
        monkeypatch.setattr(process, "_read", lambda file, files=files: files[str(file)])
        assert process.total_memory(torch.device("cpu")) == expected
    assert half_the_memory(torch.device("cpu")) == 7 * 4096 / 2


def test_available_memory_of_this_machine() -> None:
    free = process.available_memory(torch.device("cpu"))
    assert 2**20 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert process._read(Path("/no/such/file")) == ""


def test_convolutions_of_a_gpu_are_reproducible_and_a_cpu_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", True)
    monkeypatch.setattr(cudnn, "deterministic", False)
    process.reproducible_convolutions("cpu")
    assert (cudnn.allow_tf32, cudnn.deterministic) == (True, False)
    process.reproducible_convolutions(torch.device("cuda:1"))
    assert (cudnn.allow_tf32, cudnn.deterministic) == (False, True)
