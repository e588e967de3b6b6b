"""Apps written for Flower alone run unchanged."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    Krum,
    QFedAvg,
    Strategy,
)

import fedpers
from fedpers import strategies
from fedpers.errors import ConfigError, TrainingError
from fedpers.flower_private import server_identity
from fedpers.runtime.grid import FIRST_NODE, RUN_ID
from fedpers.runtime.local import LocalGrid
from tests import flower_app
from tests.runtime.wire import WireGrid, ask, run, serialized

NODES = 6
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "fedavg": FedAvg,
    "fedavg-half": lambda: FedAvg(fraction_train=0.5, fraction_evaluate=0.0),
    "fedprox": lambda: FedProx(proximal_mu=0.1),
    "fedadam": FedAdam,
    "qfedavg": lambda: QFedAvg(client_learning_rate=0.1),
    "fedmedian": FedMedian,
    "krum": lambda: Krum(num_malicious_nodes=1),
    "fedtrimmedavg": FedTrimmedAvg,
    "dp-server-fixed": lambda: DifferentialPrivacyServerSideFixedClipping(uniform(), 0.1, 1.0, NODES),
    "dp-server-adaptive": lambda: DifferentialPrivacyServerSideAdaptiveClipping(uniform(), 0.1, NODES),
    "dp-client-fixed": lambda: DifferentialPrivacyClientSideFixedClipping(uniform(), 0.1, 1.0, NODES),
}


def uniform() -> FedAvg:
    return FedAvg(weighted_by_key="one")


@pytest.fixture
def _quick_collection() -> Iterator[None]:
    """Flower collects garbage once per client in some strategies: let that not walk through all of PyTorch."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.slow
@pytest.mark.usefixtures("_quick_collection")
@pytest.mark.parametrize("name", STRATEGIES)
def test_flowers_strategies_give_what_they_give_over_a_wire(name: str) -> None:
    results: list[dict[str, Any]] = []
    mods = [fixedclipping_mod] if name == "dp-client-fixed" else []
    for grid in (LocalGrid, WireGrid):
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002 - what Flower draws its noise from
        result: dict[str, Any] = {}
        run(flower_app.server_app(result, STRATEGIES[name]), grid(flower_app.client_app(mods), NODES))
        results.append(result)
    local, wire = results
    assert set(local["arrays"]) == {"w", "b"}
    for entry, value in local["arrays"].items():
        np.testing.assert_array_equal(value, wire["arrays"][entry])
        assert np.isfinite(value).all()
        assert np.abs(value).max() > 0
    assert local["train"] == wire["train"]
    assert local["evaluate"] == wire["evaluate"]
    assert list(local["train"]) == [1, 2, 3]


def test_fedavg_equals_the_formula() -> None:
    results: dict[str, Any] = {}
    fedpers.simulate(flower_app.server_app(results, rounds=2), flower_app.client_app(), num_supernodes=3)
    w, b = np.zeros(flower_app.FEATURES), np.zeros(1)
    share = np.array([10, 11, 12]) / 33
    for _ in range(2):
        client_fits = [flower_app.fit(w, b, k, 0.1) for k in range(3)]
        w = sum(s * o[0] for s, o in zip(share, client_fits, strict=True))
        b = sum(s * o[1] for s, o in zip(share, client_fits, strict=True))
    np.testing.assert_allclose(results["arrays"]["w"], w, rtol=1e-12)
    np.testing.assert_allclose(results["arrays"]["b"], b, rtol=1e-12)
    assert results["train"][2]["calls"] == pytest.approx(2)


def test_actions_and_queries() -> None:
    app = flower_app.client_app()
    (replies,) = ask(app, RecordDict(), kind="train.other")
    assert [r.content["metrics"]["other"] for r in replies] == [1, 1, 1]
    assert {r.metadata.message_type for r in replies} == {"train.other"}
    (replies,) = ask(app, RecordDict(), kind="query")
    assert [r.content["known"]["partition-id"] for r in replies] == [0, 1, 2]
    (replies,) = ask(app, RecordDict(), kind="evaluate.unknown")
    assert all("evaluate" in r.error.reason and "unknown" in r.error.reason for r in replies)


