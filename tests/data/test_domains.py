"""Pictures in several styles, one file for each: scaled, given the same channels, normalized together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpers.data import DatasetConfig
from fedpers.data.datasets import load_dataset
from fedpers.errors import DataError

DRAWS = np.random.default_rng(0)


def write(root: Path, name: str, shape: tuple[int, ...], labels: Any, **further: Any) -> np.ndarray[Any, Any]:
    pictures = DRAWS.integers(0, 256, (len(labels), *shape), dtype=np.uint8)
    root.mkdir(exist_ok=True)
    np.savez(root / f"{name}.npz", **({"x": pictures, "y": np.array(labels)} | further))
    return pictures


def test_each_file_is_a_domain(tmp_path: Path) -> None:
    grey = write(tmp_path, "usps", (16, 16), [0, 1, 2, 2])
    colour = write(tmp_path, "mnistm", (32, 32, 3), [2, 1])  # it lacks a class
    write(tmp_path, "mnist", (28, 28, 1), [1, 0, 2])
    (tmp_path / "notes.txt").write_text("no domain")
    data = load_dataset(DatasetConfig("domains", root=str(tmp_path)))
    assert data.x.shape == (9, 3, 32, 32)
    assert data.domain_names == data.owner_names == ("mnist", "mnistm", "usps")
    assert data.domain is not None
    assert data.owner is not None
    assert data.domain.tolist() == data.owner.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert data.y.tolist() == [1, 0, 2, 2, 1, 0, 1, 2, 2]
    assert (data.num_classes, data.train_size) == (3, None)
    np.testing.assert_allclose(data.x.double().mean((0, 2, 3)), np.zeros(3), atol=1e-5)
    np.testing.assert_allclose(data.x.double().std((0, 2, 3), correction=0), np.ones(3), atol=1e-5)
    # pictures of the right size are not touched: one scale and one shift for each channel of all domains
    for channel in range(3):
        slope, shift = np.polyfit(colour[..., channel].ravel(), data.x[3:5, channel].numpy().ravel(), 1)
        np.testing.assert_allclose(data.x[3:5, channel], slope * colour[..., channel] + shift, atol=1e-4)
    # grey ones, twice as large: the mean of a picture stays
    small = (data.x[5:, 0].mean((1, 2)) - data.x[5:, 0].mean()) / data.x[5:, 0].mean((1, 2)).std()
    before = torch.from_numpy(grey.mean((1, 2)))
    torch.testing.assert_close(small, ((before - before.mean()) / before.std()).float(), atol=0.1, rtol=0)


def test_size_names_and_grey_pictures(tmp_path: Path) -> None:
    for name, side in (("a", 8), ("b", 20)):
        write(tmp_path, name, (side, side), ["one", "two"], pictures=np.full((2, side, side), side, np.uint8))
    config = DatasetConfig("domains", root=str(tmp_path), size=12, x="pictures")
    data = load_dataset(config)
    assert data.x.shape == (4, 1, 12, 12)
    assert data.class_names == ("one", "two")
    assert [len(set(picture.flatten().tolist())) for picture in data.x] == [1] * 4  # flat ones stay flat


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((2, 4, 4), np.float32)}, r"b\.npz: x is float32 \[2, 4, 4\], expected uint8 pictures"),
        (
            {"x": np.zeros((2, 4, 4, 4), np.uint8)},
            r"b\.npz: x is uint8 \[2, 4, 4, 4\], expected uint8 .*1 or 3",
        ),
        ({"x": np.zeros((2, 4), np.uint8)}, r"b\.npz: x is uint8 \[2, 4\], expected uint8 pictures"),
        ({"x": np.zeros((3, 4, 4), np.uint8)}, r"b\.npz: x has 3 samples and y has 2, expected as many"),
        ({"x": np.zeros((0, 4, 4), np.uint8), "y": np.zeros(0, int)}, r"b\.npz: x has 0 samples and y has 0"),
        ({"y": np.array([0.5, 1.0])}, r"b\.npz: y must be whole numbers or text \[N\], not float64 \[2\]"),
        (
            {"y": np.array(["0", "1"])},
            r"y must be text in all domains or whole numbers in all, not a\.npz int",
        ),
        ({"y": np.array([0, -1])}, r"y has the label -1, expected class ids"),
        ({"y": np.array([0, None])}, r"b\.npz: y holds Python objects"),
    ],
)
def test_another_file_is_a_sentence(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    write(tmp_path, "a", (4, 4), [0, 1])
    write(tmp_path, "b", (4, 4), [0, 1], **arrays)
    with pytest.raises(DataError, match=message) as error:
        load_dataset(DatasetConfig("domains", root=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_a_folder_without_domains_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no \.npz files; dataset\.root is a folder with one for each domain"):
        load_dataset(DatasetConfig("domains", root=str(tmp_path)))
    with pytest.raises(DataError, match=r"gone is missing or not a folder"):
        load_dataset(DatasetConfig("domains", root=str(tmp_path / "gone")))
    write(tmp_path, "a", (4, 4), [0, 1])
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "b.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"b\.npz is damaged or not an \.npz file"):
        load_dataset(DatasetConfig("domains", root=str(tmp_path)))
