"""Clients on Ray actors: the same results as in this process, whatever dies on the way."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flwr.app as flower
import pytest
import ray
import torch
from flwr.serverapp import ServerApp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fedpers.runtime.ray as ray_runtime
import fedpers.runtime.ray_actors as ray_actors
from fedpers import simulate
from fedpers.cohort import Fold, Training, entries, leaves, tree
from fedpers.errors import ConfigError, FedpersError, TrainingError
from fedpers.flower_private import server_identity
from fedpers.records import from_record
from fedpers.runtime.actor import Worker, pack
from fedpers.runtime.grid import FIRST_NODE
from fedpers.runtime.local import LocalGrid
from fedpers.runtime.probe import Choice
from fedpers.runtime.ray import RayGrid
from fedpers.runtime.ray_shards import deal
from fedpers.runtime.states import write_states
from fedpers.strategies import CohortApp
from tests import flower_app
from tests.equivalence import halves
from tests.runtime.faulty import (
    DATA,
    Faulty,
    FaultyUpdate,
    LocalGridContext,
    Values,
    app_of,
    assert_same,
    rounds,
    undisturbed,
)


@pytest.fixture(scope="module")
def machine(ray_machine: None) -> Iterator[None]:
    """Ray, whose actors may take long to start while other tests run beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_actors, "PATIENCE", 240.0)
        yield


@pytest.fixture(scope="module")
def two_actors(machine: None) -> Iterator[RayGrid]:
    """Clients of an app without fault, for every test that needs nothing else: actors start slowly."""
    with RayGrid(app_of(), actors=2, clients_at_once=2) as grid:
        yield grid


@pytest.fixture
def pair(two_actors: RayGrid) -> RayGrid:
    """Two actors without personal state."""
    two_actors.load([])
    return two_actors


@pytest.fixture(autouse=True)
def _server() -> Iterator[None]:
    with server_identity(1):
        yield


# ------------------------------------------------------------------- results


@pytest.mark.slow
def test_actors_give_what_this_process_gives(pair: RayGrid) -> None:
    actual, strategy = rounds(pair, app_of())
    described = pair.described()
    assert_same(actual, undisturbed())
    assert strategy.report.failures == {}
    assert described["actors"] == 2
    assert sum(described["clients_per_actor"]) == 5
    jobs = [job for shard in pair.shards for job in shard.jobs]
    assert jobs
    assert all(job.answer is None and job.future is None for job in jobs)  # answers are let go of
    assert not pair._waiting
    assert not pair._known


