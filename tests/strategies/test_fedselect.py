"""FedSelect: masks worked out by hand, whole runs against plain loops, what travels, and errors."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import flwr.app as flower
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedpers.app import _main
from fedpers.cohort import Cohort, Training, leaves, tree
from fedpers.errors import ConfigError
from fedpers.flower_private import server_identity
from fedpers.records import trees
from fedpers.run import run_rounds
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import FedSelect, FedSelectUpdate, make_strategy
from fedpers.strategies.fedselect import batch_accuracy, from_bits, grow_by_tensor, grow_together, to_bits
from tests import equivalence, reference
from tests.cohort.helpers import assert_same
from tests.problems import SmallNetwork, gaussian_data
from tests.runtime.wire import WireGrid
from tests.strategies.helpers import DATA, NETWORK, SEED, Values, copied, drawn, initial, passes, run, weights_of

CLIENTS = range(DATA.num_clients)


# ---------------------------------------------------------------------- masks


def grown(mask: list[int], change: list[float], rate: float = 0.25, limit: float = 0.8) -> list[int]:
    """One client's mask after one update of one tensor."""
    one = {"weight": torch.tensor([mask], dtype=torch.uint8)}
    return grow_by_tensor(one, {"weight": torch.tensor([change], dtype=torch.float32)}, rate, limit)["weight"][
        0
    ].tolist()


@pytest.mark.parametrize(
    ("mask", "change", "rate", "limit", "expected"),
    [
        ([0, 0, 0, 0], [0.1, 0.4, 0.2, 0.3], 0.25, 0.8, [0, 1, 0, 0]),  # c at place 3
        ([0] * 6, [1, 2, 3, 4, 5, 6], 0.25, 0.8, [0, 0, 0, 0, 1, 1]),  # round(4.5) = 4, so two
        ([0] * 10, list(range(10)), 0.25, 0.8, [0] * 8 + [1, 1]),  # round(7.5) = 8, so two
        ([1, 0, 0, 1, 0, 0], [9, 1, 4, 9, 2, 3], 0.25, 0.8, [1, 0, 1, 1, 0, 0]),  # personal ones take no place
        ([0, 0, 0, 0], [0, 0, 0, 0], 0.25, 0.8, [1, 1, 1, 1]),  # all tie
        ([0, 0, 0, 0], [1, 3, 3, 2], 0.25, 0.8, [0, 1, 1, 0]),
        ([1, 1, 1, 1, 0], [0, 0, 0, 0, 5], 0.75, 0.8, [1, 1, 1, 1, 0]),  # 4/5 is above 0.8 in float32
        ([1, 0, 0, 0], [0, 1, 2, 3], 0.5, 0.25, [1, 0, 0, 1]),  # at the limit is not above it
        ([1, 1, 0, 0], [0, 0, 2, 3], 0.5, 0.25, [1, 1, 0, 0]),
        ([0], [5.0], 0.25, 0.8, [0]),  # round(0.75) = 1 entry stays: the code has an IndexError
        ([0, 0], [5.0, 6.0], 0.25, 0.8, [0, 0]),
        ([1, 1], [5.0, 6.0], 0.25, 1.0, [1, 1]),  # none is left
    ],
)
def test_growth_by_tensor(mask: list[int], change: list[float], rate: float, limit: float, expected: list[int]) -> None:
    assert grown(mask, change, rate, limit) == expected


def test_growth_by_tensor_takes_each_client_and_tensor_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = {n: (torch.rand(5, *s, generator=generator) < 0.3).to(torch.uint8) for n, s in (("a", (4, 3)), ("b", (7,)))}
    change = {n: torch.rand(m.shape, generator=generator) for n, m in mask.items()}
    together = grow_by_tensor(mask, change, 0.4, 0.6)
    for name, whole in together.items():
        assert whole.dtype == torch.uint8
        for k in range(5):
            alone = grown(mask[name][k].flatten().tolist(), change[name][k].flatten().tolist(), 0.4, 0.6)
            assert whole[k].flatten().tolist() == alone


