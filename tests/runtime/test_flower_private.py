"""What this package relies on in Flower without being promised it; a failure here means that Flower changed."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import threading
from pathlib import Path
from typing import Any

import flwr.app as flower
import numpy as np
import pytest
import torch
from flwr.common import serde
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.supercore.inflatable import inflatable_object
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

import fedpers
from fedpers.flower_private import (
    SERVER_NODE,
    delivered,
    empty_run,
    ended,
    give_id,
    metric_record,
    server_identity,
    unavailable,
)
from fedpers.records import LiveArray, num_bytes, own_copy, to_record, to_tensor
from tests.problems import SmallNetwork

TENSORS = [
    torch.arange(6.0).reshape(2, 3),
    torch.arange(6.0).reshape(2, 3).T,
    torch.tensor(3.5, dtype=torch.float64),
    torch.tensor([1, 2], dtype=torch.int64),
    torch.zeros(0, 4),
    torch.tensor([True, False]),
    torch.nn.Parameter(torch.ones(3)),
    torch.ones(3, dtype=torch.float16),
]


def plain(tensor: torch.Tensor) -> flower.Array:
    return flower.Array(tensor.detach().contiguous().numpy())


def shared(tensor: torch.Tensor) -> flower.Array:
    """The array as the in-process grid hands it over: around bytes."""
    record = flower.ArrayRecord({"v": plain(tensor)})
    copied: flower.Array = own_copy(flower.RecordDict({"r": record})).array_records["r"]["v"]
    assert type(copied) is LiveArray
    return copied


KINDS = {"tensor": LiveArray, "bytes": shared}


# -------------------------------------------------------------------- identity


def test_task_identity_has_the_attributes_that_are_set() -> None:
    attributes = [name for name in vars(TaskIdentity) if name in ("_task_id", "_run_id", "_node_id")]
    assert sorted(attributes) == ["_node_id", "_run_id", "_task_id"], (
        f"flwr's TaskIdentity keeps its values elsewhere: {sorted(vars(TaskIdentity))}; "
        "fedpers.flower_private.server_identity must follow"
    )


def test_server_identity_is_what_messages_are_made_with_and_is_restored() -> None:
    before = (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id)
    with server_identity(41):
        assert (TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id) == (41, SUPERLINK_NODE_ID, 41), (
            "flwr's TaskIdentity does not read the attributes that server_identity sets"
        )
        message = flower.Message(flower.RecordDict(), 5, "train")
        with server_identity(42):
            assert TaskIdentity.run_id == 42
        assert TaskIdentity.run_id == 41
    assert (message.metadata.run_id, message.metadata.src_node_id) == (41, SERVER_NODE), (
        "flwr's Message does not take run and node from TaskIdentity any more"
    )
    with pytest.raises(RuntimeError), server_identity(43):
        raise RuntimeError
    assert (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id) == before


def test_a_message_takes_the_id_it_is_given() -> None:
    with server_identity(1):
        message = flower.Message(flower.RecordDict(), 5, "train")
        assert message.metadata.message_id == "", "flwr gives messages an id of its own now; give_id is not needed"
        first, second = give_id(message), give_id(message)
        assert first != second
        assert message.metadata.message_id == second, "flwr keeps the message id elsewhere than in _message_id"
        assert flower.Message(flower.RecordDict(), reply_to=message).metadata.reply_to_message_id == second


def test_a_record_of_metrics_is_flowers_own() -> None:
    values = {"test-accuracy": 0.5, "num-examples": 3}
    record, flowers = metric_record(values), flower.MetricRecord(dict(values))
    assert record == flowers
    assert record.__dict__.keys() == flowers.__dict__.keys()
    assert record.deflate() == flowers.deflate()
    record["test-accuracy"] = 1.0
    assert values["test-accuracy"] == 0.5
    with pytest.raises(TypeError):
        record["name"] = "text"  # type: ignore[assignment]


def test_a_delivered_message_has_metadata_of_its_own() -> None:
    with server_identity(1):
        message = flower.Message(flower.RecordDict(), 5, "train")
    content = flower.RecordDict()
    arrived = delivered(message, content)
    assert arrived.content is content
    assert arrived.metadata == message.metadata, "flwr's Message does not take metadata= as it did"
    arrived.metadata.dst_node_id = 6
    assert message.metadata.dst_node_id == 5, "a copy of flwr's Metadata shares state with the original"


def test_the_error_for_an_unknown_id_is_flowers() -> None:
    from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_ins_message

    ours, theirs = unavailable("abc", 7), create_message_error_unavailable_ins_message("abc", 7)
    assert ours.error.code == theirs.error.code == ErrorCode.MESSAGE_UNAVAILABLE
    differ = [
        field
        for field in ("run_id", "src_node_id", "dst_node_id", "reply_to_message_id", "message_type", "group_id", "ttl")
        if getattr(ours.metadata, field) != getattr(theirs.metadata, field)
    ]
    assert not differ, f"flwr's answer to an unknown message id has other metadata: {differ}"


def test_runs() -> None:
    run = empty_run(9)
    assert isinstance(run, Run)
    assert run.run_id == 9


def test_threads_that_flower_leaves_behind_end_on_the_end_of_a_run() -> None:
    from flwr.server import SimpleClientManager
    from flwr.server.compat.app_utils import _update_client_manager

    class Ended:
        def get_node_ids(self) -> list[int]:
            raise ended(1)

    stop = threading.Event()
    stop.wait = lambda timeout=None: False  # type: ignore[method-assign, assignment]
    thread = threading.Thread(
        target=_update_client_manager, args=(Ended(), SimpleClientManager(), stop, threading.Event()), daemon=True
    )
    thread.start()
    thread.join(5)
    assert not thread.is_alive(), "flwr's legacy server does not end on RunNotRunningException any more"


# ---------------------------------------------------------------------- arrays


def test_an_array_has_the_fields_that_a_live_one_stands_for() -> None:
    names = [field.name for field in dataclasses.fields(flower.Array)]
    assert names == ["dtype", "shape", "stype", "data"], f"flwr's Array has other fields now: {names}"
    assert vars(flower.Array(np.ones(2, np.float32))).keys() >= {"dtype", "shape", "stype", "data"}, (
        "flwr's Array does not keep its fields in __dict__ any more; LiveArray must follow"
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tensor", TENSORS, ids=lambda t: f"{t.dtype}-{tuple(t.shape)}")
def test_a_live_array_is_the_plain_one(tensor: torch.Tensor, kind: str) -> None:
    live, wanted = KINDS[kind](tensor), plain(tensor)
    assert (live.dtype, live.shape, live.stype) == (wanted.dtype, wanted.shape, wanted.stype)
    assert live.data == wanted.data
    assert live == wanted
    assert wanted == live
    assert live != plain(torch.full((2,), 7.0))
    assert live != "an array"
    np.testing.assert_array_equal(live.numpy(), wanted.numpy())
    assert live.numpy().flags.writeable
    assert live.object_id == wanted.object_id, "the object id of a LiveArray is not that of flwr's Array"
    assert torch.equal(to_tensor(live), tensor.detach())
    assert repr(live) == repr(wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_header_of_a_deflated_live_array_names_flowers_class(kind: str) -> None:
    live = KINDS[kind](TENSORS[0])
    class_name = inflatable_object.get_object_type_from_object_content(live.deflate())
    assert class_name == flower.Array.__qualname__, (
        f"a LiveArray goes onto the wire as '{class_name}', which no node can read"
    )
    restored = flower.Array.inflate(live.deflate(), live.children)
    assert type(restored) is flower.Array
    assert restored == plain(TENSORS[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_live_array_is_copied_and_pickled_as_a_plain_one(kind: str) -> None:
    live = KINDS[kind](TENSORS[0])
    for other in (copy.copy(live), copy.deepcopy(live), pickle.loads(pickle.dumps(live))):
        assert other == plain(TENSORS[0])
        other.data = b""
    assert live == plain(TENSORS[0])


@pytest.mark.parametrize("kind", KINDS)
def test_new_data_of_a_live_array_counts(kind: str) -> None:
    tensor = torch.zeros(3)
    live = KINDS[kind](tensor)
    first = live.object_id
    live.data = plain(torch.ones(3)).data
    assert live.is_dirty
    assert live.object_id != first
    assert live.object_id == plain(torch.ones(3)).object_id
    np.testing.assert_array_equal(live.numpy(), np.ones(3))
    assert torch.equal(to_tensor(live), torch.ones(3))
    assert not tensor.any()


def test_nobody_changes_a_tensor_through_a_live_array() -> None:
    tensor = torch.zeros(3)
    live = LiveArray(tensor)
    live.numpy()[:] = 1
    flower.ArrayRecord({"v": live}).to_torch_state_dict()["v"].fill_(2)
    assert not tensor.any()


# --------------------------------------------------------------------- records


def contents() -> tuple[flower.RecordDict, flower.RecordDict, flower.RecordDict]:
    """The same records around live tensors, as handed over by the grid, and plain."""
    state = {n: v.detach() for n, v in SmallNetwork().state_dict().items()}
    from fedpers.cohort import tree

    rest = {"config": flower.ConfigRecord({"a": 1}), "metrics": flower.MetricRecord({"b": [0.5]})}
    live = flower.RecordDict({"arrays": to_record(tree(state)), **rest})
    ready = flower.RecordDict({"arrays": flower.ArrayRecord({n: plain(v) for n, v in state.items()}), **rest})
    return live, own_copy(ready), ready


def test_a_record_made_of_live_arrays_holds_plain_ones() -> None:
    live, _, ready = contents()
    record = flower.ArrayRecord(dict(live["arrays"]))
    assert {type(a) for a in record.values()} == {flower.Array}, "flwr's from_array_dict does not copy fields any more"
    assert record == ready["arrays"]


def test_protocol_buffers_of_live_records_are_those_of_plain_ones() -> None:
    live, handed, ready = contents()
    wanted = serde.recorddict_to_proto(ready).SerializeToString(deterministic=True)
    for content in (live, handed):
        assert serde.recorddict_to_proto(content).SerializeToString(deterministic=True) == wanted
        assert serde.recorddict_from_proto(serde.recorddict_to_proto(content)) == ready == content
        with server_identity(1):
            message = flower.Message(content, 5, "train")
        restored = serde.message_from_proto(serde.message_to_proto(message))
        assert restored.content == ready
        assert {type(a) for a in restored.content["arrays"].values()} == {flower.Array}
        context = flower.Context(1, 2, {"partition-id": 0}, content, {})
        assert serde.context_from_proto(serde.context_to_proto(context)).state == ready


def test_object_trees_of_live_records_are_those_of_plain_ones() -> None:
    live, handed, ready = contents()
    wanted = set(inflatable_object.get_all_nested_objects(ready))
    for content in (live, handed):
        assert set(inflatable_object.get_all_nested_objects(content)) == wanted
        assert content.object_id == ready.object_id
        records: dict[str, Any] = {key: type(r).inflate(r.deflate(), _inflated(r)) for key, r in content.items()}
        assert flower.RecordDict(records) == ready


def _inflated(record: Any) -> dict[str, Any]:
    arrays = record.children or {}
    return {key: flower.Array.inflate(a.deflate(), a.children) for key, a in arrays.items()}


def test_bytes_are_counted_alike() -> None:
    assert len({num_bytes(content) for content in contents()}) == 1


def test_records_handed_over_are_marked_as_changed_when_they_are() -> None:
    _, _, ready = contents()
    before = ready.object_id
    handed = own_copy(ready)
    assert handed.object_id == before
    handed["arrays"]["head.bias"] = plain(torch.zeros(1))
    assert handed.object_id != before
    assert ready.object_id == before


class OwnArray(flower.Array):
    """Somebody's subclass."""


