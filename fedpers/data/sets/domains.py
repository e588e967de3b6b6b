"""Pictures of the same classes in several styles: a folder with an ``.npz`` file for each domain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from fedpers.data.sets.arrays import checked_ids, dataset_of, read_npz
from fedpers.data.sets.base import Dataset, data_root
from fedpers.errors import DataError
from fedpers.settings.dataset import DatasetConfig

_AT_ONCE = 1024  # pictures that are scaled together


def domains(config: DatasetConfig) -> Dataset:
    """Read ``ROOT/DOMAIN.npz``, such as digits as in MNIST, MNIST-M, USPS and SVHN (Li et al. 2021, FedBN).

    Each file has pictures ``dataset.x``, uint8 ``[N, H, W]`` or ``[N, H, W, C]`` with one or three channels, and
    classes ``dataset.y``, whole numbers or text ``[N]``, of the same meaning in all of them. Pictures are scaled to
    ``dataset.size`` pixels a side (linearly, with antialiasing), given the same channels (grey ones three, if a domain
    has colours) and normalized together. Each domain is a natural client; a domain may lack a class.

    Returns
    -------
    Dataset
        x float32 ``[N, C, size, size]``, domains in the order of their names; no official parts.

    Raises
    ------
    DataError
        If the folder is missing or has no ``.npz`` file, or one of them is damaged or holds something else.
    """
    root = data_root(config, "folder")
    files = sorted(path for path in root.glob("*.npz") if not path.name.startswith("."))
    if not files:
        raise DataError(f"{root} has no .npz files; dataset.root is a folder with one for each domain.")
    read = [_read(path, config) for path in files]
    if len({y.dtype.kind in "US" for _, y in read}) > 1:
        kinds = ", ".join(f"{path.name} {y.dtype}" for path, (_, y) in zip(files, read, strict=True))
        raise DataError(f"{root}: {config.y} must be text in all domains or whole numbers in all, not {kinds}.")
    channels = max(x.shape[3] for x, _ in read)
    pictures = np.concatenate([np.broadcast_to(x, (*x.shape[:3], channels)) for x, _ in read])
    domain = np.repeat([path.stem for path in files], [len(y) for _, y in read])
    labels = np.concatenate([y for _, y in read])
    return dataset_of(root, root.name, {config.x: pictures}, {config.y: labels}, client=domain, domain=domain)


def _read(path: Path, config: DatasetConfig) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Scaled pictures uint8 ``[N, size, size, C]`` and classes ``[N]`` of one domain."""
    arrays = read_npz(path, [config.x, config.y])
    x, y = arrays[config.x], arrays[config.y]
    x = x[..., None] if x.ndim == 3 else x
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] not in (1, 3) or 0 in x.shape[1:]:
        raise DataError(
            f"{path}: {config.x} is {x.dtype} {list(arrays[config.x].shape)}, expected uint8 pictures [N, H, W] or "
            f"[N, H, W, C] with C 1 or 3."
        )
    checked_ids(path, config.y, y)
    if len(x) != len(y) or len(y) == 0:
        raise DataError(f"{path}: {config.x} has {len(x)} samples and {config.y} has {len(y)}, expected as many.")
    return _scaled(x, config.size), y


def _scaled(pictures: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Uint8 ``[N, size, size, C]`` of uint8 ``[N, H, W, C]``."""
    if pictures.shape[1:3] == (size, size):
        return pictures
    scaled = np.empty((len(pictures), size, size, pictures.shape[3]), np.uint8)
    for start in range(0, len(pictures), _AT_ONCE):
        block = torch.from_numpy(np.ascontiguousarray(pictures[start : start + _AT_ONCE])).permute(0, 3, 1, 2).float()
        block = interpolate(block, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
        scaled[start : start + _AT_ONCE] = block.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return scaled
