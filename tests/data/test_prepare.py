"""The script that unpacks our data files, on pictures made up here."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "experiments" / "data" / "prepare.py"


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_are_cut_from_their_sheets(prepare: ModuleType) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (10, 4, 6, 3), dtype=np.uint8)
    sheets = []
    for start in (0, 6):  # two rows of three; the second sheet is not full
        sheet = np.zeros((6, 4, 6, 3), np.uint8)
        sheet[: len(pictures[start : start + 6])] = pictures[start : start + 6]
        rows = [np.concatenate(list(sheet[row : row + 3]), axis=1) for row in (0, 3)]
        content = io.BytesIO()
        Image.fromarray(np.concatenate(rows)).save(content, "WEBP", lossless=True, exact=True)
        sheets.append(content.getvalue())
    packed = {
        "webp": np.frombuffer(b"".join(sheets), np.uint8),
        "offsets": np.cumsum([0, *map(len, sheets)]),
        "shape": np.array([10, 4, 6, 3, 3]),
    }
    assert np.array_equal(prepare.unpacked(packed), pictures)
    with pytest.raises(SystemExit, match=r"pictures fit on the sheets: found False, expected True\."):
        prepare.unpacked(packed | {"shape": np.array([13, 4, 6, 3, 3])})


def test_other_counts_end_the_script(prepare: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"mnist\.npz is missing\."):
        prepare.mnist(tmp_path)
    few = {"x": np.zeros((2, 28, 28), np.uint8), "labels": np.arange(2), "writer": np.arange(2), "n_train": np.ones(1)}
    np.savez(tmp_path / "mnist.npz", **few)
    with pytest.raises(SystemExit, match=r"mnist: shape of x: found \[2, 28, 28\], expected \[70000, 28, 28\]\."):
        prepare.mnist(tmp_path)
