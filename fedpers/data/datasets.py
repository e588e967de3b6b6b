"""Data sets as whole arrays. To add one, write a function ``DatasetConfig -> Dataset`` and put it in `DATASETS`."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import lzma
import os
import socket
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpers.data.cache import cache_root
from fedpers.data.torchvision_shim import import_torchvision
from fedpers.errors import ConfigError, DataError, check
from fedpers.settings.data import DatasetConfig
from fedpers.tasks import CLASSIFICATION, Regression, Task

MAX_CHANNELS = 4
MAX_CLASSES = 100_000  # labels beyond are ids or values, not classes
DOWNLOAD_TIMEOUT = 30.0  # seconds without an answer; torchvision itself would wait for minutes


@dataclass(frozen=True)
class Dataset:
    """A whole data set, not yet divided among clients.

    Parameters
    ----------
    x : Tensor ``[N, ...]``
        Inputs, float32, normalized; pictures are ``[N, C, H, W]``.
    y : Tensor ``[N]`` or ``[N, D]``
        Class ids, int64, ``0 <= y < num_classes``; for a regression float32.
    num_classes : int
        Of a regression: its targets, D.
    name : str
    train_size : int or None
        The first `train_size` samples are the official training part, the others the official test part;
        None if there is no official split.
    owner : Tensor ``[N]`` or None
        Natural client of each sample, int64; None if the data have none.
    task : Task
        What is learned.

    Raises
    ------
    DataError
        If the arrays are empty or differ in length, a label is out of range, or an official part is empty.
    """

    x: Tensor
    y: Tensor
    num_classes: int
    name: str
    train_size: int | None = None
    owner: Tensor | None = None
    task: Task = CLASSIFICATION

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise DataError(f"{self.name}: x has {len(self.x)} samples but y has {len(self.y)}.")
        if len(self.y) == 0:
            raise DataError(f"{self.name}: there are no samples.")
        if self.task.classes and (int(self.y.min()) < 0 or int(self.y.max()) >= self.num_classes):
            low, high = int(self.y.min()), int(self.y.max())
            raise DataError(f"{self.name}: labels run from {low} to {high}, expected 0 to {self.num_classes - 1}.")
        if self.owner is not None and len(self.owner) != len(self.y):
            raise DataError(f"{self.name}: there are {len(self.owner)} client ids for {len(self.y)} samples.")
        if self.train_size is not None and not 0 < self.train_size <= len(self.y):
            raise DataError(
                f"{self.name}: an official training part of {self.train_size} samples does not fit "
                f"{len(self.y)} samples."
            )

    def __len__(self) -> int:
        return len(self.y)

    def training_part(self) -> Dataset:
        """Official training part alone (views, same positions).

        Raises
        ------
        ConfigError
            If there is no official test part.
        """
        n = self.train_size
        if n is None or n == len(self):
            raise ConfigError("split", "official", f"fractions, because {self.name} has no official test part")
        return replace(self, x=self.x[:n], y=self.y[:n], owner=None if self.owner is None else self.owner[:n])


def load_dataset(config: DatasetConfig) -> Dataset:
    """Load a data set.

    Parameters
    ----------
    config : DatasetConfig

    Returns
    -------
    Dataset
        On the CPU.

    Raises
    ------
    DataError
        If files are missing or damaged, cannot be downloaded, or hold something else than expected.
    ConfigError
        If it is a set of ratings, which has no samples with labels.
    """
    allowed = "a set of samples with labels; for ratings use load_federated"
    check(not config.holds_ratings, "dataset", config.name, allowed)
    try:
        return DATASETS[config.name](config)
    except OSError as e:  # e.g. a folder that may not be entered
        raise DataError(f"{config.name}: {_reason(e)}.") from e


# --- scikit-learn ---------------------------------------------------------------------------------------------------


def _digits(config: DatasetConfig) -> Dataset:
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
    return Dataset(_normalized(pictures, len(pictures)), torch.from_numpy(rows[:, 64]).long(), 10, config.name)


# --- torchvision ----------------------------------------------------------------------------------------------------


def _idx_files(config: DatasetConfig, kind: str) -> Dataset:
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
                f"{config.name}: {path} is damaged ({_reason(e)}); replace it, or delete it to have it downloaded."
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


def _cifar(config: DatasetConfig, kind: str, num_classes: int) -> Dataset:
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
        raise DataError(f"{config.name}: the files in {root / cls.base_folder} cannot be read ({_reason(e)}).") from e
    pictures = np.concatenate([train.data, test.data])
    return _official(config, pictures, [*train.targets, *test.targets], len(train.targets), num_classes)


def _official(config: DatasetConfig, pictures: NDArray[np.uint8], labels: Any, train: int, classes: int) -> Dataset:
    y = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    return Dataset(_normalized(pictures, train), y, classes, config.name, train_size=train)


def data_root(config: DatasetConfig) -> Path:
    """Folder (or file) of a data set: ``config.root``, or the folder ``data`` of the cache."""
    return Path(config.root).expanduser() if config.root else cache_root() / "data"


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
            f"{config.name}: {problem}, and the download failed ({_reason(e)}); set dataset.root to a "
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


def _reason(error: BaseException) -> str:
    """Last line of an error's text, for use inside a sentence."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else type(error).__name__


