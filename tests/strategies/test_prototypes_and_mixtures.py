"""MOON, FedNTD, FedALA, FedProto and FedAMP as their papers have them, against plain loops over clients and batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedpers.cohort import Network, entries, tree
from fedpers.errors import ConfigError
from fedpers.randomness import generator
from fedpers.strategies import FedAMP, FedProtoUpdate, MOONUpdate, fedala, make_strategy
from fedpers.tasks import Regression
from tests.cohort.helpers import assert_same
from tests.problems import gaussian_data
from tests.strategies.helpers import (
    DATA,
    NETWORK,
    SEED,
    Values,
    average,
    copied,
    drawn,
    initial,
    passes,
    run,
    sgd,
    sizes,
    weights_of,
)

CLIENTS = range(DATA.num_clients)
HEAD = ("head.weight", "head.bias")


def under(role: str, state: Values) -> Values:
    return {name.removeprefix(f"{role}/"): value for name, value in state.items() if name.startswith(f"{role}/")}


def features(values: Mapping[str, Tensor], x: Tensor, *, training: bool = False) -> Tensor:
    """Features under other values; in training buffers among them are updated in place."""
    inside = {name.removeprefix("body."): value for name, value in values.items() if name.startswith("body.")}
    body = NETWORK.body.train(training)
    out: Tensor = functional_call(body, inside, (x,))
    return out


def head(values: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    return F.linear(rows, values["head.weight"], values["head.bias"])


def descend(values: Values, loss: Any, lr: float = 0.1) -> None:
    """One step of SGD in place along the gradient of ``loss(values)``."""
    names = weights_of()
    free = {name: values[name].detach().requires_grad_() for name in names}
    slopes = torch.autograd.grad(loss({**values, **free}), list(free.values()))
    for name, slope in zip(names, slopes, strict=True):
        values[name] = values[name] - lr * slope


@pytest.mark.parametrize(("method", "strength"), [("moon", "mu"), ("fedntd", "beta")])
def test_without_its_own_term_a_method_is_fedavg(method: str, strength: str) -> None:
    assert_same(run(method, {strength: 0.0}).arrays, run("fedavg").arrays)


@pytest.mark.parametrize(("method", "strength"), [("fedproto", "lam"), ("fedamp", "mu")])
def test_without_attraction_every_client_trains_alone(method: str, strength: str) -> None:
    result, alone = run(method, {strength: 0.0}), run("local")
    for client in CLIENTS:
        assert_same(under("model", result.state(client)), under("model", alone.state(client)))


@pytest.mark.parametrize("variant", ["paper", "pfllib"])
def test_moon_contrasts_received_and_previous_features(variant: str) -> None:
    mu, tau = 2.0, 0.7
    result = run("moon", {"mu": mu, "temperature": tau, "variant": variant}, rounds=4, fraction=0.5)
    server, previous = initial(), {} if variant == "paper" else {client: initial() for client in CLIENTS}
    late = set()
    for r in range(1, 5):
        parts = []
        for client in drawn(r, 0.5):
            late |= {client} - previous.keys() if r > 1 else set()
            values, before = copied(server), previous.get(client, server)
            for x, y in passes(client, 2, r):

                def loss(at: Values, x: Tensor = x, y: Tensor = y, w: Values = server, p: Values = before) -> Tensor:
                    rows = features(at, x, training=True)
                    pairs = [torch.exp(F.cosine_similarity(rows, features(other, x)) / tau) for other in (w, p)]
                    contrast = -torch.log(pairs[0] / (pairs[0] + pairs[1]))
                    return F.cross_entropy(head(at, rows), y) + mu * contrast.mean()

                descend(values, loss)
            previous[client] = values
            parts.append(values)
        server = average(parts, sizes(drawn(r, 0.5)))
    assert late or variant == "pfllib"  # some client trained first when the server's network was not the initial one
    assert_same(result.arrays, server)
    for client, values in enumerate(result.predictors()):
        assert_same(values, server)
        body = under("previous", result.state(client))
        assert body.keys() == {name for name in server if name not in HEAD}
        assert_same(body, {name: previous.get(client, initial())[name] for name in body})


def test_fedntd_distils_all_classes_but_the_true_one() -> None:
    beta, tau = 0.8, 2.0
    result = run("fedntd", {"beta": beta, "temperature": tau}, rounds=3, fraction=0.5)
    server = initial()
    for r in range(1, 4):
        parts = []
        for client in drawn(r, 0.5):
            values = copied(server)
            for x, y in passes(client, 2, r):

                def loss(at: Values, x: Tensor = x, y: Tensor = y, w: Values = server) -> Tensor:
                    logits, teacher = head(at, features(at, x, training=True)), head(w, features(w, x))
                    total = F.cross_entropy(logits, y)
                    for row, target, label in zip(logits, teacher, y.tolist(), strict=True):
                        others = [c for c in range(DATA.num_classes) if c != label]
                        p = torch.softmax(target[others] / tau, 0)
                        q = torch.softmax(row[others] / tau, 0)
                        total = total + beta * tau**2 * (p * (p.log() - q.log())).sum() / len(y)
                    return total

                descend(values, loss)
            parts.append(values)
        server = average(parts, sizes(drawn(r, 0.5)))
    assert_same(result.arrays, server)


def aggregated(
    server: Values, former: Values, weights: Values, client: int, r: int, options: Mapping[str, Any], *, first: bool
) -> tuple[Values, Values, int]:
    """FedALA's mixture, its weights and the passes that these took."""
    positions = DATA.train[client].numpy()
    order = generator(SEED, "local aggregation", client, r).permutation(positions)
    samples = torch.from_numpy(order[: int(options["share"] * len(positions))])
    weights, losses = copied(weights), []

    def mixture() -> Values:
        return {**server, **{n: former[n] + (server[n] - former[n]) * w for n, w in weights.items()}}

    while True:
        for index in torch.split(samples, 5):
            at = mixture()
            free = {n: at[n].requires_grad_() for n in weights}
            rows = features({**at, **free}, DATA.x[index])
            loss = F.cross_entropy(head({**at, **free}, rows), DATA.y[index])
            slopes = torch.autograd.grad(loss, list(free.values()))
            for n, slope in zip(free, slopes, strict=True):
                moved = weights[n] - options["weight_lr"] * slope * (server[n] - former[n])
                weights[n] = moved.clamp(0, 1)
        losses.append(loss.item())
        steady = len(losses) > 10 and float(torch.tensor(losses[-10:]).double().std(unbiased=False)) < fedala.SPREAD
        if not first or steady or len(losses) == fedala.MOST_PASSES:
            return {n: v.detach() for n, v in mixture().items()}, weights, len(losses)


