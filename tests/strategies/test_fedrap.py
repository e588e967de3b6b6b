"""FedRAP, FedMF and PFedRec against plain loops over whole tables with autograd, and what belongs to ratings."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import flwr.app as flower
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedpers.cohort import Batch, Network, Training, entries, tree
from fedpers.cohort.sparse_rows import with_rows
from fedpers.data import RankingData
from fedpers.errors import ConfigError
from fedpers.flower_private import server_identity
from fedpers.models import Factorization
from fedpers.randomness import generator
from fedpers.records import from_record
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import FedRAPUpdate, make_strategy
from fedpers.strategies.fedrap import CURRICULA
from fedpers.tasks.ranking import hit_and_gain
from tests import reference
from tests.cohort.helpers import assert_same
from tests.problems import SmallNetwork, gaussian_data, ranking, ranking_data
from tests.strategies import helpers
from tests.strategies.helpers import SEED, run

GIVEN = ranking(torch.float64)
ITEMS = 40
SETTINGS = {"lr": 0.3, "epochs": 6, "batch_size": 16, "weight_decay": 1e-3, "lr_decay": 0.9}


def finished(
    method: str = "fedrap", rounds: int = 2, data: Any = GIVEN.data, groups: Any = None, **options: Any
) -> Any:
    """Train on the small problem."""
    values = {**SETTINGS, "groups": {"body": {"lr": 4.0}} if groups is None else groups}
    return run(method, options, rounds=rounds, network=GIVEN.network, data=data, **values)


# ------------------------------------------------------------------ a plain loop


def penalty(kind: str, rows: Tensor) -> Tensor:
    match kind:
        case "l1":
            return rows.abs().mean()
        case "l2":
            return rows.square().mean()
        case "nuc":
            return torch.linalg.matrix_norm(rows, "nuc")
        case "inf":
            return rows.abs().max()
    return rows.sum() * 0


def plain(
    rounds: int, start: Mapping[str, Tensor], *, drop_last: bool = False, **options: Any
) -> tuple[Tensor | None, list[dict[str, Tensor]]]:
    """Rounds over whole tables, one user after the other, with autograd."""
    lam, mu = options.get("lam", 0.1), options.get("mu", 0.1)
    kind, tables = options.get("regularizer", "l1"), options.get("tables", "both")
    paper, tolerance = options.get("variant") == "paper", options.get("tolerance", 1e-4)
    rates = {"head.weight": 0.3, "head.bias": 0.3, "personal.weight": 4.0, "common.weight": 4.0}
    decays = dict.fromkeys(rates, 1e-3)
    if tables == "both":
        rates["personal.weight"] /= 30
        decays["personal.weight"] *= 30
    common = start.get("common.weight")
    users = [{n: v.clone() for n, v in start.items() if n != "common.weight"} for _ in range(GIVEN.data.num_clients)]
    for r in range(1, rounds + 1):
        growth = math.tanh((r - 1) / 10) if paper else 1.0
        sent = []
        for u, state in enumerate(users):
            drawn = GIVEN.data.samples(u, SEED, r)
            items, y = torch.from_numpy(drawn % ITEMS), torch.from_numpy((drawn >= ITEMS).astype(float))
            params = {**state, **({} if common is None else {"common.weight": common.clone()})}
            t, total, count, former = 0, 0.0, 0, math.nan
            for epoch in range(6):
                order = generator(SEED, "batches", u, r, epoch).permutation(len(drawn))
                batches = np.split(order, range(16, len(order), 16))
                for batch in batches[:-1] if drop_last and 0 < len(order) % 16 < len(order) else batches:
                    values = {n: v.clone().requires_grad_() for n, v in params.items()}
                    at, target = items[batch], y[batch]
                    zero = torch.zeros(len(batch), 5, dtype=torch.float64)
                    d = values["personal.weight"][at] if tables != "common" else zero
                    c = values["common.weight"][at] if tables != "personal" else zero
                    chance = torch.sigmoid((d + c) @ values["head.weight"][0] + values["head.bias"])
                    loss = F.binary_cross_entropy(chance, target)
                    if paper:
                        d, c = (values.get(n, torch.zeros(1)) for n in ("personal.weight", "common.weight"))
                    if tables == "both":
                        loss = loss - growth * lam * (d - c).square().mean()
                    if tables != "personal":
                        loss = loss + growth * mu * penalty(kind, c)
                    grads = torch.autograd.grad(loss, list(values.values()))
                    for (name, value), grad in zip(params.items(), grads, strict=True):
                        rate = rates[name] * 0.9 ** (r - 1) * 0.95**t
                        params[name] = value - rate * (grad + decays[name] * value)
                    t += 1
                    total += float(loss) * len(batch)
                    count += len(batch)
                mean = total / count
                if abs(mean - former) < tolerance * abs(former):
                    break
                former = mean
            if common is not None:
                sent.append(params.pop("common.weight"))
            users[u] = params
        common = torch.stack(sent).mean(0) if sent else None
    return common, users


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tolerance": 0.02},
        {"lam": 0.0},
        {"regularizer": "l2", "mu": 0.3},
        {"regularizer": "nuc", "mu": 0.01},
        {"regularizer": "inf", "mu": 0.05},
        {"regularizer": "none"},
        {"tables": "personal"},
        {"tables": "common"},
        {"variant": "paper", "lam": 0.1, "mu": 0.3},
        {"variant": "paper", "lam": 0.1, "regularizer": "none"},
    ],
    ids=str,
)
def test_visited_rows_and_one_factor_are_the_whole_computation(options: dict[str, Any]) -> None:
    result = finished(**options)
    start = dict(result.app.template.items())
    common, users = plain(2, start, **options)
    assert_same(result.arrays, {} if common is None else {"common.weight": common})
    for user, state in enumerate(users):
        assert_same(result.state(user), {f"model/{name}": value for name, value in state.items()})


def test_without_the_tail_every_pass_has_samples_of_its_own() -> None:
    """A user with one whole batch leaves out others in each pass; one with less than a batch has the same in all."""
    assert {len(GIVEN.data.samples(user, SEED, 1)) // 16 for user in range(7)} >= {0, 1, 2}
    values = {**SETTINGS, "groups": {"body": {"lr": 4.0}}, "drop_last": True}
    for tolerance in (0.0, 0.02):
        result = run("fedrap", {"tolerance": tolerance}, rounds=2, network=GIVEN.network, data=GIVEN.data, **values)
        common, users = plain(2, dict(result.app.template.items()), drop_last=True, tolerance=tolerance)
        assert common is not None
        assert_same(result.arrays, {"common.weight": common})
        for user, state in enumerate(users):
            assert_same(result.state(user), {f"model/{name}": value for name, value in state.items()})


@pytest.mark.parametrize("curriculum", ["tanh", "sin", "square", "frac", "fixed"])
def test_the_paper_variant_stays_finite_at_the_shipped_rates(curriculum: str) -> None:
    rates = {"lr": 0.5, "epochs": 10, "batch_size": 2048, "weight_decay": 1e-4, "lr_decay": 0.97}
    options = {"variant": "paper", "curriculum": curriculum}
    network, data = Factorization(300, 32), ranking_data((9, 4, 12), items=300)
    trained = run("fedrap", options, rounds=8, network=network, data=data, groups={"body": {"lr": 200.0}}, **rates)
    assert not trained.strategy.report.failures
    assert all(value.isfinite().all() and value.abs().max() < 1e3 for value in trained.arrays.values())


def test_curricula_are_those_of_the_authors_engine() -> None:
    values = {name: [factor(i) for i in (0, 4, 5, 9, 10)] for name, factor in CURRICULA.items()}
    assert values["fixed"] == values["constant"] == [1.0] * 5
    assert values["square"] == [1, 1, 0, 0, 1]
    assert values["frac"] == pytest.approx([1, 1 / 5, 1 / 6, 1 / 10, 1 / 11])
    assert values["sin"] == pytest.approx([0.5, *((math.sin(i / 10) + 1) / 2 for i in (4, 5, 9, 10))])
    assert values["tanh"] == pytest.approx([0, *(math.tanh(i / 10) for i in (4, 5, 9, 10))])


@pytest.mark.parametrize(
    ("protocol", "groups", "share"),
    [
        ("clean", {"body": {"lr": 4.0}}, 1 / 30),
        ("symmetric", {"body": {"lr": 4.0}}, 1 / 30),
        ("official", {"body": {"lr": 4.0}}, 1.0),
        ("clean", {"common": {"lr": 4.0}, "personal": {"lr": 1.0}}, 1 / 4),
        ("clean", {"body": {"lr": 8.0}, "common": {"lr": 4.0}}, 1 / 30),
    ],
)
def test_the_rate_of_the_personal_table(protocol: str, groups: Any, share: float) -> None:
    data = ranking_data((9,), protocol=protocol)
    options, one_step = {"lam": 0.0, "mu": 0.0}, {"lr": 0.3, "epochs": 1, "batch_size": 0}
    trained = run("fedrap", options, rounds=1, network=GIVEN.network, data=data, groups=groups, **one_step)
    first = trained.app.template
    moved = trained.state(0)["model/personal.weight"] - first["personal.weight"]
    assert moved.abs().max() > 0
    common = trained.arrays["common.weight"] - first["common.weight"]
    assert torch.allclose(moved, share * common, rtol=1e-9, atol=1e-12)  # both have the same gradient


def test_samples_of_a_round_are_drawn_once_for_all_passes() -> None:
    with mock.patch.object(RankingData, "samples", autospec=True, side_effect=RankingData.samples) as samples:
        finished(rounds=2, tolerance=0.0)
    assert samples.call_count == 2 * GIVEN.data.num_clients


@pytest.mark.parametrize(
    ("groups", "moved"),
    [
        ({"body": {"lr": 0.0}}, {"head"}),
        ({"head": {"lr": 0.0}}, {"personal", "common"}),
        ({"all": {"lr": 0.0}}, set()),
        ({"all": {"lr": 0.0}, "body": {"lr": 2.0}}, {"personal", "common"}),
        ({"body": {"lr": 2.0}, "all": {"lr": 0.0}}, set()),  # later entries win
        ({"personal": {"lr": 0.0}}, {"head", "common"}),
        ({"common.weight": {"lr": 0.0}}, {"head"}),  # the personal rate is a share of it
        ({"common.weight": {"lr": 0.0}, "personal": {"lr": 1.0}}, {"head", "personal"}),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),
)
def test_groups_are_honoured(groups: dict[str, Any], moved: set[str]) -> None:
    trained = finished(rounds=1, groups=groups)
    first = entries(trained.app.template)
    kept = {name: trained.state(2).get(f"model/{name}") for name in first}
    after = {**{name: value for name, value in kept.items() if value is not None}, **trained.arrays}
    assert after.keys() == first.keys()
    same = {name for name in after if torch.allclose(after[name], first[name], rtol=1e-12, atol=1e-12)}
    assert {name.partition(".")[0] for name in after.keys() - same} == moved


@pytest.mark.parametrize("group", ["body.weight", "table", "b*"])
def test_groups_that_name_nothing_are_refused(group: str) -> None:
    _, update = make_strategy("fedrap", training=Training(**{**SETTINGS, "groups": {group: {"lr": 1.0}}}))
    with pytest.raises(ConfigError, match=rf"^training\.groups={re.escape(group)}: expected one of"):
        update.client_app(GIVEN.network, GIVEN.data)


def test_rows_nobody_visited_only_decay() -> None:
    groups = {"body": {"lr": 4.0}, "common": {"weight_decay": 0.01}}
    trained = finished(rounds=1, groups=groups, lam=0.3, tolerance=0.0, data=ranking_data((9,)))
    first = trained.app.template
    drawn = trained.app.data.samples(0, SEED, 1)
    steps = 6 * -(-len(drawn) // 16)
    rest = np.setdiff1d(np.arange(ITEMS), drawn % ITEMS)
    assert len(rest)
    personal = trained.state(0)["model/personal.weight"]
    tables = {"personal.weight": (personal, 4.0 / 30, 0.3), "common.weight": (None, 4.0, 0.01)}
    for name, (table, rate, decay) in tables.items():
        factor = math.prod(1 - rate * 0.95**t * decay for t in range(steps))
        after = trained.arrays[name] if table is None else table
        assert torch.allclose(after[rest], factor * first[name][rest], rtol=1e-12)


@pytest.mark.parametrize(
    ("groups", "rate", "decay"),
    [
        ({"body": {"lr": 4.0}}, 4.0 / 30, 1e-3 * 30),
        ({"body": {"lr": 4.0}, "personal": {"weight_decay": 0.0}}, 4.0 / 30, 0.0),
        ({"body": {"lr": 4.0}, "personal": {"lr": 2.0, "weight_decay": 0.5}}, 2.0, 0.5),
    ],
)
def test_a_group_of_the_personal_table_counts(groups: Any, rate: float, decay: float) -> None:
    trained = finished(rounds=1, groups=groups, tolerance=0.0, data=ranking_data((9,)))
    sampled = trained.app.data.samples(0, SEED, 1)
    rest = np.setdiff1d(np.arange(ITEMS), sampled % ITEMS)
    steps = 6 * -(-len(sampled) // 16)
    factor = math.prod(1 - rate * 0.95**t * decay for t in range(steps))
    table = trained.state(0)["model/personal.weight"]
    assert torch.allclose(table[rest], factor * trained.app.template["personal.weight"][rest], rtol=1e-12)


def test_fedmf_is_fedrap_without_what_it_adds() -> None:
    bare = {"tables": "common", "lam": 0.0, "mu": 0.0, "tolerance": 0.0, "step_decay": 1.0}
    one, other = finished("fedmf"), finished("fedrap", **bare)
    assert_same(one.arrays, {"body.weight": other.arrays["common.weight"]})
    assert_same(one.state(2), other.state(2))
    with pytest.raises(ConfigError, match=r"strategy\.lam=0\.1: expected one of the settings of fedmf"):
        make_strategy("fedmf", {"lam": 0.1})


def test_a_round_of_the_official_curriculum_is_the_same_in_every_shape() -> None:
    first = finished(curriculum="tanh")
    assert_same(first.arrays, finished(curriculum="square").arrays)
    with pytest.raises(AssertionError):
        assert_same(first.arrays, finished(variant="paper", curriculum="square").arrays)


# ------------------------------------------------------------------ on the way


def test_small_entries_are_not_sent_and_counted() -> None:
    whole, sparse = finished(rounds=3, mu=3.0), finished(rounds=3, mu=3.0, threshold=0.05)
    table = sparse.arrays["common.weight"]
    assert 0 < int((table == 0).sum()) < table.numel()
    assert float(table[table != 0].abs().min()) > 0.05
    report = sparse.strategy.report
    assert report.extra["sent_share"] == pytest.approx(float((table != 0).double().mean()))
    assert report.bytes_up < whole.strategy.report.bytes_up
    down = int((sparse_table(sparse, 2) != 0).sum())
    assert report.bytes_down == GIVEN.data.num_clients * (down * (8 + 4) + 2 * 8)


def sparse_table(result: Any, round: int) -> Tensor:
    """The server's table after fewer rounds of the same run."""
    table: Tensor = finished(rounds=round, mu=3.0, threshold=0.05).arrays["common.weight"]
    assert result.strategy.client_update.threshold == 0.05
    return table