def test_mods_and_lifespan_wrap_every_call() -> None:
    seen: list[str] = []

    def mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        seen.append("in")
        reply = call_next(message, context)
        seen.append("out")
        return reply

    app = flower_app.client_app([mod])

    @app.lifespan()
    def client_lifespan(context: Context) -> Iterator[None]:
        seen.append(f"enter {context.node_config['partition-id']}")
        yield
        seen.append("leave")

    ask(app, RecordDict(), nodes=2, kind="train.other")
    assert seen == [e for k in range(2) for e in (f"enter {k}", "in", "out", "leave")]


def test_the_servers_lifespan_and_main_see_one_context_and_simulate_returns_after_both() -> None:
    seen: list[Any] = []
    server = ServerApp()

    @server.lifespan()
    def lifespan(context: Context) -> Iterator[None]:
        context.state["note"] = ConfigRecord({"from": "lifespan"})
        seen.append("enter")
        yield
        seen.append("leave")

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        seen.append((context.state["note"]["from"], context.run_config["rounds"], context.run_id == grid.run.run_id))

    fedpers.simulate(server, flower_app.client_app(), 2, run_config={"rounds": 7})
    assert seen == ["enter", ("lifespan", 7, True), "leave"]


# ---------------------------------------------------------------------- legacy


def test_legacy_server_and_numpy_client() -> None:
    from flwr.client import NumPyClient
    from flwr.common import ndarrays_to_parameters
    from flwr.server import Server, ServerAppComponents, ServerConfig, SimpleClientManager
    from flwr.server.strategy import FedAvg as LegacyFedAvg

    active: list[int] = []

    class Client(NumPyClient):
        def __init__(self, context: Context) -> None:
            self.context = context
            self.partition = int(context.node_config["partition-id"])

        def get_properties(self, config: dict[str, Any]) -> dict[str, Any]:
            return {"partition": self.partition}

        def fit(self, parameters: list[np.ndarray], config: dict[str, Any]) -> tuple[Any, int, dict[str, Any]]:
            active.append(self.partition)
            time.sleep(0.002)
            assert len(active) == 1  # one client at a time, although the server asks from several threads
            calls = self.context.state.setdefault("calls", MetricRecord({"n": 0}))
            calls["n"] += 1
            w, b, loss = flower_app.fit(*parameters, self.partition, config["lr"])
            if self.partition == 4:
                active.clear()
                raise ValueError("a client without luck")
            active.remove(self.partition)
            return [w, b], 10 + self.partition, {"loss": loss, "calls": calls["n"]}

        def evaluate(self, parameters: list[np.ndarray], config: dict[str, Any]) -> tuple[float, int, dict[str, Any]]:
            x, y = flower_app.data_of(self.partition)
            return float(np.mean((x @ parameters[0] + parameters[1] - y) ** 2)), len(y), {}

    fitted: list[tuple[int, int, list[int]]] = []

    class Strategy(LegacyFedAvg):
        def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
            calls = sorted(r.metrics["calls"] for _, r in results)
            fitted.append((len(results), len(failures), calls))
            return super().aggregate_fit(server_round, results, failures)

    strategy = Strategy(
        initial_parameters=ndarrays_to_parameters([np.zeros(flower_app.FEATURES), np.zeros(1)]),
        on_fit_config_fn=lambda _: {"lr": 0.1},
    )
    server = Server(client_manager=SimpleClientManager(), strategy=strategy)
    app = ServerApp(server_fn=lambda context: ServerAppComponents(server=server, config=ServerConfig(num_rounds=2)))
    fedpers.simulate(app, ClientApp(client_fn=lambda context: Client(context).to_client()), num_supernodes=5)
    assert fitted == [(4, 1, [1] * 4), (4, 1, [2] * 4)]

    from flwr.common import parameters_to_ndarrays

    w, b = np.zeros(flower_app.FEATURES), np.zeros(1)
    for _ in range(2):
        client_fits = [flower_app.fit(w, b, k, 0.1) for k in range(4)]
        w = sum((10 + k) / 46 * o[0] for k, o in enumerate(client_fits))
        b = sum((10 + k) / 46 * o[1] for k, o in enumerate(client_fits))
    got = parameters_to_ndarrays(server.parameters)
    np.testing.assert_allclose(got[0], w, rtol=1e-12)
    np.testing.assert_allclose(got[1], b, rtol=1e-12)


