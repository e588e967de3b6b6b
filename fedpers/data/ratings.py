"""Implicit feedback of users: items each one liked, one held out, and negatives drawn for training and evaluation."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpers.data.federated import FederatedData, Part
from fedpers.data.sets.rating_files import Ratings
from fedpers.data.split import draw_unseen
from fedpers.errors import ConfigError, DataError
from fedpers.randomness import generator
from fedpers.settings.dataset import DatasetConfig
from fedpers.settings.split import SplitConfig
from fedpers.tasks import Ranking

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankingData(FederatedData):
    """Users as clients, items as samples.

    With m items, position ``i`` is "item i as a negative" and ``m + i`` is "item i as a positive": `x` holds the item
    ids 0..m-1 twice (int64 ``[2m]``), `y` is 0.0 for the first m and 1.0 for the others (float32 ``[2m]``). Users
    share all positions. :meth:`of_items` makes both from lists of items.

    Parameters
    ----------
    x, y, train, validation, test, num_classes, name, public, unseen
        See :class:`~fedpers.data.federated.FederatedData`. `train` lists a user's positives, oldest first;
        `validation` and `test` the held-out item as a positive, then the items it is ranked among as negatives.
        `num_classes` is 1: a network gives one score.
    num_items : int
        m.
    negatives : int
        Drawn for each training positive in each round, >= 0.
    task : Ranking
        Its ``protocol_name`` also says what training negatives are drawn from. ``clean``: all items but the user's
        training positives. ``symmetric``: of these, none that the user is evaluated on, neither held-out items nor
        those they are ranked among. ``official``, as in the codes of FedRAP, PFedRec and NCF: all items the user never
        touched. The held-out items are then the only candidates that are never trained as negatives, so that ranking
        items by how seldom they were drawn scores higher with every round, without any learning.

    Raises
    ------
    DataError
        If `x` has another length than 2m, or a user has touched so many items that no `negatives` are left.
    """

    num_items: int = 0
    negatives: int = 4
    task: Ranking = field(default=Ranking(), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.x) != 2 * self.num_items:
            raise DataError(f"{self.name}: x has {len(self.x)} entries, expected 2 for each of {self.num_items} items.")
        for user in range(self.num_clients):
            left = self.num_items - len(np.unique(self.excluded(user)))
            if left < self.negatives:
                name = self.client_names[user] if self.client_names else user
                raise DataError(
                    f"{self.name}: for user {name} only {left} of {self.num_items} items can be training negatives, "
                    f"fewer than dataset.negatives={self.negatives}."
                )

    @classmethod
    def of_items(
        cls,
        num_items: int,
        train: Sequence[NDArray[np.int64]],
        validation: Sequence[NDArray[np.int64]],
        test: Sequence[NDArray[np.int64]],
        *,
        name: str = "data",
        unseen: tuple[int, ...] = (),
        negatives: int = 4,
        protocol: str = "clean",
        top_k: int = 10,
        client_names: tuple[str, ...] = (),
    ) -> RankingData:
        """Make the data from item ids.

        Parameters
        ----------
        num_items : int
        train : sequence of int64 arrays ``[n_u]``
            Items each user liked, oldest first.
        validation, test : sequence of int64 arrays ``[1 + c]``
            The held-out item of each user, then the c items it is ranked among.
        name, unseen, negatives, client_names
            See the class.
        protocol, top_k
            See :class:`fedpers.tasks.Ranking`.
        """
        items = torch.arange(num_items)
        held = [
            [torch.from_numpy(np.r_[item_ids[:1] + num_items, item_ids[1:]]) for item_ids in lists]
            for lists in (validation, test)
        ]
        return cls(
            x=torch.cat([items, items]),
            y=torch.arange(2).repeat_interleave(num_items).float(),
            train=[torch.from_numpy(item_ids + num_items) for item_ids in train],
            validation=held[0],
            test=held[1],
            num_classes=1,
            name=name,
            unseen=unseen,
            num_items=num_items,
            negatives=negatives,
            client_names=client_names,
            task=Ranking(top_k, protocol),
        )

    def excluded(self, user: int) -> NDArray[np.int64]:
        """Items that are no training negatives of a user, int64 ``[e]``."""
        held_out = {"clean": 0, "official": 1, "symmetric": None}[self.task.protocol_name]
        lists = [self.train[user], self.validation[user][:held_out], self.test[user][:held_out]]
        return torch.cat(lists).numpy() % self.num_items

    def samples(self, client: int, seed: int, round: int) -> NDArray[np.int64]:
        """Each positive, oldest first, followed by its negatives; int64 ``[n * (1 + negatives)]``.

        The negatives of one positive are distinct, and every set of them is equally likely; draws belong to
        (`seed`, `client`, `round`).
        """
        positives: NDArray[np.int64] = self.train[client].numpy()
        allowed = np.ones(self.num_items, dtype=bool)
        allowed[self.excluded(client)] = False
        items = np.flatnonzero(allowed)
        out = np.empty((len(positives), 1 + self.negatives), dtype=np.int64)
        out[:, 0] = positives
        drawn = out[:, 1:]
        # Floyd's way to draw sets: a number that is already there gives way to the largest one allowed.
        rng = generator(seed, "negatives", client, round)
        first = len(items) - self.negatives
        for column in range(self.negatives):
            numbers = rng.integers(0, first + column + 1, len(positives))
            repeated = (drawn[:, :column] == numbers[:, None]).any(1)
            drawn[:, column] = np.where(repeated, first + column, numbers)
        out[:, 1:] = items[drawn]
        return out.reshape(-1)

    def label_counts(self, part: Part = "train") -> Tensor:
        """Count positives per user, int64 ``[num_clients, 1]``."""
        y = self.y.cpu()
        return torch.stack([y[positions].sum().long().reshape(1) for positions in self.part(part)])

    def _compact(self, lists: Mapping[Part, list[Tensor]]) -> dict[str, Any]:
        """Keep all items: any of them may be drawn as a negative."""
        return {str(part): index_lists for part, index_lists in lists.items()}

    def _rules(self) -> str:
        return f"{self.num_items}/{self.negatives}/{self.task.protocol_name}"


def leave_one_out(ratings: Ratings, config: DatasetConfig, split: SplitConfig, seed: int) -> RankingData:
    """Hold out each user's latest item for testing and the one before for validation; draw their negatives.

    Rows with a rating <= 0 and pairs of user and item that were there before are left out, then users with fewer than
    ``config.min_interactions`` rows; users and items are numbered by first appearance in what remains. Of equally late
    rows the first in the file counts as the latest. What stands for times in a file without them, or by request, is
    said in ``config.held_out``. What is left out is logged, and so is how many held-out items nobody trains on.

    Parameters
    ----------
    ratings : Ratings
    config : DatasetConfig
    split : SplitConfig
        Of it `unseen` is used.
    seed : int
        Of the negatives, unseen users and held-out items that are drawn at random.

    Returns
    -------
    RankingData

    Raises
    ------
    DataError
        If no user is left, or a user has touched so many items that too few negatives are left.
    ConfigError
        If ``split.unseen`` leaves no user to train, or items are to be held out by times that the file does not have.
    """
    rows, user, item, num_items = _numbered(ratings, config)
    time = _times(ratings, config, rows, user, item, seed)
    order = np.lexsort((np.arange(len(user)), -time, user))  # each user's rows, latest first
    by_user = np.split(item[order], np.cumsum(np.bincount(user))[:-1])
    train = [history[:1:-1] for history in by_user]
    names = _user_names(ratings, rows, user)
    negatives = [
        _eval_negatives(k, history, num_items, config, seed, f"{ratings.name}: user {names[k]}")
        for k, history in enumerate(by_user)
    ]
    unseen = draw_unseen(len(by_user), split, seed)
    held = np.array([history[:2] for history in by_user])
    new = np.setdiff1d(held, np.concatenate([train_items for k, train_items in enumerate(train) if k not in unseen]))
    if len(new):
        logger.info("%s: %d items are held out by a user and trained on by nobody.", ratings.name, len(new))
    return RankingData.of_items(
        num_items,
        [np.ascontiguousarray(train_items) for train_items in train],
        [np.r_[history[1], drawn[0]] for history, drawn in zip(by_user, negatives, strict=True)],
        [np.r_[history[0], drawn[1]] for history, drawn in zip(by_user, negatives, strict=True)],
        name=ratings.name,
        unseen=unseen,
        negatives=config.negatives,
        protocol=config.protocol,
        top_k=config.top_k,
        client_names=names,
    )


def _times(
    ratings: Ratings,
    config: DatasetConfig,
    rows: NDArray[np.int64],
    user: NDArray[np.int64],
    item: NDArray[np.int64],
    seed: int,
) -> NDArray[Any]:
    """How late each of the rows is, by the file's times or by what stands for them."""
    chosen = config.held_out
    if chosen is None and ratings.time is None:
        chosen = "newest_item" if config.protocol == "official" else "random"
        meant = {"newest_item": "that appear last in the file for the first time", "random": "drawn at random"}[chosen]
        logger.warning("%s has no times: held out are items %s (dataset.held_out=%s).", ratings.name, meant, chosen)
    if chosen == "last_row":
        return np.arange(len(rows))
    if chosen == "newest_item":
        return item
    if chosen == "random":
        keys = np.empty(len(rows))
        order = np.argsort(user, kind="stable")
        for client, positions in enumerate(np.split(order, np.cumsum(np.bincount(user))[:-1])):
            keys[positions] = generator(seed, "held_out", client).permutation(len(positions))
        return keys
    if ratings.time is None:
        raise ConfigError("dataset.held_out", "latest", f"another, because {ratings.name} has no times")
    return ratings.time[rows]