@pytest.mark.slow
def test_replies_may_also_be_looked_at(pair: RayGrid) -> None:
    app = app_of()
    strategy, config = Faulty(seed=3), flower.ConfigRecord()
    strategy.begin()
    results = []
    local = LocalGrid(app, 5, clients_at_once=2, workers=1)
    for grid in (pair, local):
        messages = list(strategy.configure_train(1, app.initial_arrays(), config, grid))
        ids = list(grid.push_messages(messages))
        replies: dict[int, flower.Message] = {}
        open_ids = set(ids)
        while open_ids:
            for reply in grid.pull_messages(open_ids):  # what is not there yet comes later
                replies[reply.metadata.src_node_id] = reply
                open_ids.discard(reply.metadata.reply_to_message_id)
            time.sleep(0.01)
        again = list(grid.pull_messages(ids[:1]))
        assert again[0].has_error()  # each is given once
        results.append({node: leaves(from_record(r.content.array_records["arrays"])) for node, r in replies.items()})
    local.close()
    assert sorted(results[0]) == [FIRST_NODE + c for c in range(5)]
    for node, values in results[1].items():
        for name, value in values.items():
            torch.testing.assert_close(results[0][node][name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_an_app_of_ones_own_runs_on_actors(machine: None) -> None:
    app = app_of()
    server, results = ServerApp(), []

    @server.main()
    def main(grid: Any, context: Any) -> None:
        result = Faulty(fraction=0.6, seed=3).start(grid, app.initial_arrays(), num_rounds=3)
        results.append(leaves(from_record(result.arrays)))

    simulate(server, app, 5, clients_at_once=2, workers=1)
    simulate(server, app, 5, grid=RayGrid(app, actors=1, clients_at_once=2))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-10, atol=1e-12)


# -------------------------------------------------------------------- faults


@pytest.mark.slow
@pytest.mark.parametrize("saved", [False, True])
def test_an_actor_that_dies_in_mid_round_changes_nothing(machine: None, saved: bool, tmp_path: Path) -> None:
    app = app_of("die once", str(tmp_path / "mark"), round=3)

    def save(round: int) -> None:
        if saved and round == 1:
            (tmp_path / "states").mkdir()
            write_states(tmp_path / "states", grid.blocks())
            grid.saved(tmp_path / "states")

    with RayGrid(app, actors=2, clients_at_once=2) as grid:
        actual, strategy = rounds(grid, app, after=save)
    assert (tmp_path / "mark").exists()
    assert strategy.report.failures == {}
    assert_same(actual, undisturbed())


@pytest.mark.slow
def test_a_grid_that_nobody_saves_saves_itself(machine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_runtime, "SAVE_AFTER", 1)
    app = app_of("die once", str(tmp_path / "mark"), round=4)
    most = []
    with RayGrid(app, actors=1, clients_at_once=2) as grid:
        actual, _ = rounds(grid, app, after=lambda r: most.append(max(len(shard.jobs) for shard in grid.shards)))
        folder = grid._saved_by_grid
        assert folder is not None
        assert list(Path(folder.name).iterdir())
    assert max(most) <= 2
    assert not Path(folder.name).exists()
    assert_same(actual, undisturbed())


@pytest.mark.slow
def test_actors_that_always_die_end_the_run_with_a_sentence(
    machine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_runtime, "DEATHS", 1)
    app = app_of("die", str(tmp_path / "mark"), round=1)
    with (
        RayGrid(app, actors=1, clients_at_once=2) as grid,
        pytest.raises(TrainingError, match="2 Ray actors in a row died"),
    ):
        rounds(grid, app)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "reason"), [("raise", "RuntimeError: out of luck"), ("nan", "not finite"), ("sleep", "no reply")]
)
def test_a_client_that_fails_is_left_out_and_named(machine: None, fault: str, reason: str) -> None:
    app = app_of(fault, round=1, client=0)
    strategy = Faulty(seed=3)
    strategy.begin()
    with RayGrid(app, actors=2 if fault == "sleep" else 1, cpus_per_actor=0.5, clients_at_once=1) as grid:
        folding = strategy.folding(grid)
        messages = strategy.configure_train(1, app.initial_arrays(), flower.ConfigRecord(), folding)
        timeout = 1.5 if fault == "sleep" else None
        strategy.aggregate_train(1, folding.send_and_receive(messages, timeout=timeout))
        # whoever shares an actor with a client that sleeps is late too
        late = next(list(shard.clients) for shard in grid.shards if 0 in shard.clients)
        assert list(strategy.report.failures) == (late if fault == "sleep" else [0])
        assert reason in strategy.report.failures[0]
        # and it is there again in the next round
        messages = strategy.configure_train(2, app.initial_arrays(), flower.ConfigRecord(), folding)
        strategy.aggregate_train(2, folding.send_and_receive(messages))
        assert strategy.report.failures == {}


def flat(grid: Any) -> Values:
    """Personal state of every client that has any, by client and name."""
    flattened = {}
    for clients, states in grid.blocks():
        for k, client in enumerate(clients.tolist()):
            flattened.update({f"{client}/{name}": value[k].clone() for name, value in leaves(states).items()})
    return flattened


def killed(grid: RayGrid, place: int = 0) -> None:
    """Let an actor die as a crash would."""
    ray.kill(grid.shards[place].actor.remote)


@pytest.mark.slow
def test_messages_are_computed_again_as_they_were(machine: None) -> None:
    """Also where each client is sent something else, and where one config serves all rounds, as in Flower's loop."""
    results = []
    for on_ray in (False, True):
        strategy, app = halves("fedjets", torch.float64)
        strategy.begin()
        grid: Any = (
            RayGrid(app, actors=1, clients_at_once=3) if on_ray else LocalGrid(app, 7, clients_at_once=3, workers=1)
        )
        folding = strategy.folding(grid)
        arrays, config = app.initial_arrays(), flower.ConfigRecord()
        for r in range(1, 5):
            if r == 4 and on_ray:
                killed(grid)
            messages = strategy.configure_train(r, arrays, config, folding)
            new, _ = strategy.aggregate_train(r, folding.send_and_receive(messages))
            assert new is not None
            arrays = new
        values = {f"server/{n}": v.clone() for n, v in leaves(from_record(arrays)).items()}
        for role, tensors in strategy.state.items():
            values.update({f"{role}/{n}": v.clone() for n, v in leaves(tensors).items()})
        values.update(flat(grid))
        results.append(values)
        grid.close()
    assert_same(results[1], results[0])


@pytest.mark.slow
def test_actors_that_die_after_states_were_loaded_lose_none(pair: RayGrid) -> None:
    app = app_of()
    with LocalGridContext(app) as local:
        rounds(local, app)
        before = flat(local)
        pair.load([(clients.clone(), states.clone()) for clients, states in local.blocks()])
    killed(pair)
    killed(pair, 1)
    assert_same(flat(pair), before)


