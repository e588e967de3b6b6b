"""What the networks of a cohort predict, with as few passes through them as their samples allow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from fedpers.cohort.step import Given, Network
from fedpers.cohort.tree import Tree, entries, map_tensors
from fedpers.data.federated import FederatedData

EVALUATION_SAMPLES = 2048
"""Samples that go through the network at once in an evaluation, over all clients of a cohort."""
EVALUATION_VALUES, FEWEST_SAMPLES = 2**18, 128
"""On a CPU so many values of samples instead, but not fewer samples than this.

A layer that needs more than 32 MB gets new memory from the system in each pass, which can take longer than the pass.
"""
Predict = Callable[[Network, Tensor], Tensor]
"""Scores ``[B, ...]`` of one client's network for inputs ``[B, ...]``."""


@dataclass(frozen=True)
class View:
    """Tensors to predict with: some stacked ``[K, ...]``, the others shared by the whole cohort.

    What all clients received alike stays one copy, so that a common network sees all their samples at once.

    Attributes
    ----------
    tensors : dict of name to Tensor
    stacked : frozenset of str
        Names of those that hold a row per client.
    given : mapping
        What predictions may see beside the network, stacked ``[K, ...]``; see ``Network.given``.
    """

    tensors: dict[str, Tensor]
    stacked: frozenset[str]
    given: Given = field(default_factory=dict)

    @classmethod
    def of(cls, networks: Tree | View, given: Given | None = None) -> View:
        """View of networks ``[K]`` that are all stacked, with what predictions may see; a view as it is."""
        if isinstance(networks, View):
            return networks
        values = entries(networks)
        return cls(values, frozenset(values), {} if given is None else given)

    def of_one(self) -> dict[str, Tensor]:
        """Tensors of the only client of a view, K = 1, by name."""
        return {name: value[0] if name in self.stacked else value for name, value in self.tensors.items()}


def predictions(
    module: nn.Module, data: FederatedData, view: View, lists: Sequence[Tensor], predict: Predict
) -> list[Tensor]:
    """Predictions ``[n_k, ...]`` of each client for its samples.

    Parameters
    ----------
    module : nn.Module
        Prepared, in the mode it is to be in.
    data : FederatedData
    view : View
        Of K clients.
    lists : sequence of Tensor ``[n_k]``
        Positions of each client's samples in the data.
    predict : callable
        See :data:`Predict`.
    """
    given = map_tensors(view.given, lambda value: value.to(data.device))
    with torch.no_grad():
        if not view.stacked and not given:  # one network for all: their samples in one row
            out = _of_one(Network(module, view.tensors), data, torch.cat(list(lists)), predict)
            return list(torch.split(out, [len(positions) for positions in lists]))
        if len(lists) == 1:
            network = Network(module, view.of_one(), given=map_tensors(given, itemgetter(0)))
            return [_of_one(network, data, lists[0], predict)]
        common = {n: v for n, v in view.tensors.items() if n not in view.stacked}

        def one(mine: Mapping[str, Any], x: Tensor) -> Tensor:
            return predict(Network(module, {**common, **mine["tensors"]}, given=mine["given"]), x)

        stacked = {n: v for n, v in view.tensors.items() if n in view.stacked}
        return _of_many(one, {"tensors": stacked, "given": given}, data, lists)


def _at_once(x: Tensor) -> int:
    """How many of the samples ``[N, ...]`` go through a network at once."""
    if x.device.type != "cpu":
        return EVALUATION_SAMPLES
    return min(EVALUATION_SAMPLES, max(FEWEST_SAMPLES, EVALUATION_VALUES // max(1, x[:1].numel())))


def _of_one(network: Network, data: FederatedData, index: Tensor, predict: Predict) -> Tensor:
    """Predictions of one network for the samples `index`."""
    if not len(index):  # not every network takes an empty batch
        return torch.zeros(0, data.num_classes, device=data.device)
    chunks = torch.split(index.to(data.device), _at_once(data.x))
    return torch.cat([predict(network, data.x[chunk]) for chunk in chunks])


def _of_many(
    one: Callable[[Mapping[str, Any], Tensor], Tensor],
    per_client: dict[str, Any],
    data: FederatedData,
    lists: Sequence[Tensor],
) -> list[Tensor]:
    """Predictions of K networks side by side; those whose samples are through leave the stack.

    Parameters
    ----------
    one : callable
        From a client's row of `per_client` and inputs to scores.
    per_client : dict
        Tensors ``[K, ...]``, possibly in mappings.
    data : FederatedData
    lists : sequence of Tensor ``[n_k]``
    """
    sizes = [len(positions) for positions in lists]
    index = torch.zeros(len(lists), max(sizes), dtype=torch.int64)
    for k, positions in enumerate(lists):
        index[k, : sizes[k]] = positions
    index = index.to(data.device)
    at_once = _at_once(data.x)
    width = max(1, at_once // len(lists))
    pieces: list[list[Tensor]] = [[] for _ in lists]
    start, rows = 0, list(range(len(lists)))
    while active := [row for row, k in enumerate(rows) if sizes[k] > start]:
        if 4 * len(active) > 3 * (active[-1] + 1):  # the first rows need no copy, and few of them run in vain
            active = list(range(active[-1] + 1))
        if len(active) < len(rows):
            prefix = active[-1] < len(active)
            stay = slice(len(active)) if prefix else torch.tensor(active, device=data.device)
            per_client = map_tensors(per_client, itemgetter(stay))
            index, rows = index[stay], [rows[p] for p in active]
        ahead = min(sizes[k] - start for k in rows if sizes[k] > start)  # until the next of them is through
        end = start + max(width, min(ahead, at_once // len(rows)))
        chunk = index[:, start:end]
        x = data.x[chunk.reshape(-1)].view(*chunk.shape, *data.x.shape[1:])
        for k, scores in zip(rows, vmap(one)(per_client, x), strict=True):
            if sizes[k] > start:
                pieces[k].append(scores[: sizes[k] - start])
        start = end
    empty = torch.zeros(0, data.num_classes, device=data.device)
    return [torch.cat(scores) if scores else empty for scores in pieces]
