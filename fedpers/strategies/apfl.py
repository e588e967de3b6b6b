"""APFL: an adaptive mixture of the common and an own network.

Y. Deng et al., Adaptive Personalized Federated Learning, arXiv:2003.13461 (Algorithm 1).

With the mixture m_k = alpha_k * v_k + (1 - alpha_k) * w_k, per batch:

    w_k     <- w_k - lr * grad f_k(w_k)
    v_k     <- v_k - lr * alpha_k * grad f_k(m_k)                       the gradient of f_k(m_k) by v_k
    alpha_k <- clip(alpha_k - lr * <v_k - w_k, grad f_k(m_k)>, 0, 1)    gradients at the values before the step

    w       <- mean_k w_k
    prediction of client k: alpha_k * v_k + (1 - alpha_k) * w

Shared: the whole network w. Personal: a second network v_k and alpha_k. The mixture's buffers are those of v_k.
w_k and v_k move by the optimizer of ``training`` (above: plain SGD), alpha_k by plain steps.

``variant: pfllib`` repeats a common implementation: v_k follows the gradient at v_k itself; alpha_k moves after both
steps along alpha_k * g_v + (1 - alpha_k) * g_w plus 0.02 * alpha_k; after training v_k is overwritten by the mixture
and predicts alone; replies are weighted by samples (``weighting: samples``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from fedpers.cohort import Cohort, Reply, Step, Tree, entries, mixed
from fedpers.cohort.tree import expand_rows
from fedpers.errors import check, one_of
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received

VARIANTS = ("paper", "pfllib")
Move = Callable[[dict[str, Tensor], dict[str, Tensor]], None]
"""Takes one step of w and of v along their gradients."""


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
        alpha = next(module.parameters()).detach().new_tensor(self.alpha)
        return TensorDict({"model": model.clone(), "alpha": alpha}, batch_size=[])

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Walk through the batches; each moves w, v and alpha once."""
        w = cohort.spread(received["arrays"])
        v = cohort.state["model"]
        alpha = cohort.state["alpha"].to(cohort.device)
        all_w, all_v = entries(w), entries(v)
        one_step = self._step if self.variant == "paper" else self._pfllib_step
        plan = cohort.plan()
        of_w, of_v = (cohort.optimizer(cohort.trainable(), plan) for _ in range(2))

        def move(at_w: dict[str, Tensor], at_v: dict[str, Tensor]) -> None:
            of_w.update(all_w, at_w)
            of_v.update(all_v, at_v)

        for step in cohort.steps(plan):
            rows_w = {name: step.view(value) for name, value in all_w.items()}
            rows_v = {name: step.view(value) for name, value in all_v.items()}
            cohort.count(step, one_step(cohort, step, rows_w, rows_v, step.view(alpha), move))
        cohort.finish(plan)
        if self.variant == "pfllib":
            v = mixed(alpha, v, w, cohort.names("parameters"))
        return cohort.reply(w, state={"model": v, "alpha": alpha})

    def _step(
        self, cohort: Cohort, step: Step, w: dict[str, Tensor], v: dict[str, Tensor], alpha: Tensor, move: Move
    ) -> Tensor:
        names = cohort.trainable()
        mixture = {**v, **{n: torch.lerp(w[n], v[n], expand_rows(alpha, v[n])) for n in names}}
        losses, at_mixture = cohort.gradients(step, mixture, self.loss, names)
        _, at_w = cohort.gradients(step, w, self.loss, names)
        slope = sum(((v[n] - w[n]) * g).flatten(1).sum(1) for n, g in at_mixture.items())
        move(at_w, {n: expand_rows(alpha, g) * g for n, g in at_mixture.items()})
        if self.adaptive:
            alpha.sub_(cohort.rate * slope).clamp_(0, 1)
        return losses

    def _pfllib_step(
        self, cohort: Cohort, step: Step, w: dict[str, Tensor], v: dict[str, Tensor], alpha: Tensor, move: Move
    ) -> Tensor:
        names = cohort.trainable()
        _, at_w = cohort.gradients(step, w, self.loss, names)
        losses, at_v = cohort.gradients(step, v, self.loss, names)
        move(at_w, at_v)
        slope = 0.02 * alpha
        for name in at_v:
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
        alpha = cohort.state["alpha"].to(cohort.device)
        return mixed(alpha, own, cohort.spread(received["arrays"]), cohort.names("parameters"))


@dataclass(kw_only=True)
class APFL(PersonalizedStrategy):
    """Uniform average of the common networks."""

    update = APFLUpdate
    weighting: str = "uniform"