def test_legacy_ways_of_the_grid() -> None:
    grid = LocalGrid(flower_app.client_app(), 2)
    assert [node.node_id for node in grid.get_nodes()] == list(grid.get_node_ids()) == [FIRST_NODE, FIRST_NODE + 1]
    with server_identity(RUN_ID):
        message = grid.create_message(RecordDict(), "query", FIRST_NODE + 1, "group 5", ttl=60.0)
        (reply,) = grid.send_and_receive([message], timeout=0.0)
    assert message.metadata.group_id == reply.metadata.group_id == "group 5"
    assert message.metadata.ttl == 60.0
    assert 0 < reply.metadata.ttl <= 60.0
    assert reply.content["known"]["partition-id"] == 1


# -------------------------------------------------------------------- contexts


def test_contexts_persist_per_node_and_are_not_shared() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        context.state.setdefault("own", ConfigRecord({"list": [0]}))["list"].append(context.node_id)
        context.node_config["mine"] = context.node_id
        context.run_config["mine"] = context.node_id
        return Message(RecordDict({"state": context.state["own"]}), reply_to=message)

    replies = ask(app, RecordDict(), times=3)
    for calls, group in enumerate(replies, start=1):
        assert [r.content["state"]["list"] for r in group] == [[0] + [FIRST_NODE + k] * calls for k in range(3)]
    grid = LocalGrid(app, 3, run_config={"a": 1})
    with server_identity(RUN_ID):
        list(grid.send_and_receive([Message(RecordDict(), FIRST_NODE, "train")]))
    assert grid.contexts[FIRST_NODE].run_config == {"a": 1, "mine": FIRST_NODE}
    assert grid.contexts[FIRST_NODE + 1].run_config == {"a": 1}
    assert grid.contexts[FIRST_NODE + 1].node_config == {"partition-id": 1, "num-partitions": 3}
    assert grid.contexts[FIRST_NODE + 1].node_id == FIRST_NODE + 1
    assert not grid.contexts[FIRST_NODE + 1].state


def test_a_client_that_raises_leaves_its_context_as_it_was() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        record = context.state.setdefault("own", ConfigRecord({"list": []}))
        record["list"].append(1)
        if "fail" in message.content:
            context.state["more"] = MetricRecord()
            raise ValueError
        return Message(RecordDict({"own": record}), reply_to=message)

    grid = LocalGrid(app, 1)
    with server_identity(RUN_ID):
        for content in ({}, {"fail": ConfigRecord()}, {}):
            (reply,) = grid.send_and_receive([Message(RecordDict(content), FIRST_NODE, "train")])
    assert reply.content["own"]["list"] == [1, 1]
    assert list(grid.contexts[FIRST_NODE].state) == ["own"]


# ---------------------------------------------------------------------- errors


def test_a_method_with_a_client_half_of_its_own_refuses_other_clients() -> None:
    expected = r"client_app=another Flower ClientApp: expected clients that FedRepUpdate\(\)\.client_app"
    for strategy in (strategies.FedRep(), strategies.FedAvg()):
        server = ServerApp()

        @server.main()
        def main(grid: Grid, context: Context, strategy: Strategy = strategy) -> None:
            strategy.start(grid, flower_app.initial_arrays(), num_rounds=1)

        refused = isinstance(strategy, strategies.FedRep)
        with pytest.raises(ConfigError, match=expected) if refused else nullcontext():
            fedpers.simulate(server, flower_app.client_app(), num_supernodes=3)


