"""Methods in which one network teaches another, as their papers have them, against plain loops over clients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from fedpers.cohort import Batch, Tree, entries, tree
from fedpers.errors import ConfigError
from fedpers.strategies import FedKDUpdate, FedPHPUpdate, FMLUpdate, fedkd
from fedpers.strategies.fedkd import FactoredMean
from tests.cohort.helpers import assert_same
from tests.strategies.helpers import (
    DATA,
    NETWORK,
    NUMBERS,
    Values,
    average,
    copied,
    drawn,
    initial,
    passes,
    run,
    weights_of,
)

SAMPLED = pytest.mark.parametrize(("rounds", "fraction"), [(3, 0.5), (1, 0.25)])
"""All clients train, two of them twice; and one of them once."""


def scores(values: Values, x: Tensor) -> Tensor:
    """In training mode; buffers are updated in place."""
    NETWORK.train()
    out: Tensor = functional_call(NETWORK, values, (x,))
    return out


def free(values: Values) -> Values:
    """The same with parameters to differentiate by."""
    return {n: v.detach().requires_grad_() if n in weights_of() else v for n, v in values.items()}


def descend(values: Values, tracked: Values, loss: Tensor, lr: float = 0.1) -> None:
    names = weights_of()
    for name, slope in zip(names, torch.autograd.grad(loss, [tracked[n] for n in names]), strict=True):
        values[name] = values[name] - lr * slope


def features(values: Values, x: Tensor, *, training: bool = True) -> Tensor:
    NETWORK.train(training)
    out: Tensor = functional_call(NETWORK.body, under("body.", values), (x,))
    return out


def under(part: str, values: Values) -> Values:
    return {name.removeprefix(part): value for name, value in values.items() if name.startswith(part)}


@SAMPLED
def test_fml_as_written(rounds: int, fraction: float) -> None:
    alpha, beta = 0.3, 0.6
    locals_, server = {client: initial() for client in range(4)}, initial()
    for round in range(1, rounds + 1):
        sent = {}
        for client in drawn(round, fraction):
            mine, meme = locals_[client], copied(server)
            for x, y in passes(client, 2, round):
                mine_tracked, meme_tracked = free(mine), free(meme)
                z, z_meme = scores(mine_tracked, x), scores(meme_tracked, x)
                p, q = z.softmax(1).detach(), z_meme.softmax(1).detach()
                pull = (q * (q.log() - z.log_softmax(1))).sum(1).mean()
                push = (p * (p.log() - z_meme.log_softmax(1))).sum(1).mean()
                descend(mine, mine_tracked, alpha * F.cross_entropy(z, y) + (1 - alpha) * pull)
                descend(meme, meme_tracked, beta * F.cross_entropy(z_meme, y) + (1 - beta) * push)
            sent[client] = meme
        server = average(list(sent.values()), [1.0] * len(sent))
    result = run("fml", {"alpha": alpha, "beta": beta}, rounds=rounds, fraction=fraction)
    assert_same(under("shared.", result.arrays), server)
    for client in range(4):  # who has not trained holds, and predicts with, the initial network
        assert_same(under("model/local.", result.state(client)), locals_[client])
        assert_same(under("local.", result.predictors()[client]), locals_[client])


def test_fml_without_teaching_is_local_training_and_fedavg() -> None:
    result = run("fml", {"alpha": 1.0, "beta": 1.0})
    assert_same(under("shared.", result.arrays), run("fedavg", {"weighting": "uniform"}).arrays)
    alone = run("local")
    for client in range(4):
        assert_same(under("model/local.", result.state(client)), under("model/", alone.state(client)))


def discrepancy(a: Tensor, b: Tensor) -> Tensor:
    def squares(one: Tensor, other: Tensor) -> Tensor:
        return torch.stack([(x - other).square().sum(1) for x in one])

    both = torch.cat([a, b]).detach()
    mean = squares(both, both)[~torch.eye(2 * len(a), dtype=torch.bool)].mean() + 1e-8

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        return torch.stack([torch.exp(-squares(one, other) / (mean * 2.0**i)).mean() for i in range(-2, 3)]).sum()

    return kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)


@SAMPLED
def test_fedphp_as_written(rounds: int, fraction: float) -> None:
    lam, momentum, ramp = 0.4, 0.8, 3
    server: Values = initial()
    inherited: dict[int, Values] = {}
    trainings = dict.fromkeys(range(4), 0)
    for round in range(1, rounds + 1):
        sent = {}
        for client in drawn(round, fraction):
            network, teacher = copied(server), inherited.get(client, server)
            for x, y in passes(client, 1, round):
                tracked = free(network)
                z = features(tracked, x)
                target = features(copied(teacher), x, training=False)
                logits = functional_call(NETWORK.head, under("head.", tracked), (z,))
                loss = (1 - lam) * F.cross_entropy(logits, y) + lam * discrepancy(z, target)
                descend(network, tracked, loss)
            share = momentum * trainings[client] / ramp
            inherited[client] = {
                n: share * teacher[n] + (1 - share) * v if v.is_floating_point() else v for n, v in network.items()
            }
            trainings[client] += 1
            sent[client] = network
        server = average(list(sent.values()), [float(len(DATA.train[client])) for client in sent])
    options = {"lam": lam, "momentum": momentum, "ramp": ramp}
    result = run("fedphp", options, rounds=rounds, fraction=fraction, epochs=1)
    assert_same(result.arrays, server)
    for client in range(4):  # who has not trained has inherited nothing, and predicts with what it is sent
        assert_same(under("inherited/", result.state(client)), inherited.get(client, initial()))
        assert_same(result.predictors()[client], inherited.get(client, server))


def test_a_batch_of_one_sample_has_no_discrepancy() -> None:
    update = FedPHPUpdate()
    one, other = torch.randn(1, 3, generator=torch.manual_seed(0)), torch.zeros(1, 3)
    batch = Batch(one, torch.zeros(1, dtype=torch.int64))
    assert float(update._discrepancy(one, other, batch)) == 0


def low(matrix: Tensor, energy: float) -> Tensor:
    """By the largest singular values, one after the other, until enough is held."""
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    held, out = 0.0, torch.zeros_like(matrix)
    for i, value in enumerate(singular):
        if held > energy * float(singular.square().sum()):
            break
        held += float(value.square())
        out = out + value * torch.outer(left[:, i], right[i])
    return out


@SAMPLED
def test_fedkd_as_written(rounds: int, fraction: float) -> None:
    options = {"energy_start": 0.5, "energy_end": 0.9, "energy_rounds": 2}
    result = run("fedkd", options, rounds=rounds, fraction=fraction)
    start = {n.removeprefix("projection."): v for n, v in result.app.template.items() if n.startswith("projection.")}
    locals_, server = {client: initial() for client in range(4)}, initial()
    projections = {client: start["weight"].clone() for client in range(4)}
    for round in range(1, rounds + 1):
        energy, sent = 0.5 if round == 1 else 0.9, {}
        for client in drawn(round, fraction):
            mine, student = locals_[client], copied(server)
            for x, y in passes(client, 2, round):
                a, b, projection = free(mine), free(student), projections[client].requires_grad_()
                h, h_student = features(a, x), features(b, x)
                z = functional_call(NETWORK.head, under("head.", a), (h,))
                z_student = functional_call(NETWORK.head, under("head.", b), (h_student,))
                seen = h_student @ projection.T
                p, q = z.softmax(1), z_student.softmax(1)
                task, task_student = F.cross_entropy(z, y), F.cross_entropy(z_student, y)

                def kl(target: Tensor, scores: Tensor) -> Tensor:
                    return F.kl_div(scores.log_softmax(1), target.detach(), reduction="batchmean")

                of_mine = task + (kl(q, z) + F.mse_loss(h, seen.detach())) / (task + task_student.detach())
                of_student = (kl(p, z_student) + F.mse_loss(seen, h.detach())) / (task.detach() + task_student)
                of_student = task_student + of_student
                (slope,) = torch.autograd.grad(of_student, projection, retain_graph=True)
                descend(mine, a, of_mine)
                descend(student, b, of_student)
                projections[client] = (projection - 0.1 * slope).detach()
            sent[client] = {
                n: server[n] + low(v - server[n], energy) if v.dim() == 2 else v for n, v in student.items()
            }
        mean = average(list(sent.values()), [1.0] * len(sent))
        server = {n: server[n] + low(v - server[n], energy) if v.dim() == 2 else v for n, v in mean.items()}
    assert_same(under("shared.", result.arrays), server)
    for client in range(4):
        assert_same(under("model/local.", result.state(client)), locals_[client])
        assert_same(under("local.", result.predictors()[client]), locals_[client])
        assert_same({"p": result.state(client)["model/projection.weight"]}, {"p": projections[client].detach()})


@pytest.mark.parametrize(
    ("variant", "energy", "rank"),
    [
        *(("paper", energy, rank) for energy, rank in ((0.5, 1), (0.9, 2), (1.0, 3))),
        *(("pfllib", energy, rank) for energy, rank in ((0.5, 1), (0.9, 2), (0.99, 0))),
    ],
)
def test_as_few_singular_values_as_hold_enough(variant: str, energy: float, rank: int) -> None:
    """Squares 16, 4 and 1: of 21 they hold 0.76, 0.95 and 1."""
    update = FedKDUpdate.__new__(FedKDUpdate)
    update.variant = variant  # type: ignore[assignment]
    matrix = torch.zeros(5, 3, dtype=torch.float64)
    matrix[0, 1], matrix[3, 0], matrix[4, 2] = 4.0, -2.0, 1.0
    left, right = update.factors(matrix, energy)
    assert (left.shape, right.shape) == ((5, rank), (rank, 3))
    kept = sorted((left @ right)[(left @ right).abs() > 1e-9].abs().tolist(), reverse=True)
    assert kept == pytest.approx([4.0, 2.0, 1.0][:rank])


def test_a_matrix_travels_whole_or_in_two_factors_that_fit() -> None:
    fold = fedkd.FactoredMean({"w": torch.ones(4, 3), "b": torch.ones(4)}, changes=True)
    left, right, b = torch.ones(4, 2), torch.ones(2, 3), torch.zeros(4)

    def decoded(**sent: Tensor) -> Tensor:
        return fold.decode({"arrays": tree({n.replace("_", "."): v for n, v in sent.items()})}, 0)["arrays"]["w"]

    torch.testing.assert_close(decoded(w_left=left, w_right=right, b=b), torch.full((4, 3), 3.0))
    torch.testing.assert_close(decoded(w=torch.ones(4, 3), b=b), torch.full((4, 3), 2.0))
    torch.testing.assert_close(decoded(w_left=left[:, :0], w_right=right[:0], b=b), torch.ones(4, 3))
    for sent in ({"w_left": left}, {"w_left": left, "w_right": right[:1]}, {"w": left @ right, "w_left": left}, {}):
        with pytest.raises(ValueError, match="'w' is neither whole nor in two factors that fit"):
            decoded(b=b, **sent)


@pytest.mark.parametrize(("name", "update"), [("fml", FMLUpdate()), ("fedkd", FedKDUpdate())])
def test_classes_are_needed_to_teach(name: str, update: FMLUpdate | FedKDUpdate) -> None:
    with pytest.raises(ConfigError, match=f"^strategy={name}: expected another method for gaussian, whose samples"):
        update.client_app(NETWORK, NUMBERS)


@pytest.mark.parametrize("update", [FedPHPUpdate(), FedKDUpdate()])
def test_features_are_needed_to_teach_them(update: FedPHPUpdate | FedKDUpdate) -> None:
    with pytest.raises(ConfigError, match=r"^model=Linear: expected a network with a 'body' and a "):
        update.client_app(torch.nn.Linear(6, 4).double(), DATA)


@pytest.mark.parametrize("method", ["fml", "fedkd"])
def test_gradients_of_both_networks_are_counted(method: str) -> None:
    report = run(method, rounds=1).strategy.report
    assert report.gradients == 2 * report.steps > 0


def test_energy_is_reached_in_its_round() -> None:
    for rounds, expected in ((1, [0.98, 0.98]), (2, [0.95, 0.98])):
        update = FedKDUpdate(energy_start=0.95, energy_end=0.98, energy_rounds=rounds)
        assert [update.energy(round) for round in (1, 2)] == pytest.approx(expected)


def test_a_newcomers_change_is_added_to_what_it_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """FedKD sends changes: of a second local round they are of the network that the first one left."""
    decoded: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    decode = FactoredMean.decode

    def noted(fold: FactoredMean, records: dict[str, Tree], client: int) -> dict[str, Tree]:
        result = decode(fold, records, client)
        decoded.append((dict(fold.arrays), dict(entries(result["arrays"]))))
        return result

    monkeypatch.setattr(FactoredMean, "decode", noted)
    data = replace(DATA, unseen=(3,))
    result = run("fedkd", {"variant": "paper"}, rounds=1, data=data, adapt_steps=(2, 4))
    (sent, first), (again, _) = decoded[-2:]
    for name, value in again.items():
        assert torch.equal(value, first[name])
    assert any(not torch.equal(value, first[name]) for name, value in sent.items())
    assert {name for name in result.strategy.report.adapted[3] if name.endswith("-after-4")}
