"""Privacy, robust aggregates and Flower's wrappers around every method: it runs, or one sentence says why not."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import flwr.app as flower
import numpy as np
import pytest
import torch
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedMedian,
    FedTrimmedAvg,
    Krum,
    MultiKrum,
    Strategy,
)
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.supercore.differential_privacy import compute_adaptive_noise_params
from torch import Tensor, nn

import fedpers
from fedpers.cohort import Cohort, Reply, Tree, WeightedMean, entries, leaves, tree
from fedpers.config import Config, build
from fedpers.errors import ConfigError, TrainingError
from fedpers.randomness import generator
from fedpers.run import run, run_rounds
from fedpers.runtime.flower_private import server_identity
from fedpers.runtime.grid import FIRST_NODE
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import STRATEGIES, CohortApp, FedAvg, FedAvgUpdate, PersonalizedStrategy, make_strategy
from fedpers.strategies.client import Outcome
from fedpers.strategies.intake import Intake
from fedpers.strategies.records import ARRAYS, METRICS, from_record, to_record
from fedpers.strategies.wrappers import Aggregated, Aggregation, Privacy
from tests.cohort.helpers import assert_same
from tests.problems import Problem, SmallNetwork, problem

MORE = ("scaffold", "fedrap", "fedmf", "fedselect", "fedjets", "ensemble", "pfedpg")
"""Methods whose aggregate is more than a mean of the server's arrays."""
NOTHING = ("local", "no_learning", "pretrained", "head_only")
"""Methods whose clients send nothing."""
PLAIN = [method for method in STRATEGIES if method not in (*MORE, *NOTHING)]
CLIP = Privacy(noise=0.0, norm=0.3)

Wrapper = type[
    DifferentialPrivacyServerSideFixedClipping
    | DifferentialPrivacyServerSideAdaptiveClipping
    | DifferentialPrivacyClientSideFixedClipping
    | DifferentialPrivacyClientSideAdaptiveClipping
]
WRAPPERS: dict[Wrapper, list[Any]] = {
    DifferentialPrivacyServerSideFixedClipping: [],
    DifferentialPrivacyServerSideAdaptiveClipping: [],
    DifferentialPrivacyClientSideFixedClipping: [fixedclipping_mod],
    DifferentialPrivacyClientSideAdaptiveClipping: [adaptiveclipping_mod],
}
"""Flower's wrappers and the mods they need."""


def given(method: str) -> Problem:
    """The small problem of a method, without batch statistics unless they are personal."""
    found = problem(method)
    if isinstance(found.network, SmallNetwork) and method != "fedbn":
        return replace(found, network=SmallNetwork(norm=False))
    return found


def both(
    method: str,
    mods: Sequence[Any] = (),
    *,
    network: nn.Module | None = None,
    weighting: str = "uniform",
    **server: Any,
) -> tuple[PersonalizedStrategy, CohortApp]:
    own = given(method)
    options = {**own.options, "weighting": weighting}
    server = {"seed": 3, "unseen": own.data.unseen, **server}
    strategy, update = make_strategy(method, options, server=server, training=own.training)
    return strategy, update.client_app(network or own.network, own.data, seed=3, mods=mods)


def trained(
    strategy: PersonalizedStrategy, app: CohortApp, *, rounds: int = 2, cohort: int = 3
) -> tuple[dict[str, Tensor], LocalGrid]:
    """Arrays after some rounds of our own loop."""
    grid = LocalGrid(app, app.data.num_clients, cohort=cohort, workers=1)
    with server_identity(1):
        for report in run_rounds(strategy, grid, app.initial_arrays(), rounds):
            assert not report.failures
            assert not report.evaluation_failures
    assert strategy.report.clients
    grid.close()
    return dict(entries(_next(strategy))), grid


def _next(strategy: PersonalizedStrategy) -> Tree:
    """Arrays that the last evaluation was sent."""
    assert strategy.evaluated is not None  # type: ignore[attr-defined]
    found: Tree = strategy.evaluated  # type: ignore[attr-defined]
    return found


