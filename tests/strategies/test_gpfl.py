"""GPFL against plain loops written from its equations, and by hand."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedpers.cohort import Batch, Given, Network, Training, View, entries, tree
from fedpers.data.federated import FederatedData
from fedpers.data.ratings import RankingData
from fedpers.errors import ConfigError
from fedpers.models import ModelConfig, build_model
from fedpers.strategies import GPFLUpdate
from fedpers.strategies.gpfl import ConditionalNetwork, conditioned
from tests import reference, traces
from tests.cohort.helpers import assert_same
from tests.problems import SmallNetwork, gaussian_data
from tests.strategies.helpers import (
    DATA,
    NETWORK,
    NUMBERS,
    SEED,
    Finished,
    Values,
    average,
    copied,
    drawn,
    passes,
    run,
    sizes,
)

CLIENTS = range(DATA.num_clients)
HEAD = ("head.weight", "head.bias")
STATISTICS = ("body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked")
INPUTS = ("generic", "personal")


def extended(network: nn.Module = NETWORK, data: FederatedData = DATA) -> ConditionalNetwork:
    whole, _ = GPFLUpdate().adapt_model(network, data, SEED)
    assert isinstance(whole, ConditionalNetwork)
    return whole


def valve(values: Mapping[str, Tensor], condition: Tensor) -> tuple[Tensor, Tensor]:
    """Gamma and beta, from the definition."""
    branches = []
    for branch in ("gamma", "beta"):
        w = {n.removeprefix(f"cov.{branch}."): v for n, v in values.items() if n.startswith(f"cov.{branch}.")}
        hidden = torch.relu(w["0.weight"] @ condition + w["0.bias"])
        spread = (hidden - hidden.mean()) / torch.sqrt(((hidden - hidden.mean()) ** 2).mean() + 1e-5)
        branches.append(spread * w["2.weight"] + w["2.bias"])
    return branches[0], branches[1]


def through(values: Mapping[str, Tensor], features: Tensor, condition: Tensor) -> Tensor:
    gamma, beta = valve(values, condition)
    return torch.relu((gamma + 1) * features + beta)


def objective(
    values: Mapping[str, Tensor], frozen: Tensor, inputs: tuple[Tensor, Tensor], x: Tensor, y: Tensor, paper: bool,
    lam: float, mu: float,
) -> Tensor:  # fmt: skip
    body = {n.removeprefix("body."): v for n, v in values.items() if n.startswith("body.")}
    features = functional_call(NETWORK.train().body, body, (x,))
    generic, personal = (through(values, features, condition) for condition in inputs)
    table = values["gce.weight"]
    angles = torch.stack([torch.stack([a @ c / (a.norm() * c.norm() + 1e-30) for c in table]) for a in generic])
    level = F.cross_entropy(personal @ values["head.weight"].T + values["head.bias"], y)
    level = level - (angles.exp()[range(len(y)), y] / angles.exp().sum(1)).log().mean()
    gaps = generic - frozen[y]
    if not paper:
        return level + lam * (gaps**2).sum().sqrt()
    whole = sum((v**2).sum() for n, v in values.items() if n.startswith("cov."))
    assert isinstance(whole, Tensor)
    return level + lam * (gaps**2).sum(1).sqrt().mean() + mu * (whole.sqrt() + (table**2).sum().sqrt())


def inputs_of(table: Tensor, client: int, paper: bool) -> tuple[Tensor, Tensor]:
    """Generic and personal conditional input."""
    y = DATA.y[DATA.train[client]].tolist()
    rows = [y.count(u) / len(y) * row for u, row in enumerate(table)]
    personal = torch.stack(rows).sum(0)
    return torch.stack(list(table)).sum(0) / len(table), personal / len(table) if paper else personal


@dataclass
class Plain:
    """What the plain loop ends with."""

    server: Values
    personal: list[Values]
    inputs: list[tuple[Tensor, Tensor]]


def plain(paper: bool, rounds: int, fraction: float, lam: float, mu: float) -> Plain:
    module = extended()
    start = {n: v.detach().clone() for n, v in module.state_dict().items()}
    learned = [n for n, _ in module.named_parameters()]
    server = {n: start[n] for n in learned if n not in HEAD}
    personal = [copied({n: start[n] for n in (*HEAD, *STATISTICS)}) for _ in CLIENTS]
    zero = torch.zeros(8, dtype=torch.float64)
    inputs = [(zero, zero) for _ in CLIENTS]
    for r in range(1, rounds + 1):
        parts = {}
        for client in drawn(r, fraction):
            values = {**copied(server), **personal[client]}
            frozen = server["gce.weight"].clone()
            used = inputs_of(frozen, client, True) if paper else inputs[client]
            for x, y in passes(client, 2, r):
                free = {n: values[n].detach().requires_grad_() for n in learned}
                loss = objective({**values, **free}, frozen, used, x, y, paper, lam, mu)
                for n, slope in zip(learned, torch.autograd.grad(loss, list(free.values())), strict=True):
                    decay = mu if n.startswith(("gce", "cov")) and not paper else 0.0
                    values[n] = values[n] - 0.1 * (slope + decay * values[n])
            personal[client] = {n: values[n] for n in personal[client]}
            parts[client] = {n: values[n] for n in server}
        before = server["gce.weight"]
        server = average(list(parts.values()), sizes(list(parts)))
        for client in CLIENTS:
            table = parts[client]["gce.weight"] if client in parts else before
            inputs[client] = inputs_of(server["gce.weight"] if paper else table, client, paper)
    return Plain(server, personal, inputs)


def predictors(finished: Finished) -> Iterator[tuple[int, Values, Values]]:
    """Clients, what they predict with, and the conditional inputs that are given."""
    assert finished.grid.engine is not None
    clients = sorted(CLIENTS, key=lambda c: -finished.app.sizes[c])
    state = finished.grid.engine.store.gather(clients)
    cohort = finished.app.cohort(clients, state, {"server-round": finished.round})
    received = finished.strategy.send(finished.round, tree(finished.arrays), clients)
    assert isinstance(received, Mapping)
    view = finished.app.update.personalize(cohort, received, {})
    assert isinstance(view, View)
    for k, client in enumerate(clients):
        inputs = {name: value[k] for name, value in view.given.items() if isinstance(value, Tensor)}
        yield client, {n: v[k] if n in view.stacked else v for n, v in view.tensors.items()}, inputs


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["official", "paper"])
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_both_variants_follow_a_plain_loop(variant: str, fraction: float) -> None:
    options = {"variant": variant, "lam": 0.3, "mu": 0.05}
    finished = run("gpfl", options, rounds=4, fraction=fraction)
    expected = plain(variant == "paper", 4, fraction, 0.3, 0.05)
    assert_same(finished.arrays, expected.server)
    for client, values, inputs in predictors(finished):
        assert_same(values, {**expected.server, **expected.personal[client]})
        assert_same(inputs, dict(zip(INPUTS, expected.inputs[client], strict=True)))


def test_inputs_of_official_differ_by_client_and_those_of_paper_do_not() -> None:
    for variant, alike in (("official", False), ("paper", True)):
        rows = [inputs["generic"] for _, _, inputs in predictors(run("gpfl", {"variant": variant}, rounds=2))]
        assert all(torch.allclose(rows[0], row) == alike for row in rows[1:])


def test_inputs_are_zero_before_the_first_average_of_official_only() -> None:
    for variant, zero in (("official", True), ("paper", False)):
        for _, _, inputs in predictors(run("gpfl", {"variant": variant}, rounds=0)):
            assert inputs.keys() == set(INPUTS)
            assert all(bool((value == 0).all()) == zero for value in inputs.values())


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_cohort_size_does_not_matter_for_either_variant(variant: str) -> None:
    one, all_of_them = (run("gpfl", {"variant": variant}, fraction=0.75, cohort=k) for k in (1, 4))
    assert_same(one.arrays, all_of_them.arrays)
    for client in CLIENTS:
        assert_same(one.state(client), all_of_them.state(client))
    for client, metrics in one.strategy.report.clients.items():
        assert metrics == pytest.approx(all_of_them.strategy.report.clients[client])


# ------------------------------------------------------------------ by hand


class Two(nn.Module):
    """The samples are the features; scores are twice the features."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Identity()
        self.head = nn.Linear(2, 2, bias=False)
        self.head.weight.data = 2 * torch.eye(2)


