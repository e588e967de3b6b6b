"""Weighting by inverse variance: by hand, with every method that averages, and where there is nothing to weight by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args, get_type_hints

import pytest
import torch

from fedpers.cohort import Cohort, Reply, Training
from fedpers.errors import ConfigError, TrainingError
from fedpers.flower_private import server_identity
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import STRATEGIES, FedAvg, FedAvgUpdate, Received, make_strategy
from tests.cohort.helpers import assert_same
from tests.problems import problem
from tests.runtime.wire import WireGrid
from tests.strategies.helpers import DATA, NETWORK, run

NOTHING_SENT = ("local", "head_only", "pretrained", "no_learning")
CHOICES = {name: get_args(get_type_hints(strategy)["weighting"]) for name, strategy in STRATEGIES.items()}
WITH_VARIANCE = [m for m, choices in CHOICES.items() if "inverse_variance" in choices and m not in NOTHING_SENT]


def test_fedavg_by_hand() -> None:
    result = run("fedavg", {"weighting": "inverse_variance"}, rounds=1)
    rows = result.strategy.reply_metrics
    precisions = torch.tensor([row["train/inverse_variance"] for row in rows.values()], dtype=torch.float64)
    cohort = result.app.cohort([0, 2, 1, 3], result.app.initial_state.expand(4), {"server-round": 1})
    cohort.measures_variance = True
    params = cohort.assemble(cohort.template)
    cohort.fit(params, result.app.update.loss)
    torch.testing.assert_close(precisions, (1 / cohort.variance(params))[[0, 2, 1, 3]])
    trained = params["head.weight"][[0, 2, 1, 3]]
    mean = torch.einsum("k,k...->...", precisions / precisions.sum(), trained)
    torch.testing.assert_close(result.arrays["head.weight"], mean, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(precisions, precisions[:1])


def test_messages_ask_for_it_so_that_halves_need_not_agree() -> None:
    """A client app knows nothing of its server's weighting; everything as bytes, one client per call."""
    local, wired = (
        run("fedrep", {"weighting": "inverse_variance"}, fraction=0.7, grid=grid) for grid in (None, WireGrid)
    )
    assert_same(local.arrays, wired.arrays)
    precisions = [
        {c: row["train/inverse_variance"] for c, row in one.strategy.reply_metrics.items()} for one in (local, wired)
    ]
    assert precisions[0] == pytest.approx(precisions[1], rel=1e-9)


@pytest.mark.parametrize("method", WITH_VARIANCE)
def test_every_method_that_averages_weights_by_it_alone_and_in_cohorts(method: str) -> None:
    given = problem(method, torch.float64)
    arguments: dict[str, Any] = {"network": given.network, "data": given.data, **asdict(given.training)}
    options = {**given.options, "weighting": "inverse_variance"}
    alone, together = (run(method, options, rounds=1, cohort=cohort, **arguments) for cohort in (1, 100))
    assert_same(alone.arrays, together.arrays)
    precisions = [row["train/inverse_variance"] for row in alone.strategy.reply_metrics.values()]
    assert min(precisions) > 0
    others = [row["train/inverse_variance"] for row in together.strategy.reply_metrics.values()]
    assert precisions == pytest.approx(others, rel=1e-6)
    weights = {weighting: result_of(method, weighting, arguments) for weighting in ("samples", "uniform")}
    for arrays in weights.values() if method != "self_fl" else ():  # its first round is uniform by itself
        assert any(not torch.equal(value, alone.arrays[name]) for name, value in arrays.items())


def result_of(method: str, weighting: str, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    options = {**problem(method, torch.float64).options, "weighting": weighting}
    return run(method, options, rounds=1, cohort=100, **arguments).arrays


@pytest.mark.parametrize("method", NOTHING_SENT)
def test_what_sends_nothing_needs_no_weight(method: str) -> None:
    given = problem(method, torch.float64)
    arguments: dict[str, Any] = {"network": given.network, "data": given.data, **asdict(given.training)}
    result = run(method, {**given.options, "weighting": "inverse_variance"}, rounds=1, **arguments)
    assert not result.arrays or method == "pretrained"
    assert all("train/inverse_variance" not in row for row in result.strategy.reply_metrics.values())


def test_methods_without_a_variance_or_with_weights_of_their_own_say_so() -> None:
    refusing = set(STRATEGIES) - set(WITH_VARIANCE) - set(NOTHING_SENT)
    expected = {"fedmf", "fedrap", "fedd2s", "fedamp", "fedproto", "fedgh", "fedas", "feddyn", "scaffold"}
    assert refusing == expected
    for method in refusing:
        with pytest.raises(ConfigError, match=r"^strategy\.weighting=inverse_variance: expected .*uniform"):
            make_strategy(method, {"weighting": "inverse_variance"})


def test_a_client_that_takes_no_step_has_no_weight_and_one_that_stands_still_the_largest() -> None:
    with pytest.raises(TrainingError, match="weighting=inverse_variance: its train/inverse_variance is nan"):
        run("fedrep", {"weighting": "inverse_variance", "head_epochs": 0, "body_epochs": 0}, rounds=1)
    still = run("fedrep", {"weighting": "inverse_variance", "body_epochs": 0}, rounds=1)
    weights = [row["train/inverse_variance"] for row in still.strategy.reply_metrics.values()]
    assert weights == pytest.approx([1e12] * 4)


@dataclass(kw_only=True)
class RepliesWithACopy(FedAvg):
    """Its clients reply with other tensors than those that were trained."""

    @dataclass(kw_only=True)
    class Update(FedAvgUpdate):
        """Client half."""

        def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
            """Train, and reply with a copy."""
            params = cohort.assemble(received["arrays"])
            cohort.fit(params, self.loss)
            return cohort.reply(params.clone())

    update = Update


def test_a_reply_of_other_tensors_than_the_trained_ones_is_refused() -> None:
    strategy, update = (
        RepliesWithACopy(weighting="inverse_variance"),
        RepliesWithACopy.Update(training=Training(lr=0.1, batch_size=5)),
    )
    app = update.client_app(NETWORK, DATA)
    grid = LocalGrid(app, DATA.num_clients, clients_at_once=4, workers=1)
    with (
        pytest.raises(TrainingError, match="has no variance: expected the tensor that fit or walk trained"),
        server_identity(1),
    ):
        strategy.start(grid, app.initial_arrays(), num_rounds=1)