@pytest.fixture(autouse=True)
def _keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the arrays of the last evaluation, which a rounds loop does not give away."""
    addressed = PersonalizedStrategy.evaluation_messages

    def keeping(self: Any, round: int, arrays: flower.ArrayRecord, *rest: Any) -> list[flower.Message]:
        self.evaluated = from_record(arrays)
        return addressed(self, round, arrays, *rest)

    monkeypatch.setattr(PersonalizedStrategy, "evaluation_messages", keeping)


def finite(values: Mapping[str, Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in values.values())


# ------------------------------------------------------------- every method


ADDITIONS: dict[str, dict[str, Any]] = {
    "fixed": {"privacy": Privacy(noise=0.1, norm=0.3)},
    "adaptive": {"privacy": Privacy(name="adaptive", noise=0.1, norm=0.3)},
    "krum": {"aggregator": Krum(num_malicious_nodes=1)},
    "median": {"aggregator": FedMedian()},
    "trimmed mean": {"aggregator": FedTrimmedAvg(beta=0.2)},
}


@pytest.mark.parametrize("addition", ADDITIONS)
@pytest.mark.parametrize("method", STRATEGIES)
def test_every_method_runs_or_is_refused(method: str, addition: str) -> None:
    if method in MORE:
        with pytest.raises(ConfigError) as caught:
            both(method, **ADDITIONS[addition])
        name = STRATEGIES[method].__name__
        what = "privacy=" if "privacy" in ADDITIONS[addition] else "aggregation="
        assert str(caught.value).startswith(what)
        assert str(caught.value).endswith(f" for {name}, whose aggregate is more than a mean of the server's arrays.")
        return
    strategy, app = both(method, **ADDITIONS[addition])
    arrays, _ = trained(strategy, app)
    assert finite(arrays)
    plain, app = both(method)
    usual, _ = trained(plain, app)
    assert usual.keys() == arrays.keys()
    for name, value in usual.items():
        assert value.shape == arrays[name].shape
        assert value.dtype == arrays[name].dtype
    moved = any(not torch.equal(value, arrays[name]) for name, value in usual.items())
    assert moved == (method not in NOTHING)


def wrapped(wrapper: Wrapper, strategy: Strategy, noise: float = 0.1) -> Strategy:
    if wrapper in (DifferentialPrivacyServerSideFixedClipping, DifferentialPrivacyClientSideFixedClipping):
        return wrapper(strategy, noise, 0.3, 7)
    return wrapper(strategy, noise, 7, initial_clipping_norm=0.3)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("method", STRATEGIES)
def test_flowers_wrappers_work_or_are_refused(method: str, wrapper: Wrapper) -> None:
    strategy, app = both(method, WRAPPERS[wrapper])
    results: list[Any] = []
    server = ServerApp()

    @server.main()
    def main(grid: Any, context: flower.Context) -> None:
        results.append(wrapped(wrapper, strategy).start(grid, app.initial_arrays(), num_rounds=2))

    client_side = bool(WRAPPERS[wrapper])
    refused = {
        **dict.fromkeys(MORE, "more than a mean of the server's arrays."),
        **dict.fromkeys(NOTHING, "whose clients send nothing."),
        **(
            {"gpfl": "a ServerSide one around GPFL, which sends its clients more than its arrays."}
            if client_side
            else {}
        ),
    }
    if method in refused:
        with pytest.raises(ConfigError) as caught:
            fedpers.simulate(server, app, app.data.num_clients, cohort=3, workers=1)
        assert str(caught.value).startswith(f"wrapper={wrapper.__name__}: expected ")
        assert str(caught.value).endswith(refused[method])
        assert strategy.report.round == 0  # before anybody was asked for anything
        return
    fedpers.simulate(server, app, app.data.num_clients, cohort=3, workers=1)
    (result,) = results
    assert finite(entries(from_record(result.arrays)))
    assert list(result.train_metrics_clientapp) == [1, 2]
    assert list(result.evaluate_metrics_clientapp) == [1, 2]
    assert not strategy.report.failures
    assert not strategy.report.evaluation_failures
    assert len(strategy.report.clients) == app.data.num_clients - len(app.data.unseen)


@pytest.mark.parametrize("method", PLAIN)
def test_ours_and_both_of_flowers_clip_alike(method: str) -> None:
    """Flower pairs arrays by their order, so this also says that replies keep the server's."""
    ours, app = both(method, privacy=CLIP)
    expected, kept = trained(ours, app)
    for wrapper in (DifferentialPrivacyServerSideFixedClipping, DifferentialPrivacyClientSideFixedClipping):
        if method == "gpfl" and WRAPPERS[wrapper]:
            continue
        strategy, app = both(method, WRAPPERS[wrapper])
        grid = LocalGrid(app, app.data.num_clients, cohort=3, workers=1)
        with server_identity(1):
            result = wrapped(wrapper, strategy, noise=0.0).start(grid, app.initial_arrays(), num_rounds=2)
        assert_same(entries(from_record(result.arrays)), expected)
        if grid.engine is not None:  # nothing that a wrapper did to a reply is seen in the clients' own state
            seen = sorted(set(range(app.data.num_clients)) - set(app.data.unseen))  # the others adapted at the end
            mine, theirs = (g.engine.store.gather(seen) for g in (kept, grid))  # type: ignore[union-attr]
            assert_same(leaves(theirs), leaves(mine))


