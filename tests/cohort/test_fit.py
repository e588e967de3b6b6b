from __future__ import annotations

import copy
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedpers.cohort import Cohort, Training, Tree, mixed, proximal, shifted, small_change
from fedpers.errors import ConfigError
from tests.cohort.helpers import assert_same, batches, by_size, cross_entropy, make_cohort, train_alone
from tests.problems import SmallNetwork, gaussian_data

DATA = gaussian_data(dtype=torch.float64)
NETWORK = SmallNetwork(dropout=0.0).double()
SMALL = Training(lr=0.1, batch_size=8)


def start(cohort: Cohort) -> Tree:
    return cohort.assemble(cohort.template)


def plain_sgd(module: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=lr)


@pytest.mark.parametrize("only", ["head", "body", ("parameters", "-body.1")])
def test_only_the_selected_parameters_move(only: str) -> None:
    cohort = make_cohort(NETWORK, DATA, training=SMALL)
    params = start(cohort)
    before = params.clone()
    cohort.fit(params, cross_entropy, only=only)
    chosen = set(cohort.names(only)) & set(cohort.names("parameters"))
    for name in cohort.names("parameters"):
        moved = (params[name] != before[name]).flatten(1).any(1)
        assert moved.all() if name in chosen else not moved.any(), name
    assert (params["body.1.num_batches_tracked"] == cohort.steps_taken).all()  # the layer still sees the batches


def test_frozen_parameters_are_nobodys_state_and_stay() -> None:
    network = copy.deepcopy(NETWORK)
    network.body[0].requires_grad_(False)
    cohort = make_cohort(network, DATA, training=SMALL)
    params = start(cohort)
    whole = start(make_cohort(NETWORK, DATA, training=SMALL))
    assert set(params.keys()) == {n for n in whole.keys() if not n.startswith("body.0.")}  # noqa: SIM118
    before = params.clone()
    cohort.fit(params, cross_entropy)
    assert torch.equal(cohort.module.body[0].weight, network.body[0].weight)
    assert not torch.equal(params["head.weight"], before["head.weight"])

    def only_free(step: Any, rows: Any, grads: Any) -> None:
        for name in [n for n in grads if n.startswith("body.0.")]:
            grads[name].zero_()

    other = make_cohort(NETWORK, DATA, training=SMALL)
    other.fit(whole, cross_entropy, adjust=only_free)
    assert_same({n: params[n] for n in cohort.names("all")}, {n: whole[n] for n in cohort.names("all")})


def test_a_mask_holds_entries_against_gradient_momentum_and_decay() -> None:
    for settings in ({"momentum": 0.9, "weight_decay": 0.1}, {"optimizer": "adamw", "weight_decay": 0.1}):
        training = Training(lr=0.1, batch_size=8, epochs=2, **settings)  # type: ignore[arg-type]
        cohort = make_cohort(NETWORK, DATA, training=training)
        params = start(cohort)
        before = params.clone()
        mask = {n: (torch.rand(v.shape, generator=torch.Generator().manual_seed(1)) < 0.5).to(v.dtype)
                for n, v in params.items() if n.startswith("head.")}  # fmt: skip
        cohort.fit(params, cross_entropy, only="head", mask=mask)
        for name, free in mask.items():
            moved = params[name] != before[name]
            assert torch.equal(moved, free.bool()), name


@pytest.mark.parametrize("stop", [None, small_change(0.0)], ids=["plain", "stop"])
def test_frozen_layers_work_as_in_an_evaluation(stop: Any) -> None:
    network = copy.deepcopy(NETWORK)
    network.body[3].p = 0.5  # no dropout either
    network.body[1].running_mean += 0.4
    cohort = make_cohort(network, DATA, training=Training(lr=0.1, batch_size=8, epochs=2))
    params = start(cohort)
    cohort.fit(params, cross_entropy, frozen=True, stop=stop)
    for row, client in enumerate(by_size(DATA)):
        module = copy.deepcopy(network).eval()
        optimizer = plain_sgd(module)
        for x, y, _ in islice(batches(DATA, client, size=8), int(cohort.steps_taken[row])):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
        assert_same(params, {n: v.detach() for n, v in module.state_dict().items()}, row)
    cohort.fit(params, cross_entropy)  # and the mode is not kept
    assert (params["body.1.num_batches_tracked"] > 0).all()


