"""The largest entries of a change in few bits: what travels, what stays, and that nothing is lost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import flwr.app as flower
import pytest
import torch
from flwr.clientapp.mod import arrays_size_mod
from flwr.serverapp.strategy import FedMedian
from torch import Tensor

from fedpers.app import _main
from fedpers.client.app import STATE
from fedpers.client.results import ClientResult, CohortResult
from fedpers.cohort import Tree, WeightedMean, entries, leaves, tree
from fedpers.errors import ConfigError
from fedpers.flower_private import server_identity
from fedpers.records import ARRAYS, from_record, row, to_record, unflatten_state
from fedpers.run import run, run_rounds
from fedpers.runtime.grid import ClientGrid
from fedpers.runtime.local import LocalGrid
from fedpers.runtime.ray import RayGrid
from fedpers.server.collect import ReplyCollector, ReplyRules, schema_of
from fedpers.server.postprocessors import CompressionConfig, Privacy, Robust, TopK, make_postprocessors
from fedpers.settings import Config
from fedpers.strategies import STRATEGIES, CohortApp
from tests.cohort.helpers import assert_same
from tests.resume import results
from tests.runtime.wire import WireGrid
from tests.server.helpers import both, far, plain_run, runs_or_is_refused, settings, stack, trained

SETTINGS = [
    TopK(share=0.3, bits=bits, error_feedback=feedback) for bits in (2, 5, 8, 16, 32) for feedback in (True, False)
]


def encoded(
    topk: TopK, trained_arrays: dict[str, Tree], sent: Tree, state: Tree | None = None
) -> tuple[dict[str, Tree], Tree | None]:
    size = len(trained_arrays[ARRAYS])
    return topk.encode(trained_arrays, sent, state, seed=0, round=1, clients=range(size))


def wire(records: dict[str, Tree], record: str) -> Tensor:
    """One client's entry ``w`` of a record."""
    value: Tensor = records[record]["w"][0]
    return value


def moved(*rows: list[float], dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tree], Tree]:
    """Clients that changed zeros to these values."""
    values = torch.tensor(rows, dtype=dtype)
    return stack(w=values), tree({"w": torch.zeros(values.shape[1:], dtype=dtype)})


# ------------------------------------------------------------- by hand


def test_largest_entries_in_whole_steps() -> None:
    sent = tree({"w": torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])})
    replies = stack(w=torch.tensor([[1.5, -2.0, 2.0, 1.0, 3.0]]))
    records, state = encoded(TopK(share=0.4), replies, sent, tree({"w": torch.zeros(1, 5)}, 1))
    assert records.keys() == {"values", "positions", "steps"}
    assert wire(records, "positions").tolist() == [1, 4]
    assert wire(records, "positions").dtype == torch.int32
    assert wire(records, "values").tolist() == [-127, 85]  # 2 / (3 / 127) = 84.67
    assert wire(records, "values").dtype == torch.int8
    assert float(wire(records, "steps")) == pytest.approx(3 / 127)
    assert wire(records, "steps").dtype == torch.float32
    assert state is not None
    torch.testing.assert_close(state["w"], torch.tensor([[0.5, 0.0, 1.0, 0.0, 2.0 - 85 * 3 / 127]]))
    made, metrics = TopK(share=0.4).reply(records, sent)
    assert metrics == {}
    torch.testing.assert_close(made[ARRAYS]["w"], torch.tensor([[1.0, -2.0, 1.0, 1.0, 1.0 + 85 * 3 / 127]]))