@pytest.mark.parametrize("method", ["fedavg", "fedrep", "ditto", "pfedme", "apfl"])
def test_clipping_leaves_personal_state_alone(method: str) -> None:
    states = []
    for privacy in (None, Privacy(noise=1.0, norm=1e-3)):
        strategy, app = both(method, privacy=privacy)
        _, grid = trained(strategy, app, rounds=1)
        assert grid.engine is not None
        states.append(grid.engine.store.gather(range(app.data.num_clients)))
    before, after = (leaves(state) for state in states)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


# ------------------------------------------------------------------ privacy


@dataclass(kw_only=True)
class FarUpdate(FedAvgUpdate):
    """Client k moves every entry by ``0.1 * k``."""

    def train(self, cohort: Cohort, received: Mapping[str, Tree], config: Mapping[str, Any]) -> Reply:
        params = cohort.assemble(received[ARRAYS])
        steps = torch.tensor(cohort.clients, dtype=torch.float32) * 0.1
        moved = {n: v + steps.view(-1, *[1] * (v.dim() - 1)) for n, v in entries(params).items()}
        return cohort.reply(tree(moved, cohort.size))


@dataclass(kw_only=True)
class Far(FedAvg):
    update = FarUpdate


def far(**settings: Any) -> tuple[Far, CohortApp]:
    own = given("fedavg")
    return Far(weighting="uniform", seed=5, **settings), FarUpdate().client_app(own.network, own.data, seed=5)


def test_changes_are_clipped_as_calculated_by_hand() -> None:
    strategy, app = far(privacy=Privacy(noise=0.0, norm=2.0))
    before = entries(from_record(app.initial_arrays()))
    after, _ = trained(strategy, app, rounds=1)
    size = sum(value.numel() for value in before.values())
    lengths = [0.1 * k * math.sqrt(size) for k in range(7)]  # client 0 does not move at all
    shift = sum(0.1 * k * min(1.0, 2.0 / length) for k, length in enumerate(lengths) if k) / 7
    assert 0 < sum(length > 2.0 for length in lengths) < 6
    for name, value in before.items():
        torch.testing.assert_close(after[name], value + shift)


def test_noise_has_the_size_that_hides_one_client() -> None:
    means = {ARRAYS: tree({"w": torch.zeros(200, 300, dtype=torch.float64)})}
    noisy = Privacy(noise=2.0, norm=0.7).blur(means, 0.7, sampled=9, replies=5, seed=0, round=1)[ARRAYS]["w"]
    assert float(noisy.std()) == pytest.approx(2.0 * 0.7 / 5, rel=0.01)
    assert abs(float(noisy.mean())) < 5 * 2.0 * 0.7 / 5 / math.sqrt(60_000)