def _user_names(ratings: Ratings, rows: NDArray[np.int64], user: NDArray[np.int64]) -> tuple[str, ...]:
    """What the file calls each user."""
    first = rows[np.unique(user, return_index=True)[1]]
    ids = ratings.user[first].tolist()
    return tuple(ratings.user_names[number] if ratings.user_names else str(number) for number in ids)


def _numbered(
    ratings: Ratings, config: DatasetConfig
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], int]:
    """The rows that count, their users and items, both from 0; and the number of items."""
    rows = np.flatnonzero(ratings.rating > 0)
    liked = len(rows)
    user, item = _by_appearance(ratings.user[rows]), _by_appearance(ratings.item[rows])
    first = np.sort(np.unique(user * (item.max(initial=0) + 1) + item, return_index=True)[1])
    rows, user = rows[first], user[first]
    minimum = int(config.min_interactions or 0)
    enough = np.bincount(user) >= minimum
    if not enough.any():
        raise DataError(
            f"{ratings.name}: none of {len(enough)} users has dataset.min_interactions={minimum} different items."
        )
    chosen = np.flatnonzero(enough)[: config.max_users]
    rows = rows[np.isin(user, chosen)]
    user, item = _by_appearance(ratings.user[rows]), _by_appearance(ratings.item[rows])
    logger.info(
        "%s: %d users, %d items, %d interactions; left out: %d rows with a rating <= 0, %d repeated pairs, %d users "
        "with fewer than %d items.",
        ratings.name,
        len(chosen),
        item.max() + 1,
        len(rows),
        len(ratings) - liked,
        liked - len(first),
        (~enough).sum(),
        minimum,
    )
    return rows, user, item, int(item.max()) + 1


def _by_appearance(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number ids from 0 in the order in which they first appear."""
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    number = np.empty(len(first), dtype=np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    return number[inverse]


def _eval_negatives(
    user: int, touched: NDArray[np.int64], num_items: int, config: DatasetConfig, seed: int, whose: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw items a user never touched for validation and test: the same twice if official, disjoint ones otherwise.

    `whose` begins an error: the data and the user.
    """
    untouched = np.ones(num_items, dtype=bool)
    untouched[touched] = False
    items = np.flatnonzero(untouched)
    count = config.eval_negatives
    needed = count if config.protocol == "official" else 2 * count
    if len(items) < needed:
        each = "for validation and test together" if config.protocol == "official" else "each for validation and test"
        raise DataError(
            f"{whose} has not touched {len(items)} of {num_items} items, too few for "
            f"dataset.eval_negatives={count} {each} (dataset.protocol={config.protocol})."
        )
    drawn = generator(seed, "eval_negatives", user).choice(items, needed, replace=False)
    return drawn[:count], drawn[-count:]
