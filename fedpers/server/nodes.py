"""Which node holds which client: node ids come and go, clients stay."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

import flwr.app as flower
from flwr.serverapp import Grid

from fedpers.client.app import IDENTIFY
from fedpers.errors import TrainingError
from fedpers.flower_private import is_unavailable
from fedpers.identity import METHOD
from fedpers.records import CONFIG, METRICS

log = logging.getLogger(__name__)
IDENTIFY_SECONDS = 60.0
"""Seconds a node may take to say which client it holds, after others have said so."""
START_SECONDS = 600.0
"""Seconds until the first node has to say so: programs of clients may still be starting, slowly on a busy machine."""
POLL_SECONDS = 1.0
UNUSABLE = ""
"""In place of a message's id: its node has answered, but not with the number of a client."""


class Nodes:
    """Learns from nodes which clients they hold, and keeps it in mind.

    Nodes whose app does not know the question (any other Flower app) are numbered in order of their ids. A node that
    does not answer is left out until it does, but waited for only once; a client whose node came back under another id
    is found there.

    Attributes
    ----------
    identities : list of ConfigRecord
        What clients say of themselves (:mod:`fedpers.identity`), each once.
    numbered : bool
        Whether they say nothing, and are numbered in order of the ids of their nodes.
    """

    def __init__(self) -> None:
        self.identities: list[flower.ConfigRecord] = []
        self._clients: dict[int, int] = {}
        self._questions: dict[int, str] = {}  # node without a client -> id of its unanswered message, or UNUSABLE
        self.numbered = False

    def clients(self, grid: Grid) -> dict[int, int]:
        """Client of each node there is; nodes that came since the last call are asked.

        Raises
        ------
        TrainingError
            If two nodes hold the same client.
        """
        ids = set(grid.get_node_ids())
        if self.numbered and ids != set(self._clients):
            self._clients, self._questions, self.numbered = {}, {}, False
        known_clients = {node: client for node, client in self._clients.items() if node in ids}
        self._questions = {node: question for node, question in self._questions.items() if node in ids}
        new_clients: dict[int, int] = {}
        if waiting := [question for question in self._questions.values() if question != UNUSABLE]:
            new_clients = self._clients_in(grid.pull_messages(waiting))
        if new := sorted(ids - known_clients.keys() - new_clients.keys() - self._questions.keys()):
            new_clients.update(self._ask(grid, new))
            if not known_clients and not new_clients and UNUSABLE in self._questions.values():
                new_clients, self._questions, self.numbered = dict(zip(new, range(len(new)), strict=True)), {}, True
        if doubled := [node for node, client in known_clients.items() if client in new_clients.values()]:
            answering = self._ask(grid, doubled)  # a node that ended without saying so is listed for a while
            known_clients = {
                node: client for node, client in known_clients.items() if node not in doubled or node in answering
            }
        self._clients = {**known_clients, **new_clients}
        if len(set(self._clients.values())) < len(self._clients):
            raise TrainingError("two nodes hold the same partition-id.")
        return self._clients

    def _ask(self, grid: Grid, nodes: list[int]) -> dict[int, int]:
        """Ask nodes which client they hold; those that do not say are kept in mind."""
        questions = [flower.Message(flower.RecordDict(), node, IDENTIFY) for node in nodes]
        replies = list(grid.send_and_receive(questions, timeout=IDENTIFY_SECONDS))
        if not replies and not self._clients:
            log.info("none of %d nodes has said yet which client it holds: waiting", len(nodes))
            replies = _late_replies(grid, {question.metadata.message_id for question in questions})
        self._questions.update({q.metadata.dst_node_id: q.metadata.message_id for q in questions})
        clients = self._clients_in(replies)
        if self._clients or clients or not replies:
            for silent in (node for node in nodes if node not in clients):
                log.warning("node %d does not say which client it holds and is left out", silent)
        return clients

    def _clients_in(self, replies: Iterable[flower.Message]) -> dict[int, int]:
        """Client of each node that says so; one that answers something else is not asked again, one out of reach is."""
        clients: dict[int, int] = {}
        for reply in replies:
            node = reply.metadata.src_node_id
            number = None
            if reply.has_content() and METRICS in reply.content.metric_records:
                number = reply.content.metric_records[METRICS].get("partition-id")
            if isinstance(number, int) and number >= 0:
                clients[node] = number
                self._remember(reply.content.config_records.get(CONFIG))
                self._questions.pop(node, None)
            elif is_unavailable(reply):
                self._questions.pop(node, None)  # to be asked again
            elif node in self._questions:
                self._questions[node] = UNUSABLE
        return clients

    def _remember(self, identity: flower.ConfigRecord | None) -> None:
        if identity is not None and METHOD in identity and identity not in self.identities:
            self.identities.append(identity)


def _late_replies(grid: Grid, questions: set[str]) -> list[flower.Message]:
    """Replies to messages with these ids: wait for a first one, then for the others until none comes any more."""
    replies: list[flower.Message] = []
    deadline = time.monotonic() + START_SECONDS
    while questions and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        if arrived := list(grid.pull_messages(questions)):
            replies += arrived
            questions = questions - {reply.metadata.reply_to_message_id for reply in arrived}
            deadline = time.monotonic() + IDENTIFY_SECONDS
    return replies
