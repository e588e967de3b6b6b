"""Group Personalized FL: within a group it is FedAvg, and what a client adapts is kept only where it is better."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpers.cohort import GroupedMean, Training, entries, tree
from fedpers.cohort.fold import GROUPS
from fedpers.errors import ConfigError, TrainingError
from fedpers.flower_private import server_identity
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import make_strategy
from tests.strategies.helpers import DATA, NETWORK, Finished, Values, run

GROUPED = replace(DATA, groups=(0, 1, 0, 1))
PLAIN: dict[str, Any] = {"personal_epochs": 0}


def group_network(result: Finished, group: int) -> Values:
    return {name: value[group] for name, value in entries(result.strategy.state[GROUPS]).items()}


def assert_equal(first: Values, second: Values) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-12, atol=1e-12, msg=name)


def test_the_first_rounds_are_fedavg() -> None:
    result = run("group_perfl", {**PLAIN, "global_rounds": 3}, rounds=3, data=GROUPED)
    assert_equal(result.arrays, run("fedavg", rounds=3, data=GROUPED).arrays)
    assert GROUPS not in result.strategy.state


@pytest.mark.parametrize("group", [0, 1])
def test_a_group_is_fedavg_over_its_clients(group: int) -> None:
    result = run("group_perfl", {**PLAIN, "global_rounds": 0}, rounds=3, data=GROUPED)
    others = tuple(client for client, g in enumerate(GROUPED.groups) if g != group)
    alone = run("fedavg", rounds=3, data=replace(DATA, unseen=others))
    assert_equal(group_network(result, group), alone.arrays)


def test_groups_start_from_the_network_of_all() -> None:
    result = run("group_perfl", {**PLAIN, "global_rounds": 2}, rounds=3, data=GROUPED)
    assert_equal(result.arrays, run("fedavg", rounds=2, data=GROUPED).arrays)
    assert not torch.equal(group_network(result, 0)["head.weight"], group_network(result, 1)["head.weight"])


def test_a_strong_pull_keeps_groups_at_the_network_of_all() -> None:
    far, near = (
        run("group_perfl", {**PLAIN, "global_rounds": 1, "group_mu": mu}, rounds=4, data=GROUPED, lr=0.05)
        for mu in (0.0, 10.0)
    )
    distances = [
        float((group_network(result, 0)["head.weight"] - result.arrays["head.weight"]).norm()) for result in (far, near)
    ]
    assert 0 < distances[1] < 0.5 * distances[0]


def test_without_samples_for_validation_the_last_pass_is_kept() -> None:
    nothing = [torch.zeros(0, dtype=torch.int64) for _ in range(4)]
    data = replace(GROUPED, validation=nothing)
    kept, last = (
        run("group_perfl", {"global_rounds": 1, "keep_best": best}, rounds=2, data=data) for best in (True, False)
    )
    for client in range(4):
        assert_equal(kept.predictors()[client], last.predictors()[client])


def test_passes_before_a_prediction_share_the_momentum() -> None:
    settings: dict[str, Any] = {"rounds": 1, "data": GROUPED, "momentum": 0.9, "shuffle": False}
    result = run("group_perfl", {"global_rounds": 1, "keep_best": False, "personal_epochs": 3}, **settings)
    tuned = run("fedavg_ft", {"finetune_epochs": 3}, **settings)
    for client in range(4):
        assert_equal(result.predictors()[client], tuned.predictors()[client])


def test_adapting_never_raises_the_validation_loss_and_rates_that_diverge_change_nothing() -> None:
    adapted, plain, wild = (
        run("group_perfl", {"global_rounds": 1, **options}, rounds=2, data=GROUPED).strategy.report
        for options in ({"personal_epochs": 3}, PLAIN, {"personal_rate": 1e6})
    )
    losses = [[report.clients[client]["validation-loss"] for client in range(4)] for report in (adapted, plain, wild)]
    assert all(after <= before for after, before in zip(losses[0], losses[1], strict=True))
    assert losses[0] != losses[1]
    assert losses[2] == losses[1]
    gradients = [row["adaptation-gradients"] for row in adapted.clients.values()]
    assert min(gradients) > 0


def test_unseen_clients_get_the_network_of_their_group() -> None:
    result = run("group_perfl", {**PLAIN, "global_rounds": 0}, rounds=1, data=replace(GROUPED, unseen=(3,)))
    sent = result.strategy.send(1, tree(result.arrays), [3])
    assert isinstance(sent, list)
    assert_equal(entries(sent[0]["arrays"]), group_network(result, 1))


def test_groups_come_from_a_file_an_option_or_the_data(tmp_path: Path) -> None:
    file = tmp_path / "groups.json"
    file.write_text(json.dumps(["b", "a", "b", "a"]))
    options: list[dict[str, Any]] = [{}, {"group_file": str(file)}, {"groups": (0, 1, 0, 1)}]
    runs = [
        run("group_perfl", {**PLAIN, "global_rounds": 0, **o}, rounds=1, data=GROUPED if not o else DATA)
        for o in options
    ]
    for result in runs[1:]:
        assert_equal(group_network(result, 0), group_network(runs[0], 0))


def test_shuffled_groups_keep_their_sizes_and_follow_from_the_seed() -> None:
    groups = (0,) * 6 + (1,) * 3 + (2,)
    dealt = [
        make_strategy("group_perfl", {"groups": groups, "shuffle_groups": True}, server={"seed": seed})[0]
        for seed in (1, 1, 2)
    ]
    shuffled = [strategy._group_of for strategy in dealt]  # type: ignore[attr-defined]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    assert sorted(shuffled[0]) == sorted(groups) == sorted(shuffled[2])


def test_what_is_no_grouping_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"strategy\.groups=None: expected the group of each client: .*label_groups"):
        run("group_perfl", {}, rounds=1, data=DATA)
    with pytest.raises(ConfigError, match=r"strategy\.groups=\[0, 1\]: expected 4 numbers >= 0, one for each client"):
        run("group_perfl", {"groups": (0, 1)}, rounds=1, data=DATA)
    with pytest.raises(ConfigError, match=r"strategy\.group_file=.*none\.json: expected a readable \.json file"):
        make_strategy("group_perfl", {"group_file": str(tmp_path / "none.json")})
    (tmp_path / "bad.json").write_text('{"a": 1}')
    with pytest.raises(ConfigError, match=r"bad\.json: expected a list with a number or a name for each client"):
        make_strategy("group_perfl", {"group_file": str(tmp_path / "bad.json")})
    with pytest.raises(ConfigError, match=r"expected null where strategy\.groups is given"):
        make_strategy("group_perfl", {"group_file": "x.json", "groups": (0, 1)})
    strategy, _ = make_strategy("group_perfl", {"global_rounds": 0})
    with pytest.raises(TrainingError, match="GroupPerFL knows no groups"):
        strategy.send(1, tree({}), [0])


def test_grouped_means_merge_in_any_order() -> None:
    rows = {client: tree({"w": torch.tensor([float(client), 1.0])}) for client in range(5)}
    group_of = {0: 0, 1: 2, 2: 0, 3: 2, 4: 1}
    whole, first, second = (GroupedMean(group_of) for _ in range(3))
    for client, values in rows.items():
        whole.add({"arrays": values}, client + 1.0, client)
        (first if client < 2 else second).add({"arrays": values}, client + 1.0, client)
    first.merge(second)
    for means in (whole.result(), first.result()):
        assert means[GROUPS]["group"].tolist() == [0, 1, 2]
        expected = [(0 * 1 + 2 * 3) / 4, 4.0, (1 * 2 + 3 * 4) / 6]
        torch.testing.assert_close(means["arrays"]["w"][:, 0], torch.tensor(expected))
    assert GroupedMean({}).result() == {}


def test_wrong_groups_are_refused_also_without_an_app() -> None:
    with pytest.raises(ConfigError, match=r"^strategy\.groups=\(-1, 0, 1, 1\): expected numbers >= 0\.$"):
        make_strategy("group_perfl", {"groups": (-1, 0, 1, 1)})
    strategy, update = make_strategy("group_perfl", {**PLAIN, "groups": (0, 1, 0), "global_rounds": 1})
    app = update.client_app(NETWORK, DATA)
    sentence = r"^GroupPerFL has 3 groups=\.\.\.: client 3 has none\.$"
    with server_identity(1), pytest.raises(TrainingError, match=sentence):
        strategy.start(LocalGrid(app, DATA.num_clients, workers=1), app.initial_arrays(), num_rounds=2)


@pytest.mark.parametrize(("setting", "value"), [("schedule", "linear"), ("proximal", 5.0)])
def test_settings_of_a_whole_training_are_refused_where_passes_are_compared(setting: str, value: object) -> None:
    training = Training(**{setting: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"^training\.{setting}={value}: expected .* with strategy\.keep_best and"):
        make_strategy("group_perfl", {"personal_epochs": 2}, training=training)
    for options in ({"personal_epochs": 1}, {"personal_epochs": 2, "keep_best": False}):
        make_strategy("group_perfl", options, training=training)