@pytest.mark.parametrize("layers", [1, 3])
def test_fedala_learns_how_much_to_take(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedala, "SPREAD", 0.004)
    monkeypatch.setattr(fedala, "MOST_PASSES", 40)
    options = {"layers": layers, "share": 0.7, "weight_lr": 5.0}
    result = run("fedala", options, rounds=4, fraction=0.75)
    names = [*weights_of()[-2:]] if layers == 1 else weights_of()
    server, former = initial(), [initial() for _ in CLIENTS]
    weights = [{n: torch.ones_like(server[n]) for n in names} for _ in CLIENTS]
    trainings, lasted = [0] * DATA.num_clients, set()
    for r in range(1, 5):
        parts = []
        for client in drawn(r, 0.75):
            values = copied(server)
            if trainings[client]:
                first = trainings[client] == 1
                values, weights[client], taken = aggregated(
                    server, former[client], weights[client], client, r, options, first=first
                )
                values = copied(values)
                lasted |= {taken} if first else set()
            sgd(values, passes(client, 2, r))
            former[client] = values
            trainings[client] += 1
            parts.append(values)
        server = average(parts, sizes(drawn(r, 0.75)))
    assert len(lasted) > 1  # clients of one cohort converge at different times
    assert any(float(w.min()) < 1 for rows in weights for w in rows.values())
    assert_same(result.arrays, server)
    for client, values in enumerate(result.predictors()):
        state = result.state(client)
        assert_same(under("model", state), former[client])
        assert under("weights", state).keys() == set(names)
        assert_same(under("weights", state), weights[client])
        first = trainings[client] == 1
        mixture, _, _ = aggregated(server, former[client], weights[client], client, 4, options, first=first)
        assert_same(values, mixture if trainings[client] else server)


