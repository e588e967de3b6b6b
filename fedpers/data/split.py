"""What each client trains, validates and tests on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpers.data.datasets import Dataset
from fedpers.data.federated import Part
from fedpers.errors import DataError, check, one_of
from fedpers.randomness import generator

logger = logging.getLogger(__name__)

SPLITS = ("fractions", "official")
Lists = list[NDArray[np.int64]]


@dataclass
class SplitConfig:
    """How a client's samples are split (the group ``split``).

    Parameters
    ----------
    name : str
        ``fractions`` (of the client's own samples) or ``official`` (the official test part is dealt so that a
        client's test labels are mixed like its training labels). Typed as ``split=NAME``.
    validation, test : float
        Fractions of the client's own samples, between 0 and 1, together below 1; ``official`` uses only
        `validation`.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    name: str = "fractions"
    validation: float = 0.15
    test: float = 0.25

    def __post_init__(self) -> None:
        check(self.name in SPLITS, "split", self.name, one_of(SPLITS, str(self.name)))
        for key, value in (("validation", self.validation), ("test", self.test)):
            ok = isinstance(value, float) and 0 < value < 1
            check(ok, f"split.{key}", value, "a number between 0 and 1, both excluded")
        if self.name == "fractions":
            ok = self.validation + self.test < 1
            check(ok, "split.test", self.test, f"less than 1 - split.validation = {1 - self.validation:g}")


def split_clients(
    dataset: Dataset, owned: Sequence[NDArray[np.int64]], config: SplitConfig, seed: int
) -> dict[Part, Lists]:
    """Split the samples of every client.

    Parameters
    ----------
    dataset : Dataset
        The whole data set, official test part included.
    owned : sequence of int64 arrays ``[n_k]``
        Positions each client owns; with ``official`` all of them in the official training part.
    config : SplitConfig
    seed : int
        A client's split depends on `seed`, its number and its own samples, not on the other clients
        (``official`` test samples excepted).

    Returns
    -------
    dict
        ``train``, ``validation`` and ``test`` -> one ascending int64 array ``[>= 1]`` per client; no position twice.

    Raises
    ------
    DataError
        If a client has too few samples for all its parts.
    ConfigError
        If ``official`` is asked of a data set without official test part.
    """
    if config.name == "official":
        held = [hold_out(positions, [config.validation], seed, k) for k, positions in enumerate(owned)]
        train, validation = map(list, zip(*held, strict=True))
        test = deal_official(dataset, owned, seed)
    else:
        fractions = [config.validation, config.test]
        held = [hold_out(positions, fractions, seed, k) for k, positions in enumerate(owned)]
        train, validation, test = map(list, zip(*held, strict=True))
    return {"train": train, "validation": validation, "test": test}


def hold_out(positions: NDArray[np.int64], fractions: Sequence[float], seed: int, client: int) -> Lists:
    """Divide one client's samples at random.

    Parameters
    ----------
    positions : int64 array ``[n]``
    fractions : sequence of float
        How much of `n` each held-out part gets, rounded; at least one sample, and at most what leaves one for
        every other part.
    seed, client : int
        The draw belongs to them.

    Returns
    -------
    list of int64 arrays
        What is left (for training), then the held-out parts, all ascending.

    Raises
    ------
    DataError
        If there are fewer samples than parts.
    """
    n, parts = len(positions), len(fractions) + 1
    if n < parts:
        names = "train, validation and test" if parts == 3 else "train and validation"
        raise DataError(f"Client {client} has {n} samples, but {names} need one each; raise partition.min_samples.")
    shuffled = generator(seed, "split", client).permutation(positions)
    ends = [0]
    for done, fraction in enumerate(fractions):
        most = n - ends[-1] - (len(fractions) - done)
        ends.append(ends[-1] + min(max(1, int(fraction * n + 0.5)), most))
    *held, rest = np.split(shuffled, ends[1:])
    return [np.sort(part) for part in (rest, *held)]


def deal_official(dataset: Dataset, owned: Sequence[NDArray[np.int64]], seed: int) -> Lists:
    """Deal the official test part by the clients' label mixes.

    Test samples of a class are dealt in proportion to the official training samples of that class the clients own:
    whole shares first, what remains to the largest fractions (equal ones in an order drawn from `seed`, so that no
    client is favoured in every class). Each is dealt once; those of a class nobody owns are left out and logged.

    Parameters
    ----------
    dataset : Dataset
    owned : sequence of int64 arrays ``[n_k]``
        Positions in the official training part.
    seed : int

    Returns
    -------
    list of int64 arrays ``[>= 1]``
        Ascending positions of each client's test samples.

    Raises
    ------
    DataError
        If a client gets none.
    ConfigError
        If the data set has no official test part.
    """
    start = len(dataset.training_part())
    y = dataset.y.numpy()
    own = np.stack([np.bincount(y[positions], minlength=dataset.num_classes) for positions in owned])
    dealt: list[Lists] = [[] for _ in owned]
    left_out = 0
    for label in range(dataset.num_classes):
        rng = generator(seed, "deal", label)
        samples = start + rng.permutation(np.flatnonzero(y[start:] == label))
        total = own[:, label].sum()
        if total == 0:
            left_out += len(samples)
            continue
        shares, remainders = np.divmod(own[:, label] * len(samples), total)  # whole numbers, so ties are exact
        first = np.lexsort((rng.permutation(len(owned)), -remainders))
        shares[first[: len(samples) - shares.sum()]] += 1
        for client, part in enumerate(np.split(samples, np.cumsum(shares)[:-1])):
            dealt[client].append(part)
    if left_out:
        logger.warning("%s: %d official test samples are left out, no client owns their class.", dataset.name, left_out)
    test = [np.sort(np.concatenate([np.zeros(0, np.int64), *parts])) for parts in dealt]
    for client, positions in enumerate(test):
        if len(positions) == 0:
            raise DataError(
                f"split=official: client {client} owns {len(owned[client])} training samples, too few to "
                f"get an official test sample; take fewer clients, a larger partition.min_samples, or "
                f"split=fractions."
            )
    return test
