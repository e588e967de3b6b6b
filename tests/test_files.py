from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedpers.files import whole_file


def interrupted(path: Path) -> None:
    with whole_file(path) as draft:
        draft.write_text("half of")
        raise KeyboardInterrupt


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("before")
    with whole_file(path) as draft:
        draft.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    with pytest.raises(KeyboardInterrupt):
        interrupted(path)
    assert path.read_text() == "after"
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def draft_name(path: Path) -> str:
    with whole_file(path) as draft:
        draft.write_text("second")
        return draft.name


def test_drafts_of_two_writers_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    with ThreadPoolExecutor(1) as pool, whole_file(path) as first:
        first.write_text("first")
        assert pool.submit(draft_name, path).result() != first.name
        assert (path.read_text(), first.read_text()) == ("second", "first")
    assert path.read_text() == "first"


def test_a_folder_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "missing" / "x.json") as draft:
        draft.write_text("x")
