"""IFCA against a plain loop; what is chosen, and what clients that never train do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedpers.cohort import entries, tree
from fedpers.errors import ConfigError
from fedpers.records import from_record
from fedpers.strategies import make_strategy
from fedpers.strategies.ifca import CHOICE, ClusterMean
from tests.problems import SmallNetwork, plain_ranking
from tests.strategies.helpers import (
    DATA,
    SEED,
    Values,
    average,
    copied,
    drawn,
    loss_of,
    passes,
    run,
    sgd,
    sizes,
)  # fmt: skip

LINEAR = SmallNetwork(norm=False, dropout=0.0).double()


def plain_loop(networks: list[Values], rounds: int, fraction: float, averaging: str) -> list[Values]:
    for r in range(1, rounds + 1):
        sent: list[list[tuple[int, Values]]] = [[] for _ in networks]
        clients = drawn(r, fraction)
        for client in clients:
            positions = DATA.train[client]
            losses = [loss_of(w, DATA.x[positions], DATA.y[positions], LINEAR) for w in networks]
            j = int(torch.stack(losses).argmin())
            trained = copied(networks[j])
            sgd(trained, passes(client, 2, r), network=LINEAR)
            sent[j].append((client, trained))
        for j, replies in enumerate(sent):
            if not replies:
                continue
            weights = sizes([client for client, _ in replies])
            mean = average([trained for _, trained in replies], weights)
            share = 1.0 if averaging == "models" else sum(weights) / sum(sizes(clients))
            networks[j] = {name: value + share * (mean[name] - value) for name, value in networks[j].items()}
    return networks


@pytest.mark.parametrize("averaging", ["models", "gradients"])
def test_it_is_the_plain_loop(averaging: str) -> None:
    options = {"clusters": 3, "averaging": averaging, "weighting": "samples"}
    result = run("ifca", options, fraction=0.7, network=LINEAR)
    start = entries(from_record(result.app.initial_arrays()))
    expected = plain_loop([{n: v[j].clone() for n, v in start.items()} for j in range(3)], 3, 0.7, averaging)
    for j, network in enumerate(expected):
        for name, value in network.items():
            torch.testing.assert_close(result.arrays[name][j], value, rtol=1e-10, atol=1e-12)


def test_networks_start_apart_and_the_first_as_given() -> None:
    _, update = make_strategy("ifca", {"clusters": 3})
    start = entries(from_record(update.client_app(LINEAR, DATA, seed=SEED).initial_arrays()))["head.weight"]
    assert torch.equal(start[0], LINEAR.head.weight)
    assert all(not torch.equal(start[i], start[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_one_network_is_fedavg() -> None:
    result = run("ifca", {"clusters": 1, "weighting": "samples"}, fraction=0.7)
    expected = run("fedavg", fraction=0.7).arrays
    for name, value in expected.items():
        torch.testing.assert_close(result.arrays[name][0], value, rtol=1e-12, atol=1e-12)


def test_clients_that_never_train_choose_and_continue_with_what_they_chose() -> None:
    data = replace(DATA, unseen=(1,))
    before, after = (run("ifca", network=LINEAR, data=data, epochs=e).strategy.report for e in (0, 2))
    assert before.adapted[1]["test-loss"] == pytest.approx(before.unseen[1]["test-loss"])
    assert after.adapted[1]["test-loss"] != pytest.approx(after.unseen[1]["test-loss"])
    assert sum(after.extra[f"clients_of_cluster_{j}"] for j in range(2)) == 3


def test_a_choice_of_no_network_is_refused() -> None:
    fold = ClusterMean(2)
    with pytest.raises(ValueError, match="network 2 is none of 0 to 1"):
        fold.add({"arrays": tree({"w": torch.zeros(1)}), CHOICE: tree({CHOICE: torch.tensor(2)})}, 1.0, 0)


def test_ratings_are_refused() -> None:
    given = plain_ranking()
    _, update = make_strategy("ifca")
    with pytest.raises(ConfigError, match=r"strategy=ifca: expected another method for ranking"):
        update.client_app(given.network, given.data)