@pytest.mark.parametrize(
    ("bits", "levels", "dtype"),
    [
        (2, [1, -1, 0], torch.int8),
        (3, [3, -2, 1], torch.int8),  # 1.5 / (2 / 3) = 2.25, 0.5 / (2 / 3) = 0.75
        (8, [127, -95, 32], torch.int8),  # 95.25, 31.75
        (16, [32767, -24575, 8192], torch.int16),  # 24575.25, 8191.75
        (32, [2.0, -1.5, 0.5], torch.float32),
    ],
)
def test_bits(bits: int, levels: list[float], dtype: torch.dtype) -> None:
    replies, sent = moved([2.0, -1.5, 0.1, 0.5])
    records, _ = encoded(TopK(share=0.75, bits=bits), replies, sent)
    assert wire(records, "values").tolist() == levels
    assert wire(records, "values").dtype == dtype
    assert wire(records, "positions").tolist() == [0, 1, 3]
    assert ("steps" in records) == (bits < 32)


def test_what_was_left_is_sent_later() -> None:
    topk = TopK(share=0.25, bits=32)
    replies, sent = moved([1.0, 0.6, 0.0, 0.0])
    state: Tree | None = tree({"w": torch.zeros(1, 4)}, 1)
    seen = []
    for _ in range(4):
        records, state = encoded(topk, replies, sent, state)
        seen.append((int(wire(records, "positions")), round(float(wire(records, "values")), 4)))
    assert seen == [(0, 1.0), (1, 1.2), (0, 2.0), (1, 1.2)]


def test_the_first_of_equal_entries() -> None:
    replies, sent = moved([0.0, -1.0, 1.0, 1.0, 2.0, 1.0], [0.0] * 6)
    records, _ = encoded(TopK(share=0.5), replies, sent)
    assert records["positions"]["w"].tolist() == [[1, 2, 4], [0, 1, 2]]
    assert records["values"]["w"].tolist() == [[-64, 64, 127], [0, 0, 0]]
    assert float(records["steps"]["w"][1]) == 0.0


def test_all_entries_need_no_positions() -> None:
    replies, sent = moved([1.0, -0.5, 0.25])
    topk = TopK(share=1.0)
    records, _ = encoded(topk, replies, sent)
    assert records.keys() == {"values", "steps"}
    assert wire(records, "values").tolist() == [127, -64, 32]  # 63.5 and 31.75; halves to the even number
    torch.testing.assert_close(topk.reply(records, sent)[0][ARRAYS]["w"][0, 0], torch.tensor(1.0))


@pytest.mark.parametrize(("share", "size", "count"), [(0.01, 1000, 10), (0.01, 10, 1), (0.25, 10, 2), (1.0, 7, 7)])
def test_so_many_entries(share: float, size: int, count: int) -> None:
    assert TopK(share=share).count(size) == count


def test_integers_and_empty_tensors_travel_as_they_are() -> None:
    sent = tree({"n": torch.tensor(3), "w": torch.zeros(2, 2), "e": torch.zeros(0, 4), "s": torch.tensor(1.0)})
    replies = stack(n=torch.tensor([4, 5]), w=torch.ones(2, 2, 2), e=torch.zeros(2, 0, 4), s=torch.tensor([2.0, 3.0]))
    topk = TopK(share=0.25)
    state = topk.client_state(sent)
    assert state is not None
    assert {name: value.shape for name, value in entries(state).items()} == {"w": (2, 2), "s": ()}
    records, _ = encoded(topk, replies, sent, torch.stack([state, state]))
    assert list(entries(records[ARRAYS])) == ["n", "e"]
    assert list(entries(records["values"])) == ["w", "s"]
    made = entries(topk.reply(records, sent)[0][ARRAYS])
    assert list(made) == ["n", "w", "e", "s"]  # the order of the server's arrays
    assert made["n"].tolist() == [4, 5]
    assert made["e"].shape == (2, 0, 4)
    assert made["w"].tolist() == [[[1.0, 0.0], [0.0, 0.0]]] * 2
    torch.testing.assert_close(made["s"], torch.tensor([2.0, 3.0]))


