"""One client's predictions as a module of their own, for use outside of a run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

from fedpers.client.update import LocalUpdate
from fedpers.cohort import Given, Network, Tree, View
from fedpers.cohort.modules import named_state
from fedpers.cohort.tree import map_tensors, state_names

Inputs = Callable[[Tensor], Tensor]
"""What a method makes of samples before any network sees them."""


class Predictor(nn.Module):
    """Scores of a client of a method that predicts with more than its network alone.

    Parameters
    ----------
    network : nn.Module
        With the client's values.
    update : LocalUpdate
        Its ``predict`` gives the scores.
    given : mapping
        What that sees beside the network (``View.given``), of this client; kept as buffers.
    inputs : callable, optional
        Applied to samples first: features of a frozen backbone, which a run computes once.
    """

    def __init__(self, network: nn.Module, update: LocalUpdate, given: Given, inputs: Inputs | None = None) -> None:
        super().__init__()
        self.network = network
        self.given = _Buffers(given)
        self._update, self._inputs = update, inputs

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``[B, ...]`` of samples ``[B, ...]``."""
        values = named_state(self.network)
        tensors = {name: values[name] for name in state_names(self.network)}
        samples = x if self._inputs is None else self._inputs(x)
        return self._update.predict(Network(self.network, tensors, given=self.given.as_given()), samples)


class _Buffers(nn.Module):
    """Tensors by name, or by name in mappings by name."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        for name, value in values.items():
            key = name.replace(".", "/")  # a buffer's name holds no dot
            if isinstance(value, Tensor):
                self.register_buffer(key, value.clone())
            else:
                self.add_module(key, _Buffers(value))

    def as_given(self) -> dict[str, Any]:
        parts = {name: part.as_given() for name, part in self.named_children() if isinstance(part, _Buffers)}
        return {name.replace("/", "."): value for name, value in {**self._buffers, **parts}.items()}


def predictor(module: nn.Module, update: LocalUpdate, networks: Tree | View, inputs: Inputs | None = None) -> nn.Module:
    """Make the module of a cohort of one, in evaluation mode: the network itself where a method predicts with no more.

    Parameters
    ----------
    module : nn.Module
        Prepared; copied.
    update : LocalUpdate
    networks : Tree ``[1]`` or View
        As ``update.fine_tuned`` returns them.
    inputs : callable, optional
        See :class:`Predictor`.
    """
    view = View.of(networks)
    network = with_values(module, view.of_one())
    given = map_tensors(view.given, itemgetter(0))
    if given or inputs is not None or type(update).predict is not LocalUpdate.predict:
        return Predictor(network, update, given, inputs).eval()
    return network


def with_values(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """Copy of a network in evaluation mode with other parameters and buffers, by their canonical names."""
    network = copy.deepcopy(module).eval()
    held = named_state(network)
    for name, value in values.items():
        held[name].data.copy_(value)
    return network