def test_growth_together_ranks_the_whole_network_up_to_the_limit() -> None:
    mask = {"a": torch.tensor([[0, 0, 1], [0, 0, 0]], dtype=torch.uint8), "b": torch.zeros(2, 5, dtype=torch.uint8)}
    change = {"a": torch.tensor([[4.0, 1, 9], [0, 0, 0]]), "b": torch.tensor([[3.0, 3, 3, 2, 0], [0, 0, 0, 0, 7]])}
    new = grow_together(mask, change, 0.5, 0.5)  # 3 of 7, and 4 of 8, within 4 of 8
    assert new["a"].tolist() == [[1, 0, 1], [0, 0, 0]]
    assert new["b"].tolist() == [[1, 1, 0, 0, 0], [0, 0, 0, 0, 1]]  # ties in order; what did not move stays
    assert grow_together(new, change, 0.5, 0.5)["b"][0].tolist() == [1, 1, 0, 0, 0]  # the limit is reached


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0])), min_size=1, max_size=30),
    st.floats(0.01, 0.99),
    st.floats(0.05, 1.0),
)
def test_masks_only_grow_by_what_moved_most(entries: list[tuple[bool, float]], rate: float, limit: float) -> None:
    mask = {"weight": torch.tensor([[int(personal) for personal, _ in entries]], dtype=torch.uint8)}
    change = {"weight": torch.tensor([[moved for _, moved in entries]])}
    old, moved = mask["weight"][0].bool(), change["weight"][0]
    for grow in (grow_by_tensor, grow_together):
        new = grow(mask, change, rate, limit)["weight"][0].bool()
        assert bool((new | ~old).all())
        fresh, left = new & ~old, ~new
        if fresh.any() and left.any():
            assert moved[fresh].min() >= moved[left].max()
        if grow is grow_together:
            assert int(fresh.sum()) <= round(rate * int((~old).sum()))
            assert not fresh.any() or int(new.sum()) <= limit * len(entries) + 1e-6


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 1), min_size=0, max_size=40))
def test_bits_come_back(mask: list[int]) -> None:
    bits = to_bits(torch.tensor(mask, dtype=torch.uint8))
    assert bits.dtype == torch.uint8
    assert bits.numpy().tobytes() == np.packbits(np.array(mask, dtype=np.uint8), bitorder="little").tobytes()
    assert from_bits(bits, len(mask)).tolist() == mask


def test_batch_accuracy_counts_batches_alike() -> None:
    sizes = [7, 0, 4, 1, 8]
    rng = np.random.default_rng(0)
    labels = [torch.from_numpy(rng.integers(0, 3, n)) for n in sizes]
    outputs = [torch.from_numpy(rng.normal(size=(n, 3))) for n in sizes]
    for width in (1, 3, 4, 8, 0):
        accuracies = batch_accuracy(outputs, labels, width)
        for accuracy, scores, y in zip(accuracies.tolist(), outputs, labels, strict=True):
            hits = (scores.argmax(1) == y).double()
            parts = [part.mean() for part in hits.split(width or max(1, len(y)))] if len(y) else [torch.tensor(np.nan)]
            assert accuracy == pytest.approx(float(torch.stack(parts).mean()), nan_ok=True)
    right = torch.eye(3)[[0, 0, 0]]
    assert float(batch_accuracy([right], [torch.tensor([0, 0, 1])], 2)[0]) == 0.5  # 2 of 2, 0 of 1


# ------------------------------------------------------- runs against plain loops


class Client:
    """What a client of the plain loop keeps."""

    def __init__(self, network: nn.Module) -> None:
        self.model = initial(network)
        self.names = weights_of(network)
        self.mask = {n: torch.zeros_like(self.model[n], dtype=torch.bool) for n in self.names}
        self.used = copied(self.mask)
        self.previous = copied(self.model)
        self.trained = 0

    def receive(self, server: Values) -> Values:
        values = copied(self.model)
        for n in self.names:
            values[n] = torch.where(self.used[n], values[n], server[n])
        return values