def test_running_statistics_travel_whole() -> None:
    names = ("norm.running_mean", "norm.running_var")
    sent = tree({"w": torch.zeros(4), **dict.fromkeys(names, torch.zeros(4))})
    replies = stack(w=torch.ones(1, 4), **dict.fromkeys(names, torch.tensor([[1.0, 2, 3, 4]])))
    topk = TopK(share=0.25)
    state = topk.client_state(sent)
    assert state is not None
    assert list(entries(state)) == ["w"]
    records, _ = encoded(topk, replies, sent, torch.stack([state]))
    assert list(entries(records[ARRAYS])) == list(names)
    schema = topk.schema(schema_of(ARRAYS, entries(sent)))
    assert {(record, name) for record in records for name in entries(records[record])} == set(schema)
    made = entries(topk.reply(records, sent)[0][ARRAYS])
    assert made["norm.running_var"].tolist() == [[1.0, 2, 3, 4]]
    assert made["w"].count_nonzero() == 1


def test_a_network_with_batch_normalization_learns_with_few_entries_sent(tmp_path: Path) -> None:
    settings = ["model=cnn_bn", "rounds=8", "partition.num_clients=3", "training.batch_size=32", "split.max_train=64"]
    settings += ["training.drop_last=true", "compression=topk", "compression.share=0.01", f"output={tmp_path}"]
    assert _main(["strategy=fedavg", "evaluate_every=8", *settings]) == 0
    (summary,) = tmp_path.rglob("summary.json")
    last = json.loads(summary.read_text())["last"]
    assert math.isfinite(last["test/loss"])
    assert last["test/accuracy"] > 0.15


def test_nothing_to_send() -> None:
    topk = TopK()
    assert topk.client_state(tree({})) is None
    assert topk.encode({}, tree({}), None, seed=0, round=1, clients=[0]) == ({}, None)
    assert topk.reply({}, tree({})) == ({}, {})
    assert TopK(error_feedback=False).client_state(tree({"w": torch.zeros(2)})) is None


# ------------------------------------------------------------- any values


