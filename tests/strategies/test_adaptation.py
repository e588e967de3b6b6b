"""Steps of a newcomer's local training are limited by phase, also where a method plans pass by pass."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest

from fedpers.identity import ADAPTING, MAX_STEPS, PHASE_STEPS
from fedpers.records import from_record
from fedpers.runtime.local import LocalGrid
from fedpers.server.exchange import Exchange
from fedpers.strategies import RoundReport, make_strategy
from tests.cohort.helpers import by_size, cross_entropy, make_cohort
from tests.problems import SmallNetwork, gaussian_data, problem
from tests.strategies.helpers import DATA, run


@pytest.mark.parametrize("limit", [1, 3])
@pytest.mark.parametrize(
    ("method", "phases"), [("fedavg", 1), ("fedrep", 2), ("ditto", 2), ("fedselect", 2), ("fedmf", 1), ("fedrap", 1)]
)
def test_every_phase_takes_so_many_steps(method: str, phases: int, limit: int) -> None:
    given = problem(method)
    settings = replace(given.training, epochs=5, batch_size=3, drop_last=True)
    options = {"tolerance": 0.0} if method == "fedrap" else {}
    options |= (
        {"head_epochs": 5, "body_epochs": 5}
        if method == "fedrep"
        else {"personal_epochs": 5}
        if method == "ditto"
        else {}
    )
    _, update = make_strategy(method, options, training=settings)
    app = update.client_app(given.network, given.data)
    clients = by_size(app.data)
    received = {"arrays": from_record(app.initial_arrays())}
    config = {"server-round": 1, ADAPTING: True, MAX_STEPS: limit}
    result, _, _ = app.run("train", clients, app.initial_state.expand(len(clients)).clone(), received, config)
    for metrics in result.metrics:
        assert metrics[PHASE_STEPS] == limit
        assert metrics["steps"] == phases * limit


def test_plans_of_a_phase_share_its_limit() -> None:
    data = gaussian_data((20, 9, 13))  # 4, 2 and 3 batches a pass, by client
    for phase, expected, longest in (("a", [6, 6, 6], [6, 6, 6]), (None, [12, 6, 9], [4, 2, 3])):
        cohort = make_cohort(SmallNetwork(), data)
        cohort.max_steps = 6
        params = cohort.per_client(cohort.template)
        options = {} if phase is None else {"phase": phase}
        for _ in range(3):
            cohort.fit(params, cross_entropy, epochs=1, batch_size=5, **options)
        by_client = dict(zip(cohort.clients, cohort.steps_taken.tolist(), strict=True))
        assert [by_client[c] for c in range(3)] == expected
        by_client = dict(zip(cohort.clients, cohort.longest_phase.tolist(), strict=True))
        assert [by_client[c] for c in range(3)] == longest


@pytest.mark.parametrize("method", ["fedavg", "fedfomo", "fedamp", "clustered"])
def test_newcomers_of_whom_none_is_connected_end_no_run(method: str) -> None:
    data = replace(DATA, unseen=(DATA.num_clients - 1,))
    result = run(method, data=data, drop_last=True, grid=lambda app, clients: LocalGrid(app, clients - 1, workers=1))
    assert result.strategy.report.adapted == {}
    assert result.strategy.report.evaluation_failures == {data.unseen[0]: "it is not connected"}


def test_clients_that_only_mix_are_booked(monkeypatch: pytest.MonkeyPatch) -> None:
    """FedALA as PFLlib has it: clients that are not sampled train their weights all the same."""
    before: list[tuple[int, int]] = []
    book = RoundReport.book

    def booking(report: RoundReport, replies: Any, bytes_up: int) -> None:
        before.append((report.gradients, report.bytes_to_others))
        book(report, replies, bytes_up)

    monkeypatch.setattr(RoundReport, "book", booking)
    report = run("fedala", {"variant": "pfllib"}, rounds=4, fraction=0.5).strategy.report
    assert len(report.sampled) < DATA.num_clients
    gradients, size = before[-1]
    assert gradients > 0
    assert size == report.bytes_down * (DATA.num_clients - len(report.sampled)) / DATA.num_clients
    before.clear()
    run("fedala", {}, rounds=4, fraction=0.5)
    assert before == [(0, 0)] * 4


EQUAL = replace(gaussian_data((20, 20, 20, 20)), unseen=(1, 3))
"""Clients of four batches a pass."""


@pytest.mark.parametrize("method", ["fedavg", "ditto", "gpfl", "fedbabu"])
def test_what_is_measured_after_so_many_steps_does_not_depend_on_other_measurements(method: str) -> None:
    settings = {"network": problem(method).network, "data": EQUAL, "epochs": 1, "lr_decay": 0.5}
    alone, between = (run(method, adapt_steps=steps, **settings).strategy.report for steps in ((8,), (4, 8)))
    for client in EQUAL.unseen:
        for name in ("test-loss-after-8", "test-accuracy-after-8"):
            assert alone.adapted[client][name] == pytest.approx(between.adapted[client][name], rel=1e-9)


def test_a_client_is_measured_in_the_round_in_which_it_trained_last(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, list[int]]] = []
    call = Exchange.call

    def watched(self: Exchange, grid: Any, kind: str, sent: Any, config: Any, clients: list[int]) -> Any:
        calls.append((kind, int(config["server-round"]), list(clients)))
        return call(self, grid, kind, sent, config, clients)

    monkeypatch.setattr(Exchange, "call", watched)
    data = replace(gaussian_data((20, 20, 5, 20)), unseen=(1, 2))  # four steps a round, and one
    run("fedavg", rounds=3, network=SmallNetwork(), data=data, epochs=1, adapt_steps=(2, 6))
    adaptation = [(kind, round, clients) for kind, round, clients in calls if round > 3]
    assert adaptation == [
        ("train", 4, [1, 2]), ("train", 5, [2]), ("evaluate", 4, [1]), ("evaluate", 5, [2]),
        ("train", 5, [1]), ("train", 6, [2]), ("train", 7, [2]), ("train", 8, [2]), ("train", 9, [2]),
        ("evaluate", 5, [1]), ("evaluate", 9, [2]),
    ]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"threshold": 0.1}])
def test_users_of_a_factorization_are_measured_after_steps(options: dict[str, Any]) -> None:
    given = problem("fedmf")
    data = replace(given.data, unseen=(0, 2))
    settings = {"network": given.network, "data": data, "rounds": 1, "lr": 0.5}
    report = run("fedmf", options, adapt_steps=(1, 4), **settings).strategy.report
    assert sorted(report.adapted) == [0, 2]
    for metrics in report.adapted.values():
        names = [name for name in metrics if name.startswith("test-") and name.endswith("-after-4")]
        assert names
        assert {name.replace("-after-4", "-after-1") for name in names} <= metrics.keys()
    assert not report.evaluation_failures


def test_a_method_with_a_rule_of_its_own_says_that_steps_have_no_part_in_it(caplog: pytest.LogCaptureFixture) -> None:
    given = problem("pfedhn")
    data = replace(given.data, unseen=(1,))
    settings = {**asdict(given.training), "network": given.network, "data": data}
    report = run("pfedhn", given.options, adapt_steps=(1,), **settings).strategy.report
    assert "test-loss" in report.adapted[1]
    assert "split.adapt_steps=[1] has no part in PFedHN: its newcomers adapt by a rule of their own" in caplog.text
