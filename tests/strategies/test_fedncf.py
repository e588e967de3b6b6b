"""FedNCF against a plain loop over users, and how its server treats items."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedpers.cohort import entries, tree
from fedpers.randomness import generator
from fedpers.strategies.fedncf import TABLES, UPDATED, ItemMean, NeuMF
from tests.cohort.helpers import assert_same
from tests.problems import ranking
from tests.strategies.helpers import SEED, drawn, run

GIVEN = ranking(torch.float64)
ITEMS = 40
Values = dict[str, Tensor]


def score(values: Mapping[str, Tensor], items: Tensor) -> Tensor:
    product = values["user.product.weight"] * values["items.product.weight"][items]
    user = values["user.tower.weight"].expand(len(items), -1)
    hidden = torch.cat([user, values["items.tower.weight"][items]], 1)
    for layer in (0, 2, 4):
        hidden = torch.relu(hidden @ values[f"tower.{layer}.weight"].T + values[f"tower.{layer}.bias"])
    return (torch.cat([product, hidden], 1) @ values["head.weight"].T + values["head.bias"]).squeeze(1)


def plain(rounds: int, fraction: float, start: Values) -> tuple[Values, list[Values]]:
    """Rounds with SGD, one user after the other."""
    server = {n: v for n, v in start.items() if not n.startswith("user.")}
    users = [{n: v for n, v in start.items() if n.startswith("user.")} for _ in range(GIVEN.data.num_clients)]
    for r in range(1, rounds + 1):
        sums = {n: torch.zeros_like(v) for n, v in server.items()}
        count, total = torch.zeros(ITEMS, 1, dtype=torch.float64), 0.0
        for u in drawn(r, fraction, GIVEN.data):
            samples = GIVEN.data.samples(u, SEED, r)
            items, y = torch.from_numpy(samples % ITEMS), torch.from_numpy((samples >= ITEMS).astype(float))
            values = {**server, **users[u]}
            for epoch in range(2):
                order = generator(SEED, "batches", u, r, epoch).permutation(len(samples))
                for batch in np.split(order, range(16, len(order), 16)):
                    values = {n: v.detach().requires_grad_() for n, v in values.items()}
                    loss = F.binary_cross_entropy_with_logits(score(values, items[batch]), y[batch])
                    grads = torch.autograd.grad(loss, list(values.values()))
                    values = {n: v.detach() - 0.5 * g for (n, v), g in zip(values.items(), grads, strict=True)}
            users[u] = {n: values[n] for n in users[u]}
            updated = torch.zeros(ITEMS, 1, dtype=torch.float64)
            updated[items] = 1
            size = len(GIVEN.data.train[u])
            for n in server:
                sums[n] += updated * values[n] if n in TABLES else size * values[n]
            count, total = count + updated, total + size
        server = {
            n: torch.where(count > 0, sums[n] / count, server[n]) if n in TABLES else sums[n] / total for n in server
        }
    return server, users


def test_tables_are_averaged_over_who_updated_an_item_and_layers_by_samples() -> None:
    result = run(
        "fedncf", rounds=3, fraction=0.4, network=GIVEN.network, data=GIVEN.data, lr=0.5, epochs=2, batch_size=16
    )
    server, users = plain(3, 0.4, dict(entries(result.app.template)))
    assert_same(result.arrays, server)
    for user, state in enumerate(users):
        assert_same(result.state(user), {f"model/{n}": v for n, v in state.items()})


def test_an_item_that_nobody_updated_stays_as_it_was() -> None:
    result = run("fedncf", rounds=1, fraction=0.2, network=GIVEN.network, data=GIVEN.data)
    items = np.concatenate([GIVEN.data.samples(u, SEED, 1) % ITEMS for u in drawn(1, 0.2, GIVEN.data)])
    untouched = sorted(set(range(ITEMS)) - set(items.tolist()))
    assert untouched
    for name in TABLES:
        moved = (result.arrays[name] != result.app.template[name]).any(1)
        assert not moved[untouched].any()
        assert moved[np.unique(items)].all()


def test_the_mean_of_an_item_is_not_weighted_and_that_of_a_layer_is() -> None:
    fold = ItemMean()
    for weight, value, updated in ((1.0, 2.0, [1, 0, 1]), (3.0, 6.0, [1, 0, 0])):
        tables = {name: torch.full((3, 2), value) for name in TABLES}
        arrays = tree({**tables, "head.bias": torch.tensor([value])})
        fold.add({"arrays": arrays, UPDATED: tree({"items": torch.tensor(updated, dtype=torch.uint8)})}, weight)
    means = fold.result()
    assert means["arrays"]["head.bias"].tolist() == [5.0]
    assert means[UPDATED]["items"].tolist() == [1.0, 0.0, 0.5]
    assert means["arrays"][TABLES[0]][:, 0].tolist() == [4.0, 0.0, 1.0]


@pytest.mark.parametrize(("dim", "widths"), [(12, (48, 24, 12, 6)), (1, (4, 2, 1, 1))])
def test_widths_are_those_of_the_paper(dim: int, widths: tuple[int, ...]) -> None:
    layers = [layer for layer in NeuMF(5, dim).tower if isinstance(layer, torch.nn.Linear)]
    assert (layers[0].in_features, *(layer.out_features for layer in layers)) == widths
