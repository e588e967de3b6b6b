"""Sequences of tokens, which may differ in length, as rows of one length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedpers.errors import DataError

UNKNOWN = 0
"""Token of what a vocabulary lacks, and of padding."""


def sequences_of(values: Any, what: str, least: int = 0) -> NDArray[Any] | None:
    """Sequences of whole numbers, one for each sample.

    Parameters
    ----------
    values : tensor or array ``[n, T]``, or sequence of n sequences
    what : str
        For errors.
    least : int
        The smallest number that is allowed.

    Returns
    -------
    object array ``[n]`` of int64 arrays ``[t]``, or None
        None if a sample is no sequence, as labels of classes are not.

    Raises
    ------
    DataError
        If a sequence is empty or holds something else.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    rows = list(values) if isinstance(values, np.ndarray | list | tuple) else []
    if not rows or not all(isinstance(row, Tensor | np.ndarray | list | tuple) and np.ndim(row) == 1 for row in rows):
        return None
    sequences = np.empty(len(rows), dtype=object)
    for position, row in enumerate(rows):
        array = np.asarray(row.detach().cpu() if isinstance(row, Tensor) else row)
        if array.size == 0:
            raise DataError(f"{what} have an empty sequence (sample {position}).")
        if array.dtype.kind not in "iu" or int(array.min()) < least:
            given = array.min() if array.dtype.kind in "iu" else array.dtype
            raise DataError(f"{what} are {given}, expected whole numbers >= {least} because of tokens=True.")
        sequences[position] = array.astype(np.int64)
    return sequences


def pad(
    rows: Sequence[Sequence[int] | NDArray[np.int64]], length: int, filler: int = UNKNOWN, *, left: bool = False
) -> NDArray[np.int64]:
    """Rows ``[N, length]``; longer sequences keep their last tokens.

    Parameters
    ----------
    rows : sequence of sequences
    length : int
    filler : int
        What shorter ones are filled with.
    left : bool
        Whether in front, so that the last position of a row has seen all its tokens, not behind.
    """
    padded = np.full((len(rows), length), filler, dtype=np.int64)
    for target, row in zip(padded, rows, strict=True):
        kept = row[-length:]
        target[length - len(kept) if left else 0 : length if left else len(kept)] = kept
    return padded


def columns_of(
    inputs: Sequence[NDArray[Any]], labels: Sequence[NDArray[Any]], where: Sequence[str]
) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """Inputs ``[N, T]`` of several clients, and the next tokens ``[N, T]`` if labels are sequences.

    Shorter sequences are padded: with :data:`UNKNOWN` in front, or, where the next token is learned, behind, with
    labels of -1.

    Parameters
    ----------
    inputs : sequence of object arrays ``[n_k]``
        From :func:`sequences_of`.
    labels : sequence of arrays ``[n_k]``
        The same, or one class for each sample.
    where : sequence of str
        Names of the clients.

    Raises
    ------
    DataError
        If labels are sequences of some clients only, or of another length than their inputs.
    """
    sequences = [bool(len(y)) and isinstance(y[0], np.ndarray) for y in labels]
    if any(sequences) and not all(sequences):
        raise DataError(f"{where[sequences.index(False)]}: labels are classes, but of other clients the next tokens.")
    x = [row for part in inputs for row in part]
    length = max(map(len, x))
    if not any(sequences):
        return pad(x, length, left=True), None
    for client, rows, following in zip(where, inputs, labels, strict=True):
        for position, (row, after) in enumerate(zip(rows, following, strict=True)):
            if len(row) != len(after):
                raise DataError(f"{client}: sample {position} has {len(row)} tokens but {len(after)} next tokens.")
    return pad(x, length), pad([row for part in labels for row in part], length, -1)
