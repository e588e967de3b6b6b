"""Folders of pictures: one for each class, perhaps within one for each domain."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpers.data.sets.arrays import dataset_of
from fedpers.data.sets.base import Dataset, data_root
from fedpers.errors import DataError, reason
from fedpers.settings.dataset import DatasetConfig

logger = logging.getLogger(__name__)
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_OFFICIAL_PARTS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def images(config: DatasetConfig) -> Dataset:
    """Read ``ROOT/CLASS/*.png`` or ``ROOT/DOMAIN/CLASS/*.png`` (or another common format).

    Pictures are scaled to ``dataset.size`` pixels a side and normalized. Where there are domains, each is a natural
    client; a domain may lack a class. Files that are no pictures are left out and named on the screen.

    Raises
    ------
    DataError
        If the folder is missing, holds no classes with pictures, or a picture is damaged.
    """
    root = data_root(config, "folder")
    files = sorted(path for path in root.rglob("*") if path.is_file() and not _hidden(path.relative_to(root)))
    depths = [len(path.relative_to(root).parts) for path in files if path.suffix.lower() in _SUFFIXES]
    depth = 3 if depths.count(3) > depths.count(2) else 2  # what lies elsewhere is named below
    pictures = [
        path for path in files if path.suffix.lower() in _SUFFIXES and len(path.relative_to(root).parts) == depth
    ]
    if not pictures:
        raise DataError(f"{root} has no pictures in folders CLASS/ or DOMAIN/CLASS/ ({', '.join(_SUFFIXES)}).")
    others = [str(path.relative_to(root)) for path in files if path not in set(pictures)]
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        are = "files are no pictures" if len(others) > 1 else "file is no picture"
        logger.warning("%s: %d %s of a class, left out: %s.", root, len(others), are, shown)
    x = np.stack([_picture(path, config.size) for path in pictures])
    grey = bool((x == x[..., :1]).all())
    labels = np.array([path.parent.name for path in pictures])
    domains = np.array([path.parent.parent.name for path in pictures]) if depth == 3 else None
    if domains is not None and set(domains) <= _OFFICIAL_PARTS:
        shown = " and ".join(sorted(set(domains)))
        logger.warning(
            "%s: %s are taken for domains, not for official parts, which this form does not have.", root, shown
        )
    x = x[..., :1] if grey else x
    name = root.resolve().name
    return dataset_of(root, name, {"pictures": x}, {"class": labels}, client=domains, domain=domains)


def _hidden(path: Path) -> bool:
    """Whether it is a file of the system, such as ``.DS_Store``."""
    return any(part.startswith((".", "__MACOSX")) or part == "Thumbs.db" for part in path.parts)


def _picture(path: Path, size: int) -> NDArray[Any]:
    """Uint8 ``[size, size, 3]``."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            if picture.mode[0] in "IF":
                raise DataError(f"{path} has {picture.mode} pixels, expected a picture of 8 bits for each channel.")
            scaled = picture.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is damaged ({reason(error)}).") from error
    return np.asarray(scaled)