def two_categories() -> FederatedData:
    x = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]])
    part, nothing = [torch.arange(3)], [torch.arange(0)]
    return FederatedData(x, torch.tensor([0, 1, 0]), part, nothing, nothing, 2, "two")


def test_features_by_hand() -> None:
    f = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    out = conditioned(f, torch.tensor([[0.5, -2.0], [1.0, 0.25]]))  # gamma + 1 = 1.5, -1
    assert out.tolist() == [[2.5, 2.25], [1.75, 0.0]]


def given_of(values: Values, **tensors: Tensor) -> Given:
    """Conditional inputs of zeros and the table itself, or other tensors."""
    zeros = torch.zeros(2)
    return {"generic": zeros, "personal": zeros, "target": values["gce.weight"].detach().clone(), **tensors}


def test_losses_by_hand() -> None:
    """A valve of zeros passes features through; C_0 = (1, 0), C_1 = (0, 5)."""
    network = extended(Two(), two_categories())
    values = {n: torch.zeros_like(v) for n, v in network.state_dict().items()}
    values["head.weight"] = 2 * torch.eye(2)
    values["gce.weight"] = torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    given = given_of(values, target=torch.tensor([[3.0, 1.0], [4.0, 2.0]]))
    batch = Batch(two_categories().x[:2], two_categories().y[:2], given=given)
    head = [math.log(1 + math.exp(8 - 6)), math.log(1 + math.exp(0 - 4))]
    angle = [math.log(1 + math.exp(0.8 - 0.6)), math.log(1 + math.exp(0 - 1))]
    both = (sum(head) + sum(angle)) / 2
    for variant, gap in (("official", 5.0), ("paper", 3.5)):  # gaps (0, 3) and (-4, 0)
        update = GPFLUpdate(lam=0.1, mu=0.0, variant=variant)
        assert float(update.loss(Network(network, values), batch)) == pytest.approx(both + 0.1 * gap)
    penalized = GPFLUpdate(lam=0.0, mu=0.5, variant="paper").loss(Network(network, values), batch)
    assert float(penalized) == pytest.approx(both + 0.5 * math.sqrt(26))


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_slopes_are_finite_where_norms_are_zero(variant: str) -> None:
    """Features without length, and features that are where they should be."""
    network = extended(Two(), two_categories())
    for features, target in ((torch.zeros(2, 2), torch.zeros(2, 2)), (torch.ones(2, 2), torch.ones(2, 2))):
        values = {n: torch.zeros_like(v) for n, v in network.state_dict().items()}
        values["gce.weight"] = torch.ones(2, 2)
        free = {n: values[n].requires_grad_() for n, _ in network.named_parameters()}
        batch = Batch(features, torch.tensor([0, 1]), given=given_of(values, target=target))
        loss = GPFLUpdate(lam=1.0, variant=variant).loss(Network(network, values), batch)
        assert all(bool(slope.isfinite().all()) for slope in torch.autograd.grad(loss, list(free.values())))


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_padding_has_no_part_in_loss_and_slopes(variant: str) -> None:
    network = extended(Two(), two_categories())
    data = two_categories()
    update = GPFLUpdate(lam=2.0, variant=variant)
    padded = Batch(torch.cat([data.x, 9 * data.x]), torch.cat([data.y, data.y]), torch.tensor([1.0] * 3 + [0.0] * 3))
    results = []
    for batch in (Batch(data.x, data.y), padded):
        values = {n: v.clone() for n, v in network.state_dict().items()}
        free = [values[n].requires_grad_() for n, _ in network.named_parameters()]
        loss = update.loss(Network(network, values, batch.weight), replace(batch, given=given_of(values)))
        results.append([loss.detach(), *torch.autograd.grad(loss, free)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_mu_is_the_decay_of_table_and_valve_alone() -> None:
    """After one step two values of mu differ by ``lr * mu`` of the initial values."""
    settings: dict[str, Any] = {"rounds": 1, "batch_size": 0, "epochs": 1, "weight_decay": 0.3}
    groups = {"head": {"weight_decay": 0.7}, "gce.*": {"lr": 0.9, "weight_decay": 0.8}, "gce": {"lr": 0.2}}
    without, with_it = (run("gpfl", {"mu": mu}, groups=groups, **settings) for mu in (0.0, 0.5))
    start = entries(without.app.template)
    for name, value in with_it.arrays.items():
        rate = {"gce": 0.2, "cov": 0.1}.get(name[:3], 0.0)
        torch.testing.assert_close(value, without.arrays[name] - rate * 0.5 * start[name])
    for client in CLIENTS:
        for name in HEAD:
            torch.testing.assert_close(with_it.state(client)[f"model/{name}"], without.state(client)[f"model/{name}"])


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({"shuffle": False, "drop_last": True, "batch_size": 3}, [2 / 3, 1 / 3, 0.0, 0.0]),
        ({"shuffle": False, "drop_last": False, "batch_size": 3}, [0.5, 0.25, 0.0, 0.25]),
        ({"shuffle": True, "drop_last": True, "batch_size": 3}, [0.5, 0.25, 0.0, 0.25]),
        ({"shuffle": False, "drop_last": True, "batch_size": 9}, [0.5, 0.25, 0.0, 0.25]),
        ({"shuffle": False, "drop_last": True, "batch_size": 0}, [0.5, 0.25, 0.0, 0.25]),
    ],
    ids=str,
)
def test_shares_count_the_samples_that_are_trained_on(settings: dict[str, Any], shares: list[float]) -> None:
    data = gaussian_data((4,), dtype=torch.float64)
    y = data.y.clone()
    y[data.train[0]] = torch.tensor([0, 0, 1, 3])
    finished = run("gpfl", rounds=1, data=replace(data, y=y), network=SmallNetwork(norm=False).double(), **settings)
    expected = torch.tensor(shares, dtype=torch.float64) @ finished.arrays["gce.weight"]  # the only client's own table
    torch.testing.assert_close(finished.state(0)["conditions/personal"], expected)