def move(values: Values, client: int, r: int, number: int, free: dict[str, Tensor], frozen: bool) -> None:
    """One pass in which only the entries in `free` move."""
    for x, y in passes(client, 1, r, first=number):
        moving = {n: values[n].clone().requires_grad_() for n in free}
        NETWORK.train(not frozen)
        loss = F.cross_entropy(functional_call(NETWORK, {**values, **moving}, (x,)), y)
        for (n, leaf), slope in zip(moving.items(), torch.autograd.grad(loss, list(moving.values())), strict=True):
            values[n] = torch.where(free[n], leaf.detach() - 0.1 * slope, leaf.detach())


def plain_update(client: Client, rate: float, limit: float) -> None:
    """The update of the authors' code, entry by entry."""
    for n in client.names:
        if "weight" not in n:
            continue
        old, change = client.mask[n].flatten(), (client.model[n] - client.previous[n]).abs().flatten()
        if float(np.float32(int(old.sum()) / len(old))) > limit:
            continue
        left = sorted(float(c) for c, personal in zip(change, old, strict=True) if not personal)
        place = round((1 - rate) * len(left))
        if place < len(left):
            client.mask[n] = (old | (change >= left[place])).view_as(client.mask[n])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("interval", "batchnorm", "weighting"),  # each pair of values at least once
    [(1, "official", "uniform"), (2, "official", "samples"), (1, "fixed", "samples"), (2, "fixed", "uniform")],
)
def test_official_with_partial_participation(interval: int, batchnorm: str, weighting: str) -> None:
    rate, limit, rounds = 0.3, 0.6, 7
    options = {"rate": rate, "limit": limit, "interval": interval, "batchnorm": batchnorm, "weighting": weighting}
    result = run("fedselect", options, rounds=rounds, fraction=0.5)
    server = {n: v for n, v in initial().items() if n in weights_of()}
    clients = [Client(NETWORK) for _ in CLIENTS]
    for r in range(1, rounds + 1):
        total = {n: torch.zeros_like(v) for n, v in server.items()}
        count = {n: torch.zeros_like(v) for n, v in server.items()}
        for c in drawn(r, 0.5):
            client = clients[c]
            values = client.receive(server)
            frozen = batchnorm == "official" and client.trained > 0
            for epoch in range(2):
                move(values, c, r, 2 * epoch, client.mask, frozen)
                move(values, c, r, 2 * epoch + 1, {n: ~m for n, m in client.mask.items()}, frozen)
            client.model, client.used = values, copied(client.mask)
            weight = 1.0 if weighting == "uniform" else float(len(DATA.train[c]))
            for n in server:
                total[n] += weight * (~client.used[n]) * values[n]
                count[n] += weight * (~client.used[n])
            if client.trained > 0 and client.trained % interval == 0:
                plain_update(client, rate, limit)
                client.previous = copied(values)
            client.trained += 1
        server = {n: torch.where(count[n] > 0, total[n] / count[n].clamp(min=1e-9), v) for n, v in server.items()}
    assert any(bool(client.used["head.weight"].any()) for client in clients)
    assert any(client.trained not in (0, rounds) for client in clients)
    assert_same(result.arrays, server)
    for c, client in enumerate(clients):
        state = result.state(c)
        for n in client.names:
            assert torch.equal(state[f"mask/{n}"].bool(), client.mask[n]), n
            assert torch.equal(state[f"used/{n}"].bool(), client.used[n]), n
        assert int(state["trained"]) == client.trained
        assert_same({n: state[f"model/{n}"] for n in client.model}, client.model)
        assert_same(result.predictors()[c], client.receive(server))