def test_noise_follows_from_the_seed_alone() -> None:
    found = []
    for cohort, numpy_seed, seed in ((1, 0, 3), (7, 1, 3), (7, 1, 4)):
        np.random.seed(numpy_seed)  # noqa: NPY002
        state = np.random.get_state()[1].copy()  # type: ignore[union-attr, index]  # noqa: NPY002
        strategy, app = both("fedavg", privacy=Privacy(noise=1.0, norm=1.0), seed=seed)
        arrays, _ = trained(strategy, app, cohort=cohort)
        assert (np.random.get_state()[1] == state).all()  # type: ignore[index]  # noqa: NPY002
        found.append(arrays)
    assert_same(found[0], found[1])
    assert any(not torch.allclose(value, found[2][name]) for name, value in found[0].items())
    rounds = [generator(3, "privacy-noise", r).normal() for r in (1, 2)]
    assert rounds[0] != rounds[1]


def test_an_adaptive_norm_finds_the_quantile() -> None:
    strategy, app = far(privacy=Privacy(name="adaptive", noise=0.0, norm=30.0, norm_lr=0.5))
    norms = []
    grid = LocalGrid(app, 7, cohort=7, workers=1)
    with server_identity(1):
        for report in run_rounds(strategy, grid, app.initial_arrays(), 30):
            norms += [report.extra["clipping_norm"]] if report.round else []
    size = sum(value.numel() for value in entries(app.template).values())
    lengths = [0.1 * k * math.sqrt(size) for k in range(7)]
    assert norms[0] == 30.0
    assert norms[1] == pytest.approx(30.0 * math.exp(-0.5 * (1.0 - 0.5)))  # all are within
    assert lengths[2] < norms[-1] < lengths[4]  # half of the clients are within
    assert float(strategy.state["privacy"]["norm"]) == pytest.approx(norms[-1], rel=0.1)


def test_the_adaptive_norm_is_part_of_the_servers_state() -> None:
    def strategy_and_app() -> tuple[Far, CohortApp]:
        return far(privacy=Privacy(name="adaptive", noise=0.2, norm=0.5))

    strategy, app = strategy_and_app()
    expected, _ = trained(strategy, app, rounds=3)
    first, app = strategy_and_app()
    arrays, _ = trained(first, app, rounds=2)
    second, app = strategy_and_app()
    second.state = copy.deepcopy(first.state)
    grid = LocalGrid(app, 7, cohort=7, workers=1)
    record = to_record(tree(arrays))
    with server_identity(1):
        messages = second.configure_train(3, record, flower.ConfigRecord(), grid)
        resumed, _ = second.aggregate_train(3, grid.send_and_receive(messages))
    assert resumed is not None
    assert_same(entries(from_record(resumed)), expected)
    assert float(second.state["privacy"]["norm"]) == float(strategy.state["privacy"]["norm"])


@pytest.mark.parametrize(("noise", "count"), [(0.5, None), (0.5, 2.0), (1.9, 1.0), (0.0, None), (0.0, 3.0)])
def test_noise_is_divided_between_mean_and_count_as_flower_does(noise: float, count: float | None) -> None:
    expected = compute_adaptive_noise_params(noise, 40, count)
    multiplier, deviation = Privacy(name="adaptive", noise=noise, count_noise=count).noises(40)
    assert (deviation, multiplier) == pytest.approx(expected)


def test_a_failed_client_does_not_end_a_private_round() -> None:
    strategy, app = far(privacy=Privacy(noise=0.0, norm=100.0))
    grid = LocalGrid(app, 7, cohort=7, workers=1)
    before = entries(from_record(app.initial_arrays()))
    with server_identity(1):
        messages = list(strategy.configure_train(1, app.initial_arrays(), flower.ConfigRecord(), grid))
        replies = list(grid.send_and_receive(messages))
        replies[6] = flower.Message(flower.Error(1, "ended"), reply_to=messages[6])
        arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    assert strategy.report.failures == {6: "ended"}
    for name, value in entries(from_record(arrays)).items():
        torch.testing.assert_close(value, before[name] + 0.1 * (0 + 1 + 2 + 3 + 4 + 5) / 6)


