"""FedPAC as its paper has it, against plain loops over clients and batches, and weights against other weights."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedpers.cohort import entries, tree
from fedpers.data import SplitConfig, load_federated
from fedpers.errors import ConfigError
from fedpers.models import ModelConfig, Network, build_model
from fedpers.settings import DatasetConfig, PartitionConfig
from fedpers.strategies import FedPACUpdate
from fedpers.strategies.fedpac import combination_weights
from tests.cohort.helpers import assert_same
from tests.problems import SmallNetwork
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
    sgd,
    sizes,
    weights_of,
)

HEAD = ("head.weight", "head.bias")


def features(values: Mapping[str, Tensor], x: Tensor, *, training: bool = False) -> Tensor:
    """Features under other values; in training buffers among them are updated in place."""
    inside = {name.removeprefix("body."): value for name, value in values.items() if name.startswith("body.")}
    out: Tensor = functional_call(NETWORK.body.train(training), inside, (x,))
    return out


def by_class(values: Mapping[str, Tensor], client: int) -> dict[int, Tensor]:
    """Features of a client's samples of each class."""
    index = DATA.train[client]
    rows, y = features(values, DATA.x[index]), DATA.y[index]
    return {j: rows[y == j] for j in y.unique().tolist()}


def value_of(a: Tensor, mine: int, h: Tensor, variance: Tensor) -> Tensor:
    """What weights ``[m, n]`` of a client's combination are to minimize, ``[m]``."""
    return a.square() @ variance + (h[mine] - torch.tensordot(a, h, 1)).square().sum((1, 2))


def test_weights_minimize_the_error_of_a_combination() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(6, 4, 3, generator=generator, dtype=torch.float64)
    h[4] = h[1] + 0.1 * h[4]
    variance = torch.tensor([0.1, 3.0, 0.5, 1.0, 2.0, 0.0], dtype=torch.float64)
    weights = combination_weights(h, variance)
    torch.testing.assert_close(weights.sum(1), torch.ones(6, dtype=torch.float64))
    assert float(weights.min()) >= 0
    assert float(weights[1, 4]) > 0.2  # similar features
    assert (weights == 0).any()
    others = torch.rand(50, 6, generator=generator, dtype=torch.float64) ** 4
    others = others / others.sum(1, keepdim=True)
    for mine, a in enumerate(weights):
        least = float(value_of(a[None], mine, h, variance))
        for share in (1.0, 1e-3):
            assert float(value_of(torch.lerp(a, others, share), mine, h, variance).min()) >= least - 1e-10
    same = combination_weights(torch.zeros(3, 2, 2), torch.zeros(3))  # features that say nothing
    torch.testing.assert_close(same, torch.full((3, 3), 1 / 3, dtype=torch.float64))


@pytest.mark.parametrize("lam", [0.0, 2.0])
def test_fedpac_aligns_features_and_combines_heads(lam: float) -> None:
    result = run("fedpac", {"lam": lam}, rounds=3, fraction=0.75)
    server = initial()
    heads: dict[int, Values] = {}
    prototypes: dict[int, Tensor] = {}
    for r in range(1, 4):
        clients, trained, h, variance, sums = drawn(r, 0.75), {}, [], [], []
        for client in clients:
            values, n = {**copied(server), **copied(heads.get(client, {}))}, len(DATA.train[client])
            groups = by_class(values, client)
            h.append(torch.stack([groups[j].sum(0) / n if j in groups else torch.zeros(8) for j in range(4)]))
            spread = [len(f) / n * f.square().sum(1).mean() - (f.sum(0) / n).square().sum() for f in groups.values()]
            variance.append(torch.stack(spread).sum() / n)
            sgd(values, passes(client, 1, r), names=HEAD)
            names = [name for name in weights_of() if name not in HEAD]
            for x, y in passes(client, 2, r, first=1):
                free = {name: values[name].detach().requires_grad_() for name in names}
                at = {**values, **free}
                rows = features(at, x, training=True)
                away = [
                    (f - prototypes[j]).square().mean()
                    for f, j in zip(rows, y.tolist(), strict=True)
                    if j in prototypes
                ]
                loss = F.cross_entropy(F.linear(rows, at[HEAD[0]], at[HEAD[1]]), y) + lam * sum(away) / len(y)
                for name, slope in zip(names, torch.autograd.grad(loss, list(free.values())), strict=True):
                    values[name] = values[name] - 0.1 * slope
            trained[client] = values
            sums.append({j: (f.sum(0), len(f)) for j, f in by_class(values, client).items()})
        weights = combination_weights(torch.stack(h), torch.stack(variance))
        for client, a in zip(clients, weights, strict=True):
            heads[client] = average([{n: v[n] for n in HEAD} for v in trained.values()], a.tolist())
        server = average(list(trained.values()), sizes(clients))
        for j in range(4):
            parts = [part[j] for part in sums if j in part]
            if parts:
                prototypes[j] = torch.stack([s for s, _ in parts]).sum(0) / sum(count for _, count in parts)
    assert_same(result.arrays, server)
    sent = result.strategy.send(4, tree(result.arrays), [2, 0, 1, 3])
    assert isinstance(sent, list)
    for client, records in zip([2, 0, 1, 3], sent, strict=True):
        assert_same(entries(records["arrays"]), {**server, **heads.get(client, {})})
        table = entries(records["prototypes"])["table"]
        assert table[:, -1].tolist() == [float(j in prototypes) for j in range(4)]
        assert_same({str(j): table[j, :-1] for j in prototypes}, {str(j): v for j, v in prototypes.items()})


def test_what_has_no_features_or_classes_is_refused() -> None:
    cases = ((nn.Linear(6, 4).double(), DATA, "model"), (SmallNetwork().double(), NUMBERS, "strategy"))
    for network, data, key in cases:
        with pytest.raises(ConfigError, match=rf"^{key}=\w+: expected "):
            FedPACUpdate().client_app(network, data)


def test_the_spread_of_a_single_sample_is_never_negative() -> None:
    """Sums in different orders differ by rounding, and the form of the combination then was not positive."""
    data = load_federated(DatasetConfig("digits"), PartitionConfig("iid", num_clients=40), SplitConfig(max_train=1), 0)
    model = build_model(ModelConfig("mlp", hidden=(84,)), data.x.shape[1:], data.num_classes, seed=0)
    app = FedPACUpdate().client_app(model, data)
    cohort = app.cohort(range(40), app.initial_state.expand(40), {})
    _, h, variance = app.update._statistics(cohort, cohort.per_client(app.template))
    assert bool((variance >= 0).all())
    assert bool(combination_weights(h, variance).isfinite().all())


def test_outputs_that_stand_for_no_class() -> None:
    body = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
    network = Network(body, nn.Linear(8, 6)).double()  # of data with four classes
    assert not run("fedpac", rounds=2, network=network).strategy.report.failures
