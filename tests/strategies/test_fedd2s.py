"""FedD2S: where networks are cut and when, what travels, what the server learns, and which layers hear of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedpers.cohort import Cohort, Reply, entries, tree
from fedpers.errors import ConfigError, TrainingError
from fedpers.models import CNN, MLP, Network
from fedpers.strategies import make_strategy
from fedpers.strategies.fedd2s import FedD2S, FedD2SUpdate, layers_of, soft_loss
from tests.strategies.helpers import DATA, NUMBERS, Finished, run

DEEP = MLP((6,), 4, hidden=(8, 5)).double()
"""Two hidden layers: cuts 2 and 1."""


def trained(options: dict[str, Any], rounds: int = 3, **settings: Any) -> Finished:
    return run("fedd2s", options, rounds=rounds, network=DEEP, **settings)


def state_after(result: Finished) -> dict[str, Tensor]:
    return {f"{client}/{name}": value for client in range(4) for name, value in result.state(client).items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-10, atol=1e-12, msg=name)


def test_layers_carry_what_follows_them() -> None:
    assert layers_of(DEEP) == [["body.0", "body.1", "body.2"], ["body.3", "body.4"], ["head"]]
    cnn = CNN((1, 8, 8), 10, norm="batch")
    assert [len(layer) for layer in layers_of(cnn)] == [4, 5, 2, 1]
    with pytest.raises(ConfigError, match="model=Network: expected a network with a sequence of layers as its 'body'"):
        layers_of(Network(nn.Linear(3, 3), nn.Linear(3, 3)))


def test_the_cut_moves_from_deep_to_shallow_at_the_rate() -> None:
    def cuts(rounds: int, **options: Any) -> list[int]:
        update = FedD2SUpdate(**options)
        return [update.cut(DEEP, round) for round in range(1, rounds + 1)]

    assert cuts(5, rate=2) == [2, 2, 1, 1, 1]
    assert cuts(3, rate=None) == [2, 2, 2]
    assert cuts(4, rate=1, cuts=(1, 2)) == [1, 2, 2, 2]
    assert cuts(2, rate=1, cuts=(1,)) == [1, 1]


def test_without_the_servers_word_and_in_a_first_round_it_is_local_training() -> None:
    local = run("local", rounds=3, network=DEEP)
    assert_same(state_after(local), state_after(trained({"beta": 0.0})))
    assert_same(state_after(run("local", rounds=1, network=DEEP)), state_after(trained({}, rounds=1)))
    result = trained({"beta": 0.0})
    assert result.strategy.report.bytes_up == result.strategy.report.bytes_down == 0


@pytest.mark.parametrize(("cut", "width"), [(1, 8), (2, 5)])
def test_what_travels_is_features_scores_and_labels(cut: int, width: int) -> None:
    result = trained({"cuts": (cut,)}, rounds=2)
    samples = sum(len(positions) for positions in DATA.train)
    assert result.strategy.report.bytes_up == samples * ((width + 4) * 8 + 8)  # float64
    assert result.strategy.report.bytes_down == samples * 4 * 8
    assert trained({"cuts": (cut,)}, rounds=1).strategy.report.bytes_up == 0


def test_the_server_learns_from_labels_and_scores() -> None:
    """One full batch: the step is the gradient of the loss by hand."""
    options = {
        "cuts": (1,), "server_batch_size": 1000, "server_lr": 0.3, "server_epochs": 1, "alpha": 0.7, "temperature": 2.0,
    }  # fmt: skip
    before, after = trained(options, rounds=1), trained(options, rounds=2)
    features, scores, labels = [], [], []
    for client in range(4):
        state = {
            name.removeprefix("model/"): v for name, v in before.state(client).items() if name.startswith("model/")
        }
        x = DATA.x[DATA.train[client]]
        features.append(torch.relu(F.linear(x, state["body.1.weight"], state["body.1.bias"])))
        scores.append(functional_call(DEEP, state, (x,)))
        labels.append(DATA.y[DATA.train[client]])
    head = {name: value.clone().requires_grad_() for name, value in before.arrays.items()}
    assert sorted(head) == ["body.3.bias", "body.3.weight", "head.bias", "head.weight"]
    hidden = torch.relu(F.linear(torch.cat(features), head["body.3.weight"], head["body.3.bias"]))
    guess = F.linear(hidden, head["head.weight"], head["head.bias"])
    divergence = soft_loss(torch.cat(scores), guess, 2.0).mean()
    loss = F.cross_entropy(guess, torch.cat(labels)) + 0.7 * divergence
    grads = torch.autograd.grad(loss, list(head.values()))
    expected = {name: (value - 0.3 * grad).detach() for (name, value), grad in zip(head.items(), grads, strict=True)}
    assert_same(expected, after.arrays)


def test_a_network_may_have_more_outputs_than_there_are_classes() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wide = MLP((6,), 6, hidden=(8, 5)).double()
    result = run("fedd2s", {"rate": 1}, rounds=3, network=wide)
    assert not result.strategy.report.failures
    assert 0 < result.strategy.report.extra["server_train_accuracy"] <= 1


def test_soft_loss_is_the_scaled_divergence() -> None:
    teacher, student = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    expected = F.kl_div((student / 3).log_softmax(1), (teacher / 3).softmax(1), reduction="none").sum(1) * 9
    torch.testing.assert_close(soft_loss(teacher, student, 3.0), expected)


def test_layers_behind_the_cut_hear_nothing_from_the_server() -> None:
    """One step from the same networks: behind the cut it is that of local training, in front of it is not."""
    settings = {"epochs": 1, "batch_size": 0}
    local = run("local", rounds=2, network=DEEP, **settings)
    result = trained({"cuts": (1,)}, rounds=2, **settings)
    for client in range(4):
        for name, value in result.state(client).items():
            alone = local.state(client)[name]
            if name.startswith(("model/body.3", "model/head")):
                torch.testing.assert_close(value, alone, rtol=1e-10, atol=1e-12)
            elif name.startswith("model/body.1"):
                assert not torch.allclose(value, alone, rtol=1e-6, atol=0)


def test_each_sample_learns_from_the_servers_scores_of_it() -> None:
    """At a tiny rate the steps of single samples, in random order, sum up to n times that of the full batch."""
    changes = []
    for batch_size in (0, 1):
        options = {"cuts": (1,), "server_lr": 1e-9, "beta": 5.0}
        before, after = (trained(options, rounds=r, epochs=1, batch_size=batch_size, lr=1e-7) for r in (1, 2))
        name = "model/body.1.weight"
        changes.append([after.state(client)[name] - before.state(client)[name] for client in range(4)])
    for full, single, positions in zip(*changes, DATA.train, strict=True):
        torch.testing.assert_close(single / len(positions), full, rtol=1e-4, atol=1e-12)


def test_dropping_a_layer_lets_the_server_go_on_with_the_deeper_ones() -> None:
    result = trained({"rate": 2}, rounds=4)
    assert isinstance(result.strategy, FedD2S)
    start = entries(result.app.template)
    deep_only = trained({"rate": 2}, rounds=2).arrays
    assert torch.equal(deep_only["body.3.weight"], start["body.3.weight"])
    assert not torch.equal(deep_only["head.weight"], start["head.weight"])
    assert not torch.equal(result.arrays["body.3.weight"], start["body.3.weight"])
    assert "server_train_accuracy" in result.strategy.report.extra


def test_the_control_averages_layers_in_front_of_the_cut_only() -> None:
    result = trained({"variant": "parameters", "cuts": (1,)}, rounds=2)
    assert sorted(result.arrays) == ["body.1.bias", "body.1.weight"]
    size = sum(value.numel() for value in result.arrays.values()) * 8
    assert result.strategy.report.bytes_up == result.strategy.report.bytes_down == 4 * size
    moved = trained({"variant": "parameters", "rate": 1}, rounds=2)
    assert len(moved.arrays) > len(result.arrays)
    assert moved.strategy.report.bytes_up == moved.strategy.report.bytes_down == 4 * size  # of the cut of round 2


def test_the_control_sends_the_copy_which_learned_before_the_network() -> None:
    """The copy depends on alpha and not on beta, with which the client's own network learns from it."""
    options = {"variant": "parameters", "cuts": (1,)}
    weak, strong, other = (
        trained({**options, "alpha": alpha, "beta": beta}, rounds=1) for alpha, beta in ((1, 0.1), (1, 5), (2, 0.1))
    )
    for name, value in weak.arrays.items():
        torch.testing.assert_close(value, strong.arrays[name], rtol=1e-10, atol=1e-12)
        assert not torch.equal(value, other.arrays[name])
        assert not torch.equal(weak.state(0)[f"model/{name}"], strong.state(0)[f"model/{name}"])