def some(dtype: torch.dtype, clients: int = 3) -> tuple[dict[str, Tree], Tree, Tree]:
    """Replies, what was sent, and residuals."""
    rng = torch.Generator().manual_seed(1)
    shapes = {"w": (6, 5), "b": (7,), "s": ()}
    sent = tree({n: torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for n, shape in shapes.items()})

    def drawn() -> dict[str, Tensor]:
        return {n: torch.randn(clients, *s, generator=rng, dtype=torch.float64).to(dtype) for n, s in shapes.items()}

    return stack(**drawn()), sent, tree(drawn(), clients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("topk", SETTINGS, ids=str)
def test_clients_together_as_each_alone(topk: TopK, dtype: torch.dtype) -> None:
    replies, sent, residual = some(dtype)
    state = residual if topk.error_feedback else None
    together, kept = encoded(topk, replies, sent, state)
    made, _ = topk.reply(together, sent)
    for k in range(3):
        alone, left = encoded(topk, {ARRAYS: replies[ARRAYS][k : k + 1]}, sent, None if state is None else state[[k]])
        decoded, _ = topk.reply(alone, sent)
        for record in together:
            for name, value in entries(together[record]).items():
                assert torch.equal(value[k : k + 1], alone[record][name])
        for name, value in entries(made[ARRAYS]).items():
            assert torch.equal(value[k : k + 1], decoded[ARRAYS][name])
            if left is not None and kept is not None:
                assert torch.equal(kept[name][k : k + 1], left[name])


@pytest.mark.parametrize("topk", SETTINGS, ids=str)
def test_what_is_sent_and_what_is_left_is_all(topk: TopK) -> None:
    replies, sent, residual = some(torch.float64)
    records, left = encoded(topk, replies, sent, residual)
    decoded, _ = topk.reply(records, sent)
    assert left is not None
    for name, value in entries(replies[ARRAYS]).items():
        change = value - sent[name] + residual[name]
        torch.testing.assert_close(decoded[ARRAYS][name] - sent[name] + left[name], change)
        levels = 1.0 if topk.bits == 32 else float(records["steps"][name].max()) * topk.levels
        assert float(left[name].abs().max()) <= float(change.abs().max()) <= max(levels, math.inf)


@pytest.mark.parametrize("topk", SETTINGS, ids=str)
def test_arrays_sent_to_each_client_alone(topk: TopK) -> None:
    replies, sent, _ = some(torch.float32)
    each = torch.stack([sent] * 3)
    first, second = (encoded(topk, replies, arrays)[0] for arrays in (sent, each))
    made = [topk.reply(first, arrays)[0][ARRAYS] for arrays in (sent, each)]
    for record, values in first.items():
        assert_same(entries(second[record]), entries(values))
    assert_same(entries(made[1]), entries(made[0]))


@pytest.mark.parametrize("topk", [*SETTINGS, TopK(share=1.0), TopK(share=1e-9)], ids=str)
def test_replies_are_as_declared(topk: TopK) -> None:
    replies, sent, residual = some(torch.float32)
    counts = tree({**entries(sent), "n": torch.tensor(0)})
    replies = stack(**entries(replies[ARRAYS]), n=torch.zeros(3, dtype=torch.int64))
    records, _ = encoded(topk, replies, counts, residual)
    rules = ReplyRules(counts, topk.schema(schema_of(ARRAYS, entries(counts))), WeightedMean(), (topk,), "uniform")
    metrics = [{"num-examples": 1.0}] * 3
    together, alone = ReplyCollector(rules), ReplyCollector(replace(rules, fold=WeightedMean()))
    result = CohortResult([0, 1, 2], metrics, records)
    together.take_cohort(result)
    alone.take(dict(enumerate(result.rows())))
    assert not together.collected.failures
    assert not alone.collected.failures
    assert together.collected.bytes_up == alone.collected.bytes_up
    assert_same(entries(together.collected.fold.result()[ARRAYS]), entries(alone.collected.fold.result()[ARRAYS]))


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_client_that_is_not_finite_keeps_its_residual(bits: int, bad: float) -> None:
    replies, sent, residual = some(torch.float32)
    whole, expected = encoded(TopK(share=0.3, bits=bits), replies, sent, residual)
    replies[ARRAYS]["w"][1, 2, 3] = bad
    records, left = encoded(TopK(share=0.3, bits=bits), replies, sent, residual)
    assert left is not None
    assert expected is not None
    for name in entries(residual):
        assert torch.equal(left[name][1], residual[name][1])
        assert torch.equal(left[name][[0, 2]], expected[name][[0, 2]])
    for record, values in whole.items():
        for name, value in entries(values).items():
            assert torch.equal(records[record][name][[0, 2]], value[[0, 2]])
    sign = records["steps" if bits == 8 else "values"]["w"][1]
    assert not sign.isfinite().all()  # so that the server leaves it out


# ------------------------------------------------------------- replies that are none


@pytest.mark.parametrize(
    ("record", "value", "reason"),
    [
        ("positions", torch.tensor([0, 0], dtype=torch.int32), "positions of 'w' do not ascend from 0 to 4"),
        ("positions", torch.tensor([3, 1], dtype=torch.int32), "positions of 'w' do not ascend from 0 to 4"),
        ("positions", torch.tensor([-1, 1], dtype=torch.int32), "positions of 'w' do not ascend from 0 to 4"),
        ("positions", torch.tensor([1, 5], dtype=torch.int32), "positions of 'w' do not ascend from 0 to 4"),
        ("positions", torch.tensor([1, 4]), "'w' has dtype int64, expected int32"),
        ("values", torch.tensor([1], dtype=torch.int8), "'w' has shape [1], expected [2]"),
        ("steps", torch.tensor(math.inf), "'steps/w' holds values that are not finite"),
        ("steps", torch.tensor(3e38), "'w' holds values that are not finite"),
    ],
)
def test_a_reply_that_cannot_be_read_is_left_out(record: str, value: Tensor, reason: str) -> None:
    topk = TopK(share=0.4)
    replies, sent = moved([1.0, -2.0, 0.5, 0.0, 1.0])
    records, _ = encoded(topk, replies, sent)
    rules = ReplyRules(sent, topk.schema(schema_of(ARRAYS, entries(sent))), WeightedMean(), (topk,), "uniform")
    collector = ReplyCollector(rules)
    for client in range(2):
        content = {name: entries(row(values, 0)) for name, values in records.items()}
        if client:
            content[record] = {"w": value}
        made = flower.RecordDict({name: to_record(tree(values)) for name, values in content.items()})
        collector.take({client: ClientResult(made)})
    assert collector.collected.failures == {1: reason}
    assert collector.collected.metrics.keys() == {0}
    torch.testing.assert_close(
        collector.collected.fold.result()[ARRAYS]["w"], torch.tensor([64 * 2 / 127, -2.0, 0.0, 0.0, 0.0])
    )


# ------------------------------------------------------------- rounds


@pytest.mark.slow
@pytest.mark.parametrize("method", STRATEGIES)
def test_every_method_runs_or_is_refused(method: str) -> None:
    runs_or_is_refused(method, TopK(share=0.2), without="none")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedavg", "fedrep", "ditto", "gpfl"])
def test_a_compression_that_leaves_nothing_out_is_none(method: str) -> None:
    topk = TopK(share=1.0, bits=32)
    assert_same(trained(*both(method, topk)).arrays, plain_run(method))


def test_bytes_are_those_on_the_wire() -> None:
    reports = trained(*both("fedavg", TopK(share=0.1))).reports
    sizes = {"body.0.weight": 48, "body.0.bias": 8, "head.weight": 32, "head.bias": 4}
    counts = {name: max(1, round(0.1 * size)) for name, size in sizes.items()}
    each = sum(counts.values()) * (1 + 4) + 4 * len(sizes)
    assert [report.bytes_up for report in reports[1:]] == [7 * each] * 2
    assert [report.bytes_down for report in reports[1:]] == [7 * 4 * sum(sizes.values())] * 2


def test_nothing_is_lost_over_rounds() -> None:
    """Client k wants to move by 0.1 k in each round: how far the server moved, and the residuals, are that together."""
    strategy, app = far(TopK(share=0.1))
    finished = trained(strategy, app, rounds=5)
    left = finished.state(range(7))["residual"]
    for name, value in entries(from_record(app.initial_arrays())).items():
        wanted = 5 * 0.1 * sum(range(7)) / 7
        torch.testing.assert_close(finished.arrays[name] - value + left[name].mean(0), torch.full_like(value, wanted))


def test_without_feedback_the_rest_is_lost() -> None:
    strategy, app = far(TopK(share=0.1, error_feedback=False))
    finished = trained(strategy, app, rounds=3)
    before = entries(from_record(app.initial_arrays()))["head.weight"]
    assert not leaves(app.initial_state)
    changed = finished.arrays["head.weight"] - before
    assert float(changed.sum()) == pytest.approx(3 * 3 * 0.1 * 3, rel=1e-3)  # 3 rounds, 3 of 32 entries, the mean of k


def test_compression_then_privacy_or_a_median() -> None:
    """Changes are decoded before they are clipped, or compared."""
    private, app = far(TopK(share=1.0, bits=32), Privacy(noise=0.0, norm=2.0))
    expected = trained(*far(Privacy(noise=0.0, norm=2.0))).arrays
    assert_same(trained(private, app).arrays, expected)
    robust, app = far(TopK(share=1.0, bits=32), Robust(FedMedian()))
    assert_same(trained(robust, app).arrays, trained(*far(Robust(FedMedian()))).arrays)


def on_wire(app: CohortApp) -> LocalGrid:
    """Every message, reply and context as bytes."""
    return WireGrid(app, app.data.num_clients)


def in_cohorts(cohort: int) -> Callable[[CohortApp], LocalGrid]:
    return lambda app: LocalGrid(app, app.data.num_clients, clients_at_once=cohort, workers=1)


def played(
    grid_of: Callable[[CohortApp], ClientGrid], method: str = "fedrep"
) -> tuple[dict[str, Tensor], Any, CohortApp]:
    """Arrays after three rounds with half of the clients in each."""
    strategy, app = both(method, TopK(share=0.2, bits=4), fraction=0.5)
    grid = grid_of(app)
    kept: list[flower.ArrayRecord] = []
    with server_identity(1):
        for report in run_rounds(
            strategy, grid, app.initial_arrays(), 3, after_round=lambda _, made, is_last: kept.append(made)
        ):
            assert not report.failures
    return entries(from_record(kept[-1])), grid, app


@pytest.mark.slow
def test_the_same_over_the_wire_and_in_cohorts() -> None:
    expected, grid, app = played(in_cohorts(1))
    states = grid.engine.store.gather(range(7))
    for cohort in (3, 7):
        arrays, other, _ = played(in_cohorts(cohort))
        assert_same(arrays, expected)
        assert_same(leaves(other.engine.store.gather(range(7))), leaves(states))
    arrays, wired, _ = played(on_wire)
    assert_same(arrays, expected)
    for client, context in enumerate(wired.contexts.values()):
        if STATE in context.state.array_records:
            state = unflatten_state(context.state.array_records[STATE], app.initial_state)
            assert_same(leaves(state[0]), {name: value[client] for name, value in leaves(states).items()})
            assert "residual" in state.keys()  # noqa: SIM118


@pytest.mark.slow
@pytest.mark.usefixtures("ray_machine")
def test_the_same_on_actors() -> None:
    expected, grid, _ = played(in_cohorts(7))
    states = leaves(grid.engine.store.gather(range(7)))
    arrays, remote, _ = played(lambda app: RayGrid(app, actors=2, clients_at_once=2))
    assert_same(arrays, expected)
    for clients, state in remote.blocks():
        assert_same(leaves(state), {name: value[clients] for name, value in states.items()})
    remote.close()


# ------------------------------------------------------------- runs


@pytest.mark.slow
def test_a_run_that_goes_on_equals_one_without_a_stop(tmp_path: Path) -> None:
    common = [
        "strategy=fedrep", "compression=topk", "compression.share=0.05", "fraction=0.5", "partition.num_clients=6",
        "partition.alpha=1.0", "runtime.clients_at_once=3", "runtime.workers=1",
    ]  # fmt: skip
    for folder, rounds in (("whole", 4), ("parts", 2)):
        assert _main([*common, f"rounds={rounds}", f"hydra.run.dir={tmp_path / folder}"]) == 0
    assert _main(["resume", str(tmp_path / "parts"), "rounds=4"]) == 0
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


@pytest.mark.slow
def test_a_compressed_run(tmp_path: Path) -> None:
    def summary(**values: Any) -> dict[str, Any]:
        return run(settings(**values), tmp_path / str(len(list(tmp_path.iterdir()))))

    plain, topk = summary(), summary(compression={"name": "topk", "share": 0.02})
    assert (plain["compression"], topk["compression"]) == ("none", "topk")
    assert topk["bytes_up"] < plain["bytes_up"] / 20
    assert topk["bytes_down"] == plain["bytes_down"]
    again = summary(compression={"name": "topk", "share": 0.02})
    for name in ("selected", "last"):
        assert json.dumps(again[name]) == json.dumps(topk[name])
        assert json.dumps(plain[name]) != json.dumps(topk[name])


# ------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"name": "topkk"}, "compression=topkk: expected one of none, topk (did you mean 'topk'?)."),
        ({"share": 0.0}, "compression.share=0.0: expected a number > 0 and <= 1."),
        ({"share": 1.5}, "compression.share=1.5: expected a number > 0 and <= 1."),
        ({"share": math.nan}, "compression.share=nan: expected a number."),
        ({"bits": 1}, "compression.bits=1: expected 2 to 8, 16 or 32."),
        ({"bits": 12}, "compression.bits=12: expected 2 to 8, 16 or 32."),
    ],
)
def test_settings_out_of_range(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CompressionConfig(**values)
    assert str(caught.value) == sentence


def test_settings_make_a_postprocessor() -> None:
    assert make_postprocessors(Config()) == ()
    settings = CompressionConfig(name="topk", share=0.1, bits=4, error_feedback=False)
    assert make_postprocessors(Config(compression=settings)) == (TopK(share=0.1, bits=4, error_feedback=False),)


def test_what_compression_does_not_go_with() -> None:
    def refused(*postprocessors: Any) -> str:
        strategy, app = both("fedavg", *postprocessors)
        with pytest.raises(ConfigError) as caught:
            strategy.check_arrays(from_record(app.initial_arrays()), 7)
        return str(caught.value)

    order = "expected compression first, whose replies the others read."
    assert refused(Privacy(noise=0.0), TopK()) == f"postprocessors=['privacy', 'compression']: {order}"
    assert refused(Robust(FedMedian()), TopK()) == f"postprocessors=['aggregation', 'compression']: {order}"
    assert refused(TopK(), TopK(share=0.5)) == (
        "postprocessors=['residual', 'residual']: expected one for compression at most."
    )


def test_both_halves_need_it() -> None:
    _, app = both("fedavg", TopK())
    plain, _ = both("fedavg")
    with server_identity(1), pytest.raises(ConfigError, match=r"^postprocessors=none: expected \['TopK\(share=0.01, "):
        list(run_rounds(plain, LocalGrid(app, 7, clients_at_once=7, workers=1), app.initial_arrays(), 1))


def test_a_client_that_adapts_for_itself_is_not_compressed() -> None:
    """Nothing of it travels: it is measured with all that it learnt, and its residual stays."""
    measured = []
    for postprocessors in ((), (TopK(share=0.01),)):
        strategy, app = both("fedavg", *postprocessors, unseen=(3,))
        grid = LocalGrid(app, app.data.num_clients, clients_at_once=3, workers=1)
        strategy.begin()
        with server_identity(1):
            strategy.evaluate_adapted(app.initial_arrays(), flower.ConfigRecord(), grid)
        assert not strategy.report.evaluation_failures
        measured.append(strategy.report.adapted[3])
        assert grid.engine is not None
        if postprocessors:
            assert all(not v.any() for v in entries(grid.engine.store.gather([3])["residual"]).values())
        grid.close()
    assert measured[0] == measured[1]


def test_one_reply_of_a_cohort_that_cannot_be_used_leaves_the_others() -> None:
    """A change too large for any norm is found when the stack is clipped."""
    arrays = tree({"w": torch.zeros(2, dtype=torch.float64)})
    privacy = Privacy(noise=0.0, norm=1.0)
    rules = ReplyRules(arrays, schema_of(ARRAYS, entries(arrays)), WeightedMean(), (privacy,), "uniform")
    collector = ReplyCollector(rules)
    values = torch.tensor([[0.5, 0.0], [1e200, 1e200], [0.0, 0.25]], dtype=torch.float64)
    metrics = [{"num-examples": 1, "steps": 1, "samples": 1, "train-loss": 0.5}] * 3
    collector.take_cohort(CohortResult([4, 8, 6], metrics, stack(w=values)))
    assert list(collector.collected.failures) == [8]
    assert list(collector.collected.metrics) == [4, 6]
    assert collector.collected.fold.result()[ARRAYS]["w"].tolist() == [0.25, 0.125]


def test_mods_cannot_read_compressed_replies() -> None:
    with pytest.raises(ConfigError, match=r"^mods=\['arrays_size_mod'\]: expected none with compression"):
        both("fedavg", TopK(), mods=[arrays_size_mod])