def test_what_is_sent_and_what_stays() -> None:
    for variant, tables in (("official", 2), ("paper", 1)):
        finished = run("gpfl", {"variant": variant}, rounds=2)
        parameters = {n for n, _ in extended().named_parameters()}
        assert finished.arrays.keys() == parameters - set(HEAD)
        kept = {f"model/{n}" for n in (*HEAD, *STATISTICS)} | {"trained"}
        lagging = {f"conditions/{n}" for n in INPUTS} | {"last_round"} if variant == "official" else set()
        assert finished.state(0).keys() == kept | lagging
        first, second = (finished.state(client)["model/body.1.running_mean"] for client in (0, 1))
        assert not torch.equal(first, second)
        numbers = sum(v.numel() for v in finished.arrays.values())
        report = finished.strategy.report
        assert report.bytes_up == 4 * 8 * numbers
        assert report.bytes_down == 4 * 8 * (numbers + (tables - 1) * 4 * 8)


def test_a_client_that_never_trained_has_the_inputs_of_the_table_before() -> None:
    finished = run("gpfl", rounds=2, data=replace(DATA, unseen=(2,)))
    before = entries(finished.strategy.state["previous"])["gce.weight"]
    assert not torch.equal(before, finished.arrays["gce.weight"])
    inputs = {client: given for client, _, given in predictors(finished)}[2]
    assert_same(inputs, dict(zip(INPUTS, inputs_of(before, 2, False), strict=True)))
    assert finished.strategy.report.unseen.keys() == {2}