def prototypes(values: Values, client: int) -> tuple[Tensor, Tensor]:
    """Sums ``[C, F]`` of a client's features by class, and counts ``[C]``."""
    index = DATA.train[client]
    member = F.one_hot(DATA.y[index], 4).double()
    return member.T @ features(values, DATA.x[index]), member.sum(0)


def test_fedproto_agrees_on_the_mean_feature_of_each_class() -> None:
    lam = 0.5
    result = run("fedproto", {"lam": lam}, fraction=0.25, epochs=1)
    networks = [initial() for _ in CLIENTS]
    table: dict[int, Tensor] = {}
    missing = kept = 0
    for r in (1, 2, 3):
        (client,) = drawn(r, 0.25)
        for x, y in passes(client, 1, r):

            def loss(at: Values, x: Tensor = x, y: Tensor = y, table: dict[int, Tensor] = table) -> Tensor:
                rows = features(at, x, training=True)
                known = [j for j in y.unique().tolist() if j in table]
                away = [torch.linalg.vector_norm(rows[y == j].mean(0) - table[j]) for j in known]
                return F.cross_entropy(head(at, rows), y) + lam * sum(away)

            descend(networks[client], loss)
        sums, counts = prototypes(networks[client], client)
        kept += len(table.keys() - set(counts.nonzero().flatten().tolist()))
        table = {**table, **{j: sums[j] / counts[j] for j in range(4) if counts[j]}}
        missing += 4 - len(table)
    assert missing  # some round saw a class without a prototype,
    assert kept  # and some a class that nobody in it has
    known = result.arrays["table"][:, -1]
    assert known.tolist() == [float(j in table) for j in range(4)]
    for j, mean in table.items():
        assert_same({"prototype": result.arrays["table"][j, :-1]}, {"prototype": mean})
    correct = []
    for client in CLIENTS:
        assert_same(under("model", result.state(client)), networks[client])
        index = DATA.test[client]
        rows = features(networks[client], DATA.x[index])
        distances = torch.stack([torch.linalg.vector_norm(rows - table[j], dim=1) for j in sorted(table)])
        nearest = torch.tensor(sorted(table))[distances.argmin(0)]
        correct.append(float((nearest == DATA.y[index]).double().mean()))
    report = result.strategy.report.clients
    assert [report[client]["test-accuracy"] for client in CLIENTS] == pytest.approx(correct)


def test_fedproto_weights_prototypes_by_counts() -> None:
    result = run("fedproto", rounds=1)
    parts = [prototypes(under("model", result.state(client)), client) for client in CLIENTS]
    count = sum(counts for _, counts in parts)
    assert isinstance(count, Tensor)
    assert_same({"table": result.arrays["table"][:, :-1]}, {"table": sum(sums for sums, _ in parts) / count[:, None]})


def test_fedproto_scores() -> None:
    _, update = make_strategy("fedproto")
    network = nn.Module()
    network.body, network.head = nn.Identity(), nn.Linear(2, 3)
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    table = torch.tensor([[3.0, 4.0, 1.0], [9.0, 9.0, 0.0], [0.0, 1.0, 1.0]])

    def scores(table: Tensor) -> Tensor:
        return update.predict(Network(network, dict(network.named_parameters()), given={"table": table}), x)

    torch.testing.assert_close(
        scores(table), torch.tensor([[-5.0, -6.0, -1.0], [0.0, -1 - math.sqrt(18), -math.sqrt(18)]])
    )
    nobody = table * torch.tensor([1.0, 1.0, 0.0])
    torch.testing.assert_close(scores(nobody), network.head(x))


