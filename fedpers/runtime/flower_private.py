"""All that touches Flower's private parts, in one place.

``tests/runtime/test_flower_private.py`` fails when they change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import flwr.app as flower
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE = int(SUPERLINK_NODE_ID)
"""Node id of the server."""


@contextmanager
def server_identity(run_id: int) -> Iterator[None]:
    """Let this process create messages as the server of a run; the former identity is restored."""
    before = (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id)
    TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = run_id, run_id, SERVER_NODE
    try:
        yield
    finally:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


def give_id(message: flower.Message) -> str:
    """Give a message the id that a SuperLink would; return it."""
    message_id = uuid4().hex
    message.metadata.__dict__["_message_id"] = message_id
    return message_id


def empty_run(run_id: int) -> Run:
    """Run information without content."""
    return Run.create_empty(run_id)
