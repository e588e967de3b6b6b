"""kNN-Per against a plain loop over samples and their neighbours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedpers.cohort import Network
from fedpers.errors import ConfigError
from fedpers.randomness import generator
from fedpers.strategies import KNNPerUpdate
from tests.cohort.helpers import assert_same
from tests.problems import gaussian_data
from tests.strategies.helpers import DATA, NETWORK, NUMBERS, SEED, run

CLIENTS = range(DATA.num_clients)


def mixture(values: Mapping[str, Tensor], client: int, part: str, share: float, options: Mapping[str, Any]) -> Tensor:
    """Class probabilities (or mixed logits) of a client's samples, one after the other."""
    inside = {name.removeprefix("body."): value for name, value in values.items() if name.startswith("body.")}

    def features(index: Tensor) -> Tensor:
        out: Tensor = functional_call(NETWORK.body.eval(), inside, (DATA.x[index],))
        return out

    train = DATA.train[client]
    if "capacity" in options:
        chosen = generator(SEED, "memory", client).permutation(len(train))[: int(options["capacity"] * len(train))]
        train = train[torch.from_numpy(chosen)]
    memory, labels, rows = features(train), DATA.y[train], []
    for query in features(DATA.part(part)[client]):  # type: ignore[arg-type]
        logits = F.linear(query, values["head.weight"], values["head.bias"])
        distances = [float((query - row).norm()) for row in memory]
        votes = torch.zeros(4, dtype=torch.float64)
        for i in sorted(range(len(train)), key=distances.__getitem__)[: options.get("neighbours", 10)]:
            near = distances[i] if options.get("variant") != "official" else distances[i] ** 2 / 8
            votes[labels[i]] += math.exp(-near / options.get("scale", 1.0))
        common = logits if options.get("mixture") == "logits" else torch.softmax(logits, 0)
        rows.append(share * votes / votes.sum() + (1 - share) * common)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"share": 0.6, "capacity": 0.5, "neighbours": 3, "scale": 0.5},
        {"mixture": "logits", "variant": "official", "scale": 0.2},
    ],
    ids=str,
)
def test_neighbours_correct_the_common_network(options: dict[str, Any]) -> None:
    result = run("knnper", options, rounds=2, fraction=0.5)
    assert_same(result.arrays, run("fedavg", rounds=2, fraction=0.5).arrays)
    chosen = []
    for client in CLIENTS:
        index, valid = DATA.test[client], DATA.y[DATA.validation[client]]
        shares = [options["share"]] if "share" in options else [tenth / 10 for tenth in range(11)]

        def loss(share: float, client: int = client, labels: Tensor = valid) -> float:
            scores = mixture(result.arrays, client, "validation", share, options)
            log_scores = scores if options.get("mixture") == "logits" else scores.clamp(min=1e-300).log()
            return float(F.cross_entropy(log_scores, labels))

        chosen.append(min(shares, key=loss))
        scores = mixture(result.arrays, client, "test", chosen[-1], options)
        report = result.strategy.report.clients[client]
        assert report["test-accuracy"] == pytest.approx(float((scores.argmax(1) == DATA.y[index]).double().mean()))
        if options.get("mixture") != "logits":
            picked = scores.gather(1, DATA.y[index][:, None]).clamp(min=torch.finfo(torch.float64).tiny)
            assert report["test-loss"] == pytest.approx(float(-picked.log().mean()), rel=1e-6)
    assert "share" in options or len(set(chosen)) > 1


def test_similarities_do_not_underflow() -> None:
    update = KNNPerUpdate(scale=1e-6, neighbours=2)
    given = {
        "memory": torch.tensor([[3.0], [5.0], [0.0]]),
        "labels": torch.tensor([1, 0, 2]),
        "known": torch.tensor([True, True, False]),
        "share": torch.tensor(1.0),
    }
    network = nn.Module()
    network.body, network.head = nn.Identity(), nn.Linear(1, 3)
    scores = update.predict(Network(network, dict(network.named_parameters()), given=given), torch.tensor([[1.0]]))
    assert scores.isfinite().all()
    assert torch.softmax(scores, 1).argmax() == 1


def test_what_it_cannot_work_with_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^strategy=knnper: expected another method for gaussian"):
        KNNPerUpdate().client_app(NETWORK, NUMBERS)
    network = nn.Module()
    network.head = nn.Linear(6, 4)
    with pytest.raises(ConfigError, match=r"^model=Module: expected a network with a 'body' and a linear 'head' for"):
        KNNPerUpdate().client_app(network, gaussian_data())
