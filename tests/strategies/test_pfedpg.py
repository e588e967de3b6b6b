"""pFedPG, FedVPT and the head alone against plain loops written from the paper, which embed pictures at every step."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import flwr.app as flower
import pytest
import torch
from torch import Tensor, nn

from fedpers.cohort import Training, entries, leaves, tree
from fedpers.data.federated import FederatedData
from fedpers.errors import ConfigError
from fedpers.flower_private import server_identity
from fedpers.models import frozen
from fedpers.models.frozen import FrozenNetwork
from fedpers.randomness import generator as numbers
from fedpers.records import ARRAYS, from_record, num_bytes, unflatten_state
from fedpers.runtime.grid import FIRST_NODE
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import HeadOnlyUpdate, PFedPG, PFedPGUpdate, make_strategy
from fedpers.strategies.pfedpg import follow, generate
from tests.cohort.helpers import assert_same
from tests.equivalence import difference, outcome
from tests.problems import SmallNetwork, gaussian_data, ranking_data, small_vit
from tests.runtime.wire import WireGrid
from tests.strategies.helpers import SEED, Finished, Values, average, copied, drawn, passes, run, sgd, sizes

PICTURES = gaussian_data((20, 9, 13, 7), features=(1, 4, 4), dtype=torch.float64)
MODEL = small_vit(torch.float64)
COUNT, WIDTH = 3, 8
NAMES = ["prompts", "head.weight", "head.bias"]
RATES = {"sgd": 0.3, "adam": 0.01}


def pfedpg(rounds: int = 3, *, fraction: float = 1.0, data: FederatedData = PICTURES, **options: Any) -> Finished:
    options = {"server_optimizer": "sgd", **options}
    options = {"prompts": COUNT, "server_lr": RATES[options["server_optimizer"]], **options}
    return run("pfedpg", options, rounds=rounds, fraction=fraction, network=MODEL, data=data)


def unready(prompts: Tensor | None) -> FrozenNetwork:
    """The network on pictures."""
    network = small_vit(torch.float64)
    return FrozenNetwork(network.body, network.head, prompts, ready=False)


def start() -> Tensor:
    """Initial prompts."""
    return pfedpg(1).app.template["prompts"].clone()


def head() -> Values:
    return {f"head.{n}": v.detach().clone() for n, v in MODEL.head.named_parameters()}


def matrices(inner: int = 8 * WIDTH) -> Values:
    shapes = {"query": (WIDTH, inner), "key": (WIDTH, inner), "value": (WIDTH, inner), "out": (inner, WIDTH)}
    drawn_values = {}
    for place, (name, (rows, columns)) in enumerate(shapes.items()):
        bound = rows**-0.5
        drawn_values[name] = torch.from_numpy(numbers(SEED, "generator", place).uniform(-bound, bound, (rows, columns)))
    return drawn_values


def descriptor(client: int, tokens: int = COUNT) -> Tensor:
    return torch.from_numpy(numbers(SEED, "descriptor", client).uniform(-1, 1, (tokens, WIDTH)))


def one_prompt_at_a_time(base: Tensor, phi: Values, descriptor: Tensor) -> Tensor:
    """The generator's equation for one client, row by row."""
    keys, values = base @ phi["key"], base @ phi["value"]
    rows = []
    for k in range(len(base)):
        query = descriptor[min(k, len(descriptor) - 1)] @ phi["query"]
        share = torch.softmax(keys @ query / math.sqrt(len(query)), 0)
        rows.append(base[k] + sum(s * v for s, v in zip(share, values, strict=True)) @ phi["out"])
    return torch.stack(rows)


# ---------------------------------------------------------------- the generator