# --- npz ------------------------------------------------------------------------------------------------------------


def _npz(config: DatasetConfig) -> Dataset:
    """Any arrays on disk; nothing is unpickled."""
    path = Path(config.root or "").expanduser()
    array_names = [name for name in (config.x, config.y, config.client, config.n_train) if name is not None]
    arrays = read_npz(path, array_names)
    x, y = arrays[config.x], arrays[config.y]
    classes = y.ndim == 1 and y.dtype.kind in "iu"
    if not classes and (y.dtype.kind != "f" or y.ndim not in (1, 2) or 0 in y.shape[1:]):
        raise DataError(
            f"{path}: {config.y} must be whole numbers [N], class ids, or floats [N] or [N, D], targets of a "
            f"regression, not {y.dtype} {list(y.shape)}."
        )
    if x.ndim == 0 or len(x) != len(y):
        raise DataError(f"{path}: {config.x} has {x.shape[0] if x.ndim else 0} samples but {config.y} has {len(y)}.")
    if len(y) == 0:
        raise DataError(f"{path}: there are no samples.")
    labels = _class_ids(path, config.y, y) if classes else _targets(path, config.y, y)
    train_size = None if config.n_train is None else _train_size(path, config.n_train, arrays[config.n_train], len(y))
    if x.dtype == np.uint8:
        if x.ndim == 3:
            x = x[..., None]
        if x.ndim != 4 or x.shape[-1] > MAX_CHANNELS:
            raise DataError(
                f"{path}: {config.x} is uint8 {list(x.shape)}, expected pictures [N, H, W] or "
                f"[N, H, W, C] with C <= {MAX_CHANNELS}, or floats."
            )
        inputs = _normalized(x, train_size or len(x))
    elif x.dtype.kind == "f":
        inputs = _finite(path, config.x, x)
    else:
        raise DataError(f"{path}: {config.x} is {x.dtype}, expected uint8 pictures or floats.")
    owner = None if config.client is None else _owner(path, config.client, arrays[config.client])
    count = int(labels.max()) + 1 if classes else labels[0].numel()
    task = CLASSIFICATION if classes else Regression()
    return Dataset(inputs, labels, count, path.stem, train_size=train_size, owner=owner, task=task)


def _class_ids(path: Path, name: str, y: NDArray[Any]) -> Tensor:
    if int(y.min()) < 0 or int(y.max()) >= MAX_CLASSES:
        bad = y.min() if int(y.min()) < 0 else y.max()
        raise DataError(f"{path}: {name} has the label {bad}, expected class ids from 0 to {MAX_CLASSES - 1}.")
    return torch.from_numpy(y.astype(np.int64))


def _targets(path: Path, name: str, y: NDArray[Any]) -> Tensor:
    """Float32 ``[N]`` or ``[N, D]``; floats ``[N]`` without a fraction may be meant as class ids."""
    targets = _finite(path, name, y)
    if y.ndim == 1 and (y == np.floor(y)).all():
        raise DataError(
            f"{path}: {name} holds whole numbers as {y.dtype}; store class ids as whole numbers, or the targets of a "
            f"regression as floats [N, 1]."
        )
    return targets