@pytest.mark.parametrize("interval", [1, 2])
def test_paper_variant_against_a_plain_loop(interval: int) -> None:
    rate, limit, rounds = 0.2, 0.5, 4
    options = {"variant": "paper", "rate": rate, "limit": limit, "interval": interval}
    result = run("fedselect", options, rounds=rounds, fraction=0.5)
    server = {n: v for n, v in initial().items() if n in weights_of()}
    clients = [Client(NETWORK) for _ in CLIENTS]
    size = sum(v.numel() for v in server.values())
    for r in range(1, rounds + 1):
        total = {n: torch.zeros_like(v) for n, v in server.items()}
        count = {n: torch.zeros_like(v) for n, v in server.items()}
        for c in drawn(r, 0.5):
            client = clients[c]
            start = client.receive(server)
            values = copied(start)
            for epoch in range(2):
                move(values, c, r, 2 * epoch, client.mask, False)
                move(values, c, r, 2 * epoch + 1, {n: ~m for n, m in client.mask.items()}, False)
            ranked = sorted(
                ((-float((values[n] - start[n]).abs().flatten()[i]), place, i, n)
                 for place, n in enumerate(client.names)
                 for i in range(start[n].numel()) if not client.mask[n].flatten()[i]),
            )  # fmt: skip
            wanted = min(round(rate * len(ranked)), int(limit * size) - (size - len(ranked)))
            client.trained += 1
            for moved, _, i, n in ranked[: max(0, wanted)] if client.trained % interval == 0 else []:
                if moved < 0:
                    client.mask[n].view(-1)[i] = True
            client.model, client.used = values, copied(client.mask)
            for n in server:
                total[n] += (~client.used[n]) * values[n]
                count[n] += ~client.used[n]
        server = {n: torch.where(count[n] > 0, total[n] / count[n].clamp(min=1), v) for n, v in server.items()}
    assert any(bool(client.mask["head.bias"].any()) for client in clients)  # biases too
    assert_same(result.arrays, server)
    for c, client in enumerate(clients):
        state = result.state(c)
        assert not any(name.startswith(("used/", "previous/")) for name in state)
        for n in client.names:
            assert torch.equal(state[f"mask/{n}"].bool(), client.mask[n]), n
        assert_same(result.predictors()[c], client.receive(server))