def test_prompts_by_hand() -> None:
    base = torch.tensor([[1.0], [3.0]])
    phi = {n: torch.tensor([[v]]) for n, v in (("query", 2.0), ("key", 0.5), ("value", -1.0), ("out", 10.0))}
    descriptors = torch.tensor([[[0.0], [math.log(3.0)]], [[0.0], [0.0]]])
    # scores: query * key = (2 d) * (0.5 b) = d * b; of d = 0 shares 1/2, 1/2; of d = log 3: weights 3^1, 3^3
    prompts = generate(base, phi, descriptors)
    mixed = -(3 * 1 + 27 * 3) / 30
    assert torch.allclose(prompts[0], torch.tensor([[1 + 10 * -2.0], [3 + 10 * mixed]]))
    assert torch.allclose(prompts[1], torch.tensor([[1 + 10 * -2.0], [3 + 10 * -2.0]]))
    assert torch.allclose(generate(base, phi, descriptors[:, 1:])[0], base + 10 * mixed)  # one row for all prompts


def test_the_width_of_keys_cools_the_scores() -> None:
    base, one = torch.tensor([[1.0], [2.0]]), torch.ones(1, 4)
    phi = {"query": one, "key": one, "value": one, "out": one.T}
    prompts = generate(base, phi, torch.tensor([[[math.log(2.0)]]]))  # scores 4 * log 2 * b / sqrt(4)
    assert torch.allclose(prompts, base + 4 * (4 * 1 + 16 * 2) / 20)


# ------------------------------------------------------------ acceptance of a step


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [None, 1])
@pytest.mark.parametrize(("method", "rate"), [("sgd", 0.05), ("adam", 0.001)])
def test_a_server_step_brings_generated_prompts_closer_to_the_adapted(
    method: str, rate: float, tokens: int | None
) -> None:
    options = {"descriptor_tokens": tokens, "inner": 16, "server_optimizer": method, "server_lr": rate}
    result = pfedpg(1, **options)
    clients = range(4)
    adapted = torch.stack([result.state(c)["adapted/prompts"] for c in clients])
    before = torch.stack([generate(start(), matrices(16), descriptor(c, tokens or COUNT)[None])[0] for c in clients])
    server = result.strategy.state
    after = generate(result.arrays["prompts"], entries(server["generator"]), server["descriptors"]["value"])
    gap, new = (float((adapted - prompts).square().sum()) for prompts in (before, after))
    assert 0 < new < gap
    assert not torch.equal(server["generator"]["query"], matrices(16)["query"])


def test_the_step_reversed_leads_away() -> None:
    """What a sign error would do, so that the test above can fail."""
    base, phi = start(), matrices()
    rows = torch.stack([descriptor(c) for c in range(4)])
    prompts = generate(base, phi, rows)
    change = torch.from_numpy(numbers(0, "test").normal(size=prompts.shape))
    common, per_client = follow(base, phi, rows, change, torch.ones(4))
    gaps = []
    for step in (1e-3, -1e-3):
        moved = {n: v + step * common[n] for n, v in phi.items()}
        new = generate(base + step * common["prompts"], moved, rows + step * per_client)
        gaps.append(float((prompts + change - new).square().sum()))
    assert gaps[0] < float(change.square().sum()) < gaps[1]


def test_a_descriptor_follows_its_own_client_only() -> None:
    base, phi = start(), matrices()
    rows = torch.stack([descriptor(c) for c in range(3)]).requires_grad_()
    prompts = generate(base, phi, rows)
    for client in range(3):
        (slope,) = torch.autograd.grad(prompts[client].square().sum(), rows, retain_graph=True)
        assert [bool(row.any()) for row in slope] == [c == client for c in range(3)]

    change = torch.from_numpy(numbers(0, "test").normal(size=prompts.shape))
    weights = torch.ones(3, dtype=base.dtype)
    results = []
    for factor in (1.0, -5.0):
        scale = torch.tensor([1.0, factor, 1.0], dtype=base.dtype).view(3, 1, 1)
        results.append(follow(base, phi, rows.detach(), scale * change, weights))
    (common, first), (other, second) = results
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[2], second[2])
    assert torch.allclose(second[1], -5 * first[1])
    assert not torch.equal(common["query"], other["query"])


@pytest.mark.parametrize("method", ["sgd", "adam"])
def test_descriptors_of_clients_that_were_not_asked_stay(method: str) -> None:
    result = pfedpg(1, fraction=0.5, server_optimizer=method)
    known = result.strategy.state["descriptors"]
    asked = drawn(1, 0.5)
    assert known["client"].tolist() == [0, 1, 2, 3]
    for client in range(4):
        assert torch.equal(known["value"][client], descriptor(client)) == (client not in asked)
        if method == "adam":
            assert int(known["steps"][client]) == (client in asked)


