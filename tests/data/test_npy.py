"""Arrays that stay in their file: the same numbers as of an .npz file, and never a whole copy."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from fedpers.app import _main
from fedpers.data import DatasetConfig, FederatedData, PartitionConfig, SplitConfig, mapped
from fedpers.data.datasets import load_dataset
from fedpers.data.load import load_federated
from fedpers.errors import DataError

DRAWS = np.random.default_rng(0)
X = DRAWS.normal(size=(90, 3, 4)).astype(np.float32)
Y = np.arange(90) % 3
CLIENT = np.array(["Ulm", "Kiel", "Bonn"])[DRAWS.integers(0, 3, 90)]


def write(root: Path, **arrays: Any) -> Path:
    root.mkdir(exist_ok=True)
    for name, array in ({"x": X, "y": Y} | arrays).items():
        np.save(root / f"{name}.npy", array)
    return root


def federated(config: DatasetConfig) -> FederatedData:
    return load_federated(config, PartitionConfig("natural", min_samples=5), SplitConfig(), 0)


@pytest.fixture
def both(tmp_path: Path) -> tuple[DatasetConfig, DatasetConfig]:
    """The same samples as .npy files and as an .npz file."""
    root = write(tmp_path / "made", client=CLIENT, domain=Y)
    np.savez(tmp_path / "made.npz", x=X, y=Y, client=CLIENT, domain=Y)
    packed = DatasetConfig("npz", root=str(tmp_path / "made.npz"), client="client", domain="domain")
    return DatasetConfig("npy", root=str(root)), packed


def test_the_same_samples_as_of_an_npz_file(both: tuple[DatasetConfig, DatasetConfig]) -> None:
    ours, packed = map(load_dataset, both)
    assert torch.equal(ours.x, packed.x)
    assert torch.equal(ours.y, packed.y)
    assert ours.owner_names == packed.owner_names == ("Bonn", "Kiel", "Ulm")
    assert ours.domain is not None
    assert packed.domain is not None
    assert torch.equal(ours.domain, packed.domain)
    first, second = map(federated, both)
    assert first.checksum == second.checksum
    kept = first.restrict([1])
    assert torch.equal(kept.x, second.restrict([1]).x)
    assert kept.checksum == second.restrict([1]).checksum


@pytest.mark.slow
def test_a_run_ends_with_the_same_numbers(both: tuple[DatasetConfig, DatasetConfig], tmp_path: Path) -> None:
    rows = []
    for config in both:
        output = tmp_path / "runs" / config.name
        named = [] if config.name == "npy" else ["dataset.client=client"]
        settings = [
            f"dataset={config.name}",
            f"dataset.root={config.root}",
            *named,
            "partition=natural",
            "partition.min_samples=10",
            "rounds=2",
        ]
        assert _main([*settings, "model=mlp", f"output={output}"]) == 0
        rows.append(pd.read_parquet(next(output.rglob("clients.parquet"))))
    seconds = [column for column in rows[0] if "second" in column]
    pd.testing.assert_frame_equal(rows[0].drop(columns=seconds), rows[1].drop(columns=seconds), check_exact=True)


def test_whole_numbers_stay_whole(tmp_path: Path) -> None:
    tokens = DRAWS.integers(0, 50, (90, 8))
    root = str(write(tmp_path / "text", x=tokens))
    data = load_dataset(DatasetConfig("npy", root=root, tokens=True))
    assert data.x.dtype == torch.int64
    with pytest.raises(DataError, match=r"x\.npy is int64, expected floats; whole numbers that are tokens need"):
        load_dataset(DatasetConfig("npy", root=root))
    assert data.x.tolist() == tokens.tolist()


def test_inputs_are_mapped_and_files_never_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "made", client=CLIENT)
    before = (root / "x.npy").read_bytes()
    data = federated(DatasetConfig("npy", root=str(root)))
    assert replace(data, name="other").x.data_ptr() == data.x.data_ptr()
    assert data.to("cpu").x.data_ptr() == data.x.data_ptr()
    assert data.restrict(range(data.num_clients)).x.data_ptr() == data.x.data_ptr()
    monkeypatch.setattr(mapped, "BLOCK", 500)
    read = list(mapped.blocks(data.x))
    assert max(block.nbytes for block in read) <= 500
    assert np.array_equal(np.concatenate(read), X)
    assert np.array_equal(np.concatenate(list(mapped.blocks(data.x[7:50]))), X[7:50])
    assert np.array_equal(np.concatenate(list(mapped.blocks(data.x.transpose(1, 2)))), X.swapaxes(1, 2))
    data.x[0] = 7
    assert (root / "x.npy").read_bytes() == before


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in other units elsewhere")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    size = 1 << 28
    np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=(size // 4096, 1024)).flush()
    np.save(tmp_path / "y.npy", np.arange(size // 4096) % 10)
    np.save(tmp_path / "client.npy", np.arange(size // 4096) % 16)
    code = (
        "import resource, sys\n"
        "from fedpers.data import DatasetConfig, PartitionConfig, SplitConfig, load_federated\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "data = load_federated(DatasetConfig('npy', root=sys.argv[1]), PartitionConfig('natural'), SplitConfig(), 0)\n"
        "data.checksum, data.restrict([3]).checksum\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    grown = int(done.stdout)
    assert grown < size / 2  # a sixteenth of it belongs to client 3; a copy would be all of it


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X.astype(np.float64)}, r"x\.npy is float64 \[90, 3, 4\], expected float32 or int64 .*dataset=npz"),
        ({"x": X.astype(">f4")}, r"x\.npy is >f4 \[90, 3, 4\], expected float32 or int64"),
        ({"x": np.float32(3)}, r"x\.npy is float32 \[\], expected float32 or int64 \[N, \.\.\.\]"),
        ({"x": np.asfortranarray(X)}, r"x\.npy lies column by column, expected rows one after the other"),
        ({"x": np.array([{}])}, r"x\.npy is damaged or not an \.npy file of numbers \(.*\)\."),
        ({"y": np.array([None] * 90)}, r"y\.npy is damaged or not an \.npy file of numbers \(.*\)\."),
        ({"x": X[:80]}, r"x\.npy has 80 samples but y\.npy has 90\."),
        ({"x": X * np.where(np.arange(90) == 4, np.nan, 1).astype(np.float32)[:, None, None]},
         r"x\.npy is not finite \(nan or infinite\) in 1 of 90 samples\."),
        ({"y": Y - 1}, r"y\.npy has the label -1, expected class ids"),
        ({"client": CLIENT[:8]}, r"there are 8 client ids for 90 samples\."),
        ({"domain": Y[:8]}, r"there are 8 domains for 90 samples\."),
        ({"client": X}, r"client\.npy must be whole numbers or text \[N\], not float32 \[90, 3, 4\]\."),
    ],
)  # fmt: skip
def test_other_arrays_are_a_sentence(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        load_dataset(DatasetConfig("npy", root=str(write(tmp_path / "made", **arrays))))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["x", "y", "client"])
def test_whatever_a_header_says_is_a_sentence(tmp_path: Path, name: str) -> None:
    root = write(tmp_path / "made", client=CLIENT)
    path, draws = root / f"{name}.npy", np.random.default_rng(0)
    whole = path.read_bytes()
    for printable in [True, False] * 200:
        broken = bytearray(whole)
        for place in draws.integers(0, 128, 3):
            broken[place] = draws.integers(32, 127) if printable else draws.integers(256)
        path.write_bytes(bytes(broken))
        with contextlib.suppress(DataError):
            load_dataset(DatasetConfig("npy", root=str(root)))


@pytest.mark.parametrize("name", ["x", "y", "client"])
@pytest.mark.parametrize("content", [b"", b"hello", "half", "missing"])
def test_missing_or_damaged_files_are_a_sentence(tmp_path: Path, name: str, content: bytes | str) -> None:
    root = write(tmp_path / "made", client=CLIENT)
    path = root / f"{name}.npy"
    if content == "missing":
        path.unlink()
    else:
        whole = path.read_bytes()
        path.write_bytes(content if isinstance(content, bytes) else whole[: len(whole) // 2])
    if (name, content) == ("client", "missing"):
        assert load_dataset(DatasetConfig("npy", root=str(root))).owner is None
        return
    wanted = rf"{name}\.npy is (missing or not a file|damaged or not an \.npy file of numbers \(.*\))\."
    with pytest.raises(DataError, match=wanted) as error:
        load_dataset(DatasetConfig("npy", root=str(root)))
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"^dataset\.root=.*gone is missing or not a folder\.$"):
        load_dataset(DatasetConfig("npy", root=str(tmp_path / "gone")))
