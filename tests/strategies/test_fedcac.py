"""FedCAC as its paper has it, against plain loops over clients and pairs of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedpers.cohort import entries, tree
from fedpers.strategies.fedcac import collaborators, critical
from tests.cohort.helpers import assert_same
from tests.strategies.helpers import DATA, Values, average, copied, drawn, initial, passes, run, sgd, sizes, weights_of


def test_critical_entries_are_the_most_sensitive_of_each_client() -> None:
    change = torch.tensor([[[0.1, -2.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, -1.0]]])
    value = torch.tensor([[[5.0, 0.1], [9.0, -1.0]], [[1.0, 2.0], [3.0, 4.0]]])
    expected = [[[True, False], [False, True]], [[False, False], [False, True]]]  # what did not move is not critical
    assert critical(change, value, 0.5).tolist() == expected
    assert not critical(change, value, 0.2).any()  # less than one entry


def test_clients_collaborate_where_masks_overlap_more_than_on_average() -> None:
    masks = {"w": torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]]).bool(), "b": torch.zeros(3, 2).bool()}
    similar = [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    assert collaborators(masks, 0.5).tolist() == similar  # overlaps 1, 1/2 and 1/2
    assert collaborators(masks, 1.0).tolist() == similar
    assert collaborators(masks, 1.1).tolist() == torch.eye(3).tolist()
    equal = {"w": torch.eye(3).bool()}
    assert collaborators(equal, 0.9).tolist() == torch.ones(3, 3).tolist()
    assert collaborators(equal, 1.1).tolist() == torch.eye(3).tolist()
    assert collaborators({"w": torch.ones(1, 2).bool()}, 0.1).tolist() == [[1.0]]
    with_empty = {name: torch.cat([mask, torch.zeros_like(mask[:1])]) for name, mask in masks.items()}
    found = collaborators(with_empty, 0.5)
    assert found[:3, :3].tolist() == similar
    assert found[3].tolist() == found[:, 3].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(("fraction", "beta"), [(1.0, 5), (0.5, 170)])
def test_fedcac_mixes_critical_parameters_among_collaborators(fraction: float, beta: int) -> None:
    tau, names = 0.3, weights_of()
    result = run("fedcac", {"tau": tau, "beta": beta}, rounds=4, fraction=fraction)
    start = initial()
    server = {n: start[n] for n in names}
    buffers = [{n: v for n, v in start.items() if n not in names} for _ in range(DATA.num_clients)]
    masks: dict[int, dict[str, Tensor]] = {}
    customized: dict[int, Values] = {}

    def sent(client: int) -> Values:
        if client not in masks:
            return server
        return {n: torch.where(masks[client][n], customized[client][n], server[n]) for n in names}

    alone = 0
    for r in range(1, 5):
        trained = {}
        for client in drawn(r, fraction):
            values = {**copied(sent(client)), **copied(buffers[client])}
            sgd(values, passes(client, 2, r))
            trained[client] = values
            buffers[client] = {n: values[n] for n in buffers[client]}
        fresh = {}
        for client, values in trained.items():
            fresh[client] = {}
            for n, before in sent(client).items():
                sensitivity = ((values[n] - before) * values[n]).abs()
                least = sensitivity.flatten().sort(descending=True).values[: int(tau * before.numel())]
                fresh[client][n] = sensitivity >= (least[-1] if len(least) else torch.inf)
        overlap = {
            (k, j): 1 - sum(float((fresh[k][n] ^ fresh[j][n]).sum()) for n in names)
            / (2 * sum(float(fresh[k][n].sum()) for n in names))
            for k in trained for j in trained if k != j
        }  # fmt: skip
        middle = sum(overlap.values()) / len(overlap)
        threshold = middle + r / beta * (max(overlap.values()) - middle)
        for k in trained:
            group = [k] + [j for j in trained if k != j and overlap[k, j] >= threshold - 1e-9]
            alone += len(group) == 1
            customized[k] = average([{n: trained[j][n] for n in names} for j in group], [1.0] * len(group))
        masks.update(fresh)
        server = average([{n: v[n] for n in names} for v in trained.values()], sizes(list(trained)))
    assert (alone > 0) == (fraction == 1)
    assert_same(result.arrays, server)
    for client, records in enumerate(result.strategy.send(5, tree(result.arrays), list(range(DATA.num_clients)))):
        assert_same(entries(records["arrays"]), sent(client))
        kept = {n.removeprefix("model/"): v for n, v in result.state(client).items() if n.startswith("model/")}
        assert_same(kept, buffers[client])