def test_prompts_are_all_that_travels() -> None:
    result = pfedpg(1)
    report = result.strategy.report
    assert report.bytes_up == report.bytes_down == 4 * COUNT * WIDTH * 8  # clients, float64
    content = flower.RecordDict(
        {ARRAYS: result.app.initial_arrays(), "config": flower.ConfigRecord({"server-round": 2})}
    )
    grid = LocalGrid(result.app, 4, clients_at_once=4, workers=1)
    with server_identity(1):
        (reply,) = grid.send_and_receive([flower.Message(content, FIRST_NODE, "train")])
    assert {n: list(r) for n, r in reply.content.array_records.items()} == {ARRAYS: ["prompts"]}
    assert num_bytes(reply.content) == COUNT * WIDTH * 8
    assert set(result.state(0)) == {"model/head.weight", "model/head.bias", "adapted/prompts", "trained"}
    assert set(result.strategy.state) == {"generator", "descriptors"}
    assert set(entries(result.strategy.state["generator"])) == {"query", "key", "value", "out"}


# --------------------------------------------------------------------- plain loops


class Reference:
    """Server and clients as the paper has them, with an optimizer of PyTorch."""

    def __init__(self, data: FederatedData, optimizer: str, reduction: str, tokens: int | None, weighted: bool) -> None:
        self.data, self.reduction, self.weighted = data, reduction, weighted
        clients = [c for c in range(data.num_clients) if c not in data.unseen]
        self.base = start().requires_grad_()
        self.phi = {n: v.requires_grad_() for n, v in matrices().items()}
        self.rows = {c: descriptor(c, tokens or COUNT).requires_grad_() for c in clients}
        kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
        self.kind = lambda values: kind(values, lr=RATES[optimizer])
        self.common = self.kind([self.base, *self.phi.values()])
        self.row_optimizers = {c: self.kind([row]) for c, row in self.rows.items()}
        self.heads = {c: head() for c in range(data.num_clients)}
        self.adapted: dict[int, Tensor] = {}

    def prompts(self, client: int) -> Tensor:
        return one_prompt_at_a_time(self.base, self.phi, self.rows[client])

    def local(self, client: int, prompts: Tensor, round: int) -> Tensor:
        """Train prompts and head; return how the prompts changed."""
        values = {"prompts": prompts.clone(), **self.heads[client]}
        sgd(values, passes(client, 2, round, data=self.data), names=NAMES, network=unready(start()))
        self.adapted[client] = values.pop("prompts")
        self.heads[client] = values
        return self.adapted[client] - prompts

    def round(self, r: int, clients: Sequence[int]) -> None:
        changes = {c: self.local(c, self.prompts(c).detach(), r) for c in clients}
        weights = sizes(clients, self.data) if self.weighted else [1.0] * len(clients)
        share = {
            c: w / (sum(weights) if self.reduction == "mean" else 1.0) for c, w in zip(clients, weights, strict=True)
        }
        self.common.zero_grad()
        total = sum(
            share[c] * 0.5 * (self.prompts(c).detach() + d - self.prompts(c)).square().sum() for c, d in changes.items()
        )
        assert isinstance(total, Tensor)
        total.backward()  # type: ignore[no-untyped-call]
        for c in clients:  # the descriptor's own term, without share
            gap = 0.5 * (self.prompts(c).detach() + changes[c] - self.prompts(c)).square().sum()
            self.rows[c].grad = torch.autograd.grad(gap, self.rows[c])[0]
        self.common.step()
        for c in clients:
            self.row_optimizers[c].step()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "reduction", "tokens", "weighting", "fraction"),
    [
        ("sgd", "mean", None, "uniform", 1.0),
        ("sgd", "sum", None, "uniform", 0.7),
        ("sgd", "mean", 1, "samples", 0.5),
        ("adam", "mean", None, "uniform", 0.5),
    ],
)
def test_rounds_against_a_plain_loop(
    optimizer: str, reduction: str, tokens: int | None, weighting: str, fraction: float
) -> None:
    result = pfedpg(
        2, fraction=fraction, server_optimizer=optimizer, reduction=reduction, descriptor_tokens=tokens,
        weighting=weighting,
    )  # fmt: skip
    plain = Reference(PICTURES, optimizer, reduction, tokens, weighting == "samples")
    for r in (1, 2):
        plain.round(r, drawn(r, fraction))
    server = result.strategy.state
    assert_same(result.arrays, {"prompts": plain.base.detach()})
    assert_same(entries(server["generator"]), {n: v.detach() for n, v in plain.phi.items()})
    for client in range(4):
        assert_same({"d": server["descriptors"]["value"][client]}, {"d": plain.rows[client].detach()})
        state = result.state(client)
        assert_same({n: state[f"model/{n}"] for n in NAMES[1:]}, plain.heads[client])
        assert (int(state["trained"]) > 0) == (client in plain.adapted)
        if client in plain.adapted:
            assert_same({"p": state["adapted/prompts"]}, {"p": plain.adapted[client]})
        generated = {"prompts": plain.prompts(client).detach(), **plain.heads[client]}
        adapted = {**generated, "prompts": plain.adapted.get(client, generated["prompts"])}
        metrics = result.strategy.report.clients[client]
        for name, values in (("loss", adapted), ("generated-loss", generated)):
            assert metrics[f"test-{name}"] == pytest.approx(loss_on_test(client, values), rel=1e-8)
    losses = [
        (m["test-loss"], m["test-generated-loss"])
        for c, m in result.strategy.report.clients.items()
        if c in plain.adapted
    ]
    assert all(a != b for a, b in losses)