def test_the_network_given_is_left_alone_and_values_belong_to_the_seed() -> None:
    before = copied(NETWORK.state_dict())
    first, second = extended(), extended()
    other, _ = GPFLUpdate().adapt_model(NETWORK, DATA, SEED + 1)
    assert_same(first.state_dict(), second.state_dict())
    assert not torch.equal(first.gce.weight, other.state_dict()["gce.weight"])
    next(first.body.parameters()).data += 1
    assert_same(NETWORK.state_dict(), before)


# ------------------------------------------------------------------ backbones


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig("mlp", hidden=(6,)),
        ModelConfig("cnn", width=2, hidden=(6,)),
        ModelConfig("cnn", width=2, hidden=(6,), norm="batch"),
        ModelConfig("resnet18", width=2, groups=2),
        ModelConfig("resnet18", width=2, norm="batch"),
    ],
    ids=str,
)
def test_backbones(config: ModelConfig) -> None:
    data = gaussian_data((10, 6), features=(1, 8, 8))
    network = build_model(config, (1, 8, 8), data.num_classes, SEED)
    finished = run("gpfl", rounds=2, network=network, data=data, lr=0.01, epochs=1, drop_last=True)
    start = entries(finished.app.template)
    assert all(bool(v.isfinite().all()) and not torch.equal(v, start[n]) for n, v in finished.arrays.items())
    assert finished.strategy.report.clients.keys() == {0, 1}


