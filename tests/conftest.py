"""Tests never touch the user's cache, and spend no time on a good choice of the cohort size."""

import os
import sys
from pathlib import Path

import absl.logging
import pytest

# before PyTorch is imported, here and in every process that is started: threads that wait for one another while several
# processes share the cores cost more than they bring
os.environ.setdefault("OMP_NUM_THREADS", "1")

# absl, which dp-accounting and TensorBoard bring along, closes the stream of its handler when logging is set up anew,
# unless it is one of the process: while tests are captured it would close what all of them are captured in
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point ``FEDPERS_CACHE`` at an empty folder."""
    root = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FEDPERS_CACHE", str(root))
    return root


@pytest.fixture(autouse=True)
def _quick_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sizes be compared by a few steps: with an empty cache every run measures them anew."""
    monkeypatch.setattr("fedpers.runtime.probe.SECONDS_PER_SIZE", 0.002)
