"""Shards: the clients that one Ray actor computes, the messages to them, and how clients are dealt to actors."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from fedpers.client.app import CohortApp
from fedpers.cohort.plan import batches_per_epoch
from fedpers.runtime.actor import Answer, Packed
from fedpers.runtime.ray_actors import Actor


@dataclass(eq=False)
class Shard:
    """Clients that are computed by one actor; and the messages to them, in order, that their saved state is without.

    `cost` is in seconds, or in steps where nothing was measured; `deaths` counts actors that died since an answer came.
    """

    number: int
    clients: list[int]
    cost: float
    actor: Actor
    jobs: list[Job] = field(default_factory=list)
    deaths: int = 0


@dataclass(eq=False)
class Job:
    """Messages of one kind to clients of one shard.

    `arguments` is what its `actor` is called with, `size` the bytes of arrays that they hold, and `future` the actor's
    pending answer; None: not sent, or done. After the first answer it is `done`: if it is sent again, only the state of
    its clients is brought up to date. The `answer` is kept until `unread` replies have been taken from it.
    """

    shard: Shard
    arguments: tuple[Any, ...]
    size: int
    unread: int
    actor: Actor | None = None
    future: Future[Packed] | None = None
    done: bool = False
    answer: Answer | None = None

    def read(self) -> Answer:
        """Take one reply's share of the answer."""
        assert self.answer is not None
        answer = self.answer
        self.unread -= 1
        if self.unread <= 0:
            self.answer = None
        return answer


def deal(expected: Sequence[float], shards: int) -> list[list[int]]:
    """Deal clients to shards greedily: the most expensive first, each to the shard with the least to do.

    Parameters
    ----------
    expected : sequence of float
        Cost of each client, > 0.
    shards : int
        >= 1 and <= the number of clients; none stays empty.

    Returns
    -------
    list of list of int
        Clients of each shard, ascending.
    """
    heap = [(0.0, 0, number) for number in range(shards)]
    dealt: list[list[int]] = [[] for _ in range(shards)]
    for client in sorted(range(len(expected)), key=lambda c: (-expected[c], c)):
        load, members, number = heapq.heappop(heap)
        dealt[number].append(client)
        heapq.heappush(heap, (load + expected[client], members + 1, number))
    return [sorted(clients) for clients in dealt]


def steps_of(app: CohortApp, client: int) -> int:
    """Steps of one client in a round, as far as training settings tell."""
    training = app.update.training
    if training.steps is not None:
        return training.steps
    return training.epochs * batches_per_epoch(app.sizes[client], training.batch_size, training.drop_last)