@pytest.mark.slow
def test_what_was_sent_before_a_save_is_not_computed_twice(machine: None, tmp_path: Path) -> None:
    app = app_of()
    strategy, config = Faulty(seed=3), flower.ConfigRecord()
    strategy.begin()
    with LocalGridContext(app) as local, RayGrid(app, actors=1, clients_at_once=2) as grid:
        strategy.configure_train(1, app.initial_arrays(), config, grid)
        ids = list(grid.push_messages(strategy._training))
        list(local.send_and_receive(strategy._training))
        write_states(tmp_path, grid.blocks())
        grid.saved(tmp_path)
        strategy.configure_train(2, app.initial_arrays(), config, grid)
        more = list(grid.push_messages(strategy._training))
        list(local.send_and_receive(strategy._training))
        killed(grid)
        assert_same(flat(grid), flat(local))
        assert len(list(grid.pull_messages([*ids, *more]))) == 10


@pytest.mark.slow
def test_two_grids_side_by_side(pair: RayGrid) -> None:
    app = app_of()
    with RayGrid(app, actors=1, clients_at_once=2) as other:
        first, _ = rounds(other, app, 2)
    second, _ = rounds(pair, app, 2)
    assert_same(first, second)


@pytest.mark.slow
def test_saved_state_that_is_gone_ends_the_run_with_a_sentence(machine: None, tmp_path: Path) -> None:
    app = app_of()
    with RayGrid(app, actors=1, clients_at_once=2) as grid:
        rounds(grid, app, 1)
        grid.saved(tmp_path / "gone")
        killed(grid)
        with pytest.raises(FedpersError, match="gone, which holds personal state, is missing"):
            rounds(grid, app, 1)


# --------------------------------------------------------------------- state


@pytest.mark.slow
def test_state_goes_from_one_grid_to_another(pair: RayGrid) -> None:
    app = app_of()
    rounds(pair, app)
    before = flat(pair)
    blocks = [(clients.clone(), states.clone()) for clients, states in pair.blocks()]
    assert before
    local = LocalGrid(app, 5)
    local.load(blocks)
    assert_same(flat(local), before)
    with RayGrid(app, actors=1, clients_at_once=1) as other:
        other.load(blocks)
        assert_same(flat(other), before)


@pytest.mark.slow
def test_state_beyond_the_budget_lies_in_files(machine: None, tmp_path: Path) -> None:
    app = app_of()
    with RayGrid(app, actors=1, clients_at_once=2, memory=0.0, folder=str(tmp_path)) as grid:
        actual, _ = rounds(grid, app)
        assert list(tmp_path.glob("states-*/*.memmap"))
    assert_same(actual, undisturbed())


# ------------------------------------------------------------------- network


