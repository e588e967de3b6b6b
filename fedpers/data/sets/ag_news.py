"""AG News: short articles of four kinds (Zhang et al., "Character-level convolutional networks", NeurIPS 2015)."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch

from fedpers.data.sequences import UNKNOWN, pad
from fedpers.data.sets.base import Dataset, data_root
from fedpers.data.sets.text import split_text, vocabulary
from fedpers.errors import DataError, reason
from fedpers.settings.dataset import DatasetConfig

CLASSES = ("World", "Sports", "Business", "Sci/Tech")


def ag_news(config: DatasetConfig) -> Dataset:
    """Read ``train.csv`` and ``test.csv`` in ``dataset.root``: class 1 to 4, title and description in each line.

    An article is the last ``dataset.sequence_length`` words of title and description, padded on the left; words are
    those of the training part. Nothing is downloaded.

    Raises
    ------
    DataError
        If a file is missing or damaged, or a line is no article.
    """
    root = data_root(config)
    parts = [_read(root / f"{part}.csv") for part in ("train", "test")]
    words = vocabulary((word for _, said in parts[0] for word in said), config.vocabulary_size)
    ids = [[words.get(word, UNKNOWN) for word in said] for part in parts for _, said in part]
    return Dataset(
        torch.from_numpy(pad(ids, config.sequence_length or max(map(len, ids)), left=True)),
        torch.from_numpy(np.array([label for part in parts for label, _ in part], dtype=np.int64)),
        len(CLASSES),
        "ag_news",
        train_size=len(parts[0]),
        class_names=CLASSES,
        num_tokens=len(words) + 1,
    )


def _read(path: Path) -> list[tuple[int, list[str]]]:
    """Class and words of each article of a file."""
    articles: list[tuple[int, list[str]]] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.reader(file), 1):
                if len(row) != 3 or row[0] not in ("1", "2", "3", "4"):
                    raise DataError(f"{path}: line {number} is no article: class 1 to 4, title, description.")
                articles.append((int(row[0]) - 1, list(split_text(f"{row[1]} {row[2]}", "word"))))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(
            f"{path} is missing or damaged ({reason(error)}); AG News is not downloaded, its train.csv and test.csv "
            f"are taken from dataset.root."
        ) from error
    if not articles:
        raise DataError(f"{path} holds no articles.")
    return articles