@pytest.mark.parametrize(("alpha", "fraction", "rounds"), [(None, 0.5, 5), (0.2, 0.25, 3)])
def test_fedamp_draws_each_client_to_its_own_mixture(alpha: float | None, fraction: float, rounds: int) -> None:
    mu, sigma = 0.8, 0.5
    options = {"mu": mu, "alpha": alpha, "sigma": sigma}
    result = run("fedamp", options, rounds=rounds, fraction=fraction, lr=0.02)
    names, start = weights_of(), initial()
    buffers = {n: v for n, v in start.items() if n not in names}
    server = {n: start[n] for n in names}
    networks: dict[int, Values] = {}

    def mixture(client: int) -> Values:
        mine, step = networks.get(client, server), sigma / max(1, len(networks)) if alpha is None else alpha
        out, rest = {n: torch.zeros_like(mine[n]) for n in names}, 1.0
        for other, values in networks.items():
            if other == client:
                continue
            square = sum(float((mine[n] - values[n]).square().sum()) for n in names)
            weight = step * math.exp(-square / sigma) / sigma
            rest -= weight
            out = {n: out[n] + weight * values[n] for n in names}
        return {n: out[n] + rest * mine[n] for n in names}

    late = set()
    for r in range(1, rounds + 1):
        trained = {}
        for client in drawn(r, fraction):
            late |= {client} - networks.keys() if r > 1 else set()
            anchor = mixture(client)
            values = copied(networks.get(client, {**anchor, **buffers}))
            sgd(values, passes(client, 2, r), lr=0.02, add=lambda n, v, u=anchor: mu * (v - u[n]))
            trained[client] = values
        networks.update(trained)
        server = average([{n: values[n] for n in names} for values in networks.values()], [1.0] * len(networks))
    assert late  # clients that trained first when there were others
    assert_same(result.arrays, server)
    sent = result.strategy.send(rounds + 1, tree(result.arrays), list(CLIENTS))
    assert isinstance(sent, list)
    accuracy = []
    for client in CLIENTS:
        assert_same(entries(sent[client]["arrays"]), mixture(client))
        if client in networks:
            assert_same(under("model", result.state(client)), networks[client])
        values = networks.get(client, {**mixture(client), **buffers})  # who never trained predicts with what it is sent
        index = DATA.test[client]
        right = head(values, features(values, DATA.x[index])).argmax(1) == DATA.y[index]
        accuracy.append(float(right.double().mean()))
    assert alpha is None or len(networks) < DATA.num_clients
    report = result.strategy.report.clients
    assert [report[client]["test-accuracy"] for client in CLIENTS] == pytest.approx(accuracy)


def test_fedamp_mixes_equal_networks_evenly() -> None:
    strategy = FedAMP(sigma=2.0)
    near, far = {"w": torch.tensor([[1.0], [1.0], [1.0]])}, {"w": torch.tensor([[1.0], [3.0], [9.0]])}
    same = torch.eye(3, dtype=torch.bool)
    torch.testing.assert_close(strategy.attention(near, near, same), (1 - torch.eye(3)) / 3)
    e = torch.tensor([[0.0, -2.0, -32.0], [-2.0, 0.0, -18.0], [-32.0, -18.0, 0.0]]).exp()
    torch.testing.assert_close(strategy.attention(far, far, same), e * (1 - torch.eye(3)) / 3)


class Tower(nn.Module):
    """A network in which no part computes features."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize("update", [MOONUpdate(), FedProtoUpdate()])
def test_networks_without_features_are_refused(update: MOONUpdate | FedProtoUpdate) -> None:
    with pytest.raises(ConfigError, match=r"^model=Tower: expected a network with a 'body' and a (linear )?'head' for"):
        update.client_app(Tower(), gaussian_data())


def test_prototypes_need_classes() -> None:
    data = gaussian_data()
    numbers = replace(data, y=torch.zeros(len(data.y), 4), task=Regression())
    with pytest.raises(ConfigError, match=r"^strategy=fedproto: expected another method for gaussian"):
        FedProtoUpdate().client_app(NETWORK, numbers)
