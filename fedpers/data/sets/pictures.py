"""Pictures with labels: digits, and what torchvision knows."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import socket
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpers.data.sets.base import Dataset, data_root, normalized
from fedpers.data.torchvision_shim import import_torchvision
from fedpers.errors import DataError, reason
from fedpers.settings.data import DatasetConfig

DOWNLOAD_TIMEOUT = 30.0  # seconds without an answer; torchvision itself would wait for minutes


def digits(config: DatasetConfig) -> Dataset:
    """1,797 pictures of 8x8 pixels (UCI optical digits), shipped with scikit-learn.

    They are read from its file: importing scikit-learn, with pandas and scipy, takes longer than a round.
    """
    package = importlib.util.find_spec("sklearn")
    folder = Path(next(iter(package.submodule_search_locations or ()))) if package else Path()
    path = folder / "datasets" / "data" / "digits.csv.gz"
    if not path.is_file():
        raise DataError("digits: scikit-learn, which they come with, is not installed as expected.")
    rows = np.loadtxt(path, delimiter=",", dtype=np.uint8)  # 64 whole numbers 0..16 and the digit
    pictures = rows[:, :64].reshape(-1, 8, 8, 1)
    return Dataset(normalized(pictures, len(pictures)), torch.from_numpy(rows[:, 64]).long(), 10, config.name)


def idx_files(config: DatasetConfig, kind: str) -> Dataset:
    """MNIST and its like: four idx files, in torchvision's folder below root or in root itself, packed or not."""
    import_torchvision()
    from torchvision import datasets
    from torchvision.datasets.mnist import read_image_file, read_label_file

    cls: Any = getattr(datasets, kind)
    root = data_root(config)
    names = [Path(resource).stem for resource, _ in cls.resources]  # the four files, unpacked
    raw_folder = root / kind / "raw"

    def missing(folder: Path) -> list[Path]:
        return [folder / n for n in names if not ((folder / n).is_file() or (folder / f"{n}.gz").is_file())]

    folder = next((f for f in (raw_folder, root) if not missing(f)), None)
    if folder is None:
        _download(config, f"{missing(raw_folder)[0]} is missing", lambda: cls(root, download=True))
        folder = raw_folder
    arrays = []
    for name in names:
        read = read_image_file if "images" in name else read_label_file
        path = folder / name if (folder / name).is_file() else folder / f"{name}.gz"
        try:
            arrays.append(_read_idx(path, read).numpy())
        except (OSError, EOFError, zlib.error, ValueError, TypeError, LookupError, AssertionError, RuntimeError) as e:
            raise DataError(
                f"{config.name}: {path} is damaged ({reason(e)}); replace it, or delete it to have it downloaded."
            ) from e
    train_x, train_y, test_x, test_y = arrays
    for part, images, labels in (("training", train_x, train_y), ("test", test_x, test_y)):
        if len(images) != len(labels):
            raise DataError(f"{config.name}: {folder} has {len(images)} {part} pictures but {len(labels)} labels.")
    return _official(config, np.concatenate([train_x, test_x])[..., None], [*train_y, *test_y], len(train_y), 10)


def _read_idx(path: Path, read: Callable[[str], Tensor]) -> Tensor:
    from torchvision.datasets.utils import extract_archive

    if path.suffix != ".gz":
        return read(str(path))
    with tempfile.TemporaryDirectory() as folder:  # not beside the archive: that folder may be read-only
        return read(str(extract_archive(str(path), folder)))


def cifar(config: DatasetConfig, kind: str, num_classes: int) -> Dataset:
    """CIFAR: torchvision unpacks and reads the batches, after their md5 was found right."""
    import_torchvision()
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    cls: Any = getattr(datasets, kind)
    root = data_root(config)
    if root.name == cls.base_folder:
        root = root.parent
    files = [*cls.train_list, *cls.test_list, (cls.meta["filename"], cls.meta["md5"])]
    for name, md5 in files:
        path = root / cls.base_folder / name
        if not check_integrity(path, md5):
            state = "is damaged (wrong md5)" if path.is_file() else "is missing"
            _download(config, f"{path} {state}", lambda: cls(root, download=True))
            break
    try:
        train, test = cls(root, train=True), cls(root, train=False)
    except (OSError, RuntimeError) as e:
        raise DataError(f"{config.name}: the files in {root / cls.base_folder} cannot be read ({reason(e)}).") from e
    pictures = np.concatenate([train.data, test.data])
    return _official(config, pictures, [*train.targets, *test.targets], len(train.targets), num_classes)


def _official(config: DatasetConfig, pictures: NDArray[np.uint8], labels: Any, train: int, classes: int) -> Dataset:
    y = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    return Dataset(normalized(pictures, train), y, classes, config.name, train_size=train)


def _download(config: DatasetConfig, problem: str, download: Callable[[], object]) -> None:
    if not config.download:
        raise DataError(
            f"{config.name}: {problem}; set dataset.root to the folder that has it, or dataset.download=true."
        )
    try:
        with _socket_timeout(DOWNLOAD_TIMEOUT):
            download()
    except (OSError, RuntimeError, EOFError, zlib.error, http.client.HTTPException) as e:
        raise DataError(
            f"{config.name}: {problem}, and the download failed ({reason(e)}); set dataset.root to a "
            f"folder that has the files."
        ) from e


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
