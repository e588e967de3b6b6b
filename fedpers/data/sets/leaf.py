"""Files as LEAF writes them: JSON with ``users``, ``num_samples`` and ``user_data``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpers.data.sequences import UNKNOWN, pad
from fedpers.data.sets.arrays import dataset_of
from fedpers.data.sets.base import Dataset, data_root
from fedpers.data.sets.text import split_text, vocabulary
from fedpers.errors import DataError, reason
from fedpers.settings.dataset import DatasetConfig
from fedpers.tasks.next_token import PADDING, NextToken

TWEET = 4
"""Position of the text in a sample of Sent140."""
PAD = "<PAD>"
"""What fills Reddit's sequences."""


def leaf(config: DatasetConfig) -> Dataset:
    """Read LEAF's JSON files: each user is a natural client.

    ``dataset.root`` is a file, a folder of files, or a folder with ``train`` and ``test`` (perhaps under ``data``),
    which then are the official parts. What inputs are is seen from the first sample:

    - lists of numbers of one length are taken as they are; of a square number of at least 64 they become pictures
      ``[1, H, W]`` (FEMNIST, CelebA's and the synthetic set's features);
    - text whose labels are single characters: the next character (Shakespeare), a classification of tokens ``[N, T]``;
    - lists with the text at position 4 (Sent140): its last ``dataset.sequence_length`` words;
    - lists of sequences of words, labels with ``target_tokens`` (Reddit): the next word at each position.

    Raises
    ------
    DataError
        If there is no such file, one is damaged, or inputs are none of these.
    """
    root = data_root(config, "file or folder")
    folders = [folder for folder in (root, root / "data") if (folder / "train").is_dir() and (folder / "test").is_dir()]
    parts = [folders[0] / "train", folders[0] / "test"] if folders else [root]
    read = [_read_part(part) for part in parts]
    train_size = len(read[0]) if len(read) == 2 else None
    rows = [row for part in read for row in part]
    first = rows[0] if rows else None
    if first is not None and isinstance(first[2], dict):
        read = [[piece for row in part for piece in _sequences(root, *row)] for part in read]
        train_size = len(read[0]) if len(read) == 2 else None
        return _next_words(root, [row for part in read for row in part], train_size, config)
    owners = np.array([user for user, _, _ in rows])
    labels = _labels(root, rows)
    num_tokens = 0
    if first is not None and isinstance(first[1], str):
        x, num_tokens = _characters(root, rows)
    elif first is not None and isinstance(first[1], list) and any(isinstance(value, str) for value in first[1]):
        x, num_tokens = _tweets(root, rows, config)
    else:
        try:
            x = np.array([values for _, values, _ in rows], dtype=np.float32)
        except (ValueError, TypeError) as error:
            raise DataError(f"{root}: inputs are no lists of numbers of one length ({reason(error)}).") from error
        side = math.isqrt(x.shape[1]) if x.ndim == 2 else 0
        if side >= 8 and side * side == x.shape[1]:
            x = x.reshape(len(x), 1, side, side)
    return dataset_of(
        root,
        root.stem,
        {"x": x},
        {"y": _whole(labels)},
        client=owners,
        tokens=num_tokens > 0,
        num_tokens=num_tokens,
        train_size=train_size,
    )


def _labels(root: Path, rows: Sequence[tuple[str, Any, Any]]) -> NDArray[Any]:
    try:
        return np.array([label for _, _, label in rows])
    except ValueError as error:
        raise DataError(f"{root}: labels are no numbers or text, one for each sample ({reason(error)}).") from error


def _characters(root: Path, rows: Sequence[tuple[str, Any, Any]]) -> tuple[NDArray[np.int64], int]:
    """Shakespeare: characters ``[N, T]``, and how many there are."""
    length = len(rows[0][1])
    for user, said, label in rows:
        if not isinstance(said, str) or len(said) != length or not isinstance(label, str) or len(label) != 1:
            raise DataError(
                f"{root}: a sample of user {user} is not {length} characters of text with one character as label."
            )
    known = sorted({letter for _, said, _ in rows for letter in said})
    number = {letter: position for position, letter in enumerate(known)}
    return np.array([[number[letter] for letter in said] for _, said, _ in rows], dtype=np.int64), len(known)