def test_a_server_that_diverges_keeps_its_head_and_clients_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def exploding(update: FedD2SUpdate, cohort: Cohort, *arguments: Any) -> Reply:
        reply = knowledge(update, cohort, *arguments)
        reply.records["knowledge"]["features"] *= 1e200
        return reply

    knowledge = FedD2SUpdate.query_knowledge
    monkeypatch.setattr(FedD2SUpdate, "query_knowledge", exploding)
    result = trained({}, rounds=3)
    assert all(bool(value.isfinite().all()) for value in result.arrays.values())
    assert not result.strategy.report.failures
    assert "server_train_accuracy" not in result.strategy.report.extra


def test_unseen_clients_train_alone() -> None:
    for options in ({}, {"variant": "parameters", "rate": 2}):  # the cut moves between the last round and adaptation
        result = trained(options, rounds=2, data=replace(DATA, unseen=(3,)))
        assert set(result.strategy.report.adapted) == {3}
        assert not result.strategy.report.evaluation_failures


def test_a_server_with_batch_norm_learns_from_any_number_of_samples() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.BatchNorm1d(5), nn.ReLU())
        network = Network(body, nn.Linear(5, 4)).double()
    samples = sum(len(positions) for positions in DATA.train)
    options = {"cuts": (1,), "server_batch_size": samples - 1}  # leaves a batch of one
    result = run("fedd2s", options, rounds=2, network=network, drop_last=True)
    assert "server_train_accuracy" in result.strategy.report.extra


def test_what_does_not_fit_is_refused() -> None:
    for cuts in ((), (0,), (3,)):
        with pytest.raises(ConfigError, match=r"strategy\.cuts=.*: expected numbers from 1 to 2, the hidden layers"):
            trained({"cuts": cuts})
    with pytest.raises(ConfigError, match=r"strategy=fedd2s: expected another method for .* no class labels"):
        run("fedd2s", {}, network=DEEP, data=NUMBERS)
    strategy, _ = make_strategy("fedd2s")
    with pytest.raises(TrainingError, match="FedD2S computes on the server: call attach"):
        strategy.prepare(1, tree({"head.weight": torch.zeros(1)}), [0], None, "train")  # type: ignore[arg-type]
