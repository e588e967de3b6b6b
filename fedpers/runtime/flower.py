"""Grids of Flower's own engines, watched."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import flwr.app as flower
from flwr.serverapp import Grid

from fedpers.errors import TrainingError
from fedpers.flower_private import NodeInfo, Run
from fedpers.runtime.grid import never
from fedpers.server.strategy import PersonalizedStrategy

log = logging.getLogger(__name__)
PATIENCE = 180.0
"""Seconds that nodes may take to register, and the engine to start or to end."""


class FlowerGrid(Grid):
    """A grid of Flower's, watched: whoever waits for replies learns when the engine has ended.

    Parameters
    ----------
    grid : Grid
    watch : callable, optional
        Raises if no more replies will come.
    interval : float
        Seconds between looks for replies.
    name : str
        For manifests.
    """

    def __init__(
        self, grid: Grid, watch: Callable[[], None] | None = None, *, interval: float = 0.05, name: str = "flower"
    ) -> None:
        self._grid = grid
        self._watch = watch
        self._interval = interval
        self._name = name
        self.stopping: Callable[[], bool] = never

    def set_run(self, run: Run) -> None:
        """Set the run this grid operates in."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """Run information."""
        return self._grid.run

    def create_message(
        self, content: flower.RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> flower.Message:
        """Create a message, as Flower's deprecated way has it."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Node ids of all nodes that are there."""
        self._check()
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        """What is known of all nodes that are there."""
        self._check()
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[flower.Message]) -> Iterable[str]:
        """Send messages; return their ids."""
        self._check()
        return self._grid.push_messages(list(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[flower.Message]:
        """Replies that have come to the messages with these ids, each once."""
        self._check()
        return self._grid.pull_messages(list(message_ids))

    def send_and_receive(
        self, messages: Iterable[flower.Message], *, timeout: float | None = None
    ) -> Iterable[flower.Message]:
        """Send messages and wait for their replies, for `timeout` seconds at most; None waits as long as it takes.

        Raises
        ------
        TrainingError
            If the engine ends meanwhile.
        """
        waiting = {message_id for message_id in self.push_messages(messages) if message_id}
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[flower.Message] = []
        while waiting:
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
            if waiting and deadline is not None and time.monotonic() >= deadline:
                break
            if waiting:
                time.sleep(self._interval)
        return replies

    def described(self) -> dict[str, Any]:
        """How clients are computed, for manifests."""
        return {"name": self._name}

    def __str__(self) -> str:
        return self._name

    def _check(self) -> None:
        if self._watch is not None:
            self._watch()
        if self.stopping() and "ray" in sys.modules:  # which Flower's simulation runs on
            from fedpers.runtime.cluster import check_alive

            logging.getLogger("flwr").setLevel(logging.CRITICAL)  # that actors end is no news
            check_alive()


def await_clients(grid: Grid, strategy: PersonalizedStrategy, num_clients: int, seconds: float = PATIENCE) -> None:
    """Wait until the nodes of all clients are there: who is sampled depends on who is known.

    Parameters
    ----------
    grid : Grid
    strategy : PersonalizedStrategy
        Learns which node holds which client.
    num_clients : int
    seconds : float
        How long to wait for nodes to register.

    Raises
    ------
    TrainingError
        If a client has no node.
    """
    deadline = time.monotonic() + seconds
    while (count := len(list(grid.get_node_ids()))) < num_clients:
        if time.monotonic() > deadline:
            raise TrainingError(
                f"{count} of {num_clients} nodes are connected after {seconds:g} seconds; start one SuperNode for each "
                "client (in Flower's simulation: --federation-config num-supernodes=N)."
            )
        time.sleep(min(0.5, seconds / 10))
    node_of = strategy.nodes(grid)
    if missing := sorted(set(range(num_clients)) - set(node_of)):
        names = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise TrainingError(
            f"no node holds client {names} of {num_clients}; each needs a SuperNode with "
            f'--node-config "partition-id=N num-partitions={num_clients}".'
        )
    if strange := sorted(set(node_of) - set(range(num_clients))):
        raise TrainingError(f"a node has partition-id {strange[0]}, but the data have {num_clients} clients.")