def test_a_threshold_below_every_entry_changes_nothing() -> None:
    assert_same(finished().arrays, finished(threshold=1e-300).arrays)


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"rows": torch.tensor([40], dtype=torch.int32)}, r"'rows' name items outside 0\.\.39"),
        ({"rows": torch.tensor([3, 3], dtype=torch.int32)}, "'rows' do not ascend"),
        ({"rows": torch.tensor([1, 2], dtype=torch.int32)}, r"'values' has shape \[1, 5\], expected \[2, 5\]"),
        ({"values": torch.zeros(1, 4, dtype=torch.float64)}, r"'values' has shape \[1, 4\], expected \[-1, 5\]"),
        ({"values": torch.full((1, 5), math.nan, dtype=torch.float64)}, "values that are not finite"),
        ({"more": torch.zeros(2)}, "'arrays/more'"),
    ],
)
def test_a_reply_that_is_no_part_of_the_table_is_left_out(record: dict[str, Tensor], sentence: str) -> None:
    strategy, update = make_strategy("fedrap", training=Training(**SETTINGS))

    class Wrong(FedRAPUpdate):
        def encode(self, records: dict[str, Any]) -> dict[str, Any]:
            sent = {"rows": torch.tensor([3], dtype=torch.int32), "values": torch.zeros(1, 5, dtype=torch.float64),
                    "factor": torch.tensor(1.0, dtype=torch.float64)}  # fmt: skip
            return {"arrays": tree({**sent, **record})}

    app = Wrong(training=update.training).client_app(GIVEN.network, GIVEN.data)
    grid = LocalGrid(app, 7, clients_at_once=7, workers=1)
    strategy.begin()
    with server_identity(1):
        replies = grid.send_and_receive(strategy.configure_train(1, app.initial_arrays(), flower.ConfigRecord(), grid))
        with pytest.raises(Exception, match="0 of 7 sampled clients sent a usable reply"):
            strategy.aggregate_train(1, replies)
    assert len(strategy.report.failures) == 7
    assert re.search(sentence, strategy.report.failures[0])