def test_private_replies_may_be_folded_elsewhere() -> None:
    strategy, app = far(privacy=Privacy(name="adaptive", noise=0.0, norm=1.0))
    strategy.state = {"privacy": tree({"norm": torch.tensor(0.4, dtype=torch.float64)})}
    grid = LocalGrid(app, 7, cohort=7, workers=1)
    with server_identity(1):
        messages = list(strategy.configure_train(1, app.initial_arrays(), flower.ConfigRecord(), grid))
        outcomes = {k: Outcome(r.content) for k, r in enumerate(grid.send_and_receive(messages))}
    here = Intake(strategy)
    here.take(outcomes)
    parts = []
    for clients in ((0, 3, 5), (1, 2, 4, 6)):
        away = Intake(pickle.loads(pickle.dumps(strategy.to_fold_elsewhere())))
        away.take({client: outcomes[client] for client in clients})
        parts.append(pickle.loads(pickle.dumps(away)))
    merged = Intake(strategy)
    merged.merge(parts)
    assert merged.good == here.good
    assert sum(metrics["clipped"] for metrics in merged.good.values()) == 6
    assert_same(entries(merged.fold.result()[ARRAYS]), entries(here.fold.result()[ARRAYS]))


def test_a_method_that_sends_more_than_it_says_is_not_let_through() -> None:
    class Telling(FarUpdate):
        def train(self, cohort: Cohort, received: Mapping[str, Tree], config: Mapping[str, Any]) -> Reply:
            reply = super().train(cohort, received, config)
            return Reply({**reply.records, "secret": reply.records[ARRAYS]}, reply.state)

    own = given("fedavg")
    app = Telling().client_app(own.network, own.data)
    strategy = Far(weighting="uniform", privacy=CLIP)
    with server_identity(1), pytest.raises(TrainingError, match=r"'secret/body\.0\.bias' is in its reply"):
        list(run_rounds(strategy, LocalGrid(app, 7, cohort=7, workers=1), app.initial_arrays(), 1))


