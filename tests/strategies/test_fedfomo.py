"""FedFomo as its paper has it, against plain loops over clients, networks and samples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from fedpers.cohort import entries, tree
from fedpers.randomness import generator
from fedpers.strategies import FedFomo, FedFomoUpdate, make_strategy
from tests.cohort.helpers import assert_same
from tests.strategies.helpers import (
    DATA,
    NETWORK,
    SEED,
    Finished,
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

HELD_OUT = 0.5


def halves() -> tuple[list[Tensor], list[Tensor]]:
    """What clients train on and what they hold out."""
    kept, held = [], []
    for client, index in enumerate(DATA.train):
        order = generator(SEED, "held out", client, 0).permutation(len(index))
        count = int(HELD_OUT * len(index))
        kept.append(index[np.sort(order[count:])])
        held.append(index[np.sort(order[:count])])
    return kept, held


def weight(former: Values, network: Values, index: Tensor) -> float:
    """How much better a network does than the former one, by their distance."""
    NETWORK.eval()
    losses = [F.cross_entropy(functional_call(NETWORK, v, (DATA.x[index],)), DATA.y[index]) for v in (former, network)]
    distance = float(sum((network[n] - former[n]).square().sum() for n in weights_of())) ** 0.5
    return float(losses[0] - losses[1]) / distance if distance else 0.0


@pytest.mark.parametrize(("epsilon", "fraction"), [(0.0, 1.0), (0.6, 0.75)])
def test_fedfomo_mixes_networks_that_do_better(epsilon: float, fraction: float) -> None:
    options = {"models": 2, "epsilon": epsilon, "epsilon_decay": 0.1, "held_out": HELD_OUT}
    result = run("fedfomo", options, rounds=4, fraction=fraction, lr=0.4)
    kept, held = halves()
    data = replace(DATA, train=kept)
    server, affinity = initial(), np.eye(DATA.num_clients)
    trained: dict[int, Values] = {}
    former: dict[int, Values] = {}
    last: dict[int, Values] = {}
    unmixed = mixed = 0
    for r in range(1, 5):
        now = {}
        for client in drawn(r, fraction):
            base = former.get(client, server)
            network = trained.get(client, server)
            rng = generator(SEED, "networks", client, r)
            order = rng.permutation([other for other in last if other != client]).tolist()
            best = sorted(order, key=lambda other: -affinity[client, other])
            chosen: list[int] = []
            for draw in rng.random(min(2, len(order))):
                source = order if draw < epsilon - 0.1 * (r - 1) else best
                chosen.append(next(other for other in source if other not in chosen))
            weights = [weight(base, last[other], held[client]) for other in chosen]
            affinity[client, chosen] += weights
            start = network
            if chosen:
                shares = [max(w, 0.0) for w in (*weights, weight(base, network, held[client]))]
                start = average([last[other] for other in chosen] + [network], shares) if sum(shares) else base
                counts = {n: v for n, v in network.items() if not v.is_floating_point()}
                start = {**start, **counts}  # numbers of batches are not mixed
                mixed, unmixed = mixed + (sum(shares) > 0), unmixed + (sum(shares) == 0)
            former[client] = copied(start)
            now[client] = copied(start)
            sgd(now[client], passes(client, 2, r, data=data), lr=0.4)
        trained.update(now)
        last = now
        server = average(list(now.values()), sizes(list(now)))
    assert mixed
    assert (unmixed > 0) == (fraction < 1)
    assert_same(result.arrays, server)
    torch.testing.assert_close(result.strategy.state["affinity"]["matrix"], torch.from_numpy(affinity))
    for client, values in enumerate(result.predictors()):
        assert_same(values, trained.get(client, server))
        state = result.state(client)
        if client in former:
            assert_same({n: state[f"before/{n}"] for n in former[client]}, former[client])


def strategy_of(result: Finished) -> FedFomo:
    assert isinstance(result.strategy, FedFomo)
    return result.strategy


def test_who_is_evaluated_is_sent_no_networks() -> None:
    result = run("fedfomo", {"held_out": HELD_OUT}, rounds=2)
    strategy, arrays = strategy_of(result), tree(result.arrays)
    assert list(strategy.send(2, arrays, [0, 1])) == ["arrays"]
    sent = strategy.send(3, arrays, [0, 1])
    assert isinstance(sent, list)
    assert [sorted(entries(records["chosen"])["client"].tolist()) for records in sent] == [[1, 2, 3], [0, 2, 3]]


def test_fewer_networks_than_wanted_are_padded() -> None:
    result = run("fedfomo", {"held_out": HELD_OUT, "models": 3}, rounds=2, fraction=0.5)
    strategy, arrays = strategy_of(result), tree(result.arrays)
    inside, outside = drawn(2, 0.5), sorted(set(range(4)) - set(drawn(2, 0.5)))
    sent = strategy.send(3, arrays, [inside[0], outside[0]])
    assert isinstance(sent, list)
    assert sent[0]["chosen"]["client"].tolist() == [inside[1], -1]
    assert sorted(sent[1]["chosen"]["client"].tolist()) == inside
    assert {len(value) for records in sent for value in entries(records["networks"]).values()} == {2}


def test_exploration_draws_others_than_the_best() -> None:
    chosen = {}
    for epsilon in (0.0, 1.0):
        options = {"held_out": HELD_OUT, "models": 3, "epsilon": epsilon, "epsilon_decay": 0.0}
        strategy = strategy_of(run("fedfomo", options, rounds=2))
        strategy.models = 1
        chosen[epsilon] = {tuple(strategy.choose(r, 0)) for r in range(3, 15)}
    assert len(chosen[0.0]) == 1
    assert len(chosen[1.0]) == 3


def test_samples_held_out() -> None:
    _, update = make_strategy("fedfomo")
    assert isinstance(update, FedFomoUpdate)
    assert [update.count_held_out(size) for size in (1, 2, 3, 9, 10)] == [0, 1, 1, 1, 2]
