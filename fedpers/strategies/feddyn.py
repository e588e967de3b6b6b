"""FedDyn: every client's loss is tilted so that its minimum near the common network is that of the loss of all.

D. A. E. Acar et al., Federated Learning Based on Dynamic Regularization, ICLR 2021, arXiv:2111.04263 (Algorithm 1).

    w_k <- w, then SGD on  f_k(w_k) - <g_k, w_k> + alpha/2 * ||w_k - w||^2
    g_k <- g_k - alpha * (w_k - w)                            the gradient of f_k where a full minimization ends
    h   <- h - alpha / N * sum_k (w_k - w)                    over the sampled clients, N clients in all
    w   <- mean_k w_k - h / alpha

Shared: the whole network. Personal: g_k, the gradient that tilts the loss (of parameters only); the server keeps h.
Both start at 0. Buffers have no gradient: they are averaged plainly; the server knows them from the clients' app
(``strategy.attach``). It sends w alone, so that a round costs what one of FedAvg costs.

The paper minimizes; here, as in the authors' code, the SGD of ``training`` stands for that. The authors' code, unlike
the paper, divides alpha by a client's share of the samples, relative to the mean share; here all have one alpha.

``variant: pfllib`` repeats a common implementation, in which the norm is not squared: ``alpha/2 * ||w_k - w||``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedpers.cohort import Adjust, Cohort, Reply, Step, Tree, entries, proximal, select, shifted, tree
from fedpers.cohort.tree import expand_rows, sum_rows
from fedpers.records import ARRAYS
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, method

GRADIENT, DRIFT = "gradient", "drift"
"""Roles of g_k in personal state, and of h in the server's."""


@dataclass(kw_only=True)
class FedDynUpdate(LocalUpdate):
    """Train with a pull to the received network and against the client's last gradient."""

    alpha: Annotated[float, Field(gt=0, description="strength of the pull and of both corrections")] = 0.01
    variant: Annotated[Literal["paper", "pfllib"], Field(description="pfllib: the pull is not squared")] = "paper"

    def initial_state(self, template: Tree, module: nn.Module) -> Tree:
        """g_k is 0."""
        names = set(select(module, self.shared)) & set(select(module, "parameters"))
        zeros = {name: torch.zeros_like(value) for name, value in entries(template).items() if name in names}
        return super().initial_state(template, module).set(GRADIENT, tree(zeros))

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train, then move g_k against the way the network went."""
        params = cohort.assemble(received[ARRAYS])
        gradients = entries(cohort.state[GRADIENT].to(cohort.device))
        start = {name: params[name].clone() for name in gradients}
        pull = proximal(self.alpha, start) if self.variant == "paper" else unit_pull(self.alpha / 2, start)
        cohort.fit(params, self.loss, adjust=[pull, shifted({name: -value for name, value in gradients.items()})])
        new = {name: value - self.alpha * (params[name] - start[name]) for name, value in gradients.items()}
        return cohort.reply(params, state={GRADIENT: tree(new, cohort.size)})


def unit_pull(strength: float, reference: Mapping[str, Tensor]) -> Adjust:
    """Gradient of ``strength * ||params - reference||``, 0 at the `reference` ``[K, ...]``."""

    def adjust(step: Step, params: Mapping[str, Tensor], grads: dict[str, Tensor]) -> None:
        away = {name: params[name] - step.take(value) for name, value in reference.items() if name in grads}
        if not away:
            return
        norms = torch.stack([sum_rows(value.square()) for value in away.values()]).sum(0).sqrt()
        factors = torch.where(norms > 0, strength / norms, 0.0)
        for name, value in away.items():
            grads[name].add_(expand_rows(factors, value) * value)

    return adjust


@method("feddyn")
@dataclass(kw_only=True)
class FedDyn(PersonalizedStrategy):
    """Server that goes beyond the average, by what all clients together have moved."""

    update = FedDynUpdate
    common_options = ("alpha",)
    client_update: FedDynUpdate = field(default_factory=FedDynUpdate)
    weighting: Annotated[Literal["uniform"], Field(description="of replies in the average")] = "uniform"

    @classmethod
    def plain_mean(cls) -> bool:
        """No: h follows from the mean itself, in whose place another aggregate or a server's step would be."""
        return False

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """``h - alpha / N * sum_k (w_k - w)``, and the mean less ``h / alpha``."""
        if ARRAYS not in means:
            return arrays
        alpha, share, new = self.client_update.alpha, len(clients) / self.num_trainable, entries(means[ARRAYS])
        names = [name for name in select(self.work.module, "parameters") if name in new]
        before = entries(self.state[DRIFT]) if DRIFT in self.state else {n: torch.zeros_like(new[n]) for n in names}
        drift = {name: before[name] - alpha * share * (new[name] - arrays[name]) for name in names}
        self.state[DRIFT] = tree(drift)
        return tree({**new, **{name: new[name] - drift[name] / alpha for name in names}})