def loss_on_test(client: int, values: Values, data: FederatedData = PICTURES) -> float:
    network = unready(start()).eval()
    with torch.no_grad():
        scores = torch.func.functional_call(network, values, (data.x[data.test[client]],))
    return float(nn.functional.cross_entropy(scores, data.y[data.test[client]]))


@pytest.mark.slow
def test_without_generator_everybody_gets_the_base() -> None:
    result = pfedpg(2, generator="none")
    base, heads = start(), {c: head() for c in range(4)}
    for r in (1, 2):
        changes = []
        for client in range(4):
            values = {"prompts": base.clone(), **heads[client]}
            sgd(values, passes(client, 2, r, data=PICTURES), names=NAMES, network=unready(start()))
            changes.append(values.pop("prompts") - base)
            heads[client] = values
        base = base + RATES["sgd"] * torch.stack(changes).mean(0)
    assert_same(result.arrays, {"prompts": base})
    assert result.strategy.state == {}


def test_many_clients_are_differentiated_a_few_at_a_time() -> None:
    base, phi = start(), matrices()
    rows = torch.stack([descriptor(c) for c in range(150)])
    changes = torch.stack([torch.from_numpy(numbers(c, "test").normal(size=base.shape)) for c in range(150)])
    weights = torch.arange(150, dtype=torch.float64) + 1
    strategy = PFedPG()
    strategy.state["generator"] = tree(phi)
    common, of_descriptors = strategy._directions(tree({"prompts": base}), rows, changes, weights)
    at_once, expected = follow(base, phi, rows, changes, weights)
    assert_same(common, at_once)
    assert_same({"d": of_descriptors}, {"d": expected})