def test_the_proximal_pull_is_to_the_start_of_the_whole_training() -> None:
    """While masks are empty, FedSelect is FedAvg with a uniform mean, and takes each pass of its own."""
    settings: dict[str, Any] = {"epochs": 3, "lr": 0.1, "proximal": 5.0, "shuffle": False}
    result = run("fedselect", {"batchnorm": "fixed"}, rounds=1, **settings)
    expected = run("fedavg", {"weighting": "uniform"}, rounds=1, **settings)
    for name, value in expected.arrays.items():
        if name in result.arrays:
            torch.testing.assert_close(result.arrays[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_cohort_size_does_not_matter(variant: str) -> None:
    options = {"variant": variant, "batchnorm": "official"}  # some train for the first time beside others
    one, three = (run("fedselect", options, rounds=4, fraction=0.7, cohort=k) for k in (1, 3))
    assert_same(one.arrays, three.arrays)
    for client in CLIENTS:
        assert_same(one.state(client), three.state(client))
    shares = one.strategy.report.extra
    assert 0 < shares["personal_share"] < 0.8
    assert shares == pytest.approx(three.strategy.report.extra)


def test_out_of_the_box_it_personalises_and_stops_at_the_limit() -> None:
    result = run("fedselect", rounds=8, batch_size=20, epochs=1)
    shares = result.strategy.report.extra
    assert set(shares) == {"personal_share", *(f"personal_share/{n}" for n in weights_of() if "weight" in n)}
    sizes = {n: v.numel() for n, v in initial().items() if n in weights_of()}
    for name in ("body.0.weight", "head.weight"):
        assert 0.8 < shares[f"personal_share/{name}"] < 0.85
    ones = sum(shares[f"personal_share/{n}"] * sizes[n] for n in sizes if "weight" in n)
    assert shares["personal_share"] == pytest.approx(ones / sum(sizes.values()))
    states = [result.state(c) for c in CLIENTS]
    masks = {tuple(v for n in sizes for v in state[f"mask/{n}"].flatten().tolist()) for state in states}
    assert len(masks) == len(states)  # each chose for itself
    for state in states:
        assert not any(v.any() for n, v in state.items() if n.startswith("mask/") and n.endswith("bias"))


class Tiny(nn.Module):
    """Weights of one and two entries, for which the authors' code ends in an IndexError."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(6, 1, bias=False)
        self.pair = nn.Linear(1, 2)
        self.head = nn.Linear(2, 4)
        self.norm = nn.LayerNorm(1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.pair(self.scale(x) + self.norm.weight)))
        return out


def test_small_tensors_stay_global() -> None:
    torch.manual_seed(0)
    result = run("fedselect", network=Tiny().double(), rounds=5)
    for client in CLIENTS:
        state = result.state(client)
        assert not state["mask/pair.weight"].any()
        assert not state["mask/norm.weight"].any()
        assert state["mask/head.weight"].any()


def test_statistics_stay_with_the_client_and_are_frozen_after_its_first_training() -> None:
    kept = [run("fedselect", rounds=r, fraction=0.5) for r in (1, 2, 3, 4)]
    assert not any("running" in name or "num_batches" in name for name in kept[-1].arrays)
    for client in CLIENTS:
        first = next((r for r in range(1, 5) if client in drawn(r, 0.5)), None)
        for r, result in enumerate(kept, 1):
            state = result.state(client)
            seen = int(state["model/body.1.num_batches_tracked"])
            batches = -(-len(DATA.train[client]) // 5)
            assert seen == (4 * batches if first is not None and r >= first else 0)  # 2 epochs of 2 passes
            if first is not None and r > first:
                before = kept[first - 1].state(client)
                assert torch.equal(state["model/body.1.running_mean"], before["model/body.1.running_mean"])


# ------------------------------------------------------------------- messages


def test_only_global_entries_and_a_bit_for_each_travel() -> None:
    result = run("fedselect", rounds=5)
    sizes = {n: v.numel() for n, v in initial().items() if n in weights_of()}
    free = sum(int((result.state(c)[f"used/{n}"] == 0).sum()) for c in CLIENTS for n in sizes)
    bits = len(CLIENTS) * sum(-(-size // 8) for size in sizes.values())
    assert free < 0.6 * len(CLIENTS) * sum(sizes.values())
    assert result.strategy.report.bytes_up == 8 * free + bits  # float64
    assert result.strategy.report.bytes_down == 8 * len(CLIENTS) * sum(sizes.values())


def test_the_same_over_a_wire() -> None:
    results = []
    for wire in (False, True):
        training = Training(lr=0.1, batch_size=5)
        strategy, update = make_strategy("fedselect", server={"seed": SEED}, training=training)
        strategy.begin()
        app = update.client_app(NETWORK, DATA, seed=SEED)
        grid = WireGrid(app, 4) if wire else LocalGrid(app, 4, clients_at_once=4, workers=1)
        with server_identity(1):
            arrays = app.initial_arrays()
            for r in (1, 2, 3, 4):
                messages = strategy.configure_train(r, arrays, flower.ConfigRecord(), grid)
                new, _ = strategy.aggregate_train(r, grid.send_and_receive(messages))
                assert new is not None
                arrays = new
            messages = strategy.evaluation_messages(4, arrays, flower.ConfigRecord(), grid)
            strategy.aggregate_evaluate(4, grid.send_and_receive(messages))
        assert not strategy.report.failures
        results.append((trees(flower.RecordDict({"a": arrays}))["a"], strategy.report))
    (local, report), (wired, other) = results
    assert_same(local, dict(leaves(wired)))
    assert report.bytes_up == other.bytes_up
    assert report.extra == pytest.approx(other.extra)
    assert report.clients[2] == pytest.approx(other.clients[2])


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda record, mask: (record["head.bias"][:-1], mask["head.bias"]), "has 3 values for 4 global entries"),
        (lambda record, mask: (record["head.bias"], mask["head.bias"] | 1), "has 4 values for 3 global entries"),
        (lambda record, mask: (record["head.bias"], mask["head.bias"].repeat(2)), "has shape [2], expected [1]"),
        (lambda record, mask: (record["head.bias"][None], mask["head.bias"]), "has shape [1, 4], expected [-1]"),
        (lambda record, mask: (record["head.bias"] * torch.nan, mask["head.bias"]), "not finite"),
    ],
)
def test_a_reply_that_does_not_fit_is_left_out(spoil: Any, sentence: str) -> None:
    strategy, update = make_strategy("fedselect", training=Training(batch_size=5))
    strategy.begin()
    app = update.client_app(NETWORK, DATA)
    grid = LocalGrid(app, 4, clients_at_once=4, workers=1)
    with server_identity(1):
        messages = strategy.configure_train(1, app.initial_arrays(), flower.ConfigRecord(), grid)
        replies = list(grid.send_and_receive(messages))
        content = replies[1].content
        records = trees(content)
        values, bits = spoil(records["arrays"], records["mask"])
        content["arrays"]["head.bias"] = _array(values)
        content["mask"]["head.bias"] = _array(bits)
        strategy.aggregate_train(1, replies)
    assert sentence in strategy.report.failures[1]
    assert len(strategy.report.failures) == 1


def _array(value: Tensor) -> flower.Array:
    return flower.Array(value.numpy())


def test_an_entry_that_is_personal_for_all_stays_on_the_server() -> None:
    strategy = FedSelect()
    arrays = {"weight": torch.tensor([5.0, 6.0, 7.0])}
    strategy.sent_arrays = tree(arrays)
    fold = strategy.fold()
    for client, (values, mask) in enumerate([([1.0], [1, 1, 0]), ([2.0, 3.0], [1, 0, 0])]):
        packed = {
            "arrays": tree({"weight": torch.tensor(values)}),
            "mask": tree({"weight": to_bits(torch.tensor(mask))}),
        }
        fold.add(fold.decode(packed, client), 1.0, client)
    new = strategy.combine(strategy.sent_arrays, fold.result(), [0, 1])
    assert new["weight"].tolist() == [5.0, 2.0, 2.0]


def test_unseen_clients_adapt() -> None:
    data = replace(gaussian_data(), unseen=(5, 6))
    strategy, update = make_strategy(
        "fedselect", server={"unseen": data.unseen}, training=Training(lr=0.1, batch_size=8, epochs=3)
    )
    app = update.client_app(SmallNetwork(), data)
    grid = LocalGrid(app, data.num_clients, clients_at_once=7, workers=1)
    with server_identity(1):
        *_, last = run_rounds(strategy, grid, app.initial_arrays(), 3)
    assert grid.engine is not None
    assert not last.evaluation_failures
    for client in data.unseen:
        # its mask is empty, so the network it was evaluated with is the one it trained; before, it had none
        assert last.adapted[client]["test-accuracy"] == last.adapted[client]["test-trained-accuracy"]
        assert last.adapted[client]["test-loss"] == pytest.approx(last.adapted[client]["test-trained-loss"])
        assert last.adapted[client]["test-loss"] != last.unseen[client]["test-loss"]
        state = grid.engine.store.gather([client])
        assert int(state["trained"][0]) == 1
        assert int(state["model", "body.1.num_batches_tracked"][0]) > 0


@pytest.mark.slow
def test_metrics_land_in_the_run_folder(tmp_path: Path) -> None:
    assert _main(["strategy=fedselect", "rounds=4", "partition.num_clients=2", f"output={tmp_path}"]) == 0
    (file,) = tmp_path.rglob("rounds.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    shares = [row["train/personal_share/head.weight"] for row in rows[1:]]
    assert shares[0] == 0  # no update after the first training
    assert 0.24 < shares[1] < shares[2] < shares[3] < 0.6
    for name in ("batch_accuracy", "trained_accuracy", "trained_batch_accuracy"):
        assert 0 <= rows[-1][f"test/{name}"] <= 1


# --------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rate": 0.0}, "strategy.rate=0.0: expected a number > 0 and < 1, the share of global entries that become"),
        ({"rate": 1.0}, "strategy.rate=1.0: expected a number > 0 and < 1, "),
        ({"limit": 0.0}, "strategy.limit=0.0: expected a number > 0 and <= 1."),
        ({"limit": 1.2}, "strategy.limit=1.2: expected a number > 0 and <= 1."),
        ({"interval": 0}, "strategy.interval=0: expected a whole number >= 1."),
        ({"batchnorm": "fix"}, "strategy.batchnorm=fix: expected one of fixed, official (did you mean 'fixed'?), or "),
        ({"variant": "papr"}, "strategy.variant=papr: expected one of official, paper (did you mean 'paper'?)."),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FedSelectUpdate(**options)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(("name", "value"), [("steps", 5), ("schedule", "cosine")])
def test_training_it_cannot_use(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^training\.{name}={value}: expected .* for strategy=fedselect"):
        FedSelectUpdate(training=Training(**{name: value}))


def test_errors_as_a_user_sees_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("0", "1"):
        assert _main(["strategy=fedselect", f"strategy.rate={value}", f"output={tmp_path}"]) == 2
        text = capsys.readouterr().err
        assert text.startswith(f"fedpers: strategy.rate={float(value)}: expected a number > 0 and < 1, the share of ")
        assert len(text.splitlines()) == 1


# --------------------------------------------------------------------- traces


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "array"),
    [
        ("a_alt_mlp", "after_phase1/fc.weight"),
        ("b_delta_update", "case05/new_mask/fc.weight"),
        ("c_merge", "after_c1/count/fc.weight"),
        ("d_full_mlp", "r2/c1/mask_new/fc1.weight"),
        ("d_full_convbn", "r2/c3/after/bn.running_var"),
        ("d_interval2_mlp", "r3/accuracy"),
    ],
)
def test_a_changed_trace_is_noticed(case: str, array: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "fedselect" / f"{case}.npz"
    copy.parent.mkdir()
    shutil.copy(reference.HERE / "fedselect" / f"{case}.npz", copy)
    assert reference.main(["--root", str(tmp_path), "fedselect"]) == 0
    with np.load(copy) as file:
        arrays = {key: file[key].copy() for key in file.files}
    if "mask" in array:
        arrays[array].flat[0] = 1 - arrays[array].flat[0]
    else:
        arrays[array].flat[-1] += 1e-3
    np.savez(copy, **arrays)
    assert reference.main(["--root", str(tmp_path), "fedselect"]) == 1
    assert "OVER" in capsys.readouterr().out


@pytest.mark.parametrize("label", ["default", "interval=2"])
def test_some_of_a_cohort_may_train_for_the_first_time(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[tuple[bool, bool, bool]] = []  # frozen; whether some of the cohort train in this pass, and some do not
    fit = Cohort.fit

    def spy(self: Cohort, *args: Any, **options: Any) -> None:
        steps = options.get("steps")
        if steps is not None:
            passes.append((options["frozen"], any(steps), not all(steps)))
        fit(self, *args, **options)

    alone = equivalence.outcome("fedselect", torch.float64, 1, 1, label=label)
    monkeypatch.setattr(Cohort, "fit", spy)
    together = equivalence.outcome("fedselect", torch.float64, 1000, 1, label=label)
    assert set(passes) == {(False, True, True), (True, True, True)}
    assert equivalence.difference(alone, together) <= 1e-10