# ------------------------------------------------------------------ errors


class NoBody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x)
        return out


class DeepHead(NoBody):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Identity()
        self.head = nn.Sequential(nn.Linear(6, 4))  # type: ignore[assignment]


@pytest.mark.parametrize("network", [NoBody(), DeepHead(), nn.Linear(6, 4)], ids=lambda n: type(n).__name__)
def test_a_network_without_body_or_linear_head_is_refused(network: nn.Module) -> None:
    sentence = (
        f"model={type(network).__name__}: expected a network with a 'body' and a linear 'head' for strategy=gpfl."
    )
    with pytest.raises(ConfigError) as caught:
        GPFLUpdate().client_app(network, gaussian_data())
    assert str(caught.value) == sentence


def test_a_body_whose_features_do_not_fit_the_head_is_refused() -> None:
    network = SmallNetwork()
    network.body = nn.Linear(6, 5)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="model=ConditionalNetwork: expected a network that takes samples"):
        GPFLUpdate(training=Training()).client_app(network, gaussian_data())


def test_items_without_labels_are_refused() -> None:
    items = [np.array([0, 1])]
    data = RankingData.of_items(9, items, [np.array([2, 3])], [np.array([4, 5])])
    with pytest.raises(ConfigError, match=r"strategy=gpfl: expected another method for .*no class labels"):
        GPFLUpdate().adapt_model(Two(), data, SEED)
    with pytest.raises(ConfigError, match=r"strategy=gpfl: expected another method for gaussian, .*no class labels"):
        GPFLUpdate().adapt_model(NETWORK, NUMBERS, SEED)


# ------------------------------------------------------------------ traces


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "array"),
    [
        ("gpfl/a_one_step", "r0/c0/grad/GCE/embedding.weight"),
        ("gpfl/b_three_rounds", "r2/c1/after/head/weight"),
        ("gpfl/c_partial", "r1/c2/generic_conditional_input"),
        ("gpfl/c_partial", "final_eval/correct"),
        ("gpfl/e_batchnorm", "r1/c0/received/feature_extractor/1.running_var"),
        ("pfllib/GPFL/part_mb", "out/server/CoV/Conditional_beta.2.bias"),
    ],
)
def test_a_changed_trace_is_noticed(case: str, array: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / f"{case}.npz"
    copy.parent.mkdir(parents=True)
    shutil.copy(traces.HERE / f"{case}.npz", copy)
    assert reference.main(["--root", str(tmp_path), "gpfl"]) == 0
    with np.load(copy) as file:
        arrays = {key: file[key] for key in file.files}
    arrays[array].reshape(-1)[-1] += 1 if array.endswith("correct") else 1e-3
    np.savez(copy, **arrays)
    assert reference.main(["--root", str(tmp_path), "gpfl"]) == 1
    assert "OVER" in capsys.readouterr().out


@pytest.mark.slow
def test_the_trace_tells_the_variants_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    read = traces.gpfl.read
    monkeypatch.setattr(traces.gpfl, "read", lambda path: replace(read(path), options={"variant": "paper"}))
    assert reference.main(["gpfl"]) == 1