def test_a_subclass_stays_what_it_is() -> None:
    content = flower.RecordDict({"r": flower.ArrayRecord()})
    content["r"]["v"] = OwnArray(np.ones(2))
    handed = own_copy(content)["r"]["v"]
    assert type(handed) is OwnArray
    handed.data = b""
    np.testing.assert_array_equal(content["r"]["v"].numpy(), np.ones(2))


# ------------------------------------------------------------------ simulation


@pytest.mark.slow
def test_simulated_clients_that_compute_are_ended_at_once() -> None:
    import time

    import ray

    from fedpers.flower_private import kill_simulated_clients

    kill_simulated_clients()  # without Ray there are none
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        methods = {"ready": lambda self: True, "sleep": lambda self: time.sleep(600)}
        sleeper = ray.remote(num_cpus=1)(type("Sleeper", (), methods)).remote()
        assert ray.get(sleeper.ready.remote(), timeout=120)  # before it is there it cannot be ended
        waiting = sleeper.sleep.remote()
        kill_simulated_clients()
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(waiting, timeout=60)
    finally:
        ray.shutdown()


def test_no_other_module_touches_flowers_private_parts() -> None:
    """Neither what Flower does not document as an interface, nor the attributes that this module sets."""
    root = Path(fedpers.__file__).parent
    private = re.compile(
        r"(from|import) flwr\.(common|supercore|proto|server|client|superlink|supernode|cli)\b"
        r"|metadata\.__dict__|TaskIdentity"
    )
    matches = {
        f"{path.relative_to(root)}: {line.strip()}"
        for path in root.rglob("*.py")
        for line in path.read_text().splitlines()
        if private.search(line)
    }
    assert {line.partition(":")[0] for line in matches} == {"flower_private.py"}, matches