@pytest.mark.parametrize(
    ("method", "options"),
    [("fedmf", {}), ("fedmf", {"threshold": 0.1}), ("fedrap", {}), ("fedrap", {"tables": "personal"})],
    ids=str,
)
def test_unseen_users_are_measured_with_the_table_their_rows_make(method: str, options: dict[str, Any]) -> None:
    unseen = (2, 4, 6)
    data = replace(ranking_data((12,) * 7), unseen=unseen)
    trained = finished(method, data=data, **options)
    strategy, app = trained.strategy, trained.app
    assert strategy.report.evaluation_failures == {}
    for user in unseen:
        cohort = app.cohort([user], app.initial_state.expand(1).clone(), {"server-round": trained.round + 1})
        received = {"arrays": tree(trained.arrays)}
        reply = app.update.train(cohort, received, {})
        records = {name: tree({n: v[0] for n, v in entries(t).items()}) for name, t in reply.records.items()}
        message = strategy.fold().decode(app.update.encode(records), user)
        if message:
            received = {"arrays": tree({n: with_rows(v, message["arrays"]) for n, v in trained.arrays.items()})}
        state = tree({"model": reply.state["model"], "trained": cohort.trainings + 1}, 1)
        after = app.cohort([user], state, {"server-round": trained.round + 1})
        expected = app.update.evaluate(after, received, {})[0]
        for name in ("validation-hr@3", "test-ndcg@3"):
            assert strategy.report.adapted[user][name] == pytest.approx(expected[name]), (user, name)
    assert strategy.report.adapted != strategy.report.unseen


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize("method", ["fedrap", "fedmf", "fedncf", "pfedrec", "no_learning"])
def test_pictures_are_no_ratings(method: str) -> None:
    _, update = make_strategy(method)
    with pytest.raises(ConfigError, match=r"dataset=gaussian: expected ratings, e\.g\. dataset=synthetic_ratings"):
        update.client_app(SmallNetwork(), gaussian_data())


