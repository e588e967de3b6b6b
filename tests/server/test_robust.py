"""Robust aggregates around every method: they run and resist, or one sentence says why not."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import flwr.app as flower
import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedMedian,
    FedTrimmedAvg,
    Krum,
    MultiKrum,
    Strategy,
)
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from torch import Tensor

from fedpers.cohort import WeightedMean, entries, tree
from fedpers.errors import ConfigError, TrainingError
from fedpers.flower_private import server_identity
from fedpers.records import ARRAYS, METRICS, from_record, to_record
from fedpers.run import run, run_rounds
from fedpers.runtime.grid import FIRST_NODE
from fedpers.runtime.local import LocalGrid
from fedpers.server.postprocessors import Aggregation, Robust
from fedpers.server.postprocessors.robust import KeptReplies
from fedpers.settings import Config, build
from fedpers.strategies import STRATEGIES, FedAvg
from tests.cohort.helpers import assert_same
from tests.problems import SmallNetwork
from tests.server.helpers import both, runs_or_is_refused, settings, trained

ADDITIONS: dict[str, Strategy] = {
    "krum": Krum(num_malicious_nodes=1),
    "median": FedMedian(),
    "trimmed mean": FedTrimmedAvg(beta=0.2),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "name"),
    [(method, name) for method in STRATEGIES for name in ADDITIONS if name == "median" or method in ("fedavg", "gpfl")],
)
def test_every_method_runs_or_is_refused(method: str, name: str) -> None:
    runs_or_is_refused(method, Robust(ADDITIONS[name]), without="mean")


# -------------------------------------------------------------- the aggregates


def aggregate(aggregator: Strategy, rows: Sequence[Tensor], weights: Sequence[float], start: Tensor) -> Tensor:
    """Aggregate of clients that sent these values, folded in two places, one of them far away."""
    robust = Robust(aggregator)
    fold = robust.fold(tree({"w": start}), 1)
    with server_identity(1):
        fold.add_stack({ARRAYS: tree({"w": torch.stack(rows[:2])}, 2)}, torch.tensor(weights[:2]), [0, 1])
        remote = pickle.loads(pickle.dumps(robust.fold(tree({"w": start}), 1)))
        for client in range(2, len(rows)):
            remote.add({ARRAYS: tree({"w": rows[client]})}, weights[client], client)
        part = pickle.loads(pickle.dumps(remote.partial()))
        assert not entries(part.arrays)
        fold.merge(part)
        made: Tensor = fold.result()[ARRAYS]["w"]
    return made


def test_median_trimmed_mean_and_krum_by_hand() -> None:
    start = torch.tensor([10.0, 20.0])
    rows = [start + torch.tensor(change) for change in ([1.0, 5.0], [2.0, 1.0], [9.0, 3.0], [3.0, 4.0], [-50.0, 2.0])]
    weights = [1.0, 100.0, 1.0, 1.0, 1.0]  # which none of the three knows
    torch.testing.assert_close(aggregate(FedMedian(), rows, weights, start), start + torch.tensor([2.0, 3.0]))
    trimmed = aggregate(FedTrimmedAvg(beta=0.2), rows, weights, start)
    torch.testing.assert_close(trimmed, start + torch.tensor([(1 + 2 + 3) / 3, (2 + 3 + 4) / 3]))
    # squared distances to the two nearest others: 17 + 5, 17 + 10, 37 + 50, 5 + 10, far
    torch.testing.assert_close(aggregate(Krum(num_malicious_nodes=1), rows, weights, start), rows[3])


def test_distances_between_small_changes_of_large_arrays() -> None:
    start = torch.full((1000,), 100.0)
    rng = torch.Generator().manual_seed(0)
    rows = [start + 1e-3 * torch.randn(1000, generator=rng) for _ in range(6)] + [start + 4e-3]
    chosen = aggregate(Krum(num_malicious_nodes=1), rows, [1.0] * 7, start)
    assert any(torch.equal(chosen, row) for row in rows[:6])


def test_no_replies_make_no_arrays() -> None:
    fold = Robust(FedMedian()).fold(tree({"w": torch.zeros(2)}), 1)
    assert isinstance(fold, KeptReplies)
    assert fold.result() == {}
    fold.add({}, 1.0, 0)
    assert fold.result() == {}


@pytest.mark.parametrize("weighting", ["samples", "uniform", "inverse_variance"])
def test_flowers_mean_is_our_mean(weighting: str) -> None:
    expected = trained(*both("fedavg", weighting=weighting)).arrays
    made = trained(*both("fedavg", Robust(FlowerFedAvg()), weighting=weighting)).arrays
    assert_same(made, expected)


@pytest.mark.slow
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
    strategy, app = both("fedavg", Robust(aggregator), network=SmallNetwork())
    grid = LocalGrid(app, 7, clients_at_once=7, workers=1)
    start = app.initial_arrays()
    strategy.begin()
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
        rows = torch.stack([values[name] for values in honest])
        assert value.dtype == rows.dtype
        low, high = rows.min(0).values, rows.max(0).values
        slack = 1e-5 if value.is_floating_point() else 0
        assert bool((value >= low - slack).all())
        assert bool((value <= high + slack).all())
    plain = WeightedMean()
    for values in (*honest, poison):
        plain.add({ARRAYS: tree(values)}, 1.0)
    assert float(plain.result()[ARRAYS]["head.bias"].abs().max()) > 1e4  # what a mean would be


# ---------------------------------------------------------------- what goes wrong


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
    strategy, app = both("fedavg", Robust(aggregator))
    with server_identity(1), pytest.raises(TrainingError) as caught:
        list(run_rounds(strategy, LocalGrid(app, 7, clients_at_once=7, workers=1), app.initial_arrays(), 1))
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    "aggregator",
    [FedAdam(), FedAvg(), DifferentialPrivacyServerSideFixedClipping(FlowerFedAvg(), 0.1, 1.0, 7)],
    ids=lambda aggregator: type(aggregator).__name__,
)
def test_aggregators_that_need_more_than_replies(aggregator: Any) -> None:
    strategy, app = both("fedavg", Robust(aggregator))
    with pytest.raises(ConfigError) as caught:
        strategy.check_arrays(from_record(app.initial_arrays()), 7)
    name = type(aggregator).__name__
    assert str(caught.value) == (
        f"aggregation={name}: expected a Flower strategy that needs replies and nothing else, such as Krum."
    )


def test_an_aggregator_that_is_no_strategy() -> None:
    with pytest.raises(ConfigError, match=r"^aggregation\.aggregator=krum: expected a Flower strategy "):
        Robust("krum")  # type: ignore[arg-type]


def test_two_aggregators() -> None:
    strategy, app = both("fedavg", Robust(FedMedian()), Robust(Krum()))
    with pytest.raises(ConfigError, match=r"^postprocessors=\['robust', 'robust'\]: expected one for aggregation at "):
        strategy.check_arrays(from_record(app.initial_arrays()), 7)


def test_a_round_with_too_few_replies_for_krum_ends_the_run() -> None:
    strategy, app = both("fedavg", Robust(Krum(num_malicious_nodes=2)), min_replies=7)
    grid = LocalGrid(app, 7, clients_at_once=7, workers=1)
    strategy.begin()
    with server_identity(1):
        messages = list(strategy.configure_train(1, app.initial_arrays(), flower.ConfigRecord(), grid))
        replies = [r for r in grid.send_and_receive(messages) if r.metadata.src_node_id != FIRST_NODE]
    with pytest.raises(TrainingError, match="6 of 7 sampled clients sent a usable reply, 7 needed"):
        strategy.aggregate_train(1, replies)


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
    assert Robust.of(Aggregation()) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {"aggregation": {"name": "krum", "malicious": 2}},
        {"aggregation": {"name": "median"}},
        {"aggregation": {"name": "trimmed_mean", "share": 0.2}},
    ],
    ids=lambda values: json.dumps(values),
)
def test_a_run_with_each_setting_is_another_run(values: dict[str, Any], tmp_path: Path) -> None:
    def clients(config: Config, folder: str) -> str:
        summary = run(config, tmp_path / folder)
        assert summary["aggregation"] == config.aggregation.name
        assert summary["failures"] == 0
        return json.dumps([summary["selected"], summary["last"]])

    robust = clients(settings(**values), "one")
    assert robust == clients(build(Config, asdict(settings(**values))), "again")
    assert robust != clients(settings(), "plain")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"aggregation": {"name": "krum", "malicious": 3}}, "aggregation.malicious=3: expected a whole number <= 2"),
        ({"aggregation": {"name": "median"}, "strategy": {"name": "scaffold"}}, "aggregation=FedMedian: expected "),
    ],
)  # fmt: skip
def test_a_run_is_refused_before_it_has_a_folder(values: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run(settings(**values), tmp_path / "run")
    assert str(caught.value).startswith(sentence)
    assert not (tmp_path / "run").exists()
