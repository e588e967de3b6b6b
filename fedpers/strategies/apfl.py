"""APFL: an adaptive mixture of the common and an own network.

Y. Deng et al., Adaptive Personalized Federated Learning, arXiv:2003.13461 (Algorithm 1).

With the mixture m_k = alpha_k * v_k + (1 - alpha_k) * w_k, per batch:

    w_k     <- w_k - lr * grad f_k(w_k)
    v_k     <- v_k - lr * alpha_k * grad f_k(m_k)                       the gradient of f_k(m_k) by v_k
    alpha_k <- clip(alpha_k - lr * <v_k - w_k, grad f_k(m_k)>, 0, 1)    gradients at the values before the step

    w       <- mean_k w_k
    prediction of client k: alpha_k * v_k + (1 - alpha_k) * w

Shared: the whole network w. Personal: a second network v_k and alpha_k. The mixture's buffers are those of v_k.

``variant: pfllib`` repeats a common implementation: v_k follows the gradient at v_k itself; alpha_k moves after both
steps along alpha_k * g_v + (1 - alpha_k) * g_w plus 0.02 * alpha_k; after training v_k is overwritten by the mixture
and predicts alone; replies are weighted by samples (``weighting: samples``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from fedpers.cohort import Cohort, Reply, Step, Tree, mixed
from fedpers.cohort.tree import expand_rows
from fedpers.errors import check, one_of
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received

VARIANTS = ("paper", "pfllib")


@dataclass(kw_only=True)
class APFLUpdate(LocalUpdate):
    """Train the common network, an own one, and how much of each to use.

    Parameters
    ----------
    alpha : float
        Initial share of the own network, in [0, 1].
    adaptive : bool
        Whether alpha is trained.
    variant : {"paper", "pfllib"}
    """

    alpha: float = 0.5
    adaptive: bool = True
    variant: str = "paper"

    def __post_init__(self) -> None:
        check(0 <= self.alpha <= 1, "strategy.alpha", self.alpha, "a number >= 0 and <= 1")
        check(self.variant in VARIANTS, "strategy.variant", self.variant, one_of(VARIANTS, self.variant))

    def initial_state(self, model: Tree, module: nn.Module) -> Tree:
        """v_k is the initial network."""
        first = model[next(iter(module.state_dict()))]
        return TensorDict({"model": model.clone(), "alpha": first.new_tensor(self.alpha)}, batch_size=[])

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Walk through the batches; each moves w, v and alpha once."""
        w = cohort.spread(received["arrays"])
        v = cohort.state["model"]
        alpha = cohort.state["alpha"].to(cohort.device)
        names = cohort.names("all")
        move = self._step if self.variant == "paper" else self._pfllib_step
        plan = cohort.plan()
        for step in cohort.steps(plan):
            rows_w = {name: step.take(w[name]) for name in names}
            rows_v = {name: step.take(v[name]) for name in names}
            cohort.count(step, move(cohort, step, rows_w, rows_v, step.take(alpha)))
        cohort.finish(plan)
        if self.variant == "pfllib":
            v = mixed(alpha, v, w)
        return cohort.reply(w, state={"model": v, "alpha": alpha})

    def _step(self, cohort: Cohort, step: Step, w: dict[str, Tensor], v: dict[str, Tensor], alpha: Tensor) -> Tensor:
        names = cohort.names("parameters")
        mixture = {**v, **{n: torch.lerp(w[n], v[n], expand_rows(alpha, v[n])) for n in names}}
        losses, at_mixture = cohort.gradients(step, mixture, self.loss, names)
        _, at_w = cohort.gradients(step, w, self.loss, names)
        slope = sum(((v[n] - w[n]) * g).flatten(1).sum(1) for n, g in at_mixture.items())
        for name, grad in at_w.items():
            w[name].sub_(grad, alpha=cohort.rate)
        for name, grad in at_mixture.items():
            v[name].sub_(expand_rows(alpha, grad) * grad, alpha=cohort.rate)
        if self.adaptive:
            alpha.sub_(cohort.rate * slope).clamp_(0, 1)
        return losses

    def _pfllib_step(
        self, cohort: Cohort, step: Step, w: dict[str, Tensor], v: dict[str, Tensor], alpha: Tensor
    ) -> Tensor:
        names = cohort.names("parameters")
        _, at_w = cohort.gradients(step, w, self.loss, names)
        losses, at_v = cohort.gradients(step, v, self.loss, names)
        for name in names:
            w[name].sub_(at_w[name], alpha=cohort.rate)
            v[name].sub_(at_v[name], alpha=cohort.rate)
        slope = 0.02 * alpha
        for name in names:
            mean_grad = torch.lerp(at_w[name], at_v[name], expand_rows(alpha, at_v[name]))
            slope = slope + ((v[name] - w[name]) * mean_grad).flatten(1).sum(1)
        if self.adaptive:
            alpha.sub_(cohort.rate * slope).clamp_(0, 1)
        return losses

    def personalize(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Tree:
        """Mixture of the own and the received network."""
        own: Tree = cohort.state["model"]
        if self.variant == "pfllib":
            return own
        return mixed(cohort.state["alpha"].to(cohort.device), own, cohort.spread(received["arrays"]))


@dataclass(kw_only=True)
class APFL(PersonalizedStrategy):
    """Uniform average of the common networks."""

    update = APFLUpdate
    weighting: str = "uniform"