# -------------------------------------------------------------------- unseen clients


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sgd", "adam"])
def test_an_unseen_client_fits_a_descriptor_and_leaves_the_server_alone(method: str) -> None:
    data = replace(PICTURES, unseen=(1, 2))
    result = pfedpg(2, data=data, server_optimizer=method, adapt_rounds=2)
    strategy, grid = result.strategy, result.grid
    known = entries(strategy.state["descriptors"])
    assert known["client"].tolist() == [0, 3]
    base, phi = result.arrays["prompts"].clone(), copied(entries(strategy.state["generator"]))
    before = {role: copied(leaves(values)) for role, values in strategy.state.items()}
    mean = known["value"].mean(0)
    first = one_prompt_at_a_time(base, phi, mean)
    for client in (1, 2):  # as they come
        metrics = strategy.report.unseen[client]
        expected = loss_on_test(client, {"prompts": first, **head()}, data)
        assert metrics["test-loss"] == metrics["test-generated-loss"] == pytest.approx(expected, rel=1e-8)
    grid = LocalGrid(result.app, 4, clients_at_once=4, workers=1)
    record = strategy_record(result)
    with server_identity(1):
        strategy.evaluate_adapted(record, flower.ConfigRecord(), grid)
    assert_same(entries(from_record(record)), {"prompts": base})
    assert set(before) == set(strategy.state)
    for role, values in before.items():
        after = leaves(strategy.state[role])
        assert set(after) == set(values)
        assert all(torch.equal(value, after[name]) for name, value in values.items())

    plain = Reference(data, method, "mean", None, False)
    for client in (1, 2):
        row = mean.clone().requires_grad_()
        optimizer = plain.kind([row])
        for r in (3, 4):
            sent = one_prompt_at_a_time(base, phi, row).detach()
            change = plain.local(client, sent, r)
            gap = 0.5 * (sent + change - one_prompt_at_a_time(base, phi, row)).square().sum()
            row.grad = torch.autograd.grad(gap, row)[0]
            optimizer.step()
        metrics = strategy.report.adapted[client]
        values = {"prompts": plain.adapted[client], **plain.heads[client]}
        assert metrics["test-loss"] == pytest.approx(loss_on_test(client, values, data), rel=1e-8)
        values["prompts"] = one_prompt_at_a_time(base, phi, row).detach()
        assert metrics["test-generated-loss"] == pytest.approx(loss_on_test(client, values, data), rel=1e-8)
        assert not torch.equal(row, mean)


def strategy_record(result: Finished) -> flower.ArrayRecord:
    return flower.ArrayRecord({n: v.clone() for n, v in result.arrays.items()})


class Broken(PFedPGUpdate):
    def train(self, cohort: Any, received: Any, config: Any) -> Any:
        if 2 in cohort.clients:
            raise RuntimeError("out of order")
        return super().train(cohort, received, config)


def test_an_unseen_client_that_fails_does_not_stop_the_other() -> None:
    data = replace(PICTURES, unseen=(1, 2))
    strategy = PFedPG(seed=SEED, unseen=data.unseen, adapt_rounds=2)
    app = Broken(prompts=COUNT, training=Training(lr=0.1, batch_size=5)).client_app(MODEL, data, seed=SEED)
    grid = LocalGrid(app, 4, clients_at_once=1, workers=1)
    with server_identity(1):
        strategy.evaluate_adapted(app.initial_arrays(), flower.ConfigRecord(), grid)
    assert list(strategy.report.adapted) == [1]
    assert "out of order" in strategy.report.evaluation_failures[2]


# --------------------------------------------------------------------------- a wire


def through(grid: LocalGrid, app: Any, data: FederatedData, method: str) -> Values:
    """Two rounds and the adaptation of unseen clients; everything that is left behind."""
    options = {"prompts": COUNT, "server_optimizer": method, "server_lr": 0.01, "adapt_rounds": 2}
    strategy, _ = make_strategy("pfedpg", options, server={"seed": SEED, "fraction": 0.7, "unseen": data.unseen})
    arrays, config = app.initial_arrays(), flower.ConfigRecord()
    strategy.begin()
    with server_identity(1):
        for r in (1, 2):
            new, _ = strategy.aggregate_train(
                r, grid.send_and_receive(strategy.configure_train(r, arrays, config, grid))
            )
            assert new is not None
            assert not strategy.report.failures
            arrays = new
        strategy.aggregate_evaluate(2, grid.send_and_receive(strategy.configure_evaluate(2, arrays, config, grid)))
        strategy.evaluate_adapted(arrays, config, grid)
    assert not strategy.report.evaluation_failures
    tensors = {f"server/{n}": v for n, v in leaves(from_record(arrays)).items()}
    for role, values in strategy.state.items():
        tensors.update({f"{role}/{n}": v for n, v in leaves(values).items()})
    for group in ("clients", "unseen", "adapted"):
        for client, metrics in getattr(strategy.report, group).items():
            tensors.update({f"{group}/{client}/{n}": torch.tensor(v) for n, v in metrics.items()})
    for client in range(data.num_clients):
        if isinstance(grid, WireGrid):
            (record,) = grid.contexts[FIRST_NODE + client].state.array_records.values()
            state = unflatten_state(record, app.initial_state)
        else:
            assert grid.engine is not None
            state = grid.engine.store.gather([client])
        tensors.update({f"client/{client}/{n}": v for n, v in leaves(state).items()})
    return tensors