BAD_PRIVACY: list[tuple[str, Any]] = [
    ("noise", -0.1), ("noise", math.inf), ("noise", math.nan), ("norm", 0.0), ("norm", math.inf), ("quantile", 1.1),
    ("quantile", -0.1), ("norm_lr", 0.0), ("count_noise", -1.0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_PRIVACY)
def test_privacy_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^privacy.{name}={value}: expected a number"):
        Privacy(**{name: value})


def test_an_unknown_privacy() -> None:
    with pytest.raises(
        ConfigError, match=r"^privacy=fixd: expected one of adaptive, fixed, none \(did you mean 'fixed'"
    ):
        Privacy(name="fixd")


def test_what_privacy_does_not_go_with() -> None:
    with pytest.raises(ConfigError) as weights:
        both("fedavg", weighting="samples", privacy=CLIP)
    assert str(weights.value) == (
        "strategy.weighting=samples: expected uniform with privacy, whose noise is sized for clients of equal weight."
    )
    with pytest.raises(ConfigError) as robust:
        both("fedavg", privacy=CLIP, aggregator=FedMedian())
    assert str(robust.value) == "aggregation=FedMedian: expected mean with privacy, whose noise is sized for a mean."
    strategy, app = both("fedavg", network=SmallNetwork(), privacy=CLIP)
    with server_identity(1), pytest.raises(ConfigError) as counts:
        strategy.configure_train(1, app.initial_arrays(), flower.ConfigRecord(), LocalGrid(app, 7))
    assert str(counts.value) == (
        "privacy=fixed with 'body.1.num_batches_tracked' of int64: expected a network whose shared entries are no "
        "batch statistics: another one, or strategy=fedbn."
    )
    strategy, app = both("fedavg", privacy=Privacy(name="adaptive", noise=1.0))
    with server_identity(1), pytest.raises(ConfigError) as much:
        strategy.configure_train(1, app.initial_arrays(), flower.ConfigRecord(), LocalGrid(app, 7))
    assert str(much.value) == (
        "privacy.noise=1.0: expected a number < 0.7, twice privacy.count_noise (default: a twentieth of the sampled "
        "clients)."
    )


def refused(strategy: PersonalizedStrategy, app: CohortApp) -> str:
    """What Flower's wrapper around a strategy ends in."""
    outer = DifferentialPrivacyServerSideFixedClipping(strategy, 0.1, 1.0, 7)
    with server_identity(1), pytest.raises(ConfigError) as caught:
        outer.start(LocalGrid(app, 7, cohort=7, workers=1), app.initial_arrays(), num_rounds=1)
    return str(caught.value)


class OneNumber(SmallNetwork):
    """A network with a parameter that has no dimension, which Flower's clipping (flwr 1.41) passes by."""

    def __init__(self) -> None:
        super().__init__(norm=False)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


def test_what_flowers_wrappers_do_not_go_with() -> None:
    name = "DifferentialPrivacyServerSideFixedClipping"
    assert refused(*both("fedavg", privacy=CLIP)) == (
        f"wrapper={name}: expected none around a FedAvg that has privacy of its own."
    )
    assert refused(*both("fedavg", weighting="samples")).startswith(
        "strategy.weighting=samples: expected uniform with "
    )
    assert refused(*both("fedavg", aggregator=FedMedian())).startswith("aggregation=FedMedian: expected mean with ")
    assert refused(*both("fedavg", network=SmallNetwork())).startswith(
        f"privacy={name} with 'body.1.num_batches_tracked' of int64: expected a network whose shared entries are no "
    )
    assert refused(*both("fedavg", network=OneNumber())) == (
        f"wrapper={name}: expected none around arrays like 'scale', a single number, which it does not clip."
    )


def test_a_wrapper_that_is_not_calling_matters_to_nobody() -> None:
    strategy, app = both("scaffold")
    DifferentialPrivacyServerSideFixedClipping(strategy, 0.1, 1.0, 7)
    assert finite(trained(strategy, app)[0])


# --------------------------------------------------------- robust aggregates


def kept(aggregator: Strategy, rows: Sequence[Tensor], weights: Sequence[float], start: Tensor) -> Tensor:
    """Aggregate of clients that sent these values."""
    fold = Aggregated(aggregator, tree({"w": start}), 1)
    parts = [Aggregated(aggregator, tree({"w": start}), 1) for _ in range(2)]
    with server_identity(1):
        for client, (row, weight) in enumerate(zip(rows, weights, strict=True)):
            parts[client % 2].add({ARRAYS: tree({"w": row})}, weight, client)
        for part in parts:
            fold.merge(part)
        found: Tensor = fold.result()[ARRAYS]["w"]
    return found


def test_median_trimmed_mean_and_krum_by_hand() -> None:
    start = torch.tensor([10.0, 20.0])
    rows = [start + torch.tensor(change) for change in ([1.0, 5.0], [2.0, 1.0], [9.0, 3.0], [3.0, 4.0], [-50.0, 2.0])]
    weights = [1.0, 100.0, 1.0, 1.0, 1.0]  # which none of the three knows
    torch.testing.assert_close(kept(FedMedian(), rows, weights, start), start + torch.tensor([2.0, 3.0]))
    trimmed = kept(FedTrimmedAvg(beta=0.2), rows, weights, start)
    torch.testing.assert_close(trimmed, start + torch.tensor([(1 + 2 + 3) / 3, (2 + 3 + 4) / 3]))
    # squared distances to the two nearest others: 17 + 5, 17 + 10, 37 + 50, 5 + 10, far
    torch.testing.assert_close(kept(Krum(num_malicious_nodes=1), rows, weights, start), rows[3])


def test_distances_between_small_changes_of_large_arrays() -> None:
    start = torch.full((1000,), 100.0)
    rng = torch.Generator().manual_seed(0)
    rows = [start + 1e-3 * torch.randn(1000, generator=rng) for _ in range(6)] + [start + 4e-3]
    found = kept(Krum(num_malicious_nodes=1), rows, [1.0] * 7, start)
    assert any(torch.equal(found, row) for row in rows[:6])


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_flowers_mean_is_our_mean(weighting: str) -> None:
    ours, app = both("fedavg", weighting=weighting)
    expected, _ = trained(ours, app)
    theirs, app = both("fedavg", weighting=weighting, aggregator=FlowerFedAvg())
    found, _ = trained(theirs, app)
    assert_same(found, expected)


@pytest.mark.parametrize(
    "aggregator",
    [
        Krum(num_malicious_nodes=1),
        MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3),
        Bulyan(num_malicious_nodes=1),
        FedMedian(),
        FedTrimmedAvg(beta=0.2),
    ],
    ids=lambda aggregator: type(aggregator).__name__,
)  # fmt: skip
def test_one_poisoned_client_of_seven_does_not_move_the_result(aggregator: Strategy) -> None:
    strategy, app = both("fedavg", network=SmallNetwork(), aggregator=aggregator)
    grid = LocalGrid(app, 7, cohort=7, workers=1)
    start = app.initial_arrays()
    with server_identity(1):
        messages = list(strategy.configure_train(1, start, flower.ConfigRecord(), grid))
        replies = list(grid.send_and_receive(messages))
        honest = [
            entries(from_record(reply.content.array_records[ARRAYS])) for k, reply in enumerate(replies) if k != 2
        ]
        poison = {n: v * -1e6 if v.is_floating_point() else v + 10**9 for n, v in entries(from_record(start)).items()}
        bad = flower.RecordDict(
            {ARRAYS: to_record(tree(poison)), METRICS: flower.MetricRecord({"num-examples": 10**9, "samples": 1})}
        )
        replies[2] = flower.Message(bad, reply_to=messages[2])
        arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    assert not strategy.report.failures
    for name, value in entries(from_record(arrays)).items():
        rows = torch.stack([own[name] for own in honest])
        assert value.dtype == rows.dtype
        low, high = rows.min(0).values, rows.max(0).values
        slack = 1e-5 if value.is_floating_point() else 0
        assert bool((value >= low - slack).all())
        assert bool((value <= high + slack).all())
    plain = WeightedMean()
    for values in (*honest, poison):
        plain.add({ARRAYS: tree(values)}, 1.0)
    assert float(plain.result()[ARRAYS]["head.bias"].abs().max()) > 1e4  # what a mean would be