def test_zero_epochs_change_nothing() -> None:
    cohort = make_cohort(NETWORK, DATA, training=SMALL)
    params = start(cohort)
    before = params.clone()
    cohort.fit(params, cross_entropy, epochs=0)
    assert (params == before).all()
    assert cohort.steps_taken.sum() == cohort.samples_seen.sum() == 0


def test_passes_go_on_in_a_second_training() -> None:
    once, twice = (make_cohort(NETWORK, DATA, training=SMALL) for _ in range(2))
    a, b = start(once), start(twice)
    once.fit(a, cross_entropy, epochs=2)
    twice.fit(b, cross_entropy, epochs=1)
    twice.fit(b, cross_entropy, epochs=1)
    assert_same(a, {name: b[name] for name in once.names("all")})
    assert torch.equal(once.samples_seen, twice.samples_seen)


def test_rate_falls_with_the_round() -> None:
    training = Training(lr=0.1, batch_size=0, shuffle=False, lr_decay=0.5)
    cohort = make_cohort(NETWORK, DATA, training=training, round=3)
    assert cohort.rate == pytest.approx(0.025)
    params = start(cohort)
    cohort.fit(params, cross_entropy)
    for row, client in enumerate(by_size(DATA)):
        x, y = DATA.x[DATA.train[client]], DATA.y[DATA.train[client]]
        module = copy.deepcopy(NETWORK).train()
        nn.functional.cross_entropy(module(x), y).backward()
        plain_sgd(module, 0.025).step()
        assert_same(params, dict(module.state_dict()), row)


def test_loss_and_counts() -> None:
    cohort = make_cohort(NETWORK, DATA, training=Training(lr=1e-12, batch_size=8, epochs=2))
    cohort.fit(start(cohort), cross_entropy)
    assert cohort.samples_seen.tolist() == [2 * len(DATA.train[c]) for c in by_size(DATA)]
    alone = make_cohort(NETWORK, DATA, [3], training=Training(lr=1e-12, batch_size=8, epochs=2))
    alone.fit(start(alone), cross_entropy)
    row = by_size(DATA).index(3)
    assert float(cohort.loss_sum[row]) == pytest.approx(float(alone.loss_sum[0]), rel=1e-5)
    assert 0.5 < float(cohort.loss_sum[row] / cohort.samples_seen[row]) < 3  # near log(4), the network knows nothing


def test_proximal_is_the_gradient_of_the_penalty() -> None:
    anchor = {n: v + 0.3 for n, v in NETWORK.named_parameters()}

    def penalty(module: nn.Module) -> Tensor:
        return 0.35 * sum(((p - anchor[n].detach()) ** 2).sum() for n, p in module.named_parameters())  # type: ignore[return-value]

    cohort = make_cohort(NETWORK, DATA, training=Training(lr=0.1, batch_size=8, epochs=2))
    params = start(cohort)
    cohort.fit(params, cross_entropy, adjust=proximal(0.7, cohort.spread({n: v.detach() for n, v in anchor.items()})))
    for row, client in enumerate(by_size(DATA)):
        steps = int(cohort.steps_taken[row])
        alone = train_alone(NETWORK, DATA, client, plain_sgd, steps=steps, size=8, penalty=penalty)
        assert_same(params, alone, row)


def test_shifted_and_proximal_follow_their_clients_into_another_order() -> None:
    steps = [1, 5, 0, 3, 2, 4, 6]  # rows of the plan are not rows of the cohort
    cohort = make_cohort(NETWORK, DATA, training=SMALL)
    torch.manual_seed(0)
    shift = {"head.weight": torch.randn(7, 4, 8, dtype=torch.float64)}
    anchor = {"head.bias": torch.randn(7, 4, dtype=torch.float64)}
    params = start(cohort)
    cohort.fit(params, cross_entropy, steps=steps, adjust=[shifted(shift), proximal(0.5, anchor)])
    for row, client in enumerate(by_size(DATA)):

        def penalty(module: nn.Module, row: int = row) -> Tensor:
            linear = (module.head.weight * shift["head.weight"][row]).sum()  # type: ignore[operator,union-attr]
            return linear + 0.25 * ((module.head.bias - anchor["head.bias"][row]) ** 2).sum()  # type: ignore[operator,union-attr]

        alone = train_alone(NETWORK, DATA, client, plain_sgd, steps=steps[row], size=8, penalty=penalty)
        assert_same(params, alone, row)


