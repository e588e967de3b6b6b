"""Folders as PFLlib writes them: ``train/0.npz``, ``test/0.npz``, ... and ``config.json``."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpers.data.sets.arrays import dataset_of
from fedpers.data.sets.base import Dataset, data_root
from fedpers.errors import DataError, reason
from fedpers.settings.dataset import DatasetConfig

_PLAIN = re.compile(r"[biufSU]\d+")
"""Types of arrays that hold nothing but their own bytes."""


class _Dtype:
    """Stands for a pickled type; only its name and byte order are read."""

    def __init__(self, name: str, *_: Any) -> None:
        self.name, self.order = str(name), "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="

    def resolve(self) -> np.dtype[Any]:
        if not _PLAIN.fullmatch(self.name):
            raise pickle.UnpicklingError(f"it holds an array of type {self.name}, which is not loaded")
        return np.dtype(f"{self.order}{self.name}")


class _Array:
    """Stands for a pickled array, which is made of its bytes alone."""

    def __init__(self, *_: Any) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def resolve(self) -> Any:
        _, shape, dtype, by_columns, data = self.state
        if isinstance(data, list):  # of objects: containers and other arrays
            return data[0] if shape == () else data
        return np.frombuffer(data, dtype.resolve()).reshape(shape, order="F" if by_columns else "C").copy()


def _of_buffer(data: Any, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.state = (1, shape, dtype, order == "F", bytes(data))
    return array


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    return np.frombuffer(data, dtype.resolve())[0]


def _bytes(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """Unpickles arrays, numbers, text and containers without calling anything that the file names."""

    def find_class(self, module: str, name: str) -> Any:
        known = {"_reconstruct": _Array, "scalar": _scalar, "_frombuffer": _of_buffer, "ndarray": _Array,
                 "dtype": _Dtype, "encode": _bytes}  # fmt: skip
        if module.partition(".")[0] not in ("numpy", "_codecs") or name not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not loaded")
        return known[name]


def _resolved(value: Any) -> Any:
    """What a pickle holds, with arrays for what stands for them."""
    if isinstance(value, _Array):
        return _resolved(value.resolve())
    if isinstance(value, dict):
        return {key: _resolved(entry) for key, entry in value.items()}
    return type(value)(map(_resolved, value)) if type(value) in (list, tuple) else value


def pfllib(config: DatasetConfig) -> Dataset:
    """Read a folder of PFLlib as it lies: client N owns ``train/N.npz`` and ``test/N.npz``.

    A file holds ``data``, a pickled dictionary of ``x`` ``[n, ...]`` and ``y`` ``[n]``, which is read without running
    anything; or the arrays ``x`` and ``y``. The files' ``train`` parts, in the order of the clients, are the official
    training part. Numbers are taken as they are: PFLlib stores pictures normalized.

    Raises
    ------
    DataError
        If the folder or a file is missing or damaged, a client has no samples, or shapes differ.
    """
    root = data_root(config, "folder")
    clients = _clients(root)
    parts = [(client, *_read(root / part / f"{client}.npz")) for part in ("train", "test") for client in range(clients)]
    shapes = {x.shape[1:] for _, x, _ in parts}
    if len(shapes) > 1:
        raise DataError(f"{root}: clients differ in the shape of a sample: {', '.join(map(str, sorted(shapes)))}.")
    x, y = (np.concatenate([part[place] for part in parts]) for place in (1, 2))
    owner = np.concatenate([np.full(len(labels), client) for client, _, labels in parts])
    train_size = sum(len(labels) for _, _, labels in parts[:clients])
    return dataset_of(root, root.name, {"x": x}, {"y": y}, client=owner, train_size=train_size)


def _clients(root: Path) -> int:
    """Number of clients, for each of which both files must be there."""
    numbers = {
        part: sorted(int(path.stem) for path in (root / part).glob("*.npz") if path.stem.isdecimal())
        for part in ("train", "test")
    }
    if not numbers["train"]:
        raise DataError(f"{root} has no files train/0.npz, train/1.npz, ...; dataset.root is a folder of PFLlib.")
    stated = _stated(root)
    clients = numbers["train"][-1] + 1 if stated is None else stated
    for part, present in numbers.items():
        if present != list(range(clients)):
            absent = next((k for k in range(clients) if k not in present), None)
            what = f"{part}/{absent}.npz is missing" if absent is not None else f"{part} has more files"
            raise DataError(f"{root}: there are {clients} clients, but {what}.")
    return clients


def _stated(root: Path) -> int | None:
    """Number of clients that ``config.json`` states; None if there is no such file."""
    path = root / "config.json"
    if not path.is_file():
        return None
    try:
        clients = json.loads(path.read_text(encoding="utf-8")).get("num_clients")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({reason(error)}).") from error
    return clients if isinstance(clients, int) else None


def _read(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """Inputs ``[n, ...]`` and labels ``[n]`` of one client's part."""
    try:
        with zipfile.ZipFile(path) as file:
            content: Any = {name.removesuffix(".npy"): _array(file, name) for name in file.namelist()}
        content = content["data"] if isinstance(content.get("data"), dict) else content
        if not isinstance(content, dict) or not {"x", "y"} <= content.keys():
            raise DataError(f"{path} holds no dictionary of x and y.")
        x, y = np.asarray(content["x"]), np.asarray(content["y"])
    except DataError:
        raise
    except Exception as error:  # whatever damaged or malicious bytes lead to
        raise DataError(f"{path} cannot be read ({reason(error)}).") from error
    if x.dtype == object or y.dtype == object or y.ndim != 1 or x.ndim == 0 or len(x) != len(y):
        raise DataError(f"{path}: x is {x.dtype} {list(x.shape)} and y {y.dtype} {list(y.shape)}, expected [n, ...] "
                        f"and [n].")  # fmt: skip
    return x, y


def _array(file: zipfile.ZipFile, name: str) -> Any:
    """One array of an ``.npz`` file; of a pickled one what it holds, without running anything."""
    with file.open(name) as stream:
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        _, _, dtype = header(stream)
        if dtype.hasobject:
            return _resolved(_ArraysOnly(stream).load())
    with file.open(name) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)