class Backbone(nn.Module):
    """A large frozen body under a small head."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            frozen = nn.Sequential(nn.Linear(6, 20_000), nn.ReLU(), nn.Linear(20_000, 8)).requires_grad_(False)
            self.body = nn.Sequential(frozen, nn.Linear(8, 8))
            self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(x))
        return scores


BACKBONE_BYTES = 8 * (6 * 20_000 + 20_000 + 20_000 * 8 + 8)


def frozen_app() -> CohortApp:
    return FaultyUpdate(training=Training(lr=0.1, batch_size=5)).client_app(Backbone().double(), DATA, seed=3)


def test_moving_an_app_moves_nothing_of_the_one_it_was_made_from() -> None:
    app = frozen_app()
    part = app.restrict([0]).to("meta")
    assert {value.device.type for value in part.module.state_dict().values()} == {"meta"}
    assert {value.device.type for value in app.module.state_dict().values()} == {"cpu"}
    assert part.data.x.is_meta


@pytest.mark.slow
def test_frozen_parameters_travel_once(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def put(value: Any) -> Any:
        packed = pack(value)
        sizes.append(len(packed[0]) + sum(part.nbytes for part in packed[1]))
        return ray.put(packed)

    monkeypatch.setattr(ray_runtime, "put", put)
    app = frozen_app()
    with RayGrid(app, actors=2, clients_at_once=2) as grid:
        Faulty(seed=3).start(grid, app.initial_arrays(), num_rounds=1)
        killed(grid)  # whoever takes its clients over needs no further copy
        actual = flat(grid)
        assert len(grid.shards) == 2
    assert len([size for size in sizes if size > BACKBONE_BYTES]) == 1
    assert len([size for size in sizes if size > BACKBONE_BYTES // 20]) == 1
    local = LocalGrid(app, 5, clients_at_once=2, workers=1)
    Faulty(seed=3).start(local, app.initial_arrays(), num_rounds=1)
    assert "4/model/head.weight" in actual
    assert_same(actual, flat(local))
    local.close()


@pytest.mark.slow
def test_shards_of_an_actor_share_frozen_parameters(machine: None) -> None:
    app, threads = frozen_app(), torch.get_num_threads()
    common, worker = pack(app.restrict(())), Worker()
    try:
        for shard, clients in enumerate(([0, 2], [1, 3, 4])):
            worker.host(shard, common, pack(app.data.restrict(clients)), clients, Choice(2, 1, "given"), 1e9)
        modules = [engine.app.module for engine in worker.shards.values()]
        first, second = ({n: p.data_ptr() for n, p in module.named_parameters()} for module in modules)
        assert {name for name in first if first[name] == second[name]} == {n for n in first if n.startswith("body.0.")}
        assert [engine.app.sizes for engine in worker.shards.values()] == [[20, 0, 13, 0, 0], [0, 9, 0, 7, 28]]
        for name, value in app.module.state_dict().items():
            assert torch.equal(modules[0].state_dict()[name], value)
        stored = {part.__array_interface__["data"][0] for part in common[1]}
        assert not stored & set(first.values())
    finally:
        for engine in worker.shards.values():
            engine.close()
        torch.set_num_threads(threads)


# ------------------------------------------------------------------ settings


@pytest.mark.slow
def test_too_many_actors_are_refused(machine: None) -> None:
    with pytest.raises(ConfigError, match=r"runtime.actors=9: expected at most 5.*5 CPUs"):
        RayGrid(app_of(), actors=9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"cpus_per_actor": 64}, "runtime.cpus_per_actor=64: expected at most 5, the CPUs of the largest node"),
        ({"gpus_per_actor": 0.5}, "runtime.gpus_per_actor=0.5: expected at most 0, the GPUs of the largest node"),
        ({"gpus_per_actor": 1, "cpus_per_actor": 0}, "runtime.gpus_per_actor=1: expected at most 0, the GPUs of the"),
    ],
)
def test_what_no_node_has_room_for_is_named(machine: None, wanted: dict[str, float], sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}.*5 CPUs and 0 GPUs"):
        RayGrid(app_of(), **wanted)


@pytest.mark.slow
def test_other_apps_are_refused(machine: None) -> None:
    with pytest.raises(ConfigError, match=r"client_app=ClientApp"):
        RayGrid(flower_app.client_app(), 3)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_node_that_does_not_exist(pair: RayGrid) -> None:
    with pytest.raises(ValueError, match="node 99 does not exist"):
        pair.push_messages([flower.Message(flower.RecordDict(), 99, "train")])


@pytest.mark.slow
def test_an_address_that_nobody_listens_on() -> None:
    code = "from fedpers.runtime.cluster import connect; connect('127.0.0.1:9')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "runtime.address=127.0.0.1:9: expected the address of a running Ray cluster" in done.stderr


# --------------------------------------------------------------------- dealing


def test_dear_clients_are_dealt_first() -> None:
    assert deal([5.0, 1.0, 4.0, 3.0], 2) == [[0, 1], [2, 3]]
    assert deal([1.0, 1.0, 1.0], 3) == [[0], [1], [2]]


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40), st.integers(1, 8))
def test_dealing_is_fair(expected: list[float], shards: int) -> None:
    shards = min(shards, len(expected))
    dealt = deal(expected, shards)
    assert sorted(c for clients in dealt for c in clients) == list(range(len(expected)))
    assert all(dealt)
    loads = [sum(expected[c] for c in clients) for clients in dealt]
    # greedy: the fullest shard exceeds the emptiest by at most the last client it got
    assert max(loads) - min(loads) <= max(expected) * (1 + 1e-9)


class Summing(Fold):
    """A sum in a tensor that an empty fold holds already; it knows the arrays too."""

    def __init__(self, arrays: Any) -> None:
        self.known = entries(arrays)["body.0.weight"]
        self.total = torch.zeros_like(self.known, dtype=torch.float64)

    def add(self, records: Any, weight: float, client: int) -> None:
        self.total += records["arrays"]["body.0.weight"] - self.known

    def merge(self, other: Any) -> None:
        self.total += other.total

    def result(self) -> Any:
        return {"sum": tree({"body.0.weight": self.total})}


class SummingServer(Faulty):
    """Sums up how the first layers changed."""

    def fold(self) -> Any:
        return Summing(self.sent_arrays)

    def combine(self, arrays: Any, means: Any, clients: list[int]) -> Any:
        self.total = means["sum"]["body.0.weight"].clone()
        return arrays


@pytest.mark.slow
def test_actors_do_not_sum_up_in_memory_that_they_share(pair: RayGrid) -> None:
    app = app_of()
    totals = []
    local = LocalGrid(app, 5, clients_at_once=2, workers=1)
    for grid in (pair, local):
        strategy = SummingServer(seed=3)
        folding, config = strategy.folding(grid), flower.ConfigRecord()
        strategy.begin()
        for r in (1, 2):
            messages = strategy.configure_train(r, app.initial_arrays(), config, folding)
            strategy.aggregate_train(r, folding.send_and_receive(messages))
        totals.append(strategy.total)
    local.close()
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-10, atol=1e-12)