def test_a_clients_exception_becomes_an_error_reply_and_the_run_goes_on() -> None:
    inner = flower_app.client_app()
    results: dict[str, Any] = {}
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            raise ValueError("no luck today")
        if context.node_config["partition-id"] == 2:
            raise SystemExit(3)
        return inner(message, context)

    app.evaluate()(inner)
    replies = ask(app, RecordDict({"arrays": flower_app.initial_arrays(), "config": ConfigRecord()}), nodes=4)[0]
    assert [r.has_error() for r in replies] == [False, True, True, False]
    assert replies[1].error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert replies[1].error.reason.startswith("ValueError: no luck today (at ")
    assert replies[1].metadata.src_node_id == FIRST_NODE + 1
    fedpers.simulate(flower_app.server_app(results), app, 4)
    assert len(results["train"]) == len(results["evaluate"]) == 3


@pytest.mark.parametrize("answer", [None, "a text", "the message itself", "a reply to nothing"])
def test_an_answer_that_is_no_reply_becomes_an_error(answer: Any) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Any:
        if answer == "the message itself":
            return message
        if answer == "a reply to nothing":
            return Message(RecordDict(), FIRST_NODE, "train")
        return answer

    for reply in ask(app, RecordDict())[0]:
        assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        assert "must return a reply" in reply.error.reason


def test_an_exception_in_the_server_app_is_raised_by_simulate() -> None:
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        raise KeyError("the server's own")

    with pytest.raises(KeyError, match="the server's own"):
        fedpers.simulate(server, flower_app.client_app(), 2)


# ------------------------------------------------------------ messages by hand


def test_push_and_pull() -> None:
    grid = LocalGrid(flower_app.client_app(), 3)
    with server_identity(RUN_ID):
        messages = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
        ids = list(grid.push_messages(iter(messages)))
        assert len(set(ids)) == 3
        assert ids == [m.metadata.message_id for m in messages]
        (second,) = grid.pull_messages([ids[1]])
        rest = list(grid.pull_messages(iter([ids[0], ids[2], ids[0]])))
        again = list(grid.pull_messages(ids))
        unknown = list(grid.pull_messages(["never sent"]))
    assert second.content["known"]["partition-id"] == 1
    assert [r.content["known"]["partition-id"] for r in rest] == [0, 2]
    assert [r.error.code for r in again + unknown] == [ErrorCode.MESSAGE_UNAVAILABLE] * 4
    assert [r.metadata.reply_to_message_id for r in again + unknown] == [*ids, "never sent"]
    assert list(grid.pull_messages([])) == list(grid.push_messages([])) == list(grid.send_and_receive([])) == []
    assert serialized(unknown[0]).error.reason == unknown[0].error.reason


def test_metadata_of_a_reply() -> None:
    grid = LocalGrid(flower_app.client_app(), 3)
    with server_identity(RUN_ID):
        messages = [Message(RecordDict(), node, "query", group_id="g", ttl=100.0) for node in grid.get_node_ids()]
        replies = list(grid.send_and_receive(messages, timeout=5.0))
    for message, reply in zip(messages, replies, strict=True):
        assert reply.metadata.run_id == grid.run.run_id == message.metadata.run_id
        assert reply.metadata.src_node_id == message.metadata.dst_node_id
        assert reply.metadata.dst_node_id == message.metadata.src_node_id
        assert reply.metadata.reply_to_message_id == message.metadata.message_id
        assert reply.metadata.message_type == "query"
        assert reply.metadata.group_id == "g"
        assert reply.metadata.created_at >= message.metadata.created_at
        expiry = message.metadata.created_at + message.metadata.ttl
        assert reply.metadata.created_at + reply.metadata.ttl == pytest.approx(expiry)
    assert len({m.metadata.message_id for m in [*messages, *replies]}) == 6
    assert "" not in {r.metadata.message_id for r in replies}


