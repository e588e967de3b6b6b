"""What the grids of this package share: every client is a node, and replies wait until they are pulled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flwr.app as flower
from flwr.serverapp import Grid

from fedpers.client.results import ClientResult
from fedpers.errors import TrainingError, check
from fedpers.flower_private import SERVER_NODE, ErrorCode, Run, empty_run, ended, give_id

FIRST_NODE = SERVER_NODE + 1
MAX_POLLS, MAX_WAIT = 5, 5.0
"""Questions for node ids in a row, and seconds since the first, after which a server app is taken to wait in vain."""
RUN_ID = 1


def never() -> bool:
    """Nothing has asked a run to stop."""
    return False


class ClientGrid(Grid):
    """A Flower ``Grid`` whose nodes are the clients: node ids are ``FIRST_NODE + partition_id``.

    The class is abstract: a subclass adds ``push_messages``, ``pull_messages`` and ``send_and_receive``.

    Parameters
    ----------
    num_clients : int
        >= 1.
    max_clients : int, optional
        Clients in the data.

    Attributes
    ----------
    stopping : callable
        Returns whether the run was asked to stop. While true, clients or processes that end are not restarted.

    Raises
    ------
    ConfigError
        If `num_clients` is out of its range.
    """

    def __init__(self, num_clients: int, max_clients: int | None = None) -> None:
        good = isinstance(num_clients, int) and 1 <= num_clients <= (max_clients or num_clients)
        allowed = "a whole number >= 1" + (f" and <= {max_clients}, the clients in the data" if max_clients else "")
        check(good, "num_supernodes", num_clients, allowed)
        self.num_clients = num_clients
        self._polls = 0  # questions for node ids since the last message
        self._polled_since = 0.0  # when the first of them was
        self.stopping: Callable[[], bool] = never
        self._run = empty_run(RUN_ID)
        self._closed = False

    def set_run(self, run: Run) -> None:
        """Set the run this grid operates in."""
        self._run = run

    @property
    def run(self) -> Run:
        """Run information."""
        return self._run

    def create_message(
        self, content: flower.RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> flower.Message:
        """Create a message, as Flower's deprecated way has it."""
        return flower.Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Node ids of all clients.

        Raises
        ------
        TrainingError
            If a server app asks for them again and again and sends nothing: it waits for nodes that will never come.
        RunNotRunningException
            If the grid was closed.
        """
        self._check_open()
        now = time.monotonic()
        self._polls, self._polled_since = self._polls + 1, self._polled_since or now
        if self._polls > MAX_POLLS and now - self._polled_since >= MAX_WAIT:
            raise TrainingError(
                f"the server app waits for more nodes than the {self.num_clients} of this run, and no other will join "
                "(Flower's strategies wait for min_available_nodes, 2 by default)."
            )
        return list(range(FIRST_NODE, FIRST_NODE + self.num_clients))

    def close(self) -> None:
        """End the run. Later calls for node ids or with messages to send raise ``RunNotRunningException``."""
        self._closed = True

    def client_of(self, message: flower.Message) -> int:
        """Client a message is addressed to."""
        return message.metadata.dst_node_id - FIRST_NODE

    def _check_open(self) -> None:
        if self._closed:
            raise ended(self._run.run_id)

    def _accept(self, messages: Iterable[flower.Message]) -> list[flower.Message]:
        """Check the nodes, then give each message an id, in place.

        Raises
        ------
        ValueError
            If a node does not exist; no message has got an id then.
        """
        self._polls, self._polled_since = 0, 0.0
        accepted = list(messages)
        for message in accepted:
            if not 0 <= self.client_of(message) < self.num_clients:
                nodes = f"{FIRST_NODE} to {FIRST_NODE + self.num_clients - 1}"
                raise ValueError(f"node {message.metadata.dst_node_id} does not exist; there are nodes {nodes}")
        for message in accepted:
            give_id(message)
        return accepted


def context_of(client: int, num_clients: int, run_config: Mapping[str, Any]) -> flower.Context:
    """Context of a client that has not been called yet."""
    return flower.Context(
        run_id=RUN_ID,
        node_id=FIRST_NODE + client,
        node_config={"partition-id": client, "num-partitions": num_clients},
        state=flower.RecordDict(),
        run_config=dict(run_config),
    )


def reply_of(message: flower.Message, result: ClientResult) -> flower.Message:
    """A client's answer as a message."""
    if result.content is None:
        return error_reply(message, result.error)
    return flower.Message(result.content, reply_to=message)


def error_reply(message: flower.Message, reason: str) -> flower.Message:
    """What stands for the reply of a client that raised."""
    return flower.Message(flower.Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
