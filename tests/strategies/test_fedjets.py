"""FedJETs against plain loops written from the paper, its properties, its errors; and the rows beside it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import flwr.app as flower
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpers.app import _main
from fedpers.app.compose import composed
from fedpers.cohort import Cohort, Reply, Training, entries, tree
from fedpers.data import DatasetConfig, PartitionConfig, SplitConfig, load_federated
from fedpers.data.federated import FederatedData
from fedpers.errors import ConfigError
from fedpers.flower_private import server_identity
from fedpers.models import ModelConfig, build_model
from fedpers.records import ARRAYS, from_record
from fedpers.run import prepare_run
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import (
    EnsembleUpdate,
    FedJETs,
    FedJETsUpdate,
    PretrainedUpdate,
    Received,
    make_strategy,
)
from fedpers.strategies.fedjets import SELECTED, SLOTS, ExpertMean
from fedpers.tasks import Regression
from tests import equivalence
from tests.cohort.helpers import assert_same
from tests.problems import SmallNetwork, gaussian_data
from tests.runtime.wire import WireGrid
from tests.strategies.helpers import SEED, Finished, Values, average, drawn, initial, passes, run, sgd, sizes

# Batches of 5 leave 0, 4, 3, 2, 3, 2 and 4 samples; client 6 never trains.
DATA = replace(gaussian_data((20, 9, 13, 7, 18, 12, 14), dtype=torch.float64), unseen=(6,))
NETWORK = SmallNetwork(dropout=0.0).double()
OPTIONS: dict[str, Any] = {"experts": 3, "top_k": 2, "gate_hidden": 5, "gate_lr": 0.05}


def jets(options: Mapping[str, Any] | None = None, *, data: FederatedData = DATA, **settings: Any) -> Finished:
    return run("fedjets", {**OPTIONS, **(options or {})}, network=NETWORK, data=data, **settings)


# --------------------------------------------------------------- plain loops


def gate_of(values: Values) -> nn.Sequential:
    hidden, width = values["gate.0.weight"].shape
    gate = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, len(values["gate.2.bias"]))).double()
    gate.load_state_dict({n.removeprefix("gate."): v.clone() for n, v in values.items() if n.startswith("gate.")})
    return gate


def expert_of(values: Values, i: int) -> SmallNetwork:
    network = copy.deepcopy(NETWORK)
    before = f"experts.{i}."
    network.load_state_dict({n.removeprefix(before): v.clone() for n, v in values.items() if n.startswith(before)})
    return network


@torch.no_grad()
def embedded(x: Tensor) -> Tensor:
    out: Tensor = copy.deepcopy(NETWORK).eval().body(x)
    return out


def chosen(values: Values, x: Tensor, top_k: int) -> list[int]:
    with torch.no_grad():
        scores = torch.softmax(gate_of(values)(embedded(x)), 1).mean(0)
    return sorted(scores.argsort(descending=True)[:top_k].tolist())


def gate_input(client: int, data: FederatedData = DATA) -> Tensor:
    """What a client chooses experts by."""
    return data.x[data.test[client] if client in data.unseen else data.train[client]]


def mixture_loss(gate: nn.Module, experts: Sequence[nn.Module], held: list[int], x: Tensor, y: Tensor, mixture: str):  # type: ignore[no-untyped-def]
    g = torch.softmax(gate(embedded(x)), 1)[:, held]
    if mixture != "unnormalized":
        g = g / g.sum(1, keepdim=True)
    if mixture == "logits":
        return F.cross_entropy(sum(g[:, [j]] * expert(x) for j, expert in enumerate(experts)), y)
    p = sum(g[:, [j]] * torch.softmax(expert(x), 1) for j, expert in enumerate(experts))
    assert isinstance(p, Tensor)
    return -torch.log(p[torch.arange(len(y)), y]).mean()


def train_normal(
    values: Values, held: list[int], client: int, round: int, mixture: str, gate_lr: float, epochs: int = 2
) -> Values:
    gate, experts = gate_of(values), [expert_of(values, i).train() for i in held]
    groups: list[dict[str, Any]] = [
        {"params": gate.parameters(), "lr": gate_lr},
        {"params": [p for expert in experts for p in expert.parameters()]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.5)
    for x, y in passes(client, epochs, round, data=DATA):
        optimizer.zero_grad()
        mixture_loss(gate, experts, held, x, y, mixture).backward()
        optimizer.step()
    out = {f"gate.{n}": v.detach() for n, v in gate.state_dict().items()}
    for i, expert in zip(held, experts, strict=True):
        out.update({f"experts.{i}.{n}": v.detach() for n, v in expert.state_dict().items()})
    return out


def train_anchor(values: Values, i: int, client: int, round: int, gate_lr: float) -> Values:
    """Two trainings that know nothing of each other."""
    gate, expert = gate_of(values), expert_of(values, i).train()
    of_expert = torch.optim.SGD(expert.parameters(), lr=0.1, momentum=0.5)
    for x, y in passes(client, 2, round, data=DATA):
        of_expert.zero_grad()
        torch.autograd.backward(F.cross_entropy(expert(x), y))
        of_expert.step()
    of_gate = torch.optim.SGD(gate.parameters(), lr=gate_lr, momentum=0.5)
    for x, _ in passes(client, 2, round, data=DATA):
        of_gate.zero_grad()
        torch.autograd.backward(F.cross_entropy(gate(embedded(x)), torch.full((len(x),), i)))
        of_gate.step()
    out = {f"gate.{n}": v.detach() for n, v in gate.state_dict().items()}
    return {**out, **{f"experts.{i}.{n}": v.detach() for n, v in expert.state_dict().items()}}


def merged(values: Values, parts: list[Values], weights: list[float]) -> Values:
    out = dict(values)
    for name in values:
        holders = [(part, weight) for part, weight in zip(parts, weights, strict=True) if name in part]
        if holders:
            out.update(average([{name: part[name]} for part, _ in holders], [weight for _, weight in holders]))
    return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mixture": "unnormalized", "weighting": "uniform"},
        {"mixture": "logits", "anchor_share": 0.25},
        {"top_k": 1, "gate_lr": None},
        {"top_k": 3, "anchor_share": 0.0},
        {"init": "common"},
    ],
    ids=str,
)
def test_training_and_prediction_follow_the_paper(options: dict[str, Any]) -> None:
    finished = jets(options, fraction=0.7, momentum=0.5)
    server = entries(from_record(finished.app.initial_arrays()))
    settings = {**OPTIONS, "mixture": "probabilities", "weighting": "samples", **options}
    rate = settings["gate_lr"] or 0.1
    kinds = set()
    for r in (1, 2, 3):
        parts = []
        sampled = finished.strategy.sample(r)
        for client in sampled:
            if client < 3:
                parts.append(train_anchor(server, client, client, r, rate))
            else:
                held = chosen(server, gate_input(client), settings["top_k"])
                parts.append(train_normal(server, held, client, r, settings["mixture"], rate))
            kinds.add(client < 3)
        weights = sizes(sampled, DATA) if settings["weighting"] == "samples" else [1.0] * len(sampled)
        server = merged(server, parts, weights)
    assert kinds == ({False} if options.get("anchor_share") == 0 else {True, False})
    assert finished.arrays.keys() == server.keys()
    assert_same(finished.arrays, server)
    measured = {**finished.strategy.report.clients, **finished.strategy.report.unseen}
    assert sorted(measured) == list(range(7))
    for client, metrics in measured.items():
        held = chosen(server, gate_input(client), settings["top_k"])
        x, y = DATA.x[DATA.test[client]], DATA.y[DATA.test[client]]
        experts = {i: expert_of(server, i).eval() for i in held}
        with torch.no_grad():
            gates = gate_of(server)(embedded(x))
            right = 0
            for k in range(len(x)):
                best = max(held, key=lambda i, k=k: float(gates[k, i]))  # type: ignore[misc]
                right += int(experts[best](x[[k]]).argmax() == y[k])
        assert metrics["test-accuracy"] == right / len(x)


def test_experts_start_from_values_of_their_own_or_from_the_common_expert() -> None:
    data = gaussian_data((20, 9, 13, 7), dtype=torch.float64)
    app = FedJETsUpdate(**OPTIONS).client_app(NETWORK, data, seed=1)
    assert entries(app.initial_state) == {}  # clients keep nothing
    for init in ("random", "common"):
        app = FedJETsUpdate(**OPTIONS, init=init).client_app(NETWORK, data, seed=1)
        arrays = entries(from_record(app.initial_arrays()))
        assert {name.split(".")[1] for name in arrays if name.startswith("experts.")} == {"0", "1", "2"}
        heads = [arrays[f"experts.{i}.head.weight"] for i in range(3)] + [NETWORK.head.weight.detach()]
        alike = [torch.equal(a, b) for k, a in enumerate(heads) for b in heads[:k]]
        assert alike == [init == "common"] * 6
        again = FedJETsUpdate(**OPTIONS, init=init).client_app(NETWORK, data, seed=1)
        assert_same(entries(from_record(again.initial_arrays())), arrays)


# ----------------------------------------------------------------- properties


def test_experts_nobody_held_stay_bit_identical() -> None:
    finished = jets({"experts": 5, "anchor_share": 0.0}, rounds=1)
    start = entries(from_record(finished.app.initial_arrays()))
    assert finished.strategy.sample(1) == [5]
    held = chosen(start, gate_input(5), 2)
    for name, value in start.items():
        stays = name.startswith("experts.") and int(name.split(".")[1]) not in held
        assert torch.equal(finished.arrays[name], value) == stays, name


def test_a_round_has_as_many_anchors_as_asked_for() -> None:
    data = gaussian_data((6,) * 40)
    grid = LocalGrid(FedJETsUpdate().client_app(SmallNetwork(), data), 40)
    for fraction, share, anchors, others in (
        (0.25, 0.5, 5, 5), (0.25, 0.0, 0, 10), (0.25, 0.3, 3, 7), (0.1, 0.5, 2, 2), (0.5, 0.5, 5, 14), (0.25, 1, 5, 5),
        (1.0, 0.5, 5, 33), (1.0, 0.0, 0, 33), (0.05, 0.9, 1, 1), (0.02, 0.0, 0, 1), (0.02, 1.0, 1, 0),
    ):  # fmt: skip
        strategy = FedJETs(fraction=fraction, anchor_share=share, unseen=(1, 39))
        with server_identity(1):
            strategy.nodes(grid)
        seen = set()
        for r in range(1, 60):
            sampled = strategy.sample(r)
            assert sampled == sorted(set(sampled))
            assert len([c for c in sampled if c in (0, 2, 3, 4, 5)]) == anchors
            assert len(sampled) == anchors + others
            assert not {1, 39} & set(sampled)
            seen.update(sampled)
        if anchors and others >= 5:
            assert seen == set(range(40)) - {1, 39}
    alone = FedJETs(fraction=0.02, anchor_share=0.5)
    with server_identity(1):
        alone.nodes(grid)
    with pytest.raises(ConfigError, match=r"^fraction=0.02: expected a share of at least two clients a round"):
        alone.sample(1)
    grid.close()


def message(finished: Finished, client: int, arrays: Values, held: dict[str, list[int]], kind: str = "train") -> Reply:
    app = finished.app
    cohort = app.cohort([client], app.initial_state.expand(1).clone(), {"server-round": 1})
    received = {
        ARRAYS: tree(arrays),
        **({"held": tree({n: torch.tensor(v) for n, v in held.items()})} if held else {}),
    }
    reply = getattr(app.update, kind)(cohort, received, {"server-round": 1})
    assert isinstance(reply, Reply)
    return reply


def test_anchors_touch_only_their_expert_and_the_gate() -> None:
    finished = jets(rounds=1)
    assert isinstance(finished.strategy, FedJETs)
    finished.strategy._anchors, finished.strategy._held = {0}, {0: (2,), 3: (0, 1)}
    sent = finished.strategy.send(1, tree(finished.arrays), [0, 3])
    assert isinstance(sent, list)
    anchor, other = sent
    experts = {n for n in entries(anchor[ARRAYS]) if n.startswith("experts.")}
    assert all(torch.equal(anchor[ARRAYS][n], finished.arrays[n.replace("experts.0", "experts.2")]) for n in experts)
    assert anchor["held"]["anchor"].tolist() == [2]
    assert other["held"]["slots"].tolist() == [0, 1]
    reply = message(finished, 0, entries(anchor[ARRAYS]), {"anchor": [2]})
    answered = entries(reply.records[ARRAYS])
    assert answered.keys() == entries(anchor[ARRAYS]).keys()
    assert not any(n.startswith("experts.1") for n in answered)
    assert reply.state is None

    # the gate's training does not depend on the expert, nor the expert's on the gate
    changed = {n: v * 1.3 if n.startswith("gate.") else v for n, v in entries(anchor[ARRAYS]).items()}
    other_gate = entries(message(finished, 0, changed, {"anchor": [2]}).records[ARRAYS])
    assert all(torch.equal(other_gate[n], answered[n]) for n in experts)
    changed = {n: v * 1.3 if n.endswith("weight") and n in experts else v for n, v in entries(anchor[ARRAYS]).items()}
    other_expert = entries(message(finished, 0, changed, {"anchor": [2]}).records[ARRAYS])
    assert all(torch.equal(other_expert[n], answered[n]) for n in answered if n.startswith("gate."))
    assert not torch.equal(other_expert["experts.0.head.weight"], answered["experts.0.head.weight"])


def test_the_way_to_a_prediction_uses_no_labels_and_one_expert_for_each_sample() -> None:
    finished = jets({"experts": 5})
    values = finished.arrays
    gate = {n: v for n, v in values.items() if n.startswith("gate.")}
    for client in (2, 6):
        asked = message(finished, client, gate, {}, "query_select").records[SELECTED][SLOTS][0].tolist()
        assert asked == chosen(values, gate_input(client), 2)
        shuffled = copy.copy(finished)
        shuffled.app = copy.copy(finished.app)
        shuffled.app.data = replace(finished.app.data, y=(finished.app.data.y + 1) % 4)
        assert message(shuffled, client, gate, {}, "query_select").records[SELECTED][SLOTS][0].tolist() == asked
        outputs = []
        for app in (finished.app, shuffled.app):
            cohort = app.cohort([client], app.initial_state.expand(1).clone(), {})
            slots = {
                f"experts.{j}.{n}": v for j, i in enumerate(asked) for n, v in expert_of(values, i).state_dict().items()
            }
            received = {ARRAYS: tree({**gate, **slots}), "held": tree({"slots": torch.tensor(asked)})}
            outputs.append(cohort.logits(app.update.personalize(cohort, received, {}), "test", app.update.predict)[0])
        assert torch.equal(*outputs)
        x = DATA.x[DATA.test[client]]
        with torch.no_grad():
            every = torch.stack([expert_of(values, i).eval()(x) for i in asked])
            best = gate_of(values)(embedded(x))[:, asked].argmax(1)
        torch.testing.assert_close(outputs[0], every[best, torch.arange(len(x))], rtol=1e-10, atol=1e-10)


def test_an_unseen_client_chooses_by_what_it_is_tested_on_and_nobody_else_does() -> None:
    gate = {n: v for n, v in jets(rounds=1).arrays.items() if n.startswith("gate.")}
    for client in (3, 6):
        for part in ("train", "test"):
            x = DATA.x.clone()
            x[getattr(DATA, part)[client]] = 5 * torch.randn(
                6, dtype=x.dtype, generator=torch.Generator().manual_seed(0)
            )
            app = FedJETsUpdate(**OPTIONS).client_app(NETWORK, replace(DATA, x=x), seed=SEED)
            before, after = (
                _mean_gate(other, client, gate)
                for other in (FedJETsUpdate(**OPTIONS).client_app(NETWORK, DATA, seed=SEED), app)
            )
            assert torch.equal(before, after) == ((part == "test") != (client == 6))


def _mean_gate(app: Any, client: int, gate: Values) -> Tensor:
    cohort = app.cohort([client], app.initial_state.expand(1).clone(), {})
    return app.update.query_select(cohort, {ARRAYS: tree(gate)}, {}).metrics["gate_entropy"]  # type: ignore[no-any-return]


def label_blocks() -> FederatedData:
    """Six classes far apart; anchors hold two each, the other clients and two unseen ones three at random."""
    generator = torch.Generator().manual_seed(1)
    centers = 4 * torch.randn(6, 6, generator=generator)
    sets = [(0, 1), (2, 3), (4, 5), (0, 2, 4), (1, 2, 5), (0, 3, 5), (1, 3, 4), (0, 1, 3), (2, 4, 5)]
    lists: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": []}
    xs, ys, at = [], [], 0
    for labels in sets:
        for part in lists:
            y = torch.tensor(labels).repeat(8)
            xs.append(centers[y] + torch.randn(len(y), 6, generator=generator))
            ys.append(y)
            lists[part].append(torch.arange(at, at + len(y)))
            at += len(y)
    return FederatedData(
        torch.cat(xs), torch.cat(ys), lists["train"], lists["validation"], lists["test"], 6, unseen=(7, 8)
    )


@pytest.mark.slow
def test_anchors_teach_the_gate_whose_labels_are_whose() -> None:
    data = label_blocks()
    network = SmallNetwork(classes=6, norm=False, dropout=0.0)
    routed = {}
    for share in (0.0, 0.5):
        options = {**OPTIONS, "gate_hidden": 32, "anchor_share": share}
        finished = run("fedjets", options, rounds=15, network=network, data=data, batch_size=8, lr=0.05)
        values = {n: v.double() for n, v in finished.arrays.items()}
        with torch.no_grad():
            scores = [
                gate_of(values)(network.eval().body(data.x[data.test[q]]).double()).argmax(1) == q for q in range(3)
            ]
        routed[share] = float(torch.cat(scores).double().mean())
        assert set(finished.strategy.report.unseen) == {7, 8}
        if share:
            assert min(metrics["test-accuracy"] for metrics in finished.strategy.report.unseen.values()) > 0.8
    assert routed[0.5] > 0.95
    assert routed[0.0] < 0.6


def test_bytes_count_the_question_and_once_the_common_expert() -> None:
    finished = jets(rounds=1)
    values = finished.arrays
    gate = sum(v.nbytes for n, v in values.items() if n.startswith("gate."))
    expert = sum(v.nbytes for n, v in values.items() if n.startswith("experts.0."))
    body = expert - sum(v.nbytes for n, v in values.items() if n.startswith("experts.0.head."))
    report = finished.strategy.report
    assert report.sampled == [0, 1, 2, 3, 4, 5]
    asked = 3 * (gate + 2 * 8)  # clients 3 to 5: the gate there, two numbers back
    down = 6 * body + 3 * gate + 3 * (gate + 2 * expert + 2 * 8) + 3 * (gate + expert + 8)
    assert report.bytes_down == down
    assert report.bytes_up == asked - 3 * gate + 3 * (gate + 2 * expert) + 3 * (gate + expert)
    held = [chosen(entries(from_record(finished.app.initial_arrays())), gate_input(c), 2) for c in (3, 4, 5)]
    for i in range(3):
        assert report.extra[f"holders_of_expert_{i}"] == 1 + sum(i in experts for experts in held)
    assert 0 < report.extra["gate_entropy"] <= torch.tensor(3.0).log()


def test_a_fold_knows_who_had_which_expert() -> None:
    def reply(gate: float, *experts: float) -> dict[str, Any]:
        slots = {f"experts.{j}.w": torch.tensor([value]) for j, value in enumerate(experts)}
        return {ARRAYS: tree({"gate.w": torch.tensor([gate]), **slots})}

    held = {0: (2,), 1: (0, 2), 2: (2, 11)}
    folds = [ExpertMean(held), ExpertMean(held)]
    folds[0].add(reply(1.0, 10.0), 1, 0)
    folds[0].add(reply(2.0, 20.0, 30.0), 3, 1)
    folds[1].add(reply(3.0, 40.0, 50.0), 2, 2)
    folds[0].merge(folds[1])
    means = {name: float(value) for name, value in entries(folds[0].result()[ARRAYS]).items()}
    expected = {"gate.w": 13 / 6, "experts.2.w": 180 / 6, "experts.0.w": 20.0, "experts.11.w": 50.0}
    assert means == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_stack_is_folded_as_its_rows_are(dtype: torch.dtype) -> None:
    held = {7: (0, 2), 3: (2, 11), 5: (0, 2), 4: (1, 11)}
    generator = torch.Generator().manual_seed(0)
    names = ("gate.w", "experts.0.w", "experts.1.w")
    stack = {name: torch.randn(4, 3, generator=generator, dtype=dtype) for name in names}
    count = torch.tensor([[4], [1], [6], [3]])
    weights = torch.tensor([1.0, 4.0, 2.0, 5.0], dtype=torch.float64)
    together, one_by_one = ExpertMean(held), ExpertMean(held)
    together.add_stack({ARRAYS: tree({**stack, "experts.1.n": count}, 4)}, weights, list(held))
    for k, client in enumerate(held):
        row = {**{name: value[k] for name, value in stack.items()}, "experts.1.n": count[k]}
        one_by_one.add({ARRAYS: tree(row)}, float(weights[k]), client)
    means, expected = (entries(fold.result()[ARRAYS]) for fold in (together, one_by_one))
    assert {n.split(".")[1] for n in means if n.startswith("experts")} == {"0", "1", "2", "11"}
    assert means.keys() == expected.keys()
    assert_same(means, expected)
    torch.testing.assert_close(means["experts.2.w"], (stack["experts.1.w"][0] + 4 * stack["experts.0.w"][1]
                                                      + 2 * stack["experts.1.w"][2]) / 7)  # fmt: skip
    assert int(means["experts.2.n"]) == 5  # (4 + 2 * 6) / 3
    assert int(means["experts.11.n"]) == 2  # (4 * 1 + 5 * 3) / 9 = 2.1


def test_clients_with_the_same_experts_share_records_and_schema() -> None:
    finished = jets({"anchor_share": 0.0})
    assert isinstance(finished.strategy, FedJETs)
    strategy, clients = finished.strategy, [0, 3, 4, 5]
    strategy._anchors, strategy._held = {0}, {0: (2,), 3: (0, 1), 4: (1, 2), 5: (0, 1)}
    sent, schemas = strategy.send(2, tree(finished.arrays), clients), strategy.reply_schema(clients)
    assert isinstance(sent, list)
    for made in (sent, schemas):
        assert made[1] is made[3]
        assert len({id(each) for each in made}) == 3
    for records, schema in zip(sent, schemas, strict=True):
        shapes = {(ARRAYS, name): tuple(value.shape) for name, value in entries(records[ARRAYS]).items()}
        assert {key: entry.shape for key, entry in schema.items()} == shapes


@pytest.mark.parametrize(
    ("gate_lr", "groups", "rates"),
    [
        (0.05, None, {"gate": 0.05, "experts": 0.1}),
        (None, None, {"gate": 0.1, "experts": 0.1}),
        (0.05, {"gate": {"lr": 0.5}}, {"gate": 0.5, "experts": 0.1}),
        (0.05, {"gate.*": {"lr": 0.5}}, {"gate": 0.5, "experts": 0.1}),
        (0.05, {"gate": {"weight_decay": 0.0}}, {"gate": 0.05, "experts": 0.1}),
        (0.05, {"gate.2": {"lr": 0.5}}, {"gate.0": 0.05, "gate.2": 0.5, "experts": 0.1}),
        (0.05, {"all": {"lr": 0.3}}, {"gate": 0.3, "experts": 0.3}),
        (0.05, {"parameters": {"lr": 0.3}}, {"gate": 0.3, "experts": 0.3}),
        (0.05, {"parameters": {"lr": 0.3}, "gate": {"lr": 0.5}}, {"gate": 0.5, "experts": 0.3}),
        (0.05, {"gate": {"lr": 0.5}, "parameters": {"lr": 0.3}}, {"gate": 0.3, "experts": 0.3}),
        (0.05, {"experts": {"lr": 0.2}}, {"gate": 0.05, "experts": 0.2}),
    ],
    ids=str,
)
def test_the_gate_has_a_rate_of_its_own_unless_a_group_names_another(
    gate_lr: float | None, groups: dict[str, dict[str, float]] | None, rates: dict[str, float]
) -> None:
    """After one step of all clients from the same values, what has moved is the rate times the same slopes."""
    plain, other = (
        jets({"gate_lr": rate}, rounds=1, batch_size=0, epochs=1, groups=of)
        for rate, of in ((None, None), (gate_lr, groups))
    )
    start = _start(plain)
    parameters = {n for n in start if n.endswith(("weight", "bias"))}
    assert len(parameters) == 4 + 3 * len(list(NETWORK.parameters()))
    for name in parameters:
        (rate,) = (rate for part, rate in rates.items() if name.startswith(f"{part}."))
        slope = (start[name] - plain.arrays[name]) / 0.1
        torch.testing.assert_close(start[name] - other.arrays[name], rate * slope, rtol=1e-9, atol=1e-12)
    assert float((start["gate.0.weight"] - plain.arrays["gate.0.weight"]).abs().max()) > 1e-4


def test_settings_of_training_are_left_as_the_user_gave_them() -> None:
    settings = Training(groups={"gate": {"lr": 0.5}})
    assert FedJETsUpdate(training=settings).training is settings


class Greedy(FedJETsUpdate):
    """Client 3 asks for the same expert twice."""

    def query_select(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        reply = super().query_select(cohort, received, config)
        reply.records[SELECTED][SLOTS][[c == 3 for c in cohort.clients]] = 1
        return reply


def rounds_of(update: FedJETsUpdate, strategy: FedJETs, grid_of: Any = LocalGrid, rounds: int = 2) -> Values:
    app = update.client_app(NETWORK, DATA, seed=SEED)
    grid = grid_of(app, DATA.num_clients)
    arrays, config = app.initial_arrays(), flower.ConfigRecord()
    strategy.begin()
    with server_identity(1):
        for r in range(1, rounds + 1):
            replies = grid.send_and_receive(strategy.configure_train(r, arrays, config, grid))
            new, _ = strategy.aggregate_train(r, replies)
            assert new is not None
            arrays = new
            strategy.aggregate_evaluate(r, grid.send_and_receive(strategy.configure_evaluate(r, arrays, config, grid)))
        strategy.evaluate_adapted(arrays, config, grid)
    grid.close()
    return entries(from_record(arrays))


TRAINING = Training(lr=0.1, batch_size=5, epochs=2)


def test_an_unusable_choice_leaves_the_client_out() -> None:
    strategy, _ = make_strategy("fedjets", OPTIONS, server={"seed": SEED, "unseen": (6,)})
    assert isinstance(strategy, FedJETs)
    rounds_of(Greedy(**OPTIONS, training=TRAINING), strategy)
    reason = "an unusable choice of experts: [1, 1] are not 2 ascending numbers from 0 to 2"
    assert strategy.report.failures == {3: reason}
    assert strategy.report.evaluation_failures == {3: reason}
    assert sorted(strategy.report.clients) == [0, 1, 2, 4, 5]


@pytest.mark.slow
def test_a_wire_changes_nothing_and_unseen_clients_adapt_without_a_trace() -> None:
    outcomes = []
    for grid_of in (LocalGrid, WireGrid):
        strategy, update = make_strategy("fedjets", OPTIONS, server={"seed": SEED, "unseen": (6,)}, training=TRAINING)
        assert isinstance(strategy, FedJETs)
        assert isinstance(update, FedJETsUpdate)
        values = rounds_of(update, strategy, grid_of)
        metrics = {
            f"{c}/{n}": torch.tensor(v).double() for c, m in strategy.report.clients.items() for n, v in m.items()
        }
        outcomes.append({**values, **metrics})
        (adapted,) = strategy.report.adapted.values()
        # it trained as one of the other clients, on what it chose without labels, after round 2
        trained = train_normal(values, chosen(values, gate_input(6), 2), 6, 3, "probabilities", OPTIONS["gate_lr"])
        changed = any(not torch.equal(trained[n], values[n]) for n in trained)
        assert changed
        assert adapted["test-loss"] != strategy.report.unseen[6]["test-loss"]
    assert equivalence.difference(*outcomes) <= 1e-9


def test_the_mixture_can_be_evaluated_beside_one_expert() -> None:
    plain, both = jets(), jets({"evaluate_mixture": True})
    values = both.arrays
    for client, metrics in {**both.strategy.report.clients, **both.strategy.report.unseen}.items():
        without = {**plain.strategy.report.clients, **plain.strategy.report.unseen}[client]
        assert {name: metrics[name] for name in without} == without
        held = chosen(values, gate_input(client), 2)
        x, y = DATA.x[DATA.test[client]], DATA.y[DATA.test[client]]
        with torch.no_grad():
            experts = [expert_of(values, i).eval() for i in held]
            loss = mixture_loss(gate_of(values), experts, held, x, y, "probabilities")
        assert metrics["test-mixture-loss"] == pytest.approx(float(loss), rel=1e-9)


# --------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"top_k": 4}, r"strategy\.top_k=4: expected a whole number >= 1 and <= strategy\.experts=3\."),
        ({"top_k": 0}, r"strategy\.top_k=0: expected a whole number >= 1"),
        ({"experts": 0}, r"strategy\.experts=0: expected a whole number >= 1"),
        ({"anchor_share": 1.5}, r"strategy\.anchor_share=1\.5: expected a number >= 0 and <= 1"),
        ({"mixture": "logit"}, r"strategy\.mixture=logit: expected one of .*did you mean 'logits'"),
        ({"init": "same"}, r"strategy\.init=same: expected one of common, random"),
        ({"gate_hidden": 0}, r"strategy\.gate_hidden=0: expected a whole number >= 1"),
        ({"gate_lr": 0.0}, r"strategy\.gate_lr=0\.0: expected a number > 0, or null"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make_strategy("fedjets", {**OPTIONS, **options})


def test_every_expert_needs_an_anchor() -> None:
    sentence = r"strategy\.experts=7: expected at most 6, the clients that train: each expert needs one as its anchor\."
    with pytest.raises(ConfigError, match=sentence):
        FedJETsUpdate(experts=7).client_app(NETWORK, DATA)
    sentence = r"strategy\.experts=5: expected at most 2: each expert needs an anchor \(partition\.anchors\)\."
    with pytest.raises(ConfigError, match=sentence):
        FedJETsUpdate().client_app(NETWORK, replace(DATA, anchors=(0, 1)))


def test_networks_and_data_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model=Linear: expected a network with a 'body' and a linear 'head'"):
        FedJETsUpdate().client_app(nn.Linear(6, 4).double(), DATA)
    with pytest.raises(ConfigError, match=r"model=SmallNetwork: expected a network that takes samples of shape \[6\]"):
        FedJETsUpdate().client_app(SmallNetwork(features=5).double(), DATA)
    with pytest.raises(ConfigError, match=r"dataset=gaussian: expected samples of numbers with class labels"):
        FedJETsUpdate().client_app(NETWORK, replace(DATA, x=DATA.x.long()))
    with pytest.raises(ConfigError, match=r"dataset=gaussian: expected samples with class labels for strategy=fedjets"):
        FedJETsUpdate().client_app(NETWORK, replace(DATA, y=DATA.y.double(), num_classes=1, task=Regression()))


def test_a_common_expert_that_nobody_trained_is_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    data = load_federated(DatasetConfig("digits"), PartitionConfig("label_sets"), SplitConfig(public=0.2), 0)
    for config, mentioned in ((ModelConfig("mlp"), True), (ModelConfig(pretrained="public", pretrain_epochs=1), False)):
        caplog.clear()
        assert data.public is not None
        public = (data.x[data.public], data.y[data.public])
        FedJETsUpdate().client_app(build_model(config, (1, 8, 8), 10, 0, public=public), data)
        assert ("common expert of fedjets has random values" in caplog.text) == mentioned


def one_sentence(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert _main(list(arguments)) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_errors_as_a_user_sees_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = one_sentence(capsys, "strategy=fedjets", "strategy.top_k=6")
    assert text == "fedpers: strategy.top_k=6: expected a whole number >= 1 and <= strategy.experts=5."
    text = one_sentence(capsys, "strategy=fedjets", "partition.anchors=3")
    assert text == "fedpers: strategy.experts=5: expected at most 3: each expert needs an anchor (partition.anchors)."
    text = one_sentence(capsys, "strategy=fedjets", "partition=dirichlet", "partition.num_clients=4")
    assert text.startswith("fedpers: strategy.experts=5: expected at most 4, the clients that train")
    text = one_sentence(capsys, "strategy=pretrained", "model.pretrained=null")
    assert text == "fedpers: model.pretrained=None: expected public for strategy=pretrained, with split.public > 0."


# -------------------------------------------------------- the rows beside it


def test_pretrained_predicts_with_the_given_network_and_never_trains() -> None:
    finished = run("pretrained", network=NETWORK, data=DATA)
    report = finished.strategy.report
    assert finished.arrays == {}
    assert report.bytes_down == report.bytes_up == report.steps == report.gradients == 0
    for client, metrics in {**report.clients, **report.unseen}.items():
        x, y = DATA.x[DATA.test[client]], DATA.y[DATA.test[client]]
        with torch.no_grad():
            right = copy.deepcopy(NETWORK).eval()(x).argmax(1) == y
        assert metrics["test-accuracy"] == float(right.double().mean())
    assert isinstance(finished.app.update, PretrainedUpdate)


@pytest.mark.parametrize("init", ["common", "random"])
def test_an_ensemble_is_so_many_times_fedavg(init: str) -> None:
    data = gaussian_data((20, 9, 13, 7), dtype=torch.float64)
    alone = run("fedavg", rounds=2, fraction=0.5, network=NETWORK, data=data)
    one = run("ensemble", {"members": 1}, rounds=2, fraction=0.5, network=NETWORK, data=data)
    assert_same({n.removeprefix("members.0."): v for n, v in one.arrays.items()}, alone.arrays)

    both = run("ensemble", {"init": init}, rounds=2, fraction=0.5, network=NETWORK, data=data)
    server = [initial(NETWORK), {n.removeprefix("members.1."): v for n, v in _start(both).items() if "members.1" in n}]
    assert torch.equal(server[0]["head.weight"], server[1]["head.weight"]) == (init == "common")
    for r in (1, 2):
        of = [both.strategy.sample_of(i, r) for i in (0, 1)]  # type: ignore[attr-defined]
        assert of[0] == drawn(r, 0.5, data)
        assert sorted(set(of[0]) | set(of[1])) == both.strategy.sample(r)
        new = []
        for i in (0, 1):
            parts = []
            for client in of[i]:
                parts.append({n: v.clone() for n, v in server[i].items()})
                before = 2 if i and client in of[0] else 0  # it has made two passes for the first member
                sgd(parts[-1], passes(client, 2, r, first=before, data=data), network=NETWORK)
            new.append(average(parts, sizes(of[i], data)))
        server = new
    for i in (0, 1):
        assert_same(both.arrays, {f"members.{i}.{n}": v for n, v in server[i].items()})
    for client, metrics in both.strategy.report.clients.items():
        x, y = data.x[data.test[client]], data.y[data.test[client]]
        chances = []
        for values in server:
            network = copy.deepcopy(NETWORK)
            network.load_state_dict(values)
            chances.append(torch.softmax(network.eval()(x), 1).detach())
        loss = F.nll_loss(((chances[0] + chances[1]) / 2).log(), y)
        assert metrics["test-loss"] == pytest.approx(float(loss), rel=1e-9)


def _start(finished: Finished) -> Values:
    return entries(from_record(finished.app.initial_arrays()))


def test_as_many_replies_may_be_asked_for_as_an_ensemble_can_sample() -> None:
    settings = ["strategy=ensemble", "partition.num_clients=10", "fraction=0.2"]
    assert prepare_run(composed([*settings, "min_replies=4"])).strategy.min_replies == 4
    with pytest.raises(ConfigError, match=r"^min_replies=5: expected at most 4, the clients sampled in a round\.$"):
        prepare_run(composed([*settings, "min_replies=5"]))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"members": 0}, r"strategy\.members=0: expected a whole number >= 1"),
        ({"init": "commn"}, r"strategy\.init=commn: expected one of common, random \(did you mean 'common'\?\)"),
    ],
)
def test_wrong_settings_of_an_ensemble_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        EnsembleUpdate(**options)


@pytest.mark.slow
def test_fedjets_runs_out_of_the_box_with_unseen_clients(tmp_path: Path) -> None:
    assert _main(["strategy=fedjets", "rounds=3", f"output={tmp_path}"]) == 0
    (path,) = tmp_path.rglob("summary.json")
    summary = json.loads(path.read_text())
    assert summary["failures"] == 0
    assert 0.2 < summary["last"]["unseen/accuracy"] <= 1
    assert 0.2 < summary["last"]["adapted/accuracy"] <= 1