@pytest.mark.parametrize("method", ["sgd", "adam"])
def test_messages_and_state_survive_a_wire(method: str) -> None:
    data = replace(gaussian_data((20, 9, 13), features=(1, 4, 4), dtype=torch.float64), unseen=(1,))
    update = PFedPGUpdate(prompts=COUNT, training=Training(lr=0.1, batch_size=5, epochs=2))
    app = update.client_app(MODEL, data, seed=SEED)
    local = through(LocalGrid(app, 3, clients_at_once=3, workers=1), app, data, method)
    wired = through(WireGrid(app, 3), app, data, method)
    assert {"generator/query", "descriptors/value", "client/0/adapted/prompts", "adapted/1/test-accuracy"} <= set(local)
    assert difference(local, wired) <= 1e-9


def test_adam_on_the_server_does_not_depend_on_cohorts(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import problems

    given = problems.generated(torch.float64)
    options = {**given.options, "server_optimizer": "adam", "server_lr": 0.01}
    monkeypatch.setitem(problems.SPECIAL, "pfedpg", lambda dtype: replace(given, options=options))
    one, all_at_once = (outcome("pfedpg", torch.float64, cohort, 1) for cohort in (1, 100))
    assert "server/moments/query.second" in one
    assert difference(one, all_at_once) <= 1e-10


# ---------------------------------------------------------------- the rows beside it


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_fedvpt_averages_prompts_and_keeps_heads(weighting: str) -> None:
    result = run("fedvpt", {"prompts": COUNT, "weighting": weighting}, fraction=0.5, network=MODEL, data=PICTURES)
    server, heads = {"prompts": start()}, {c: head() for c in range(4)}
    for r in (1, 2, 3):
        parts, chosen = [], drawn(r, 0.5)
        for client in chosen:
            values = {**copied(server), **heads[client]}
            sgd(values, passes(client, 2, r, data=PICTURES), names=NAMES, network=unready(start()))
            parts.append({"prompts": values.pop("prompts")})
            heads[client] = values
        server = average(parts, sizes(chosen, PICTURES) if weighting == "samples" else [1.0] * len(chosen))
    assert_same(result.arrays, server)
    for client in range(4):
        assert_same(result.state(client), {f"model/{n}": v for n, v in heads[client].items()})
        loss = result.strategy.report.clients[client]["test-loss"]
        assert loss == pytest.approx(loss_on_test(client, {**server, **heads[client]}), rel=1e-8)


def test_head_only_trains_heads_on_features() -> None:
    result = run("head_only", fraction=0.5, network=MODEL, data=PICTURES)
    heads = {c: head() for c in range(4)}
    for r in (1, 2, 3):
        for client in drawn(r, 0.5):
            sgd(heads[client], passes(client, 2, r, data=PICTURES), names=NAMES[1:], network=unready(None))
    assert not result.arrays
    assert result.strategy.report.bytes_up == result.strategy.report.bytes_down == 0
    for client in range(4):
        assert_same(result.state(client), {f"model/{n}": v for n, v in heads[client].items()})
    assert result.app.data.x.shape == (len(PICTURES.x), WIDTH)


def test_head_only_leaves_batch_normalization_and_dropout_as_in_an_evaluation() -> None:
    network = SmallNetwork()
    data = gaussian_data((20, 9))
    app = HeadOnlyUpdate().client_app(network, data)
    with torch.no_grad():
        expected = network.eval().body(data.x)
    assert torch.equal(app.data.x, expected)
    over = frozen.featured(SmallNetwork(), data, budget=0)
    assert over[1] is data
    assert over[0].train().head.training
    assert not over[0].body.training
    assert torch.allclose(over[0](data.x), network.head(expected))


# ------------------------------------------------------------------- a frozen backbone


def test_clients_share_one_frozen_backbone() -> None:
    app = PFedPGUpdate(prompts=COUNT).client_app(MODEL, PICTURES)
    assert set(entries(app.template)) == set(NAMES)
    assert app.data.x.shape == (len(PICTURES.x), 4, WIDTH)
    before = {n: v.clone() for n, v in app.module.body.state_dict().items()}
    result = pfedpg(2)
    assert all(torch.equal(v, before[n]) for n, v in result.app.module.body.state_dict().items())
    assert all(p.requires_grad for p in MODEL.parameters())  # what was given is left as it was
    assert torch.equal(PICTURES.x, gaussian_data((20, 9, 13, 7), features=(1, 4, 4), dtype=torch.float64).x)


def test_prompts_start_uniform_and_depend_on_the_seed() -> None:
    bound = math.sqrt(6 / (4 + WIDTH))  # four pixels a patch
    network, _ = frozen.prompted(MODEL, PICTURES, 200, 1)
    assert network.prompts is not None
    values = network.prompts.detach()
    assert 0.98 * bound < float(values.abs().max()) <= bound
    assert float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    again, other = (frozen.prompted(MODEL, PICTURES, 200, seed)[0].prompts for seed in (1, 2))
    assert again is not None
    assert other is not None
    assert torch.equal(values, again)
    assert not torch.equal(values, other)


def test_beyond_the_budget_every_batch_embeds_its_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="fedpers.models.frozen"):
        inside = pfedpg(2)
        size = len(PICTURES.x) * 4 * WIDTH * 8
        assert f"tokens of {len(PICTURES.x)} samples are computed once" in caplog.text
        monkeypatch.setattr(frozen, "BUDGET", size - 1)
        beyond = pfedpg(2)
        assert "every batch computes its own" in caplog.text
    assert beyond.app.data.x.shape == PICTURES.x.shape
    assert_same(inside.arrays, beyond.arrays)
    assert_same(inside.state(0), beyond.state(0))
    monkeypatch.setattr(frozen, "BUDGET", size)
    assert pfedpg(1).app.data.x.shape == inside.app.data.x.shape