def _finite(path: Path, name: str, values: NDArray[Any]) -> Tensor:
    """Float32 copy, refused if it is not finite."""
    with np.errstate(over="ignore"):  # what overflows float32 is refused just below
        copy = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    finite = copy.isfinite().reshape(len(copy), -1).all(1)
    if not bool(finite.all()):
        count = int((~finite).sum())
        raise DataError(f"{path}: {name} is not finite (nan or infinite) in {count} of {len(copy)} samples.")
    return copy


def _train_size(path: Path, name: str, value: NDArray[Any], num_samples: int) -> int:
    if value.size != 1 or value.dtype.kind not in "iu" or not 0 < int(value.item()) <= num_samples:
        raise DataError(f"{path}: {name} must be one whole number from 1 to {num_samples}.")
    return int(value.item())


def _owner(path: Path, name: str, value: NDArray[Any]) -> Tensor:
    if value.ndim != 1 or value.dtype.kind not in "iuUS":
        raise DataError(f"{path}: {name} must be whole numbers or text [N], not {value.dtype} {list(value.shape)}.")
    if value.dtype.kind in "US":
        value = np.unique(value, return_inverse=True)[1]
    return torch.from_numpy(value.astype(np.int64))


def read_npz(path: Path, names: list[str] | None = None) -> dict[str, NDArray[Any]]:
    """Read arrays of an ``.npz`` file, never unpickling.

    Parameters
    ----------
    path : Path
    names : list of str or None
        Which arrays; None is all.

    Raises
    ------
    DataError
        If the file is missing or damaged, an array is missing (those present are listed) or holds objects.
    """
    if not os.path.isfile(path):  # unlike Path.is_file, also False in a folder that may not be entered
        raise DataError(f"{path} is missing or not a file.")
    name = None
    try:
        # np.load takes whatever is not a zip file for a pickle; opening it as a zip first gives the right error.
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:
            absent = [n for n in names or () if n not in file.files]
            if absent:
                raise DataError(f"{path} has no array '{absent[0]}'; it has {', '.join(sorted(file.files)) or 'none'}.")
            arrays = {}
            for name in file.files if names is None else names:
                arrays[name] = file[name]
                if not isinstance(arrays[name], np.ndarray):
                    raise DataError(f"{path}: {name} is not an array.")
            return arrays
    except ValueError as e:
        if name is not None and "pickle" in str(e):
            raise DataError(f"{path}: {name} holds Python objects, which are not read; store numbers.") from e
        raise DataError(f"{path} is damaged ({_reason(e)}).") from e
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError) as e:
        raise DataError(f"{path} is damaged or not an .npz file ({_reason(e)}).") from e


# --- pictures -------------------------------------------------------------------------------------------------------


def _normalized(pictures: NDArray[np.uint8], train_size: int) -> Tensor:
    """Float32 ``[N, C, H, W]`` from uint8 ``[N, H, W, C]``: mean 0 and deviation 1 in each channel.

    Mean and deviation are those of the first `train_size` pictures. Scaling by 1/255 cancels out.
    """
    values = np.arange(256)
    x = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).float()
    for channel in range(x.shape[1]):
        # Counted, not summed: exact, and no second float copy of the data.
        counts = np.bincount(pictures[:train_size, ..., channel].ravel(), minlength=256)
        mean = float(np.average(values, weights=counts))
        deviation = float(np.sqrt(np.average((values - mean) ** 2, weights=counts)))
        x[:, channel].sub_(mean).div_(deviation or 1.0)  # a constant channel becomes 0
    return x


DATASETS: dict[str, Callable[[DatasetConfig], Dataset]] = {
    "digits": _digits,
    "mnist": partial(_idx_files, kind="MNIST"),
    "fashion_mnist": partial(_idx_files, kind="FashionMNIST"),
    "cifar10": partial(_cifar, kind="CIFAR10", num_classes=10),
    "cifar100": partial(_cifar, kind="CIFAR100", num_classes=100),
    "npz": _npz,
}
