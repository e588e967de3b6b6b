"""pFedMe: personal networks on a Moreau envelope.

C. T. Dinh et al., Personalized Federated Learning with Moreau Envelopes,
NeurIPS 2020, arXiv:2006.08848 (Algorithm 1).

For each batch of a client:

    theta <- K steps of  theta - personal_lr * (grad f_k(theta) + lam * (theta - w_k))      the client's network
    w_k   <- w_k - lr * lam * (w_k - theta)

    w     <- (1 - beta) * w + beta * mean_k w_k

Shared: the whole network w. Personal: the network theta, which predicts. theta starts at the received network in every
round and continues from batch to batch. Buffers follow theta, which sees the data, and are averaged. w_k moves by the
optimizer of ``training`` on lam * (w_k - theta) (above: plain SGD), theta by plain steps.

``variant: pfllib`` repeats a common implementation: a decay of 0.001 on theta; theta of a client's first training
starts at the initial network; prediction with the received network, or the initial one before a client's first
training. It weights by samples (``weighting: samples``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from fedpers.cohort import Cohort, Reply, Tree, entries, tree
from fedpers.cohort.tree import expand_rows
from fedpers.records import ARRAYS
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, Weighting, method


@dataclass(kw_only=True)
class PFedMeUpdate(LocalUpdate):
    """Alternate between theta and w on every batch."""

    lam: Annotated[float, Field(gt=0, description="strength of the tie; lr * lam should be below 1")] = 15.0
    inner_steps: Annotated[int, Field(ge=1, description="steps on theta for each batch, K in the paper")] = 5
    personal_lr: Annotated[
        float | None, Field(gt=0, description="rate of theta, to which lr_decay applies; null: training.lr")
    ] = None
    variant: Annotated[Literal["paper", "pfllib"], Field(description="see the module")] = "paper"

    def initial_state(self, template: Tree, module: nn.Module) -> Tree:
        """Theta is the initial network; with state of its own, whether a client has trained is remembered."""
        return super().initial_state(template, module).set("theta", template.clone())

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Walk through the batches; each moves theta several times and w once."""
        w = cohort.assemble(received["arrays"])
        theta = self._pfllib_theta(cohort, received) if self.variant == "pfllib" else w.clone()
        decay = 0.001 if self.variant == "pfllib" else 0.0
        inner_rate = cohort.rate if self.personal_lr is None else self.personal_lr * cohort.rate / cohort.training.lr
        names = cohort.trainable()
        walk = cohort.walk(theta, w)
        optimizer = walk.optimizer(names)
        for step, (theta_rows, w_rows) in walk:
            for _ in range(self.inner_steps):
                losses, grads = cohort.gradients(step, theta_rows, self.loss, names)
                for name, grad in grads.items():
                    grad.add_(theta_rows[name] - w_rows[name], alpha=self.lam).add_(theta_rows[name], alpha=decay)
                    theta_rows[name].sub_(grad, alpha=inner_rate)
            optimizer.update(w_rows, {name: self.lam * (w_rows[name] - theta_rows[name]) for name in names})
            cohort.count_loss(step, losses)
        w.update(theta.select(*cohort.names("buffers")))
        return cohort.reply(w, state={"theta": theta})

    def personalize(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Tree:
        """Theta; a client that has not trained yet predicts with the received network."""
        if self.variant == "pfllib":
            return self._pfllib_theta(cohort, received)
        # assemble takes `personal` only of clients that have trained
        return cohort.assemble(received["arrays"], personal=cohort.state["theta"])

    def _pfllib_theta(self, cohort: Cohort, received: Received) -> Tree:
        """The received network of a client that has trained, else the initial one."""
        theta, sent = entries(cohort.state["theta"]), cohort.assemble(received["arrays"])
        return tree({n: torch.where(expand_rows(cohort.trained, v), sent[n], v) for n, v in theta.items()}, cohort.size)


@method("pfedme")
@dataclass(kw_only=True)
class PFedMe(PersonalizedStrategy):
    """Server that moves towards the average."""

    update = PFedMeUpdate
    weighting: Weighting = "uniform"
    beta: Annotated[
        float,
        Field(ge=0, description="step of the server; 1: the average; 0, in some codes the default, never moves it"),
    ] = 1.0

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """``(1 - beta) * old + beta * mean``."""
        if ARRAYS not in means:
            return arrays
        return tree(
            {
                name: torch.lerp(arrays[name], mean, self.beta) if mean.is_floating_point() else mean
                for name, mean in entries(means[ARRAYS]).items()
            }
        )
