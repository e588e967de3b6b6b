"""Messages between a server half and its clients: who is where, what they are sent, what came back."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import flwr.app as flower
from flwr.serverapp import Grid

from fedpers.client.results import ClientResult
from fedpers.cohort import Records
from fedpers.records import CONFIG, num_bytes, to_record
from fedpers.server.collect import result_of
from fedpers.server.nodes import Nodes

log = logging.getLogger(__name__)


class Exchange:
    """Sends records to clients by their number and gives their answers by number.

    Attributes
    ----------
    timeout : float or None
        Seconds to wait for the replies to one lot of messages; None waits for as long as they take.
    node_of : dict of int to int
        Node id of each client that is connected, by client number; settled by :meth:`connect`.
    client_of : dict of int to int
        The other way round.
    """

    def __init__(self) -> None:
        self.timeout: float | None = None
        self.node_of: dict[int, int] = {}
        self.client_of: dict[int, int] = {}
        self._nodes = Nodes()

    @property
    def identities(self) -> list[flower.ConfigRecord]:
        """What clients said of themselves, each once; see :class:`~fedpers.server.nodes.Nodes`."""
        return self._nodes.identities

    @property
    def anonymous(self) -> bool:
        """Whether clients do not say who they are, as those of any other Flower app."""
        return self._nodes.numbered

    def connect(self, grid: Grid) -> dict[int, int]:
        """Find out which node holds which client; see :class:`~fedpers.server.nodes.Nodes`."""
        self.client_of = self._nodes.clients(grid)
        self.node_of = {client: node for node, client in sorted(self.client_of.items(), key=lambda pair: pair[1])}
        return self.node_of

    def messages(
        self, kind: str, sent: Records | Sequence[Records], config: flower.ConfigRecord, clients: Sequence[int]
    ) -> tuple[list[flower.Message], int]:
        """Messages to `clients`, which share one content where all are sent the same, and the bytes of their arrays.

        Parameters
        ----------
        kind : str
            Message type.
        sent : mapping of record to Tree, or sequence of such
            For all clients, or for each in their order.
        config : ConfigRecord
        clients : sequence of int

        Returns
        -------
        list of Message
            In the order of `clients`.
        int
            Bytes of the arrays of all messages.

        Raises
        ------
        KeyError
            If a client is not connected.
        ValueError
            If `sent` is a sequence of another length than `clients`.
        """
        each = [sent] * len(clients) if isinstance(sent, Mapping) else sent
        contents: dict[int, flower.RecordDict] = {}
        for records in each:
            if id(records) not in contents:  # what several are sent is made once
                contents[id(records)] = content_of(records, config)
        sizes = {key: num_bytes(content) for key, content in contents.items()}
        pairs = zip(clients, each, strict=True)
        messages = [flower.Message(contents[id(records)], self.node_of[client], kind) for client, records in pairs]
        return messages, sum(sizes[id(records)] for records in each)

    def answers(self, replies: Iterable[flower.Message], clients: Iterable[int]) -> dict[int, ClientResult]:
        """What each of `clients` answered.

        A reply from a node that was not asked is none, and of several from one node the last counts.
        """
        answered: dict[int, flower.Message] = {}
        for reply in replies:
            client = self.client_of.get(reply.metadata.src_node_id)
            if client is None:
                log.warning("a reply from node %d, which holds no client, is left out", reply.metadata.src_node_id)
            else:
                answered[client] = reply
        return {client: result_of(answered.get(client)) for client in clients}

    def call(
        self,
        grid: Grid,
        kind: str,
        sent: Records | Sequence[Records],
        config: flower.ConfigRecord,
        clients: Sequence[int],
    ) -> tuple[dict[int, ClientResult], int]:
        """Send messages and wait for the answers; also the bytes that were sent.

        Parameters and exceptions are those of :meth:`messages`; `grid` carries them.
        """
        messages, size = self.messages(kind, sent, config, clients)
        return self.answers(grid.send_and_receive(messages, timeout=self.timeout), clients), size


def content_of(records: Records, config: flower.ConfigRecord) -> flower.RecordDict:
    """Content of a message, sharing the records' memory."""
    content = flower.RecordDict({name: to_record(values) for name, values in records.items()})
    content[CONFIG] = config
    return content
