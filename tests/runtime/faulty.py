"""A method one of whose clients does something wrong, and rounds of it on any grid."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flwr.app as flower
import torch
from torch import Tensor

from fedpers.cohort import Cohort, Reply, Training, leaves
from fedpers.records import from_record
from fedpers.runtime.grid import ClientGrid
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import CohortApp, FedPer, FedPerUpdate, PersonalizedStrategy, Received
from tests.problems import SmallNetwork, gaussian_data

DATA = gaussian_data((20, 9, 13, 7, 28), dtype=torch.float64)
Values = dict[str, Tensor]


@dataclass(kw_only=True)
class FaultyUpdate(FedPerUpdate):
    """FedPer's client half; one client does something wrong when it trains in a round."""

    client: int = 3
    round: int = 2
    fault: str = ""
    mark: str = ""  # file that says it has happened: it happens once

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        if self.client in cohort.clients and int(config["server-round"]) == self.round:
            if self.fault == "raise":
                raise RuntimeError("out of luck")
            if self.fault == "sleep":
                time.sleep(3.0)
            if self.fault == "die" or (self.fault == "die once" and not Path(self.mark).exists()):
                Path(self.mark).touch()
                os._exit(1)
        reply = super().train(cohort, received, config)
        if self.fault == "nan" and self.client in cohort.clients and int(config["server-round"]) == self.round:
            row = list(cohort.clients).index(self.client)
            next(iter(leaves(reply.records["arrays"]).values()))[row] = torch.nan
        return reply


@dataclass(kw_only=True)
class Faulty(FedPer):
    """Its server half."""

    update = FaultyUpdate


def app_of(fault: str = "", mark: str = "", **options: Any) -> CohortApp:
    update = FaultyUpdate(fault=fault, mark=mark, training=Training(lr=0.1, batch_size=5, epochs=1), **options)
    return update.client_app(SmallNetwork().double(), DATA, seed=3)


def rounds(
    grid: ClientGrid,
    app: CohortApp,
    number: int = 4,
    after: Callable[[int], None] = lambda round: None,
    timeout: float | None = None,
) -> tuple[Values, PersonalizedStrategy]:
    """Train with 60 % of the clients, evaluate all; everything that is there at the end."""
    strategy = Faulty(fraction=0.6, seed=3)
    strategy.begin()
    folding = strategy.folding(grid)
    arrays, config = app.initial_arrays(), flower.ConfigRecord()
    for r in range(1, number + 1):
        messages = strategy.configure_train(r, arrays, config, folding)
        new, _ = strategy.aggregate_train(r, folding.send_and_receive(messages, timeout=timeout))
        assert new is not None
        arrays = new
        after(r)
    messages = strategy.configure_evaluate(number, arrays, config, folding)
    strategy.aggregate_evaluate(number, folding.send_and_receive(messages))
    outcome = {f"server/{n}": v.clone() for n, v in leaves(from_record(arrays)).items()}
    for clients, state in grid.blocks():  # type: ignore[attr-defined]
        for k, client in enumerate(clients.tolist()):
            outcome.update({f"{client}/{n}": v[k].clone() for n, v in leaves(state).items()})
    for client, metrics in strategy.report.clients.items():
        outcome.update({f"{client}/{n}": torch.tensor(v) for n, v in metrics.items()})
    return outcome, strategy


def undisturbed(number: int = 4) -> Values:
    app = app_of()
    with LocalGridContext(app) as grid:
        return rounds(grid, app, number)[0]


class LocalGridContext:
    """A local grid that is closed at the end."""

    def __init__(self, app: CohortApp) -> None:
        self.grid = LocalGrid(app, app.data.num_clients, clients_at_once=2, workers=1)

    def __enter__(self) -> LocalGrid:
        return self.grid

    def __exit__(self, *error: object) -> None:
        self.grid.close()


def assert_same(actual: Values, expected: Values) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-12, equal_nan=True, msg=name)
