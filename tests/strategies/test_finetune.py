"""Fine-tuning before each evaluation, with every method."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

from fedpers.errors import ConfigError
from fedpers.strategies import STRATEGIES, make_strategy
from tests.cohort.helpers import assert_same
from tests.problems import SmallNetwork, gaussian_data, problem
from tests.strategies.helpers import Finished, copied, passes, run, sgd

WITHOUT = {"group_perfl", "knnper", "no_learning", "fedmf", "fedrap", "pfedrec"}


def finished(method: str, epochs: int, cohort: int = 100) -> Finished:
    given = problem(method, torch.float64)
    arguments: dict[str, Any] = {"network": given.network, "data": given.data, **asdict(given.training)}
    return run(method, {**given.options, "finetune_epochs": epochs}, rounds=1, cohort=cohort, **arguments)


def test_methods_that_plain_steps_do_not_fit_say_so() -> None:
    assert {name for name, strategy in STRATEGIES.items() if not strategy.update.can_finetune} == WITHOUT
    for method in WITHOUT:
        with pytest.raises(ConfigError, match=r"^strategy\.finetune_epochs=2: expected 0, since plain steps"):
            make_strategy(method, {"finetune_epochs": 2})


@pytest.mark.parametrize("method", sorted(STRATEGIES.keys() - WITHOUT))
def test_it_changes_predictions_and_nothing_else_alone_and_in_cohorts(method: str) -> None:
    plain, tuned = finished(method, 1 if method == "fedavg_ft" else 0), finished(method, 2)
    alone = finished(method, 2, cohort=1)
    assert_same(plain.arrays, tuned.arrays)
    for client, metrics in tuned.strategy.report.clients.items():
        assert_same(plain.state(client), tuned.state(client))
        assert metrics == pytest.approx(alone.strategy.report.clients[client], rel=1e-9, abs=1e-12)
        before = plain.strategy.report.clients[client]["adaptation-gradients"]
        assert metrics["adaptation-gradients"] > before
    scores = [one.strategy.report.clients for one in (plain, tuned)]
    if "test-loss" in scores[0][0]:
        assert all(scores[0][client]["test-loss"] != scores[1][client]["test-loss"] for client in scores[0])


def test_fedavg_with_it_is_fedavg_with_fine_tuning() -> None:
    tuned, named = run("fedavg", {"finetune_epochs": 3}), run("fedavg_ft", {"finetune_epochs": 3})
    assert tuned.strategy.report.clients == named.strategy.report.clients
    for one, other in zip(tuned.predictors(), named.predictors(), strict=True):
        assert_same(one, other)


def test_a_personal_head_is_tuned_from_what_the_client_keeps() -> None:
    result = run("fedper", {"finetune_epochs": 2}, rounds=2, fraction=0.5)
    plain = run("fedper", rounds=2, fraction=0.5)
    for client, (tuned, kept) in enumerate(zip(result.predictors(), plain.predictors(), strict=True)):
        expected = copied(kept)
        sgd(expected, passes(client, 2, 2, purpose="finetune"))
        assert_same(tuned, expected)


def test_a_batch_of_one_sample_in_fine_tuning_is_refused_before_training() -> None:
    network = SmallNetwork(dropout=0.0).double()  # with batch normalization
    data = gaussian_data((20, 16, 10, 15), dtype=torch.float64)
    run(
        "perfedavg", rounds=1, network=network, data=data, batch_size=5
    )  # trains on pairs of batches: 11 samples at once
    with pytest.raises(ConfigError, match=r"client 1"):
        run("perfedavg", {"finetune_epochs": 1}, rounds=1, network=network, data=data, batch_size=5)


def test_a_mixture_is_that_of_the_tuned_experts() -> None:
    given = problem("fedjets", torch.float64)
    arguments: dict[str, Any] = {"network": given.network, "data": given.data, **asdict(given.training)}
    options = {**given.options, "finetune_epochs": 1}
    mixed, plain = (
        run("fedjets", {**options, "evaluate_mixture": on}, rounds=1, **arguments).strategy.report.clients
        for on in (True, False)
    )
    for client, metrics in plain.items():
        assert {n: v for n, v in mixed[client].items() if "mixture" not in n} == metrics
        assert mixed[client]["test-mixture-loss"] != metrics["test-loss"]
