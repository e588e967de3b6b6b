"""Clipping and noise around every method: it runs, or one sentence says why not."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import flwr.app as flower
import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedMedian
from flwr.supercore.differential_privacy import compute_adaptive_noise_params

from fedpers.client.results import ClientResult
from fedpers.cohort import Cohort, Reply, Tree, WeightedMean, entries, leaves, tree
from fedpers.cohort.tree import expand_rows
from fedpers.errors import ConfigError, TrainingError
from fedpers.flower_private import server_identity
from fedpers.randomness import generator
from fedpers.records import ARRAYS, from_record, to_record
from fedpers.run import run, run_rounds
from fedpers.runtime.local import LocalGrid
from fedpers.server.collect import ReplyCollector, ReplyRules, result_of, schema_of
from fedpers.server.postprocessors import Privacy, Robust
from fedpers.server.postprocessors.accounting import epsilon
from fedpers.server.postprocessors.privacy import CLIPPED, SystemNoise
from fedpers.settings import Config, build
from fedpers.strategies import STRATEGIES
from tests.cohort.helpers import assert_same
from tests.problems import SmallNetwork
from tests.server.helpers import (
    MORE,
    NOTHING,
    Far,
    FarUpdate,
    both,
    far,
    given,
    runs_or_is_refused,
    settings,
    stack,
    trained,
)


def test_methods_by_what_their_clients_answer() -> None:
    assert set(MORE) >= {"scaffold", "feddyn", "fedrap", "fedmf", "fedselect", "fedjets", "ensemble", "pfedpg"}
    assert not set(MORE) & {"fedavg", "fedrep", "fedbn", "ditto", "pfedme", "apfl", "gpfl", "fedvpt", *NOTHING}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "name"), [*((method, "fixed") for method in STRATEGIES), ("fedavg", "adaptive"), ("gpfl", "adaptive")]
)
def test_every_method_runs_or_is_refused(method: str, name: str) -> None:
    runs_or_is_refused(method, Privacy(name=name, noise=0.1, norm=0.3), without="none")


@pytest.mark.parametrize("method", ["fedavg", "fedrep", "ditto", "pfedme", "apfl"])
def test_clipping_leaves_personal_state_alone(method: str) -> None:
    states = []
    for postprocessors in ((), (Privacy(noise=1.0, norm=1e-3),)):
        strategy, app = both(method, *postprocessors)
        states.append(leaves(trained(strategy, app, rounds=1).state(range(app.data.num_clients))))
    before, after = states
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


# ----------------------------------------------------------------- clipping


def test_changes_are_clipped_as_calculated_by_hand() -> None:
    strategy, app = far(Privacy(noise=0.0, norm=2.0))
    before = entries(from_record(app.initial_arrays()))
    after = trained(strategy, app, rounds=1).arrays
    size = sum(value.numel() for value in before.values())
    lengths = [0.1 * k * math.sqrt(size) for k in range(7)]  # client 0 does not move at all
    shift = sum(0.1 * k * min(1.0, 2.0 / length) for k, length in enumerate(lengths) if k) / 7
    assert 0 < sum(length > 2.0 for length in lengths) < 6
    for name, value in before.items():
        torch.testing.assert_close(after[name], value + shift)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_stack_is_clipped_as_its_rows(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    sent = tree({"w": torch.randn(3, 5, generator=rng).to(dtype), "b": torch.randn((), generator=rng).to(dtype)})
    scale = torch.tensor([0.0, 0.01, 1.0, 3.0])
    changes = {n: torch.randn(4, *v.shape, generator=rng) for n, v in entries(sent).items()}
    values = {n: sent[n] + (expand_rows(scale, change) * change).to(dtype) for n, change in changes.items()}
    privacy = Privacy(norm=2.0)
    clipped, metrics = privacy.reply(stack(**values), sent)
    assert metrics[CLIPPED].tolist() == [0.0, 0.0, 1.0, 1.0]
    for k in range(4):
        row, single = privacy.reply(stack(**{name: value[k : k + 1] for name, value in values.items()}), sent)
        assert single[CLIPPED].tolist() == metrics[CLIPPED][k : k + 1].tolist()
        changes = [row[ARRAYS][name][0].double() - sent[name].double() for name in values]
        length = math.sqrt(sum(float(change.square().sum()) for change in changes))
        for name, value in values.items():
            assert clipped[ARRAYS][name].dtype == dtype
            torch.testing.assert_close(clipped[ARRAYS][name][k], row[ARRAYS][name][0])
            if k < 2:  # within the norm, to the last digit
                assert torch.equal(clipped[ARRAYS][name][k], value[k])
        if k >= 2:
            assert length == pytest.approx(2.0, rel=0.03 if dtype == torch.bfloat16 else 1e-5)


def test_arrays_sent_to_each_client_alone() -> None:
    privacy = Privacy(norm=1.0)
    sent = tree({"w": torch.tensor([[1.0, 0.0], [5.0, 5.0]])}, 2)
    clipped, metrics = privacy.reply(stack(w=torch.tensor([[1.0, 4.0], [5.0, 5.5]])), sent)
    assert metrics[CLIPPED].tolist() == [1.0, 0.0]
    assert clipped[ARRAYS]["w"].tolist() == [[1.0, 1.0], [5.0, 5.5]]


def test_replies_without_arrays() -> None:
    privacy = Privacy()
    assert privacy.reply({}, tree({})) == ({}, {})
    _, metrics = privacy.reply({ARRAYS: tree({}, 2)}, tree({}))
    assert metrics[CLIPPED].tolist() == [0.0, 0.0]


def test_a_change_too_large_for_a_norm_is_left_out_alone() -> None:
    sent = tree({"w": torch.tensor([-3e38, 1.0])})
    replies = stack(w=torch.tensor([[-3e38, 2.0], [3e38, 1.0]]))
    with pytest.raises(ValueError, match="its change is too large for a finite norm"):
        Privacy().reply(replies, sent)
    rules = ReplyRules(sent, schema_of(ARRAYS, entries(sent)), WeightedMean(), (Privacy(),), "uniform")
    collector = ReplyCollector(rules)
    for k in range(2):
        content = flower.RecordDict({ARRAYS: to_record(tree({"w": replies[ARRAYS]["w"][k]}))})
        collector.take({k: ClientResult(content)})
    assert collector.collected.failures == {1: "its change is too large for a finite norm"}
    assert collector.collected.metrics.keys() == {0}


# -------------------------------------------------------------------- noise


def test_noise_has_the_size_that_hides_one_client() -> None:
    means = {ARRAYS: tree({"w": torch.zeros(200, 300, dtype=torch.float64)})}
    for source in ("seed", "system"):
        privacy = Privacy(noise=2.0, norm=0.7, noise_source=source)
        noisy = privacy.blur(means, 0.7, sampled=9, replies=5, seed=0, round=1)[ARRAYS]["w"]
        assert float(noisy.std()) == pytest.approx(2.0 * 0.7 / 5, rel=0.02)
        assert abs(float(noisy.mean())) < 6 * 2.0 * 0.7 / 5 / math.sqrt(60_000)


def test_noise_follows_from_the_seed_alone() -> None:
    runs = []
    for cohort, numpy_seed, seed in ((1, 0, 3), (7, 1, 3), (7, 1, 4)):
        np.random.seed(numpy_seed)  # noqa: NPY002
        state = np.random.get_state()[1].copy()  # type: ignore[union-attr, index]  # noqa: NPY002
        strategy, app = both("fedavg", Privacy(noise=1.0, norm=1.0), seed=seed)
        runs.append(trained(strategy, app, cohort=cohort).arrays)
        assert (np.random.get_state()[1] == state).all()  # type: ignore[index]  # noqa: NPY002
    assert_same(runs[0], runs[1])
    assert any(not torch.allclose(value, runs[2][name]) for name, value in runs[0].items())
    rounds = [generator(3, "privacy-noise", r).normal() for r in (1, 2)]
    assert rounds[0] != rounds[1]


def test_noise_by_hand() -> None:
    """Tensor by tensor in the order of their names, from one generator."""
    means = {ARRAYS: tree({"w": torch.ones(2), "b": torch.zeros(3)})}
    noisy = Privacy(noise=3.0).blur(means, 0.5, sampled=4, replies=4, seed=7, round=2)[ARRAYS]
    draw = generator(7, "privacy-noise", 2)
    first, second = draw.normal(0.0, 3.0 * 0.5 / 4, (3,)), draw.normal(0.0, 3.0 * 0.5 / 4, (2,))
    assert list(entries(noisy)) == ["w", "b"]
    torch.testing.assert_close(noisy["b"], torch.tensor(first, dtype=torch.float32))
    torch.testing.assert_close(noisy["w"], torch.tensor(1.0 + second, dtype=torch.float32))


def test_noise_of_the_system_cannot_be_repeated() -> None:
    runs = []
    for _ in range(2):
        strategy, app = far(Privacy(name="adaptive", noise=0.5, noise_source="system"))
        runs.append(trained(strategy, app, rounds=1).arrays)
    assert all(not torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_noise_of_the_system_is_normal(monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.stats import kstest, norm

    drawn = SystemNoise().normal(1.0, 2.0, (400, 500))
    assert drawn.shape == (400, 500)
    assert kstest(drawn.ravel(), norm(1.0, 2.0).cdf).pvalue > 1e-6
    # the bits of the ends and of the middle: place, then half
    bits = [0, 1, (2**53 - 1) << 11, (2**53 - 1) << 11 | 1, (2**52 - 1) << 11]
    monkeypatch.setattr("os.urandom", lambda size: np.array(bits, np.uint64).tobytes()[:size])
    ends = SystemNoise().normal(0.0, 1.0, (5,))
    assert ends[0] == -ends[1] == pytest.approx(norm.ppf(2.0**-54))
    assert ends[2] == ends[3] == 0.0
    assert ends[4] == pytest.approx(norm.ppf(0.25))


@pytest.mark.parametrize(("noise", "count"), [(0.5, None), (0.5, 2.0), (1.9, 1.0), (0.0, None), (0.0, 3.0)])
def test_noise_is_divided_between_mean_and_count_as_flower_does(noise: float, count: float | None) -> None:
    expected = compute_adaptive_noise_params(noise, 40, count)
    multiplier, deviation = Privacy(name="adaptive", noise=noise, count_noise=count).noises(40)
    assert (deviation, multiplier) == pytest.approx(expected)


# ------------------------------------------------------- an adaptive norm


def test_an_adaptive_norm_finds_the_quantile() -> None:
    strategy, app = far(Privacy(name="adaptive", noise=0.0, norm=30.0, norm_lr=0.5))
    reports = trained(strategy, app, rounds=30, cohort=7).reports
    norms = [report.extra["clipping_norm"] for report in reports if report.round]
    size = sum(value.numel() for value in entries(app.template).values())
    lengths = [0.1 * k * math.sqrt(size) for k in range(7)]
    assert norms[0] == 30.0
    assert norms[1] == pytest.approx(30.0 * math.exp(-0.5 * (1.0 - 0.5)))  # all are within
    assert lengths[2] < norms[-1] < lengths[4]  # half of the clients are within
    assert float(strategy.state["privacy"]["norm"]) == pytest.approx(norms[-1], rel=0.1)


def test_the_adaptive_norm_is_part_of_the_servers_state() -> None:
    def strategy_and_app() -> tuple[Far, Any]:
        return far(Privacy(name="adaptive", noise=0.2, norm=0.5))

    strategy, app = strategy_and_app()
    expected = trained(strategy, app, rounds=3).arrays
    first, app = strategy_and_app()
    arrays = trained(first, app, rounds=2).arrays
    second, app = strategy_and_app()
    second.restore(first.report, pickle.loads(pickle.dumps(first.state)))
    grid = LocalGrid(app, 7, clients_at_once=7, workers=1)
    with server_identity(1):
        messages = second.configure_train(3, to_record(tree(arrays)), flower.ConfigRecord(), grid)
        resumed, _ = second.aggregate_train(3, grid.send_and_receive(messages))
    assert resumed is not None
    assert_same(entries(from_record(resumed)), expected)
    assert float(second.state["privacy"]["norm"]) == float(strategy.state["privacy"]["norm"])


def test_a_second_run_starts_with_the_first_norm() -> None:
    strategy, app = far(Privacy(name="adaptive", noise=0.0, norm=0.5))
    first, second = (trained(strategy, app) for _ in range(2))
    assert [r.extra.get("clipping_norm") for r in second.reports] == [
        r.extra.get("clipping_norm") for r in first.reports
    ]
    assert_same(second.arrays, first.arrays)


def test_a_fixed_norm_is_no_state() -> None:
    strategy, app = far(Privacy(noise=0.1, norm=0.5))
    reports = trained(strategy, app).reports
    assert strategy.state == {}
    assert all("clipping_norm" not in report.extra for report in reports)


# ------------------------------------------------------------------ replies


def test_a_failed_client_does_not_end_a_private_round() -> None:
    strategy, app = far(Privacy(noise=0.0, norm=100.0))
    grid = LocalGrid(app, 7, clients_at_once=7, workers=1)
    before = entries(from_record(app.initial_arrays()))
    strategy.begin()
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
    strategy, app = far(Privacy(name="adaptive", noise=0.0, norm=1.0))
    grid = LocalGrid(app, 7, clients_at_once=7, workers=1)
    state = {"privacy": tree({"norm": torch.tensor(0.4, dtype=torch.float64)})}
    strategy.restore(strategy.report, state)
    with server_identity(1):
        messages = list(strategy.configure_train(1, app.initial_arrays(), flower.ConfigRecord(), grid))
        results = {k: result_of(reply) for k, reply in enumerate(grid.send_and_receive(messages))}
    local = ReplyCollector(strategy.reply_rules(list(range(7))))
    local.take(results)
    parts = []
    for clients in ((0, 3, 5), (1, 2, 4, 6)):
        remote = ReplyCollector(pickle.loads(pickle.dumps(strategy.reply_rules(list(range(7))))))
        remote.take({client: results[client] for client in clients})
        parts.append(pickle.loads(pickle.dumps(remote.partial())))
    merged = ReplyCollector(strategy.reply_rules(list(range(7)))).collected
    merged.merge(parts)
    assert merged.metrics == local.collected.metrics
    assert sum(metrics["clipped"] for metrics in merged.metrics.values()) == 6
    assert_same(entries(merged.fold.result()[ARRAYS]), entries(local.collected.fold.result()[ARRAYS]))


@dataclass(kw_only=True)
class TellingUpdate(FarUpdate):
    """Sends more than it says."""

    def train(self, cohort: Cohort, received: Mapping[str, Tree], config: Mapping[str, Any]) -> Reply:
        reply = super().train(cohort, received, config)
        return Reply({**reply.records, "secret": reply.records[ARRAYS]}, reply.state)


@dataclass(kw_only=True)
class Telling(Far):
    update = TellingUpdate


def test_a_method_that_sends_more_than_it_says_is_not_let_through() -> None:
    chosen = given("fedavg")
    app = TellingUpdate().client_app(chosen.network, chosen.data)
    strategy = Telling(weighting="uniform", postprocessors=[Privacy(noise=0.0, norm=0.3)])
    with server_identity(1), pytest.raises(TrainingError, match=r"'secret/body\.0\.bias' is in its reply, but the "):
        list(run_rounds(strategy, LocalGrid(app, 7, clients_at_once=7, workers=1), app.initial_arrays(), 1))


# -------------------------------------------------------------- the settings

BAD_PRIVACY: list[tuple[str, Any]] = [
    ("noise", -0.1), ("noise", math.inf), ("noise", math.nan), ("norm", 0.0), ("norm", math.inf), ("quantile", 1.1),
    ("quantile", -0.1), ("norm_lr", 0.0), ("count_noise", -1.0), ("delta", 0.0), ("delta", 1.0), ("delta", math.nan),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_PRIVACY)
def test_privacy_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^privacy.{name}={value}: expected a number"):
        Privacy(**{name: value})


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match=r"^privacy=fixd: expected one of adaptive, fixed, none \(did you mean"):
        Privacy(name="fixd")
    with pytest.raises(ConfigError, match=r"^privacy.noise_source=sed: expected one of seed, system \(did"):
        Privacy(noise_source="sed")


def refused(strategy: Any, app: Any) -> str:
    """What a first round is refused with."""
    strategy.begin()
    with server_identity(1), pytest.raises(ConfigError) as caught:
        strategy.configure_train(1, app.initial_arrays(), flower.ConfigRecord(), LocalGrid(app, 7))
    assert strategy.report.round == 0  # before anybody was asked for anything
    return str(caught.value)


def test_what_privacy_does_not_go_with() -> None:
    clip = Privacy(noise=0.0, norm=0.3)
    assert refused(*both("fedavg", clip, weighting="samples")) == (
        "strategy.weighting=samples: expected uniform with privacy, whose noise is sized for clients of equal weight."
    )
    assert refused(*both("fedavg", clip, Robust(FedMedian()))) == (
        "aggregation=FedMedian: expected mean with privacy, whose noise is sized for a mean."
    )
    assert refused(*both("fedavg", clip, network=SmallNetwork())) == (
        "privacy=fixed with 'body.1.num_batches_tracked' of int64: expected a network whose shared entries are no "
        "batch statistics: another one, or strategy=fedbn."
    )
    assert refused(*both("fedavg", Privacy(name="adaptive", noise=1.0))) == (
        "privacy.noise=1.0: expected a number < 0.7, twice privacy.count_noise (default: a twentieth of the sampled "
        "clients)."
    )
    assert refused(*both("fedavg", clip, Privacy())) == (
        "postprocessors=['privacy', 'privacy']: expected one for privacy at most."
    )
    assert refused(*both("fedavg", Privacy(name="none"))) == (
        "privacy=none: expected fixed or adaptive among postprocessors."
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {"privacy": {"name": "fixed", "noise": 0.5, "norm": 2.0}},
        {"privacy": {"name": "adaptive", "noise": 0.5, "norm": 2.0, "delta": 1e-4}},
    ],
    ids=lambda values: json.dumps(values),
)
def test_a_run_with_each_setting_is_another_run(values: dict[str, Any], tmp_path: Path) -> None:
    def clients(config: Config, folder: str) -> str:
        summary = run(config, tmp_path / folder)
        assert summary["privacy"] == config.privacy.name
        assert summary["failures"] == 0
        return json.dumps([summary["selected"], summary["last"]])

    private = clients(settings(**values), "one")
    assert private == clients(build(Config, asdict(settings(**values))), "again")
    assert private != clients(settings(), "plain")
    delta = values["privacy"].get("delta", 1e-5)
    for name in ("summary.json", "manifest.json"):
        content = json.loads((tmp_path / "one" / name).read_text())
        assert content["privacy_epsilon"] == pytest.approx(epsilon(0.5, 8, 8, 2, delta))
        assert content["privacy_delta"] == delta
        assert "privacy_epsilon" not in json.loads((tmp_path / "plain" / name).read_text())


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"privacy": {"name": "fixed"}, "strategy": {"name": "fedavg"}}, "strategy.weighting=samples: expected "),
        ({"privacy": {"name": "fixed"}, "model": {"name": "cnn", "norm": "batch"}}, "privacy=fixed with 'body."),
        ({"privacy": {"name": "adaptive", "noise": 1.0}}, "privacy.noise=1.0: expected a number < 0.8, twice "),
        ({"privacy": {"name": "fixed", "clip": 1.0}}, "privacy.clip=1.0: expected a known key: one of "),
        ({"privacy": {"name": "fixed"}, "aggregation": {"name": "median"}}, "aggregation=FedMedian: expected mean "),
    ],
)  # fmt: skip
def test_a_run_is_refused_before_it_has_a_folder(values: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run(settings(**values), tmp_path / "run")
    assert str(caught.value).startswith(sentence)
    assert not (tmp_path / "run").exists()
