"""Text of speakers, writers or accounts, as sequences of characters or words."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedpers.data.sequences import UNKNOWN
from fedpers.data.sets.base import Dataset, data_root
from fedpers.errors import DataError, reason
from fedpers.settings.dataset import DatasetConfig
from fedpers.tasks import NextToken
from fedpers.tasks.next_token import PADDING


def text(config: DatasetConfig) -> Dataset:
    """Read what each client says; the next character or word is to be predicted at each position.

    ``dataset.root`` is a folder with a ``.txt`` file for each client, or a ``.json`` file ``{client: text}``, in UTF-8.
    A client's text is cut into sequences of ``dataset.sequence_length`` tokens, without overlap; what is left at the
    end of one is padded, unless it is a single token. A client with fewer than two tokens is left out.

    Raises
    ------
    DataError
        If there is no such file, one cannot be read, or nobody says two tokens.
    """
    root = data_root(config, "file or folder")
    texts = {name: split_text(said, config.level) for name, said in _texts(root).items()}
    size = config.vocabulary_size if config.level == "word" else None
    tokens = vocabulary((token for said in texts.values() for token in said), size)
    x: list[NDArray[np.int64]] = []
    y: list[NDArray[np.int64]] = []
    owner: list[int] = []
    names: list[str] = []
    for name, said in texts.items():
        ids = np.array([tokens.get(token, UNKNOWN) for token in said], dtype=np.int64)
        if len(ids) < 2:
            continue
        inputs, labels = windows(ids, config.sequence_length or len(ids))
        x.append(inputs)
        y.append(labels)
        owner += [len(names)] * len(inputs)
        names.append(name)
    if not x:
        raise DataError(f"{root}: no client has two {config.level}s of text.")
    return Dataset(
        torch.from_numpy(np.concatenate(x)),
        torch.from_numpy(np.concatenate(y)),
        len(tokens) + 1,
        root.stem,
        owner=torch.tensor(owner),
        owner_names=tuple(names),
        num_tokens=len(tokens) + 1,
        task=NextToken(UNKNOWN),
    )


def split_text(said: str, level: Literal["character", "word"]) -> Sequence[str]:
    """Tokens of a text: its characters, or its words in small letters and its marks of punctuation."""
    return said if level == "character" else re.findall(r"\w+|[^\w\s]", said.lower())


def vocabulary(tokens: Iterable[str], size: int | None = None) -> dict[str, int]:
    """Ids from 1 of tokens, in their order; of the `size` most frequent only, if that is given."""
    counts = Counter(tokens)
    known = sorted(sorted(counts), key=lambda token: -counts[token])[:size]
    return {token: number for number, token in enumerate(sorted(known), 1)}


def windows(ids: NDArray[np.int64], length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut ids ``[n]``, n >= 2, into sequences ``[w, length]`` and the next token at each of their positions.

    The last one is padded on the right, with :data:`UNKNOWN` and labels of :data:`~fedpers.tasks.next_token.PADDING`.
    """
    count = -(-(len(ids) - 1) // length)
    x = np.full(count * length, UNKNOWN, dtype=np.int64)
    y = np.full(count * length, PADDING, dtype=np.int64)
    x[: len(ids) - 1], y[: len(ids) - 1] = ids[:-1], ids[1:]
    return x.reshape(count, length), y.reshape(count, length)


def _texts(root: Path) -> dict[str, str]:
    """Text of each client by name, in the order of names."""
    try:
        if root.is_dir():
            files = sorted(root.glob("*.txt"))
            if not files:
                raise DataError(f"{root} has no .txt file.")
            return {file.stem: file.read_text(encoding="utf-8-sig") for file in files}
        content: Any = json.loads(root.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{root} is damaged or no UTF-8 text, expected a folder of .txt files or a .json file ({reason(error)})."
        ) from error
    if not isinstance(content, dict) or not content or not all(isinstance(said, str) for said in content.values()):
        raise DataError(f"{root} must hold the text of each client: {{client: text}}.")
    return dict(sorted(content.items()))
