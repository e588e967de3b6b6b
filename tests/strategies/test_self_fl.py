"""Self-FL: variances by hand, steps by the uncertainties, and Gaussian clients beside the closed form."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from fedpers.cohort import Cohort, Training, tree
from fedpers.errors import ConfigError
from fedpers.strategies.self_fl import AGGREGATE, MEMORY, UNCERTAINTY, SelfFL, SelfFLUpdate
from tests.strategies.helpers import DATA, NETWORK, run


def update_with(**options: Any) -> SelfFLUpdate:
    return SelfFLUpdate(training=Training(lr=0.1, batch_size=5, epochs=2), **options)


def cohort_with(variance: list[float], update: SelfFLUpdate, trainings: int = 1) -> Cohort:
    app = update.client_app(NETWORK, DATA)
    clients = [0, 2, 1, 3]  # 20, 13, 9 and 7 samples: 4, 3, 2 and 2 batches of 5
    state = app.initial_state.expand(4).clone()
    state[MEMORY, "variance"] = torch.tensor(variance, dtype=torch.float64)
    state["trained"] = torch.full((4,), trainings)
    return app.cohort(clients, state, {"server-round": 3})


def steps_of(update: SelfFLUpdate, variance: list[float], inter: float, scale: float, trainings: int = 1) -> list[int]:
    cohort = cohort_with(variance, update, trainings)
    column = torch.ones(4, dtype=torch.float64)
    return update._steps(cohort, inter * column, inter * column, scale * column)


def test_steps_grow_with_the_variance_between_clients_and_fall_with_the_own_one() -> None:
    usual = [8, 6, 4, 4]
    assert steps_of(update_with(step_rule="fixed"), [0.1] * 4, 1.0, 1.0) == usual
    median = 1 / np.log1p(2.0)
    assert steps_of(update_with(), [0.5] * 4, 1.0, median) == usual
    assert steps_of(update_with(), [0.5, 0.1, 0.1, 5.0], 1.0, median) == [8, round(6 * np.log(11) * median), 9, 1]
    assert steps_of(update_with(max_ratio=1.5), [1e-6] * 4, 1.0, median) == [12, 9, 6, 6]
    assert steps_of(update_with(), [0.0, 0.5, 0.5, 0.5], 1.0, median)[0] == 8  # nothing known yet
    assert steps_of(update_with(), [0.1] * 4, 1.0, median, trainings=0) == usual
    exact = update_with(step_rule="quadratic", curvature=2.0, min_ratio=0.0, max_ratio=100.0)
    assert steps_of(exact, [0.1] * 4, 0.4, 1.0) == [round(np.log(5) / -np.log(0.8))] * 4


def test_a_rate_at_which_descent_does_not_come_closer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"strategy\.curvature=10\.0: expected less than 1 / training\.lr = 10"):
        update_with(step_rule="quadratic", curvature=10.0)


def test_without_its_own_part_the_mean_is_that_of_the_others() -> None:
    update = update_with()
    cohort = cohort_with([0.1] * 4, update)
    state = cohort.state["model"].items()
    networks = {n: torch.randn_like(v) if v.is_floating_point() else v for n, v in state}
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    cohort.state["model"] = tree(networks, 4)
    cohort.state[MEMORY, "round"] = torch.tensor([2, 2, 1, 2])
    names = cohort.names("parameters")
    mean = tree({n: torch.einsum("k,k...->...", weights, networks[n]) / weights.sum() for n in names})
    params = cohort.assemble(mean, tree({}, 4))
    share, others_variance = weights / weights.sum(), torch.tensor([1 / 9, 1 / 8, 1 / 7, 1 / 6], dtype=torch.float64)
    share[3] = 0  # its reply did not arrive
    known = {"round": torch.full((4,), 2), "share": share, "others": others_variance}
    spread = update._leave_out(cohort, params, mean, known)
    for k in range(4):
        others = [j for j in range(4) if j != k or k >= 2]  # client 2 has trained before that round
        expected = torch.einsum("k,k...->...", weights[others], networks["head.weight"][others]) / weights[others].sum()
        torch.testing.assert_close(params["head.weight"][k], expected)
    torch.testing.assert_close(spread, torch.tensor([1 / 9, 1 / 8, 0, 0], dtype=torch.float64))


def test_the_server_weighs_by_inverse_variance_and_starts_with_a_uniform_round() -> None:
    first = run("self_fl", rounds=1)
    uniform = run("fedavg", {"weighting": "uniform"}, rounds=1)
    for name, value in first.arrays.items():
        torch.testing.assert_close(value, uniform.arrays[name], rtol=1e-12, atol=1e-12)
    result = run("self_fl", rounds=3)
    assert isinstance(result.strategy, SelfFL)
    rows = result.strategy.reply_metrics
    former = run("self_fl", rounds=2).strategy.state[UNCERTAINTY]["inter"]
    mean = torch.zeros_like(result.arrays["head.weight"])
    for client, row in rows.items():
        assert row["train/inverse_variance"] == pytest.approx(
            1 / (float(former) + row["train/intra_variance"]), rel=1e-12
        )
        mean += row["train/inverse_variance"] * result.state(client)["model/head.weight"]
    total = sum(row["train/inverse_variance"] for row in rows.values())
    torch.testing.assert_close(result.arrays["head.weight"], mean / total, rtol=1e-10, atol=1e-12)
    last, inter = result.strategy.state[AGGREGATE], float(result.strategy.state[UNCERTAINTY]["inter"])
    assert last["clients"].tolist() == list(rows)
    weights = torch.tensor([row["train/inverse_variance"] for row in rows.values()], dtype=torch.float64)
    torch.testing.assert_close(last["share"], weights / total)
    variances = [inter + row["train/intra_variance"] for row in rows.values()]
    scatter = [float(w) ** 2 * v for w, v in zip(weights[1:], variances[1:], strict=True)]
    assert float(last["others"][0]) == pytest.approx(sum(scatter) / float(weights[1:].sum()) ** 2)


@pytest.mark.parametrize("weighting", ["inverse_variance", "samples", "uniform"])
def test_the_server_says_who_was_in_the_last_mean_and_with_which_share(weighting: str) -> None:
    strategy = run("self_fl", {"weighting": weighting}, rounds=2).strategy
    last = strategy.state[AGGREGATE]
    last["clients"][0] = 99  # instead of the first, whose reply was lost
    sent = strategy.send(3, strategy.sent_arrays, list(range(4)))
    shares = [float(records[UNCERTAINTY]["share"]) for records in sent]
    rounds = {int(records[UNCERTAINTY]["round"]) for records in sent}
    assert rounds == {2}
    members = last["clients"].tolist()
    assert shares == [float(last["share"][members.index(c)]) if c in members else 0.0 for c in range(4)]
    assert 0.0 in shares
    assert sum(shares) == pytest.approx(1 - float(last["share"][0]))


def test_it_needs_the_exact_mean() -> None:
    assert not SelfFL.plain_mean()


@pytest.mark.parametrize("settings", [{"steps": 1}, {"steps": 2}, {"steps": 3}])
def test_few_steps_tell_a_variance_too(settings: dict[str, int]) -> None:
    result = run("self_fl", rounds=2, **settings)
    assert all(row["train/intra_variance"] > 0 for row in result.strategy.reply_metrics.values())


def test_the_variance_between_clients_is_the_em_rule() -> None:
    before, after = run("self_fl", {"smoothing": 0.0}, rounds=2), run("self_fl", {"smoothing": 0.0}, rounds=3)
    former = float(before.strategy.state[UNCERTAINTY]["inter"])
    rows = after.strategy.reply_metrics
    names = list(after.arrays)
    size = sum(value.numel() for value in after.arrays.values())
    expected = total = squares = 0.0
    for client, row in rows.items():
        state, intra = after.state(client), row["train/intra_variance"]
        away = sum(float((state[f"model/{n}"] - after.arrays[n]).square().sum()) for n in names)
        weight = row["train/inverse_variance"]
        expected += weight * former * intra / (former + intra)
        squares += weight * away / size
        total += weight
    shares = [row["train/inverse_variance"] / total for row in rows.values()]
    expected = expected / total + squares / total / (1 - sum(share**2 for share in shares))
    assert after.strategy.report.extra["inter_variance"] == pytest.approx(expected, rel=1e-9)


def test_clients_predict_with_their_networks_and_a_new_one_with_the_servers() -> None:
    result = run("self_fl", rounds=2, data=replace(DATA, unseen=(3,)))
    predictors = result.predictors()
    assert torch.equal(predictors[0]["head.weight"], result.state(0)["model/head.weight"])
    assert not torch.equal(predictors[0]["head.weight"], result.arrays["head.weight"])


def gaussian() -> ModuleType:
    """The study of ``experiments/self_fl``."""
    path = Path(__file__).parents[2] / "experiments" / "self_fl" / "gaussian.py"
    spec = importlib.util.spec_from_file_location("gaussian", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gaussian"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_gaussian_clients_reach_the_closed_form_and_its_limits() -> None:
    study = gaussian()
    study.CLIENTS = 40
    clients = study.Clients(0)
    weightings, limits = ("self_fl", "self_fl weighting=uniform"), ("self_fl, s_0 to 0", "self_fl, s_0 to infinity")
    results = {}
    for name in (*weightings, *limits):
        *settings, rounds = study.ROWS[name]
        results[name] = study.trained(clients, *settings, 8 if rounds == study.ROUNDS else rounds)
    best = clients.errors(*clients.optimum())
    for name in weightings:
        assert clients.errors(*results[name][:2])[1] < 1.05 * best[1]
    uniform = results["self_fl weighting=uniform"]
    centre, personal = clients.optimum(uniform[2])
    assert (uniform[0] - centre).square().mean() < 0.05 * best[0]
    assert (uniform[1] - personal).square().mean() < 0.05 * best[1]
    assert uniform[2] == pytest.approx(study.INTER, rel=0.15)
    pooled = clients.optimum(1e-9)[0]
    assert (results["self_fl, s_0 to 0"][0] - pooled).square().mean() < 0.05 * best[0]
    assert (results["self_fl, s_0 to infinity"][1] - clients.means).square().mean() < 0.01 * best[1]
