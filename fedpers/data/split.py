"""What each client trains, validates and tests on."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from fedpers.data.federated import Part
from fedpers.data.partitions.base import Lists
from fedpers.data.sets.base import Dataset
from fedpers.errors import DataError, check
from fedpers.randomness import generator
from fedpers.settings.split import SplitConfig

logger = logging.getLogger(__name__)


def split_clients(
    dataset: Dataset,
    owned: Sequence[NDArray[np.int64]],
    config: SplitConfig,
    seed: int,
    *,
    by_owner: bool = False,
    by_domain: bool = False,
) -> dict[Part, Lists]:
    """Split the samples of every client.

    Parameters
    ----------
    dataset : Dataset
        The whole data set, official test part included.
    owned : sequence of int64 arrays ``[n_k]``
        Positions each client owns; with ``official`` only such of the official training part.
    config : SplitConfig
    seed : int
        A client's split depends on `seed`, its number and its own samples, not on the other clients
        (``official`` test samples excepted).
    by_owner : bool
        Whether `owned` are the natural clients of `dataset`, or groups of them, so that ``official`` test samples go
        to their owners.
    by_domain : bool
        Whether ``official`` test samples go to clients of their own domain only.

    Returns
    -------
    dict
        ``train``, ``validation`` and ``test`` -> one ascending int64 array per client, not empty except validation
        where ``config.validation`` is 0; no position twice.

    Raises
    ------
    DataError
        If a client has too few samples for all its parts.
    ConfigError
        If the split is ``official`` and the data set has no official test part; if it is ``stratified`` and there are
        no classes; if it is ``leave_one_out``, which is for ratings.
    """
    check(config.name != "leave_one_out", "split", config.name, "fractions or official, except for ratings")
    labels = strata(dataset, config)
    if config.name == "official":
        held = [hold_out(positions, [config.validation], seed, k, labels) for k, positions in enumerate(owned)]
        train, validation = map(list, zip(*held, strict=True))
        mixed = _domains_as_classes(dataset) if by_domain else dataset
        test = official_by_owner(dataset, owned) if by_owner else deal_official(mixed, owned, seed)
    else:
        fractions = [config.validation, config.test]
        held = [hold_out(positions, fractions, seed, k, labels) for k, positions in enumerate(owned)]
        train, validation, test = map(list, zip(*held, strict=True))
    return {"train": train, "validation": validation, "test": test}


def draw_unseen(num_clients: int, config: SplitConfig, seed: int) -> tuple[int, ...]:
    """Draw the clients that never train, ascending.

    Raises
    ------
    ConfigError
        If ``config.unseen`` leaves no client to train, or names one that there is not.
    """
    if isinstance(config.unseen, tuple):
        allowed = f"clients from 0 to {num_clients - 1}, each once, of which one at least is left to train"
        listed = sorted(set(config.unseen) & set(range(num_clients)))
        fits = len(listed) == len(config.unseen) < num_clients
        check(fits, "split.unseen", list(config.unseen), allowed)
        return tuple(listed)
    count = config.unseen if isinstance(config.unseen, int) else max(1, int(config.unseen * num_clients + 0.5))
    if count == 0:
        return ()
    what = "a number" if isinstance(config.unseen, int) else "a share that gives a number"
    allowed = f"{what} below {num_clients}, the clients, so that one is left to train"
    check(count < num_clients, "split.unseen", config.unseen, allowed)
    return tuple(np.sort(generator(seed, "unseen").permutation(num_clients)[:count]).tolist())


def take_public(
    train: Sequence[NDArray[np.int64]], unseen: Sequence[int], config: SplitConfig, seed: int
) -> tuple[Lists, NDArray[np.int64] | None]:
    """Take a share of the training samples out of the clients' lists.

    Parameters
    ----------
    train : sequence of int64 arrays ``[n_k]``
        The lists may share samples.
    unseen : sequence of int
        Clients that never train; what only they have is not taken.
    config : SplitConfig
    seed : int

    Returns
    -------
    train : list of int64 arrays ``[>= 1]``
        What is left to the clients, in the order given.
    public : int64 array ``[p]`` or None
        What was taken, ascending: ``config.public`` of the distinct samples in lists of clients that train, rounded,
        but at least one; none of it is left in any list. None if ``config.public`` is 0.

    Raises
    ------
    ConfigError
        If so many cannot be taken because every client keeps one sample.
    """
    if config.public == 0:
        return list(train), None
    rng = generator(seed, "public")
    reserved = [rng.choice(positions) for positions in train]
    absent = set(unseen)
    shared = np.unique(np.concatenate([positions for k, positions in enumerate(train) if k not in absent]))
    available = np.setdiff1d(shared, reserved)
    count = max(1, int(config.public * len(shared) + 0.5))
    share = math.floor(1e4 * len(available) / len(shared)) / 1e4
    allowed = (
        f"at most {share:g}, because of the {len(shared)} training samples each of the {len(train)} clients keeps one"
    )
    check(count <= len(available), "split.public", config.public, allowed)
    public = np.sort(rng.permutation(available)[:count])
    return [positions[~np.isin(positions, public)] for positions in train], public


def take_global(
    owned: Sequence[NDArray[np.int64]], config: SplitConfig, seed: int
) -> tuple[Lists, NDArray[np.int64] | None, NDArray[np.int64] | None]:
    """Take a share of the samples of each client out of the lists, before these are split.

    Parameters
    ----------
    owned : sequence of int64 arrays ``[n_k]``
    config : SplitConfig
    seed : int
        What is taken from a client depends on `seed`, its number and its own samples.

    Returns
    -------
    owned : list of int64 arrays
        What is left to the clients, in the order given.
    taken : int64 array ``[g]`` or None
        Ascending: ``config.global_test`` of the samples of each client, rounded half up; None if that is 0.
    owners : int64 array ``[g]`` or None
        Client of each.

    Raises
    ------
    ConfigError
        If that is not one sample of any client, or all of one.
    """
    share = config.global_test
    if share == 0:
        return list(owned), None, None
    drawn = [generator(seed, "global test", client).permutation(positions) for client, positions in enumerate(owned)]
    parts = [order[: int(share * len(order) + 0.5)] for order in drawn]
    taken, owners = np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    ascending = np.argsort(taken)
    taken, owners = taken[ascending], owners[ascending]
    largest = max(len(positions) for positions in owned)
    check(len(taken) > 0, "split.global_test", share, f"at least {0.5 / largest:.2g}, one sample of the largest client")
    left = [positions[~np.isin(positions, taken)] for positions in owned]
    emptied = next((client for client, positions in enumerate(left) if len(positions) == 0 < len(owned[client])), None)
    check(emptied is None, "split.global_test", share, f"less, which leaves client {emptied} a sample")
    return left, taken, owners


def keep_at_most(
    train: Sequence[NDArray[np.int64]], config: SplitConfig, seed: int, labels: NDArray[np.int64] | None = None
) -> Lists:
    """Leave each client ``config.max_train`` of its training samples, ascending.

    Parameters
    ----------
    train : sequence of int64 arrays ``[n_k]``
    config : SplitConfig
    seed : int
        What a client keeps depends on `seed`, its number and its own samples; what a smaller number leaves is among
        what a larger one leaves, unless the split is stratified.
    labels : int64 array ``[N]``, optional
        Class of each sample of the data set, of a stratified split.
    """
    most = config.max_train
    if most is None:
        return list(train)
    kept = []
    for client, positions in enumerate(train):
        rng = generator(seed, "max_train", client)
        order = rng.permutation(positions)
        few = slice(most) if labels is None or len(order) <= most else _in_proportion(labels[order], most, rng)
        kept.append(np.sort(order[few]))
    return kept


def strata(dataset: Dataset, config: SplitConfig) -> NDArray[np.int64] | None:
    """Class of each sample ``[N]`` if parts are to have the classes in proportion, else None.

    Raises
    ------
    ConfigError
        If there are no classes.
    """
    if not config.stratified:
        return None
    allowed = f"false, because {dataset.name} has no class labels"
    check(dataset.task.classes, "split.stratified", config.stratified, allowed)
    return dataset.y.numpy()


def hold_out(
    positions: NDArray[np.int64],
    fractions: Sequence[float],
    seed: int,
    client: int,
    labels: NDArray[np.int64] | None = None,
) -> Lists:
    """Divide one client's samples at random.

    Parameters
    ----------
    positions : int64 array ``[n]``
    fractions : sequence of float
        Share of `n` of each held-out part, rounded half up: 0 gives an empty part, any other at least one sample and
        at most what leaves one for every other part.
    seed, client : int
        Decide on the draw.
    labels : int64 array ``[N]``, optional
        Class of each sample of the data set. The parts are as large as without, and have of each class what is their
        share of what is left of it, rounded up or down.

    Returns
    -------
    list of int64 arrays
        What is left (for training), then the held-out parts, all ascending.

    Raises
    ------
    DataError
        If there are fewer samples than parts.
    """
    n, parts = len(positions), 1 + sum(fraction > 0 for fraction in fractions)
    if n < parts:
        names = f"train and {'validation' if len(fractions) == 1 else 'test'}"
        names = "train, validation and test" if parts == 3 else names
        need = "train needs one" if parts == 1 else f"{names} need one each"
        raise DataError(f"Client {client} has {n} samples, but {need}; raise partition.min_samples.")
    rest = generator(seed, "split", client).permutation(positions)
    rng = generator(seed, "strata", client)
    held: Lists = []
    for done, fraction in enumerate(fractions):
        most = len(rest) - 1 - sum(other > 0 for other in fractions[done + 1 :])
        size = min(max(1, int(fraction * n + 0.5)), most) if fraction > 0 else 0
        chosen = np.arange(len(rest)) < size if labels is None else _in_proportion(labels[rest], size, rng)
        held.append(rest[chosen])
        rest = rest[~chosen]
    return [np.sort(part) for part in (rest, *held)]


def _in_proportion(labels: NDArray[np.int64], size: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which of some samples, the first of each class, make a part of `size` with classes in proportion."""
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    shares = _shares(counts, size, rng)
    order = np.argsort(classes, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank < shares[classes]


def _shares(counts: NDArray[np.int64], total: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Divide `total` in proportion to `counts`: whole shares first, the rest to the largest fractions, ties by lot."""
    shares, remainders = np.divmod(counts * total, counts.sum())  # whole numbers, so ties are exact
    first = np.lexsort((rng.permutation(len(counts)), -remainders))
    shares[first[: total - shares.sum()]] += 1
    return shares


def tested_owners(dataset: Dataset) -> Dataset:
    """Official training part, in which samples of owners without official test samples are nobody's.

    Both owners without test samples and test samples of owners without training samples are left out with a warning.
    """
    training = dataset.training_part()
    if dataset.owner is None or training.owner is None:
        return training
    trained, tested = torch.unique(training.owner), torch.unique(dataset.owner[len(training) :])
    for absent, present, what in ((tested, trained, "test"), (trained, tested, "training")):
        missing = present[(present >= 0) & ~torch.isin(present, absent)]  # -1: nobody
        if len(missing):
            names = [dataset.owner_name(int((dataset.owner == number).nonzero()[0])) for number in missing[:3]]
            logger.warning(
                "split=official: %d of %d clients (%s) have no official %s samples and are left out.",
                len(missing), int((present >= 0).sum()), ", ".join(names) + (", ..." if len(missing) > 3 else ""), what,
            )  # fmt: skip
    kept = torch.isin(training.owner, tested)
    return replace(training, owner=torch.where(kept, training.owner, -1))


def official_by_owner(dataset: Dataset, owned: Sequence[NDArray[np.int64]]) -> Lists:
    """Official test samples of the owners of each client's samples, ascending; see :func:`tested_owners`."""
    assert dataset.owner is not None
    start = len(dataset.training_part())
    owner = dataset.owner.numpy()
    order = start + np.argsort(owner[start:], kind="stable")

    def tested(positions: NDArray[np.int64]) -> NDArray[np.int64]:
        owners = np.unique(owner[positions])
        ends = zip(*(np.searchsorted(owner[order], owners, side) for side in ("left", "right")), strict=True)
        return np.sort(np.concatenate([order[first:last] for first, last in ends]))

    return [tested(positions) for positions in owned]


def _domains_as_classes(dataset: Dataset) -> Dataset:
    """The same samples, each class of each domain being a class of its own."""
    assert dataset.domain is not None
    classes = dataset.num_classes
    domains = int(dataset.domain.max()) + 1
    return replace(dataset, y=dataset.domain * classes + dataset.y, num_classes=domains * classes, class_names=())


def deal_official(dataset: Dataset, owned: Sequence[NDArray[np.int64]], seed: int) -> Lists:
    """Deal the official test part in proportion to what each client has of each class.

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
    label_counts = np.stack([np.bincount(y[positions], minlength=dataset.num_classes) for positions in owned])
    dealt: list[Lists] = [[] for _ in owned]
    left_out = 0
    for label in range(dataset.num_classes):
        rng = generator(seed, "deal", label)
        samples = start + rng.permutation(np.flatnonzero(y[start:] == label))
        if label_counts[:, label].sum() == 0:
            left_out += len(samples)
            continue
        shares = _shares(label_counts[:, label], len(samples), rng)
        for client, part in enumerate(np.split(samples, np.cumsum(shares)[:-1])):
            dealt[client].append(part)
    if left_out:
        logger.warning("%s: %d official test samples are left out, no client owns their class.", dataset.name, left_out)
    test = [np.sort(np.concatenate([np.zeros(0, np.int64), *parts])) for parts in dealt]
    for client, positions in enumerate(test):
        if len(positions) == 0:
            raise DataError(
                f"split=official: client {client} with its {len(owned[client])} training samples gets no official test "
                f"sample: they are too few, or none of its classes is tested; take fewer clients, a larger "
                f"partition.min_samples, or split=fractions."
            )
    return test
