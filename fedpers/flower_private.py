"""All that touches Flower's private parts, in one place.

``tests/runtime/test_flower_private.py`` fails when they change.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from uuid import uuid4

import flwr.app as flower
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, SType
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.run import Run, RunNotRunningException
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


def metric_record(values: Mapping[str, float]) -> flower.MetricRecord:
    """Record of values that are numbers for certain; Flower checks each, which is felt with 10^5 clients."""
    record = flower.MetricRecord()
    record.__dict__["_data"].update(values)
    return record


def empty_run(run_id: int) -> Run:
    """Run information without content."""
    return Run.create_empty(run_id)


def delivered(message: flower.Message, content: flower.RecordDict) -> flower.Message:
    """The message as it arrives at a node, with metadata of its own."""
    return flower.Message(content=content, metadata=copy(message.metadata))  # type: ignore[call-overload, no-any-return]


def unavailable(message_id: str, run_id: int) -> flower.Message:
    """Reply of the SuperLink to a pull with an id that stands for no message."""
    metadata = flower.Metadata(
        run_id, "", SERVER_NODE, SERVER_NODE, message_id, "", time.time(), 0.0, SYSTEM_MESSAGE_TYPE
    )
    error = flower.Error(ErrorCode.MESSAGE_UNAVAILABLE, f"there is no reply to message '{message_id}' to be had")
    reply: flower.Message = flower.Message(error=error, metadata=metadata)  # type: ignore[call-overload]
    give_id(reply)
    return reply


def is_unavailable(reply: flower.Message) -> bool:
    """Whether a reply says that the node or the message cannot be had at present, and nothing about the client."""
    passing = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE)
    return reply.has_error() and reply.error.code in passing


def ended(run_id: int) -> BaseException:
    """What a grid raises when its run has ended; threads that Flower leaves behind end on it."""
    return RunNotRunningException(f"run {run_id} has ended")


def kill_simulated_clients() -> None:
    """End the actors of Flower's simulation at once: it has none but this way to stop one that computes."""
    import ray
    from ray._private.state import actors
    from ray._private.worker import global_worker

    if not ray.is_initialized():
        return
    job = ray.get_runtime_context().get_job_id()
    for actor, info in actors().items():
        if info["State"] != "DEAD" and info["JobID"] == job:
            global_worker.core_worker.kill_actor(ray.ActorID.from_hex(actor), True)


__all__ = [
    "SERVER_NODE",
    "ErrorCode",
    "NodeInfo",
    "Run",
    "SType",
    "delivered",
    "empty_run",
    "ended",
    "give_id",
    "kill_simulated_clients",
    "server_identity",
    "unavailable",
]