@pytest.mark.parametrize("method", ["fedrap", "fedmf", "fedncf", "pfedrec"])
def test_another_network_is_refused(method: str) -> None:
    _, update = make_strategy(method)
    with pytest.raises(ConfigError, match="model=SmallNetwork: expected factorization"):
        update.client_app(SmallNetwork(), ranking_data())


def test_a_table_that_is_too_short_is_refused() -> None:
    with pytest.raises(ConfigError, match="model=Factorization: expected a network that takes samples"):
        make_strategy("local")[1].client_app(Factorization(1), ranking_data())


@pytest.mark.parametrize(
    ("options", "training", "sentence"),
    [
        ({"regularizer": "l3"}, {}, r"strategy\.regularizer=l3: expected one of inf, l1, l2, none, nuc"),
        ({"tolerance": -1.0}, {}, r"strategy\.tolerance=-1\.0: expected a number >= 0"),
        ({"step_decay": 0.0}, {}, r"strategy\.step_decay=0\.0: expected a number > 0 and <= 1"),
        ({"tables": "none"}, {}, r"strategy\.tables=none: expected one of both, common, personal"),
        ({"variant": "paper", "regularizer": "nuc"}, {}, r"strategy\.regularizer=nuc: expected l1 or none"),
        ({}, {"momentum": 0.9}, r"training\.momentum=0\.9: expected 0\.0 for this method"),
        ({}, {"steps": 3}, r"training\.steps=3: expected null for this method"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], training: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make_strategy("fedrap", options, training=Training(**training))


# ------------------------------------------------------------------ rows beside it


@pytest.mark.slow
def test_no_learning_wins_where_negatives_spare_the_held_out_item_and_guesses_elsewhere() -> None:
    sizes = (8,) * 60
    scores = {}
    for protocol in ("official", "clean"):
        result = run("no_learning", {}, rounds=25, network=GIVEN.network, data=ranking_data(sizes, protocol=protocol))
        scores[protocol] = np.mean([m["test-hr@3"] for m in result.strategy.report.clients.values()])
    assert scores["official"] > 0.95
    assert 0.05 < scores["clean"] < 0.45  # chance: 3 of 13


def test_no_learning_counts_what_was_drawn() -> None:
    result = run("no_learning", {}, rounds=2, network=GIVEN.network, data=GIVEN.data)
    drawn = np.concatenate([GIVEN.data.samples(3, SEED, r) for r in (1, 2)])
    expected = np.bincount(drawn[drawn < ITEMS], minlength=ITEMS)
    assert result.state(3)["model/drawn"].tolist() == expected.tolist()
    assert result.arrays == {}


def test_pfedrec_takes_two_steps_per_batch_and_predicts_with_its_own_table() -> None:
    result = run(
        "pfedrec", {"item_rate": 0.5}, rounds=2, network=GIVEN.network, data=GIVEN.data, lr=0.2, epochs=1, batch_size=16
    )
    start = {name: value.clone() for name, value in result.app.template.items()}
    table, heads, trained = start["body.weight"], [start] * 7, [{}] * 7
    for r in (1, 2):
        sent = []
        for u in range(7):
            values = {**heads[u], "body.weight": table}
            drawn = GIVEN.data.samples(u, SEED, r)
            order = generator(SEED, "batches", u, r, 0).permutation(len(drawn))
            for batch in np.split(order, range(16, len(order), 16)):
                items, y = torch.from_numpy(drawn[batch] % ITEMS), torch.from_numpy((drawn[batch] >= ITEMS) * 1.0)
                for names, rate in ((("head.weight", "head.bias"), 0.2), (("body.weight",), 0.2 * 0.5 * ITEMS)):
                    leaf = {n: v.clone().requires_grad_() for n, v in values.items()}
                    logit = leaf["body.weight"][items] @ leaf["head.weight"][0] + leaf["head.bias"]
                    grads = torch.autograd.grad(F.binary_cross_entropy_with_logits(logit, y), [leaf[n] for n in names])
                    values = {**values, **{n: values[n] - rate * g for n, g in zip(names, grads, strict=True)}}
            heads[u] = trained[u] = values
            sent.append(values["body.weight"])
        table = torch.stack(sent).mean(0)
    assert_same(result.arrays, {"body.weight": table})
    for user, values in enumerate(result.predictors()):
        assert_same(values, trained[user])


def test_a_user_of_pfedrec_that_has_not_trained_predicts_with_the_received_table() -> None:
    result = run("pfedrec", {"item_rate": 0.5}, rounds=2, fraction=0.3, network=GIVEN.network, data=GIVEN.data, lr=0.2)
    trained = {user for r in (1, 2) for user in helpers.drawn(r, 0.3, GIVEN.data)}
    assert 0 < len(trained) < 7
    start = {name: value.clone() for name, value in result.app.template.items()}
    table = result.arrays["body.weight"]
    assert not torch.equal(table, start["body.weight"])
    for user, values in enumerate(result.predictors()):
        if user in trained:
            assert_same(values, {name: result.state(user)[f"model/{name}"] for name in start})
            assert not torch.equal(values["body.weight"], table)
        else:
            assert_same(values, {**start, "body.weight": table})


def test_an_unseen_user_of_pfedrec_is_measured_with_the_received_table() -> None:
    unseen = (2, 4, 6)
    data = replace(ranking_data((12,) * 7), unseen=unseen)
    result = run("pfedrec", {"item_rate": 0.5}, rounds=3, network=GIVEN.network, data=data, lr=0.3, batch_size=16)
    report = result.strategy.report
    head, table = result.app.template, result.arrays["body.weight"]
    for user in unseen:
        for part in ("validation", "test"):
            items = data.x[data.part(part)[user]]  # type: ignore[arg-type]
            scores = table[items] @ head["head.weight"][0] + head["head.bias"]
            expected = hit_and_gain([torch.sigmoid(scores.float())], 3)
            for name in ("hr@3", "ndcg@3"):
                assert report.unseen[user][f"{part}-{name}"] == pytest.approx(float(expected[name])), (user, part)
    assert sorted(report.adapted) == list(unseen)
    assert report.adapted != report.unseen


def test_in_the_official_variant_of_pfedrec_such_a_user_predicts_with_the_initial_table() -> None:
    options = {"item_rate": 0.5, "variant": "official"}
    trained = run("pfedrec", options, rounds=2, fraction=0.3, network=GIVEN.network, data=GIVEN.data, lr=0.2)
    drawn = {user for r in (1, 2) for user in helpers.drawn(r, 0.3, GIVEN.data)}
    first = dict(entries(trained.app.template))
    for user, values in enumerate(trained.predictors()):
        kept = {name: trained.state(user)[f"model/{name}"] for name in first}
        assert_same(values, kept if user in drawn else first)


def test_in_the_official_variant_of_pfedrec_a_saturated_score_has_no_gradient() -> None:
    network = ranking().network
    first = {**network.state_dict(), "head.weight": torch.zeros(1, 5)}
    slopes, losses = {}, {}
    for variant in ("default", "official"):
        _, update = make_strategy("pfedrec", {"variant": variant})
        app = update.client_app(network, GIVEN.data)
        for bias in (-120.0, 0.3):
            leaf = torch.tensor([bias], requires_grad=True)
            batch = Batch(torch.tensor([3]), torch.tensor([1.0]), task=GIVEN.data.task)
            loss = update.loss(Network(app.module, {**first, "head.bias": leaf}), batch)
            losses[variant, bias] = float(loss)
            slopes[variant, bias] = float(torch.autograd.grad(loss, leaf)[0])
    assert slopes["default", -120.0] == pytest.approx(-1.0)
    assert slopes["official", -120.0] == 0.0
    assert losses["default", -120.0] == pytest.approx(120.0)
    assert losses["official", -120.0] == pytest.approx(100.0)
    assert slopes["official", 0.3] == pytest.approx(slopes["default", 0.3])


# ------------------------------------------------------------------ traces


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "case", "array", "change"),
    [
        ("fedrap", "b_six_users", "r1/u2/after/item_personality.weight", 1e-3),
        ("fedrap", "c_early_stop", "r0/u0/loss", 1e-2),
        ("fedrap", "f_evaluation", "eval/hr", 1e-3),
        ("fedrap", "i_split", "split/test", 1),
        ("pfedrec", "c_batches", "r1/u2/order", 1),
        ("pfedrec", "d_partial", "r1/u3/after/affine_output.bias", 1e-3),
        ("pfedrec", "e_weight_decay", "r0/server/embedding_item.weight", 1e-3),
        ("pfedrec", "f_evaluation", "eval/params/u5/embedding_item.weight", 1e-3),
        ("pfedrec", "g_split", "split/val", 1),
    ],
)
def test_a_changed_trace_is_noticed(method: str, case: str, array: str, change: float, tmp_path: Path) -> None:
    copy = tmp_path / method / f"{case}.npz"
    copy.parent.mkdir()
    shutil.copy(reference.HERE / method / f"{case}.npz", copy)
    assert reference.main(["--root", str(tmp_path), method]) == 0
    with np.load(copy) as file:
        arrays = dict(file)
    value = np.array(arrays[array])
    if array.endswith("/order"):
        value[0] = np.roll(value[0], 1)
    else:
        value.flat[-2 if "split" in array else -1] += np.asarray(change, dtype=value.dtype)
    np.savez(copy, **{**arrays, array: value})
    assert reference.main(["--root", str(tmp_path), method]) == 1


def test_arrays_are_the_common_table_alone() -> None:
    _, update = make_strategy("fedrap")
    app = update.client_app(GIVEN.network, GIVEN.data)
    assert list(from_record(app.initial_arrays()).keys()) == ["common.weight"]
    assert sorted(app.initial_state["model"].keys()) == ["head.bias", "head.weight", "personal.weight"]
