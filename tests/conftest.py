"""Tests never touch the user's cache."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point ``FEDPERS_CACHE`` at an empty folder."""
    root = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FEDPERS_CACHE", str(root))
    return root
