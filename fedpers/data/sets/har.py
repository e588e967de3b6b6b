"""Human activity recognition with smartphones (UCI HAR), from the files as they are unpacked."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedpers.data.sets.base import Dataset, data_root, finite_floats, number_labels
from fedpers.errors import DataError, reason
from fedpers.settings.dataset import DatasetConfig
from fedpers.settings.sources import SOURCES

FOLDER = "UCI HAR Dataset"
SIGNALS = tuple(f"{kind}_{axis}" for kind in ("body_acc", "body_gyro", "total_acc") for axis in "xyz")
"""Channels in their order: acceleration of the body, angular velocity, total acceleration."""
STEPS = 128
"""Values of a window: 2.56 seconds."""
_SOURCE = f"it is to be had from {SOURCES['har'].url} ({SOURCES['har'].licence})"


def har(config: DatasetConfig) -> Dataset:
    """Read the folder "UCI HAR Dataset" (Anguita et al. 2013): 30 people, 6 activities, 9 signals of a smartphone.

    ``dataset.root`` is this folder, or one that holds it. Nothing is downloaded, since no published checksum says
    whether the files are right. They are under CC BY 4.0 at UCI (240), while their README allows no commercial use.

    Returns
    -------
    Dataset
        x float32 ``[10299, 9, 128]``, as the files have it: accelerations in g, angular velocities in radians a second.
        Natural clients are the people. The classes are named as in ``activity_labels.txt``. There are no official
        parts: the files' ``train`` and ``test`` hold different people, so that nobody could be trained and tested on
        them; samples of both are here, those of ``train`` first.

    Raises
    ------
    DataError
        If a file is missing or damaged, or files differ in the number of their lines.
    """
    root = data_root(config)
    root = root / FOLDER if (root / FOLDER).is_dir() else root
    if not (root / "activity_labels.txt").is_file():
        raise DataError(f"har: {root} is missing or not the folder {FOLDER}, {_SOURCE}; set dataset.root to it.")
    activities = _activities(root / "activity_labels.txt")
    parts = [_read_part(root, part) for part in ("train", "test")]
    x, labels, subject = (np.concatenate([part[place] for part in parts]) for place in range(3))
    unknown = np.setdiff1d(labels, list(activities))
    if len(unknown):
        raise DataError(f"har: {root} has the label {unknown[0]}, which activity_labels.txt does not name.")
    y = np.searchsorted(list(activities), labels)
    owner, owner_names = number_labels(subject)
    return Dataset(
        torch.from_numpy(finite_floats(x, f"{root}: Inertial Signals is")),
        torch.from_numpy(y),
        len(activities),
        config.name,
        owner=torch.from_numpy(owner),
        owner_names=owner_names,
        class_names=tuple(activities.values()),
    )


def _activities(path: Path) -> dict[int, str]:
    """Names of the activities by their numbers, ascending."""
    try:
        rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return dict(sorted((int(number), name) for number, name in rows))
    except ValueError as error:
        raise DataError(f"{path} is damaged ({reason(error)}); a line is a number and a name.") from error


def _read_part(root: Path, part: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Signals float32 ``[n, 9, 128]``, labels int64 ``[n]`` and subjects int64 ``[n]`` of ``train`` or ``test``."""
    folder = root / part
    labels = _read(folder / f"y_{part}.txt", np.int64, 1)
    subject = _read(folder / f"subject_{part}.txt", np.int64, 1)
    paths = [folder / "Inertial Signals" / f"{signal}_{part}.txt" for signal in SIGNALS]
    x = np.empty((len(labels), len(SIGNALS), STEPS), np.float32)
    for channel, path in enumerate(paths):
        x[:, channel] = _same_lines(path, _read(path, np.float32, STEPS), labels)
    return x, labels[:, 0], _same_lines(folder / f"subject_{part}.txt", subject, labels)[:, 0]


def _read(path: Path, dtype: type[np.generic], columns: int) -> NDArray[Any]:
    """Numbers ``[n, columns]`` of a file of text."""
    if not os.path.isfile(path):
        raise DataError(f"har: {path} is missing; {_SOURCE}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a file that is empty, which is refused below
            warnings.simplefilter("error", DeprecationWarning)  # of 2.5 where whole numbers are
            values = np.loadtxt(path, dtype=dtype, ndmin=2)
    except (ValueError, OverflowError, DeprecationWarning) as error:
        raise DataError(f"har: {path} is damaged ({reason(error)}).") from error
    if values.shape[1] != columns or len(values) == 0:
        shape = list(values.shape) if values.size else "nothing"
        raise DataError(f"har: {path} holds {shape}, expected numbers [n, {columns}].")
    return values


def _same_lines(path: Path, values: NDArray[Any], labels: NDArray[Any]) -> NDArray[Any]:
    """`values`, if there are as many rows as labels."""
    if len(values) != len(labels):
        raise DataError(f"har: {path} has {len(values)} lines, but there are {len(labels)} labels.")
    return values
