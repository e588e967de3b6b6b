"""A grid on which everything travels as bytes, to measure the in-process one against."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import flwr.app as flower
from flwr.clientapp import ClientApp
from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto, message_to_proto
from flwr.serverapp import Grid, ServerApp

from fedpers.flower_private import SERVER_NODE, give_id, server_identity
from fedpers.runtime.grid import FIRST_NODE, RUN_ID
from fedpers.runtime.local import LocalGrid


def serialized(message: flower.Message) -> flower.Message:
    return message_from_proto(message_to_proto(message))


class WireGrid(LocalGrid):
    """Messages, replies and contexts go through protocol buffers; every client app is called per client."""

    def __init__(self, client_app: ClientApp, num_supernodes: int) -> None:
        super().__init__(client_app, num_supernodes)
        self.waiting: dict[str, flower.Message] = {}

    def push_messages(self, messages: Iterable[flower.Message]) -> list[str]:
        ids = []
        for message in messages:
            ids.append(give_id(message))
            node = message.metadata.dst_node_id
            context = context_from_proto(context_to_proto(self.contexts[node]))
            reply = self.client_app(serialized(message), context)
            self.contexts[node] = context_from_proto(context_to_proto(context))
            self.waiting[ids[-1]] = serialized(reply)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[flower.Message]:
        return [self.waiting.pop(i) for i in message_ids]


def run(server_app: ServerApp | Callable[[Grid, flower.Context], None], grid: Grid) -> None:
    """Run a server app on a grid."""
    with server_identity(RUN_ID):
        server_app(grid, flower.Context(RUN_ID, SERVER_NODE, {}, flower.RecordDict(), {}))


def ask(
    client_app: ClientApp, content: flower.RecordDict, *, nodes: int = 3, kind: str = "train", times: int = 1
) -> list[list[flower.Message]]:
    """Send one content to all nodes, `times` times; the replies of each time in the order of the nodes."""
    grid = LocalGrid(client_app, nodes, workers=1)  # here, where tests see what clients do
    with server_identity(RUN_ID):
        return [
            list(grid.send_and_receive([flower.Message(content, FIRST_NODE + k, kind) for k in range(nodes)]))
            for _ in range(times)
        ]
