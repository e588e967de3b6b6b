"""A part of ``python -m tests.fuzz``, with other draws."""

from __future__ import annotations

import pytest

from tests import fuzz


@pytest.mark.slow
def test_malformed_replies_are_left_out() -> None:
    assert fuzz.fuzz_replies(len(fuzz.DAMAGES) * 24 // 8, seed=1) == 0


@pytest.mark.slow
def test_bad_settings_end_in_a_sentence(tmp_path: object) -> None:
    assert fuzz.fuzz_configs(10, seed=1) == 0