def test_replies_are_not_folded_before_they_are_aggregated() -> None:
    strategy, app = both("fedavg", aggregator=FedMedian())
    grid = LocalGrid(app, 7)
    assert strategy.folding(grid) is grid
    plain, _ = both("fedavg")
    assert plain.folding(grid) is not grid  # type: ignore[comparison-overlap]


class Raising(FlowerFedAvg):
    """An aggregation strategy that goes wrong."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        if self.kind == "raises":
            raise ValueError("too few\nlayers.")
        if self.kind == "other":
            return flower.ArrayRecord([np.zeros(3)]), None
        return super().aggregate_train(server_round, [])


@pytest.mark.parametrize(
    ("aggregator", "sentence"),
    [
        (Bulyan(num_malicious_nodes=2), "round 1: Bulyan made nothing of 7 replies."),
        (Raising("nothing"), "round 1: Raising made nothing of 7 replies."),
        (Raising("raises"), "round 1: Raising cannot aggregate 7 replies: too few layers."),
        (Raising("other"), "round 1: Raising gave no 'body.0.weight' of shape [8, 6]."),
    ],
)
def test_an_aggregator_that_fails(aggregator: Strategy, sentence: str) -> None:
    strategy, app = both("fedavg", aggregator=aggregator)
    with server_identity(1), pytest.raises(TrainingError) as caught:
        list(run_rounds(strategy, LocalGrid(app, 7, cohort=7, workers=1), app.initial_arrays(), 1))
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    "aggregator",
    [FedAdam(), FedAvg(), "krum", DifferentialPrivacyServerSideFixedClipping(FlowerFedAvg(), 0.1, 1.0, 7)],
    ids=lambda aggregator: type(aggregator).__name__,
)
def test_aggregators_that_need_more_than_replies(aggregator: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        both("fedavg", aggregator=aggregator)
    name = type(aggregator).__name__
    assert str(caught.value) == (
        f"aggregation={name}: expected a Flower strategy that needs replies and nothing else, such as Krum."
    )


# -------------------------------------------------------------- the settings


@pytest.mark.parametrize(
    ("values", "sampled", "sentence"),
    [
        ({"name": "medan"}, 9, "aggregation=medan: expected one of krum, mean, median, trimmed_mean (did you mean"),
        ({"name": "krum", "malicious": -1}, 9, "aggregation.malicious=-1: expected a whole number >= 0."),
        ({"name": "krum", "malicious": 4}, 9, "aggregation.malicious=4: expected a whole number <= 3, for Krum"),
        ({"name": "krum", "malicious": 0}, 2, "aggregation.malicious=0: expected aggregation=mean or median: Krum "),
        ({"name": "trimmed_mean", "share": 0.5}, 9, "aggregation.share=0.5: expected a number > 0 and < 0.5."),
        ({"name": "trimmed_mean", "share": 0.1}, 9, "aggregation.share=0.1: expected a number >= 0.111111, so that"),
        ({"name": "trimmed_mean", "share": 1e-12}, 9, "aggregation.share=1e-12: expected a number >= 0.111111, so"),
        ({"name": "trimmed_mean", "share": 0.4}, 2, "aggregation.share=0.4: expected aggregation=mean or median: a "),
    ],
)  # fmt: skip
def test_aggregation_out_of_range(values: dict[str, Any], sampled: int, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Aggregation(**values).replies(sampled)
    assert str(caught.value).startswith(sentence)


def test_an_aggregate_needs_so_many_replies() -> None:
    assert Aggregation(name="krum", malicious=2).replies(20) == 7
    assert Aggregation(name="trimmed_mean", share=0.3).replies(20) == 4
    assert Aggregation(name="median").replies(1) == 1
    assert Aggregation().strategy() is None


def settings(**values: Any) -> Config:
    plain = {
        "strategy": {"name": "fedrep", "weighting": "uniform"},
        "partition": {"num_clients": 8, "alpha": 1.0},
        "rounds": 2,
        "runtime": {"device": "cpu", "cohort": 8, "workers": 1},
        **values,
    }
    return build(Config, plain)


@pytest.mark.parametrize(
    "values",
    [
        {"privacy": {"name": "fixed", "noise": 0.5, "norm": 2.0}},
        {"privacy": {"name": "adaptive", "noise": 0.5, "norm": 2.0}},
        {"aggregation": {"name": "krum", "malicious": 2}},
        {"aggregation": {"name": "median"}},
        {"aggregation": {"name": "trimmed_mean", "share": 0.2}},
    ],
    ids=lambda values: json.dumps(values),
)
def test_a_run_with_each_setting_is_another_run(values: dict[str, Any], tmp_path: Path) -> None:
    def clients(config: Config, folder: str) -> str:
        summary = run(config, tmp_path / folder)
        assert summary["privacy"] == config.privacy.name
        assert summary["aggregation"] == config.aggregation.name
        assert summary["failures"] == 0
        return json.dumps([summary["selected"], summary["last"]])

    found = clients(settings(**values), "one")
    assert found == clients(build(Config, asdict(settings(**values))), "again")
    assert found != clients(settings(), "plain")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"privacy": {"name": "fixed"}, "strategy": {"name": "fedavg"}}, "strategy.weighting=samples: expected "),
        ({"privacy": {"name": "fixed"}, "model": {"name": "cnn", "norm": "batch"}}, "privacy=fixed with 'body."),
        ({"privacy": {"name": "adaptive", "noise": 1.0}}, "privacy.noise=1.0: expected a number < 0.8, twice "),
        ({"privacy": {"name": "fixed", "clip": 1.0}}, "privacy.clip=1.0: expected a known key: one of "),
        ({"aggregation": {"name": "krum", "malicious": 3}}, "aggregation.malicious=3: expected a whole number <= 2"),
        ({"aggregation": {"name": "median"}, "strategy": {"name": "scaffold"}}, "aggregation=FedMedian: expected "),
    ],
)  # fmt: skip
def test_a_run_is_refused_before_it_has_a_folder(values: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run(settings(**values), tmp_path / "run")
    assert str(caught.value).startswith(sentence)
    assert not (tmp_path / "run").exists()


def test_a_round_with_too_few_replies_for_krum_ends_the_run() -> None:
    strategy, app = both("fedavg", aggregator=Krum(num_malicious_nodes=2), min_replies=7)
    grid = LocalGrid(app, 7, cohort=7, workers=1)
    with server_identity(1):
        messages = list(strategy.configure_train(1, app.initial_arrays(), flower.ConfigRecord(), grid))
        replies = [r for r in grid.send_and_receive(messages) if r.metadata.src_node_id != FIRST_NODE]
    with pytest.raises(TrainingError, match="6 of 7 sampled clients sent a usable reply, 7 needed"):
        strategy.aggregate_train(1, replies)
