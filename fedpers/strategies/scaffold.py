"""SCAFFOLD: control variates against client drift.

S. P. Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging for Federated Learning,
ICML 2020, arXiv:1910.06378 (Algorithm 1, option II).

    w_k <- w, then S steps  w_k <- w_k - lr * (grad f_k(w_k) - c_k + c)
    c_k' = c_k - c + (w - w_k) / (S * lr)
    w    <- w + server_lr * mean_k (w_k - w)
    c    <- c + 1/N * sum_k (c_k' - c_k)          over the sampled clients, N clients in all

Shared: the whole network and the server's control variate c. Personal: the client's control variate c_k (parameters
only). Buffers have no gradient: they are averaged plainly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from fedpers.cohort import Cohort, Reply, Tree, entries, has_role, select, shifted, tree
from fedpers.cohort.tree import expand_rows
from fedpers.errors import check
from fedpers.records import ARRAYS
from fedpers.server.collect import Schema, schema_of
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, method

CONTROL = "control"
_PLAIN = {
    "optimizer": "sgd",
    "momentum": 0.0,
    "weight_decay": 0.0,
    "schedule": "constant",
    "clip": None,
    "groups": None,
    "proximal": 0.0,
}


@dataclass(kw_only=True)
class ScaffoldUpdate(LocalUpdate):
    """SGD with drift correction; another optimizer is refused, for the control variates divide by ``S * lr``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, plain in _PLAIN.items():
            value = getattr(self.training, name)
            allowed = f"{'null' if plain is None else plain} for strategy=scaffold, which needs plain SGD"
            check(value == plain, f"training.{name}", value, allowed)

    def initial_state(self, template: Tree, module: nn.Module) -> Tree:
        """All control variates start at 0."""
        shared = set(select(module, self.shared))
        names = tuple(name for name in select(module, "parameters") if name in shared)
        return super().initial_state(template, module).set(CONTROL, _zeros(template, names))

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train with ``grad - c_k + c``; send the network and the change of c_k."""
        params = cohort.assemble(received["arrays"])
        start = params.clone()
        controls = entries(cohort.state[CONTROL]) if has_role(cohort.state, CONTROL) else {}
        names = tuple(controls)
        common = cohort.per_client(received[CONTROL] if CONTROL in received else _zeros(cohort.template, names))
        cohort.fit(params, self.loss, adjust=shifted({n: common[n] - controls[n] for n in names}))
        steps = cohort.steps_taken.clamp(min=1).to(cohort.device)
        change = {n: (start[n] - params[n]) / expand_rows(steps, params[n]) / cohort.rate - common[n] for n in names}
        new = tree({n: controls[n] + change[n] for n in names}, cohort.size)
        return cohort.reply(params, state={CONTROL: new}, control=tree(change, cohort.size))


@method("scaffold")
@dataclass(kw_only=True)
class Scaffold(PersonalizedStrategy):
    """Server with a control variate of its own."""

    update = ScaffoldUpdate
    weighting: Annotated[Literal["uniform"], Field(description="of replies in the average")] = "uniform"
    server_lr: Annotated[float, Field(gt=0, description="step of the server")] = 1.0

    def send(self, round: int, arrays: Tree, clients: list[int]) -> Mapping[str, Tree]:
        """Send c too, once there is one; until then it is 0."""
        return {ARRAYS: arrays, **({CONTROL: self.state[CONTROL]} if CONTROL in self.state else {})}

    def reply_schema(self, clients: list[int]) -> Schema:
        """The network, and the change of c_k: an entry for each parameter."""
        arrays = entries(self.sent_arrays)
        server_control = self.state.get(CONTROL)
        control = schema_of(CONTROL, arrays if server_control is None else entries(server_control))
        if server_control is None:  # the first round tells parameters from buffers, which have no control variate
            control = {key: entry._replace(optional=True) for key, entry in control.items()}
        return {**schema_of(ARRAYS, arrays), **control}

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """Move the network by ``server_lr`` and c by the share of clients that took part."""
        if CONTROL not in means:  # nothing is shared
            return arrays
        share = len(clients) / self.num_trainable
        change = entries(means[CONTROL])
        old = self.state.get(CONTROL, _zeros(arrays, tuple(change)))
        self.state[CONTROL] = tree({n: old[n] + share * v for n, v in change.items()})
        moved = {
            name: torch.lerp(arrays[name], mean, self.server_lr) if name in change else mean
            for name, mean in entries(means[ARRAYS]).items()
        }
        return tree(moved)


def _zeros(model: Tree, names: tuple[str, ...]) -> Tree:
    return tree({name: torch.zeros_like(model[name]) for name in names})