def test_a_client_cannot_change_the_metadata_of_the_servers_message() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        reply = Message(RecordDict(), reply_to=message)
        message.metadata.ttl = 1e9
        message.metadata.dst_node_id = 77
        return reply

    grid = LocalGrid(app, 1)
    with server_identity(RUN_ID):
        message = Message(RecordDict(), FIRST_NODE, "train", ttl=5.0)
        (reply,) = grid.send_and_receive([message])
    assert not reply.has_error()
    assert (message.metadata.ttl, message.metadata.dst_node_id) == (5.0, FIRST_NODE)


# ------------------------------------------------------------------- isolation


def content() -> RecordDict:
    arrays = ArrayRecord({"a": Array(np.arange(4.0, dtype=np.float32)), "b": Array(np.ones((2, 3)))})
    return RecordDict({"arrays": arrays, "config": ConfigRecord({"n": 1, "list": [1, 2]})})


def add_to_tensors(content: RecordDict) -> None:
    for tensor in content["arrays"].to_torch_state_dict().values():
        tensor.add_(1.0)


def add_to_numpy(content: RecordDict) -> None:
    for array in content["arrays"].values():
        values = array.numpy()
        values += 1


def set_data(content: RecordDict) -> None:
    content["arrays"]["a"].data = Array(np.full(4, 9, np.float32)).data


def set_shape(content: RecordDict) -> None:
    content["arrays"]["a"].shape = (2, 2)


def replace_array(content: RecordDict) -> None:
    content["arrays"]["a"] = Array(np.zeros(7))


def delete_array(content: RecordDict) -> None:
    del content["arrays"]["b"]


def take_arrays(content: RecordDict) -> None:
    content["arrays"].to_numpy_ndarrays(keep_input=False)


def change_config(content: RecordDict) -> None:
    content["config"]["n"] = 2
    content["config"]["new"] = "x"


def append_to_list(content: RecordDict) -> None:
    content["config"]["list"].append(3)


def change_records(content: RecordDict) -> None:
    del content["config"]
    content["arrays"] = ArrayRecord([np.zeros(2)])
    content["more"] = MetricRecord()


HARM = [
    add_to_tensors, add_to_numpy, set_data, set_shape, replace_array, delete_array, take_arrays, change_config,
    append_to_list, change_records,
]  # fmt: skip


@pytest.mark.parametrize("harm", HARM, ids=lambda f: f.__name__)
def test_what_a_client_does_to_its_message_stays_with_it(harm: Callable[[RecordDict], None]) -> None:
    app = ClientApp()
    arrived: list[bool] = []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrived.append(message.content == content())
        reply = Message(message.content, reply_to=message)
        if context.node_config["partition-id"] == 1:
            harm(message.content)
            return Message(RecordDict(), reply_to=message)
        return reply

    sent = content()
    first, second = ask(app, sent, times=2)
    assert arrived == [True] * 6
    assert sent == content()
    assert [r.content == content() for r in first + second] == [True, False, True] * 2


@pytest.mark.parametrize("harm", HARM, ids=lambda f: f.__name__)
def test_what_a_server_does_to_a_reply_stays_with_it(harm: Callable[[RecordDict], None]) -> None:
    app = ClientApp()
    kept: list[RecordDict] = []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        kept.append(message.content)
        state = context.state.setdefault("arrays", message.content["arrays"])
        answer = RecordDict({"arrays": state, "config": message.content["config"]})
        kept.append(answer)
        return Message(answer, reply_to=message)

    sent = content()
    grid = LocalGrid(app, 3)
    with server_identity(RUN_ID):
        replies = list(grid.send_and_receive([Message(sent, FIRST_NODE + k, "train") for k in range(3)]))
        harm(replies[1].content)
        assert [r.content == content() for r in replies] == [True, harm in (add_to_tensors, add_to_numpy), True]
        assert all(c == content() for c in kept)
        assert sent == content()
        harm(sent)  # the sender goes on with its own, too
        assert all(c == content() for c in kept)
        again = list(grid.send_and_receive([Message(content(), FIRST_NODE + k, "train") for k in range(3)]))
    assert all(r.content == content() for r in again)