PASSES = {27: 2, 11: 5, 46: 1, 22: 3, 38: 5, 6: 4, 31: 2}
"""After how many of at most 5 passes the client of this size stops."""


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"optimizer": "adam"}])
@pytest.mark.parametrize("order", ["by size", "own steps"])
def test_stop_ends_each_client_after_its_own_passes(settings: dict[str, object], order: str) -> None:
    clients = by_size(DATA)
    per_pass = [-(-len(DATA.train[c]) // 8) for c in clients]
    patience = [PASSES[len(DATA.train[c])] for c in clients]
    # A rule sees one client's losses at a time; the first loss tells which client it is.
    training = Training(lr=0.05, batch_size=8, **settings)  # type: ignore[arg-type]
    first: list[float] = []
    for client in clients:
        probe = make_cohort(NETWORK, DATA, [client], training=training)
        probe.fit(start(probe), cross_entropy, epochs=1)
        first.append(float(probe.loss_sum[0] / probe.samples_seen[0]))
    assert len({round(loss, 4) for loss in first}) == len(first)
    calls: list[int] = []

    def rule(losses: Tensor) -> Tensor:
        done = []
        for own in losses.T:
            client = min(range(len(first)), key=lambda k: abs(first[k] - float(own[0])))
            assert float(own[0]) == pytest.approx(first[client], rel=1e-4)
            calls.append(client)
            done.append(len(own) >= patience[client])
        return torch.tensor(done)

    steps = [5 * n for n in per_pass]
    if order == "own steps":
        steps[3], steps[5] = 1, 50  # one ends in the middle of its first pass, one could train longest
    cohort = make_cohort(NETWORK, DATA, training=training)
    params = start(cohort)
    cohort.fit(params, cross_entropy, steps=steps, stop=rule)
    wanted = [min(s, n * p) for s, n, p in zip(steps, per_pass, patience, strict=True)]
    assert cohort.steps_taken.tolist() == wanted
    assert set(calls) == set(range(7)) - ({3} if order == "own steps" else set())
    for row, client in enumerate(clients):
        alone = make_cohort(NETWORK, DATA, [client], training=training)
        own = start(alone)
        alone.fit(own, cross_entropy, steps=wanted[row])
        assert_same({n: params[n][row] for n in cohort.names("all")}, {n: own[n][0] for n in cohort.names("all")})
        assert cohort.samples_seen[row] == alone.samples_seen[0]
        assert float(cohort.loss_sum[row]) == pytest.approx(float(alone.loss_sum[0]), rel=1e-5)


@pytest.mark.parametrize("settings", [{"schedule": "cosine", "momentum": 0.9}, {"schedule": "linear"}])
def test_a_schedule_goes_on_over_the_planned_steps_when_others_stop(settings: dict[str, object]) -> None:
    training = Training(lr=0.05, batch_size=8, epochs=6, **settings)  # type: ignore[arg-type]
    rule = small_change(0.03)
    network = SmallNetwork(dropout=0.4).double()
    cohort = make_cohort(network, DATA, training=training)
    params = start(cohort)
    cohort.fit(params, cross_entropy, stop=rule)
    planned = [6 * -(-len(DATA.train[c]) // 8) for c in by_size(DATA)]
    stopped = [taken < steps for taken, steps in zip(cohort.steps_taken.tolist(), planned, strict=True)]
    assert any(stopped)
    assert not all(stopped)
    for row, client in enumerate(by_size(DATA)):
        alone = make_cohort(network, DATA, [client], training=training)
        own = start(alone)
        alone.fit(own, cross_entropy, stop=rule)
        assert alone.steps_taken[0] == cohort.steps_taken[row]
        assert_same(params, {n: own[n][0] for n in cohort.names("all")}, row)


def test_a_rule_sees_the_mean_loss_of_each_pass() -> None:
    seen: list[list[float]] = []

    def rule(losses: Tensor) -> Tensor:
        seen.append(losses[:, 0].tolist())
        return torch.tensor([False])

    whole = make_cohort(NETWORK, DATA, [2], training=SMALL)
    whole.fit(start(whole), cross_entropy, epochs=3, stop=rule)
    parts = make_cohort(NETWORK, DATA, [2], training=SMALL)
    params = start(parts)
    expected, before = [], 0.0
    for _ in range(3):
        parts.fit(params, cross_entropy, epochs=1)
        expected.append((float(parts.loss_sum[0]) - before) / len(DATA.train[2]))
        before = float(parts.loss_sum[0])
    assert [len(losses) for losses in seen] == [1, 2, 3]
    assert seen[-1] == pytest.approx(expected, rel=1e-5)


def test_small_change_stops_when_the_loss_stands_still() -> None:
    rule = small_change(0.1)
    assert rule(torch.tensor([[1.0, 5.0]])).tolist() == [False, False]
    assert rule(torch.tensor([[9.0, 5.0], [1.0, 5.0], [0.95, 4.0]])).tolist() == [True, False]
    cohort = make_cohort(NETWORK, DATA, training=Training(lr=1e-9, batch_size=8, epochs=50, shuffle=False))
    cohort.fit(start(cohort), cross_entropy, stop=small_change(1e-3))
    assert cohort.samples_seen.tolist() == [2 * len(DATA.train[c]) for c in by_size(DATA)]


def test_a_batch_of_one_sample_under_batch_normalization_is_refused() -> None:
    cohort = make_cohort(NETWORK, gaussian_data((16, 9), dtype=torch.float64), training=SMALL, needs_pairs=True)
    with pytest.raises(ConfigError, match=r"training\.batch_size=8.*client 1 "):
        cohort.fit(start(cohort), cross_entropy)


def test_clients_must_stand_by_size() -> None:
    with pytest.raises(ValueError, match="descending"):
        make_cohort(NETWORK, DATA, [1, 0])


def test_a_loss_over_parts_of_the_network() -> None:
    def parts(network: object, batch: object) -> Tensor:
        features = network.part("body")(batch.x)  # type: ignore[attr-defined]
        return batch.mean(  # type: ignore[attr-defined,no-any-return]
            nn.functional.cross_entropy(network.part("head")(features), batch.y, reduction="none")  # type: ignore[attr-defined]
        )

    results = []
    for loss in (cross_entropy, parts):
        cohort = make_cohort(SmallNetwork(dropout=0.3).double(), DATA, training=SMALL)
        params = start(cohort)
        cohort.fit(params, loss)
        results.append(params)
    names = list(NETWORK.state_dict())
    assert_same(results[0], {n: results[1][n] for n in names})


def test_assemble_prefers_personal_then_received_then_initial() -> None:
    cohort = make_cohort(NETWORK, DATA, [2, 0])
    received = cohort.template.select("head.weight", "head.bias").clone()
    received["head.weight"] = received["head.weight"] + 1
    received["head.bias"] = received["head.bias"] + 2
    personal = cohort.spread({"head.bias": torch.arange(4.0, dtype=torch.float64)})
    personal["head.bias"][1] = -1
    full = cohort.assemble(received, personal)
    assert full["head.bias"].tolist() == [[0, 1, 2, 3], [-1, -1, -1, -1]]
    assert torch.equal(full["head.weight"][1], received["head.weight"])
    assert torch.equal(full["body.0.weight"][0], cohort.template["body.0.weight"])
    full["head.weight"].zero_()
    assert received["head.weight"].abs().sum() > 0  # what all received is not touched


def test_mixed_mixes_the_named_entries_only() -> None:
    first = Tree({"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([5, 6])}, batch_size=[2])
    second = Tree({"w": torch.tensor([[0.0, 0.0], [1.0, 0.0]]), "b": torch.tensor([7, 8])}, batch_size=[2])
    out = mixed(torch.tensor([0.25, 1.0]), first, second, ["w"])
    assert out["w"].tolist() == [[0.25, 0.5], [3.0, 4.0]]
    assert out["b"].tolist() == [5, 6]