@pytest.fixture(params=["fedvpt", "pfedpg"])
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_prompt_length_zero_is_refused(method: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_strategy(method, {"prompts": 0})
    assert str(caught.value) == "strategy.prompts=0: expected a whole number >= 1."


def test_a_backbone_without_class_token_is_refused(method: str) -> None:
    _, update = make_strategy(method)
    with pytest.raises(ConfigError) as caught:
        update.client_app(SmallNetwork(), gaussian_data())
    expected = "a vision transformer with a class token: model=vit or model=vit_b16"
    assert str(caught.value) == f"model=SmallNetwork: expected {expected}."


def test_networks_and_data_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^model=ViT: expected a network that takes samples of shape \[6\]"):
        PFedPGUpdate().client_app(small_vit(), gaussian_data())
    with pytest.raises(ConfigError, match=r"^model=Linear: expected a network with a 'body' and a linear 'head'"):
        HeadOnlyUpdate().client_app(nn.Linear(6, 4), gaussian_data())
    with pytest.raises(ConfigError, match=r"^dataset=ranking: expected samples of numbers with class labels"):
        HeadOnlyUpdate().client_app(SmallNetwork(), ranking_data())


@pytest.mark.parametrize(
    ("option", "value"),
    [("generator", "mlp"), ("inner", 0), ("descriptor_tokens", 2), ("server_optimizer", "adamw"), ("server_lr", 0.0),
     ("server_lr", math.nan), ("reduction", "max"), ("adapt_rounds", 0)],
)  # fmt: skip
def test_values_out_of_range_are_named(option: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        make_strategy("pfedpg", {option: value})
    assert str(caught.value).startswith(f"strategy.{option}={value}: expected ")