@pytest.mark.parametrize("harm", HARM, ids=lambda f: f.__name__)
def test_what_a_client_does_to_its_answer_afterwards_is_not_seen(harm: Callable[[RecordDict], None]) -> None:
    app = ClientApp()
    common = content()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(common, reply_to=message)

    (replies,) = ask(app, RecordDict())
    harm(common)
    assert all(r.content == content() for r in replies)


@pytest.mark.parametrize(
    "value",
    [
        np.array(3.5),
        np.zeros((0, 3), np.float32),
        np.asfortranarray(np.arange(12, dtype=np.int16).reshape(3, 4)),
        np.arange(24, dtype=">f4").reshape(2, 3, 4)[:, ::2],
        np.array([True, False]),
        np.array([1 + 2j], np.complex64),
        np.array(["text", "more"]),
        np.array([(1, 2.0)], dtype=[("first", "i4"), ("second", "f8")]),
        np.float16([1.5, math.inf, math.nan]),
    ],
    ids=lambda v: f"{v.dtype}-{v.shape}",
)
def test_arrays_arrive_as_numpy_would_read_them(value: np.ndarray) -> None:
    app = ClientApp()
    seen: list[np.ndarray] = []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        seen.append(message.content["arrays"]["v"].numpy())
        return Message(message.content, reply_to=message)

    sent = Array(value)
    (reply,) = ask(app, RecordDict({"arrays": ArrayRecord({"v": sent})}), nodes=1)[0]
    seen.append(reply.content["arrays"]["v"].numpy())
    wanted = sent.numpy()
    for array in seen:
        np.testing.assert_array_equal(array, wanted)
        assert (array.dtype, array.shape) == (wanted.dtype, wanted.shape)
        assert array.flags.writeable
        assert (array.flags.c_contiguous, array.flags.f_contiguous) == (
            wanted.flags.c_contiguous,
            wanted.flags.f_contiguous,
        )
    assert reply.content["arrays"]["v"] == sent
    assert sent == reply.content["arrays"]["v"]


@pytest.mark.parametrize(
    ("array", "error"),
    [
        (Array("float32", (3,), "numpy.ndarray", b"not an array"), ValueError),
        (Array("float32", (3,), "numpy.ndarray", Array(np.ones(3, np.float32)).data[:-4]), ValueError),
        (Array("float32", (3,), "other", b"x"), TypeError),
        (Array("float32", (3,), "numpy.ndarray", b""), EOFError),
    ],
)
def test_damaged_arrays_fail_as_flowers_do(array: Array, error: type[Exception]) -> None:
    app = ClientApp()
    texts: list[str] = []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        with pytest.raises(error) as caught:
            message.content["arrays"]["v"].numpy()
        texts.append(str(caught.value))
        return Message(message.content, reply_to=message)

    (reply,) = ask(app, RecordDict({"arrays": ArrayRecord({"v": array})}), nodes=1)[0]
    assert not reply.has_error()
    with pytest.raises(error) as caught:
        array.numpy()
    assert texts == [str(caught.value)]


def test_a_server_that_waits_for_clients_that_never_come_ends_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flwr.serverapp.strategy.strategy_utils.sleep", lambda seconds: None)
    monkeypatch.setattr("fedpers.runtime.grid.MAX_WAIT", 0.0)
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        FedAvg().start(grid, flower_app.initial_arrays(), num_rounds=2)

    sentence = r"^the server app waits for more nodes than the 1 of this run, and no other will join \(Flower's"
    with pytest.raises(TrainingError, match=sentence):
        fedpers.simulate(server, flower_app.client_app(), 1)
