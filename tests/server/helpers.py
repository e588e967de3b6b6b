"""Small runs with something around the mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import flwr.app as flower
import pytest
import torch
from torch import Tensor, nn

from fedpers.cohort import Cohort, Reply, Tree, entries, tree
from fedpers.errors import ConfigError
from fedpers.flower_private import server_identity
from fedpers.records import ARRAYS, from_record
from fedpers.run import run_rounds
from fedpers.runtime.local import LocalGrid
from fedpers.server.postprocessors import Postprocessor
from fedpers.server.report import RoundReport
from fedpers.settings import Config, build
from fedpers.strategies import STRATEGIES, CohortApp, FedAvg, FedAvgUpdate, PersonalizedStrategy, make_strategy
from tests.problems import Problem, SmallNetwork, problem

NOTHING = ("local", "no_learning", "pretrained", "head_only")
"""Methods whose clients send nothing."""
MORE = [name for name, method in STRATEGIES.items() if not method.plain_mean()]
"""Methods whose aggregate is more than a mean of the server's arrays."""
PLAIN = [name for name in STRATEGIES if name not in (*MORE, *NOTHING)]
Values = dict[str, Tensor]


def given(method: str) -> Problem:
    """The small problem of a method, without batch statistics unless they are personal."""
    chosen = problem(method)
    if isinstance(chosen.network, SmallNetwork) and method != "fedbn":
        return replace(chosen, network=SmallNetwork(norm=False))
    return chosen


def both(
    method: str,
    *postprocessors: Postprocessor,
    mods: Sequence[Any] = (),
    network: nn.Module | None = None,
    weighting: str = "uniform",
    **server: Any,
) -> tuple[PersonalizedStrategy, CohortApp]:
    """Both halves of a method on its small problem."""
    chosen = given(method)
    options = {**chosen.options, "weighting": weighting}
    server = {"seed": 3, "unseen": chosen.data.unseen, "postprocessors": postprocessors, **server}
    strategy, update = make_strategy(method, options, server=server, training=chosen.training)
    app = update.client_app(
        network or chosen.network, chosen.data, seed=3, mods=mods, postprocessors=strategy.postprocessors
    )
    strategy.attach(app)
    return strategy, app


@dataclass
class Finished:
    """What a run left behind."""

    arrays: Values
    grid: LocalGrid
    reports: list[RoundReport]

    def state(self, clients: Sequence[int]) -> Tree:
        """Personal state of some clients, stacked."""
        assert self.grid.engine is not None
        return self.grid.engine.store.gather(clients)


def trained(strategy: PersonalizedStrategy, app: CohortApp, *, rounds: int = 2, cohort: int = 3) -> Finished:
    """Some rounds of our loop without a failure."""
    grid = LocalGrid(app, app.data.num_clients, clients_at_once=cohort, workers=1)
    arrays: list[flower.ArrayRecord] = []
    reports = []
    with server_identity(1):
        for report in run_rounds(
            strategy, grid, app.initial_arrays(), rounds, after_round=lambda _, record, is_last: arrays.append(record)
        ):
            assert not report.failures
            assert not report.evaluation_failures
            assert report.clients
            reports.append(report)
    grid.close()
    return Finished(dict(entries(from_record(arrays[-1]))), grid, reports)


@cache
def plain_run(method: str) -> Values:
    """Arrays of a method after two rounds with nothing around the mean."""
    return trained(*both(method)).arrays


def runs_or_is_refused(method: str, *postprocessors: Postprocessor, without: str) -> None:
    """Every method runs to other arrays of the same form, or one sentence says why not."""
    strategy, app = both(method, *postprocessors)
    if method in MORE:
        with pytest.raises(ConfigError) as caught:
            strategy.check_arrays(from_record(app.initial_arrays()), 7)
        kind, name = postprocessors[0], STRATEGIES[method].__name__
        assert str(caught.value) == (
            f"{kind.setting}={kind.label}: expected {without} for {name}, whose aggregate is more than a mean of the "
            "server's arrays."
        )
        return
    arrays, usual = trained(strategy, app).arrays, plain_run(method)
    assert finite(arrays)
    assert list(usual) == list(arrays)
    for name, value in usual.items():
        assert value.shape == arrays[name].shape
        assert value.dtype == arrays[name].dtype
    moved = any(not torch.equal(value, arrays[name]) for name, value in usual.items())
    assert moved == (method not in NOTHING)


def finite(values: Mapping[str, Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in values.values())


@dataclass(kw_only=True)
class FarUpdate(FedAvgUpdate):
    """Client k moves every entry by ``0.1 * k``."""

    def train(self, cohort: Cohort, received: Mapping[str, Tree], config: Mapping[str, Any]) -> Reply:
        params = cohort.assemble(received[ARRAYS])
        steps = torch.tensor(cohort.clients, dtype=torch.float32) * 0.1
        moved = {n: v + steps.view(-1, *[1] * (v.dim() - 1)) for n, v in entries(params).items()}
        return cohort.reply(tree(moved, cohort.size))


@dataclass(kw_only=True)
class Far(FedAvg):
    update = FarUpdate


def far(*postprocessors: Postprocessor, **server: Any) -> tuple[Far, CohortApp]:
    """Clients that move by known amounts."""
    chosen = given("fedavg")
    strategy = Far(weighting="uniform", seed=5, postprocessors=postprocessors, **server)
    app = FarUpdate().client_app(chosen.network, chosen.data, seed=5, postprocessors=postprocessors)
    return strategy, app


def stack(**tensors: Tensor) -> dict[str, Tree]:
    """The record of arrays of K clients."""
    return {ARRAYS: tree(tensors, len(next(iter(tensors.values()))))}


def settings(**values: Any) -> Config:
    """A small run."""
    plain = {
        "strategy": {"name": "fedrep", "weighting": "uniform"},
        "partition": {"num_clients": 8, "alpha": 1.0},
        "rounds": 2,
        "runtime": {"device": "cpu", "clients_at_once": 8, "workers": 1},
        **values,
    }
    return build(Config, plain)
