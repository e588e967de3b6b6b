"""Run a method as users do, and plain reference loops in double precision to compare it with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import flwr.app as flower
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedpers.cohort import Training, Tree, View, entries, leaves
from fedpers.data.federated import FederatedData
from fedpers.flower_private import server_identity
from fedpers.randomness import sample_clients
from fedpers.records import from_record
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import CohortApp, PersonalizedStrategy, make_strategy
from fedpers.tasks import Regression
from tests.cohort.helpers import batches
from tests.problems import SmallNetwork, gaussian_data

SEED = 3
DATA = gaussian_data((20, 9, 13, 7), dtype=torch.float64)  # batches of 5 leave 0, 4, 3 and 2 samples
NUMBERS = replace(DATA, y=DATA.y.double(), num_classes=1, task=Regression())
"""The same samples with numbers in place of class labels."""
NETWORK = SmallNetwork(dropout=0.0).double()
Values = dict[str, Tensor]


@dataclass
class Finished:
    """What a run left behind."""

    strategy: PersonalizedStrategy
    app: CohortApp
    grid: LocalGrid
    arrays: Values
    round: int

    def state(self, client: int) -> Values:
        """Personal state of one client, by ``role/name``."""
        assert self.grid.engine is not None
        return {name: value[0] for name, value in leaves(self.grid.engine.store.gather([client])).items()}

    def predictors(self) -> list[Values]:
        """The networks all clients predict with, by client."""
        assert self.grid.engine is not None
        clients = sorted(range(self.app.data.num_clients), key=lambda c: -self.app.sizes[c])
        config = {"server-round": self.round}
        cohort = self.app.cohort(clients, self.grid.engine.store.gather(clients), config)
        networks: Tree | View = self.app.update.personalize(cohort, {"arrays": _tree(self.arrays)}, config)
        networks = self.app.update.fine_tuned(cohort, networks)
        tensors = networks.tensors if isinstance(networks, View) else entries(networks)
        stacked = networks.stacked if isinstance(networks, View) else frozenset(tensors)
        rows = {c: {n: v[k] if n in stacked else v for n, v in tensors.items()} for k, c in enumerate(clients)}
        return [rows[client] for client in range(len(clients))]


def _tree(values: Mapping[str, Tensor]) -> Tree:
    return Tree(dict(values), batch_size=[])


def run(
    method: str,
    options: Mapping[str, Any] | None = None,
    *,
    rounds: int = 3,
    fraction: float = 1.0,
    network: nn.Module = NETWORK,
    data: FederatedData = DATA,
    cohort: int = 3,
    device: str = "cpu",
    grid: Callable[[CohortApp, int], LocalGrid] | None = None,
    adapt_steps: tuple[int, ...] = (),
    **training: Any,
) -> Finished:
    """Train a method for some rounds, evaluate it once, and let unseen clients adapt."""
    settings = Training(**{"lr": 0.1, "batch_size": 5, "epochs": 2, **training})
    server = {"fraction": fraction, "seed": SEED, "unseen": data.unseen, "adapt_steps": adapt_steps}
    strategy, update = make_strategy(method, options, server=server, training=settings)
    app = update.client_app(network, data, seed=SEED, device=device)
    strategy.attach(app)
    made = (
        LocalGrid(app, data.num_clients, clients_at_once=cohort, workers=1)
        if grid is None
        else grid(app, data.num_clients)
    )
    arrays, config = app.initial_arrays(), flower.ConfigRecord()
    strategy.begin()
    with server_identity(1):
        for r in range(1, rounds + 1):
            new, _ = strategy.aggregate_train(
                r, made.send_and_receive(strategy.configure_train(r, arrays, config, made))
            )
            assert new is not None
            assert not strategy.report.failures
            arrays = new
        strategy.aggregate_evaluate(
            rounds, made.send_and_receive(strategy.configure_evaluate(rounds, arrays, config, made))
        )
        if strategy.unseen:
            strategy.evaluate_adapted(arrays, config, made)
    made.close()
    return Finished(strategy, app, made, entries(from_record(arrays)), rounds)


# ------------------------------------------------------------------ plain loops


def initial(network: nn.Module = NETWORK) -> Values:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def copied(values: Mapping[str, Tensor]) -> Values:
    return {name: value.clone() for name, value in values.items()}


def weights_of(network: nn.Module = NETWORK) -> list[str]:
    return [name for name, _ in network.named_parameters()]


def drawn(round: int, fraction: float, data: FederatedData = DATA) -> list[int]:
    return sample_clients(SEED, round, data.num_clients, fraction)


def passes(
    client: int, epochs: int, round: int, *, first: int = 0, size: int = 5, data: FederatedData = DATA,
    purpose: str = "batches",
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Batches of some passes of a client in a round."""
    steps = epochs * -(-len(data.train[client]) // size)
    stream = batches(data, client, size=size, first=first, round=round, seed=SEED, purpose=purpose)
    for x, y, _ in islice(stream, steps):
        yield x, y


def loss_of(values: Mapping[str, Tensor], x: Tensor, y: Tensor, network: nn.Module = NETWORK) -> Tensor:
    """Mean cross-entropy in training mode; buffers among `values` are updated in place."""
    network.train()
    out: Tensor = functional_call(network, dict(values), (x,))
    return F.cross_entropy(out, y)


def slopes(
    values: Mapping[str, Tensor], x: Tensor, y: Tensor, names: Sequence[str], network: nn.Module = NETWORK
) -> Values:
    free = {name: values[name].detach().requires_grad_() for name in names}
    loss = loss_of({**values, **free}, x, y, network)
    return dict(zip(names, torch.autograd.grad(loss, list(free.values())), strict=True))


def sgd(
    values: Values, data: Iterator[tuple[Tensor, Tensor]], *, lr: float = 0.1, names: Sequence[str] | None = None,
    network: nn.Module = NETWORK, add: Any = None,
) -> None:  # fmt: skip
    """Plain SGD in place; ``add(name, value)`` is added to each gradient."""
    for x, y in data:
        for name, slope in slopes(values, x, y, names or weights_of(network), network).items():
            extra = 0.0 if add is None else add(name, values[name])
            values[name] -= lr * (slope + extra)


def average(parts: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> Values:
    """Weighted mean; integers rounded."""
    total = sum(weights)
    out = {}
    for name, like in parts[0].items():
        mean = sum(w * part[name].double() for w, part in zip(weights, parts, strict=True)) / total
        assert isinstance(mean, Tensor)
        out[name] = mean if like.is_floating_point() else mean.round().to(like.dtype)
    return out


def sizes(clients: Sequence[int], data: FederatedData = DATA) -> list[float]:
    return [float(len(data.train[client])) for client in clients]
