"""Clients whose networks differ in kind: one app, in which each kind has its network, initial values and cohorts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import flwr.app as flower
import torch
from torch import Tensor, nn

from fedpers.client.app import CohortApp
from fedpers.client.predictor import Inputs
from fedpers.client.results import CohortResult
from fedpers.client.update import Received
from fedpers.cohort import Tree, entries, leaves, tree
from fedpers.data.federated import FederatedData
from fedpers.errors import ConfigError, check
from fedpers.records import from_record


class MixedApp(CohortApp):
    """Flower ``ClientApp`` of clients with different networks.

    Personal state is stored by kind: role ``kind0`` holds that of the first kind, and so on. Every client stores the
    state of all kinds; that of kinds other than its own stays as it was made.

    Parameters
    ----------
    apps : sequence of CohortApp
        One for each kind of network, of the same method and data.
    kind_of : sequence of int ``[N]``
        Kind of each client.
    names : sequence of str, optional
        Of the kinds, for messages; default the networks' classes.

    Raises
    ------
    ConfigError
        If the method shares entries of a network, the kinds do not share arrays of the same shapes, or `kind_of` does
        not name a kind for each client.
    """

    def __init__(self, apps: Sequence[CohortApp], kind_of: Sequence[int], names: Sequence[str] = ()) -> None:
        first = apps[0]
        names = names or [type(app.module).__name__ for app in apps]
        fits = len(kind_of) == first.data.num_clients and set(kind_of) <= set(range(len(apps)))
        allowed = f"a number from 0 to {len(apps) - 1} for each of {first.data.num_clients} clients"
        check(fits, "kind_of", list(kind_of), allowed)
        method = type(first.update).__name__
        allowed = (
            f"null, one network for all: {method} shares entries of a network, which must be the same for all clients"
        )
        check(first.update.mixes_networks, "model.kinds", list(names), allowed)
        shared = [{n: tuple(v.shape) for n, v in entries(from_record(app.initial_arrays())).items()} for app in apps]
        for name, shapes in zip(names, shared, strict=True):
            if shapes != shared[0]:
                difference = f"{names[0]}: {shared[0]}, {name}: {shapes}"
                remedy = f"use {first.update.mixing_settings} for one width"
                allowed = f"networks that share arrays of the same shapes ({difference}); {remedy}"
                raise ConfigError("model.kinds", list(names), allowed)
        self.update, self.mods, self.encoders = first.update, first.mods, first.encoders
        self.identity, self.seed = first.identity, first.seed
        self.kind_of = tuple(kind_of)
        self._take(apps)

    def _take(self, apps: Sequence[CohortApp]) -> None:
        """Become an app of these kinds."""
        first = apps[0]
        self.kinds = tuple(apps)
        self.device, self.data, self.sizes, self.traits = first.device, first.data, first.sizes, first.traits
        self.template = first.template
        self.module = nn.ModuleList([app.module for app in apps])
        states = {_role(kind): app.initial_state for kind, app in enumerate(apps) if leaves(app.initial_state)}
        self.initial_state = tree(states)
        self._register()

    def kind(self, client: int) -> int:
        """Number of a client's kind of network."""
        return self.kind_of[client]

    @property
    def first_kind(self) -> CohortApp:
        """The app of the first kind."""
        return self.kinds[0]

    @property
    def largest_kind(self) -> CohortApp:
        """The app of the kind with most parameters."""
        return max(self.kinds, key=lambda app: sum(value.numel() for value in entries(app.template).values()))

    def with_data(self, data: FederatedData) -> Self:
        """Copy with other data of the same kind, on the same device."""
        part = copy.copy(self)
        part._take([app.with_data(data) for app in self.kinds])
        return part

    def to(self, device: torch.device | str) -> Self:
        """Move what clients compute with to a device."""
        first = self.kinds[0].to(device)
        for app in self.kinds[1:]:
            app.data = first.data  # moved once
            app.to(device)
        self._take(self.kinds)
        return self

    def initial_arrays(self) -> flower.ArrayRecord:
        """What the server starts from, the same for all kinds but for its values: those of the first."""
        return self.kinds[0].initial_arrays()

    def network_of(
        self,
        client: int,
        state: Tree,
        received: Received,
        config: Mapping[str, Any],
        inputs: Inputs | None = None,
    ) -> nn.Module:
        """Network of a client, see :meth:`CohortApp.network_of`."""
        number = self.kind_of[client]
        return self.kinds[number].network_of(client, state.get(_role(number), tree({}, 1)), received, config, inputs)

    def run(
        self,
        kind: str,
        clients: Sequence[int],
        state: Tree,
        received: Received,
        config: Mapping[str, Any],
        module: nn.Module | None = None,
    ) -> tuple[CohortResult, Tree | None, Tensor]:
        """Handle one message type for K clients of one kind of network, see :meth:`CohortApp.run`."""
        (number,) = {self.kind_of[client] for client in clients}
        modules = self.module if module is None else module
        assert isinstance(modules, nn.ModuleList)
        of_kind = state.get(_role(number), tree({}, len(clients)))
        result, new, finite = self.kinds[number].run(kind, clients, of_kind, received, config, modules[number])
        return result, None if new is None else tree({_role(number): new}, len(clients)), finite


def _role(kind: int) -> str:
    return f"kind{kind}"
