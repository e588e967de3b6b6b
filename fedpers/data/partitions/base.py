"""What a partition says: who owns which samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedpers.data.sets.base import Dataset
from fedpers.settings.partition import PartitionConfig

Lists = list[NDArray[np.int64]]


@dataclass(frozen=True)
class Division:
    """Samples of each client.

    Parameters
    ----------
    owned : list of int64 arrays ``[n_k]``
        Positions of the samples of each client, ascending; no sample has two owners.
    parts : mapping
        ``train``, ``test`` and perhaps ``validation`` -> such lists, where the division says what a client is trained
        and tested on; empty where its samples are still to be split.
    groups : tuple of int
        Group of each client, where the division knows groups; else empty.
    names : tuple of str
        What each client is called; empty where it has a number only.
    """

    owned: Lists
    parts: Mapping[str, Lists] = field(default_factory=dict)
    groups: tuple[int, ...] = ()
    names: tuple[str, ...] = ()


Divide = Callable[[Dataset, PartitionConfig, int], Division]
"""A partition: (data set all of whose samples are to be divided, settings, seed) -> who owns which.

It gives every client at least ``config.min_samples`` samples or raises a :class:`~fedpers.errors.DataError` that says
why it cannot, and a :class:`~fedpers.errors.ConfigError` where a setting does not fit the data. The same arguments give
the same lists.
"""