def _tweets(root: Path, rows: Sequence[tuple[str, Any, Any]], config: DatasetConfig) -> tuple[NDArray[np.int64], int]:
    """Sent140: the last words ``[N, T]`` of each tweet, padded on the left, and the size of the vocabulary."""
    texts = []
    for user, fields, _ in rows:
        if not isinstance(fields, list) or len(fields) <= TWEET or not isinstance(fields[TWEET], str):
            raise DataError(f"{root}: a sample of user {user} is no list with the text at position {TWEET}.")
        texts.append(split_text(fields[TWEET], "word"))
    words = vocabulary((word for said in texts for word in said), config.vocabulary_size)
    ids = [[words.get(word, UNKNOWN) for word in said] for said in texts]
    return pad(ids, config.sequence_length or 1, left=True), len(words) + 1


def _sequences(root: Path, user: str, inputs: Any, label: Any) -> list[tuple[str, Any, Any]]:
    """Reddit: the sequences of one comment, each with its next words."""
    targets: Any = label.get("target_tokens") if isinstance(label, dict) else None
    for given in (inputs, targets):
        rows = isinstance(given, list) and all(isinstance(row, list) for row in given)
        if not rows or not all(isinstance(word, str) for row in given for word in row):
            raise DataError(f"{root}: a sample of user {user} is no list of lists of words with 'target_tokens'.")
    if [len(row) for row in inputs] != [len(row) for row in targets]:
        raise DataError(f"{root}: inputs and target_tokens of user {user} differ in length.")
    return [(user, words, following) for words, following in zip(inputs, targets, strict=True) if words]


def _next_words(
    root: Path, rows: Sequence[tuple[str, Any, Any]], train_size: int | None, config: DatasetConfig
) -> Dataset:
    """Reddit's sequences ``[N, T]``, shorter ones padded on the right."""
    length = max((len(words) for _, words, _ in rows), default=1)
    said = (word for _, before, after in rows for word in (*before, *after) if word != PAD)
    words = vocabulary(said, config.vocabulary_size)
    x = pad([[words.get(word, UNKNOWN) for word in before] for _, before, _ in rows], length)
    following = [[PADDING if word == PAD else words.get(word, UNKNOWN) for word in after] for _, _, after in rows]
    y = pad(following, length, PADDING)
    owners = np.array([user for user, _, _ in rows])
    made = dataset_of(
        root,
        root.stem,
        {"x": x},
        {"y": y},
        client=owners,
        tokens=True,
        num_tokens=len(words) + 1,
        train_size=train_size,
    )
    return replace(made, task=NextToken(UNKNOWN))


def _whole(labels: NDArray[Any]) -> NDArray[Any]:
    """Labels that JSON wrote as 3.0 as whole numbers."""
    whole = labels.dtype.kind == "f" and bool((labels == np.floor(labels)).all())
    return labels.astype(np.int64) if whole else labels


def _read_part(path: Path) -> list[tuple[str, Any, Any]]:
    """User, input and label of every sample of a file or a folder of files."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} has no .json file.")
    return [row for file in files for row in _read_file(file)]


def _read_file(path: Path) -> list[tuple[str, Any, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is missing or damaged ({reason(error)}).") from error
    if not isinstance(content, dict) or not {"users", "user_data"} <= content.keys():
        raise DataError(f"{path} is not a file of LEAF: it has no 'users' and 'user_data'.")
    if not isinstance(content["users"], list) or not isinstance(content["user_data"], dict):
        raise DataError(f"{path} is not a file of LEAF: 'users' is no list, or 'user_data' no dictionary.")
    rows: list[tuple[str, Any, Any]] = []
    for user in dict.fromkeys(map(str, content["users"])):
        samples = content["user_data"].get(user)
        if not isinstance(samples, dict) or not {"x", "y"} <= samples.keys():
            raise DataError(f"{path}: user {user} has no x and y.")
        if not isinstance(samples["x"], list) or not isinstance(samples["y"], list):
            raise DataError(f"{path}: x and y of user {user} are no lists.")
        if len(samples["x"]) != len(samples["y"]):
            raise DataError(f"{path}: user {user} has {len(samples['x'])} inputs but {len(samples['y'])} labels.")
        rows += [(str(user), values, label) for values, label in zip(samples["x"], samples["y"], strict=True)]
    return rows
