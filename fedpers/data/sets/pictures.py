"""Pictures with labels: digits, and what torchvision knows."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import socket
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpers.data.sets.base import Dataset, data_root, normalized
from fedpers.data.torchvision_shim import import_torchvision
from fedpers.errors import DataError, reason
from fedpers.settings.dataset import DatasetConfig

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
    """MNIST and its like: four idx files, in torchvision's folder below root or in root itself, packed or not.

    Parameters
    ----------
    config : DatasetConfig
    kind : str
        torchvision's name of the set: ``MNIST``, ``FashionMNIST`` or ``KMNIST``.

    Raises
    ------
    DataError
        If a file is missing and cannot be downloaded, or is damaged.
    """
    import_torchvision()
    from torchvision import datasets

    cls: Any = getattr(datasets, kind)
    names = [Path(resource).stem for resource, _ in cls.resources]  # the four files, unpacked
    x, y, training = _read_idx_files(config, kind, names, lambda root: cls(root, download=True))
    return _official(config, x[..., None], y, training, 10)


def emnist(config: DatasetConfig) -> Dataset:
    """EMNIST (Cohen et al. 2017): letters and digits, which ``dataset.variant`` chooses.

    Its files hold each picture mirrored at the diagonal; here they stand upright, as MNIST's do. Letters are classes 0
    to 25.

    Raises
    ------
    DataError
        If a file is missing and cannot be downloaded, or is damaged.
    """
    import_torchvision()
    from torchvision import datasets

    variant = config.variant
    names = [
        f"emnist-{variant}-{part}-{what}"
        for part in ("train", "test")
        for what in ("images-idx3-ubyte", "labels-idx1-ubyte")
    ]
    x, y, training = _read_idx_files(
        config, "EMNIST", names, lambda root: datasets.EMNIST(root, variant, download=True)
    )
    classes: list[str] = datasets.EMNIST.classes_split_dict[variant]
    if variant == "letters":  # counted from 1
        y, classes = y - 1, classes[1:]
    data = _official(config, x.swapaxes(1, 2)[..., None], y, training, len(classes))
    return data if variant in ("digits", "mnist") else replace(data, class_names=tuple(classes))


def _read_idx_files(
    config: DatasetConfig, kind: str, names: list[str], download: Callable[[Path], object]
) -> tuple[NDArray[np.uint8], NDArray[np.int64], int]:
    """Read pictures and labels of the training and the test part.

    Parameters
    ----------
    config : DatasetConfig
    kind : str
        Folder below root in which torchvision keeps them, as ``kind/raw``.
    names : list of str
        Pictures and labels for training, pictures and labels for testing, each with or without ``.gz``.
    download : callable
        Has torchvision download the files below a folder.

    Returns
    -------
    x : uint8 array ``[N, H, W]``
    y : int64 array ``[N]``
    training : int
        So many, the first, are for training.
    """
    from torchvision.datasets.mnist import read_image_file, read_label_file

    root = data_root(config)
    raw_folder = root / kind / "raw"

    def missing(folder: Path) -> list[Path]:
        return [folder / n for n in names if not ((folder / n).is_file() or (folder / f"{n}.gz").is_file())]

    folder = next((f for f in (raw_folder, root, root / "gzip") if not missing(f)), None)
    if folder is None:
        _download(config, f"{missing(raw_folder)[0]} is missing", lambda: download(root))
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
    return np.concatenate([train_x, test_x]), np.concatenate([train_y, test_y]), len(train_y)


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

    cls: Any = getattr(datasets, kind)
    root = data_root(config)
    if root.name == cls.base_folder:
        root = root.parent
    files = [*cls.train_list, *cls.test_list, (cls.meta["filename"], cls.meta["md5"])]
    _have(config, root / cls.base_folder, files, lambda: cls(root, download=True))
    try:
        train, test = cls(root, train=True), cls(root, train=False)
    except (OSError, RuntimeError) as e:
        raise DataError(f"{config.name}: the files in {root / cls.base_folder} cannot be read ({reason(e)}).") from e
    pictures = np.concatenate([train.data, test.data])
    return _official(config, pictures, [*train.targets, *test.targets], len(train.targets), num_classes)


def svhn(config: DatasetConfig) -> Dataset:
    """Street View House Numbers (Netzer et al. 2011), cropped to single digits, without the extra training part.

    Raises
    ------
    DataError
        If a .mat file is missing or damaged (its md5 is another) and cannot be downloaded.
    """
    import_torchvision()
    from torchvision import datasets

    root = _have_parts(config, datasets.SVHN)
    train, test = (_opened(config, root, partial(datasets.SVHN, root, split=part)) for part in ("train", "test"))
    pictures = np.concatenate([train.data, test.data]).transpose(0, 2, 3, 1)
    return _official(config, pictures, np.concatenate([train.labels, test.labels]), len(train.labels), 10)


def usps(config: DatasetConfig) -> Dataset:
    """USPS (Hull 1994): digits of post codes, in the form of LIBSVM; torchvision makes them bytes.

    Raises
    ------
    DataError
        If a .bz2 file is missing or damaged (its md5 is another) and cannot be downloaded.
    """
    import_torchvision()
    from torchvision import datasets

    root = _have_parts(config, datasets.USPS)
    train, test = (_opened(config, root, partial(datasets.USPS, root, train=part)) for part in (True, False))
    pictures = np.concatenate([train.data, test.data])[..., None]
    return _official(config, pictures, [*train.targets, *test.targets], len(train.targets), 10)


def _have_parts(config: DatasetConfig, cls: Any) -> Path:
    """Folder in which a set's training and test file lie, each in one piece."""
    from torchvision.datasets.utils import download_url

    root = data_root(config)
    for part in ("train", "test"):
        url, name, md5 = cls.split_list[part]
        _have(config, root, [(name, md5)], partial(download_url, url, root, name, md5))
    return root


def _have(config: DatasetConfig, folder: Path, files: Iterable[Sequence[str]], download: Callable[[], object]) -> None:
    """See to it that files are there, each a pair of name and md5; they are downloaded if one is missing or damaged."""
    from torchvision.datasets.utils import check_integrity

    for name, md5 in files:
        path = folder / name
        if not check_integrity(path, md5):
            state = "is damaged (wrong md5)" if path.is_file() else "is missing"
            _download(config, f"{path} {state}", download)
            return


def _opened(config: DatasetConfig, root: Path, read: Callable[[], Any]) -> Any:
    """What torchvision reads of files whose md5 is right."""
    try:
        return read()
    except (OSError, RuntimeError, ValueError, LookupError, EOFError, TypeError) as e:
        raise DataError(f"{config.name}: the files in {root} cannot be read ({reason(e)}).") from e


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
