"""APFL: an adaptive mixture of the common and an own network.

Y. Deng et al., Adaptive Personalized Federated Learning, arXiv:2003.13461 (Algorithm 1).

With the mixture m_k = alpha_k * v_k + (1 - alpha_k) * w_k, per batch:

    w_k     <- w_k - lr * grad f_k(w_k)
    v_k     <- v_k - lr * alpha_k * grad f_k(m_k)                       the gradient of f_k(m_k) by v_k
    alpha_k <- clip(alpha_k - lr * <v_k - w_k, grad f_k(m_k)>, 0, 1)    gradients at the values before the step

    w       <- mean_k w_k
    prediction of client k: alpha_k * v_k + (1 - alpha_k) * w

Shared: the whole network w. Personal: a second network v_k, and its share alpha_k of the mixture. The mixture's buffers
are those of v_k. w_k and v_k move by the optimizer of ``training`` (above: plain SGD), alpha_k by plain steps.

``variant: pfllib`` repeats a common implementation: v_k follows the gradient at v_k itself; alpha_k moves after both
steps along alpha_k * g_v + (1 - alpha_k) * g_w plus 0.02 * alpha_k; after training v_k is overwritten by the mixture
and predicts alone; v_k is the initial network until the client trains, where else it is the w that the client is
sent; replies are weighted by samples (``weighting: samples``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedpers.cohort import Cohort, Reply, Step, Tree, entries, mixed, tree
from fedpers.cohort.tree import expand_rows, flat_rows
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, Weighting, method

Values = dict[str, Tensor]
Move = Callable[[Values, Values], None]
"""Takes one step of w and of v along their gradients."""


@dataclass(kw_only=True)
class APFLUpdate(LocalUpdate):
    """Train the common network, a personal one, and how much of each to use."""

    personal = "all"
    alpha: Annotated[float, Field(ge=0, le=1, description="initial share of the personal network")] = 0.5
    adaptive: Annotated[bool, Field(description="train alpha")] = True
    variant: Annotated[
        Literal["paper", "pfllib"],
        Field(
            description="paper: Algorithm 1; pfllib: as PFLlib computes it, which also has strategy.weighting=samples"
        ),
    ] = "paper"

    def initial_state(self, template: Tree, module: nn.Module) -> Tree:
        """v_k, the initial network, which the variant ``paper`` replaces by the received w, and alpha, a scalar."""
        alpha = next(module.parameters()).detach().new_tensor(self.alpha)
        return super().initial_state(template, module).set("alpha", alpha)

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Walk through the batches; each moves w, v and alpha once."""
        w, v = cohort.common(received["arrays"]), self._personal(cohort, received)
        alpha = cohort.state["alpha"].to(cohort.device)
        step_function = self._step if self.variant == "paper" else self._pfllib_step
        walk = cohort.walk(w, v, {"alpha": alpha})
        w_optimizer, v_optimizer = (walk.optimizer(cohort.trainable()) for _ in range(2))
        for step, (w_rows, v_rows, alpha_rows) in walk:

            def move(w_grads: Values, v_grads: Values, w: Values = w_rows, v: Values = v_rows) -> None:
                w_optimizer.update(w, w_grads)
                v_optimizer.update(v, v_grads)

            cohort.count_loss(step, step_function(cohort, step, w_rows, v_rows, alpha_rows["alpha"], move))
        if self.variant == "pfllib":
            v = mixed(alpha, v, w, cohort.names("parameters"))
        personal_values = v.select(*cohort.names(self.personal))
        return cohort.reply(w, state={"model": personal_values, "alpha": alpha})

    def _personal(self, cohort: Cohort, received: Received) -> Tree:
        """v_k before a training; parts that are not personal are those of w."""
        if self.variant == "paper":
            return cohort.assemble(received["arrays"])
        return tree({**entries(cohort.common(received["arrays"])), **entries(cohort.state["model"])}, cohort.size)

    def _step(
        self, cohort: Cohort, step: Step, w: dict[str, Tensor], v: dict[str, Tensor], alpha: Tensor, move: Move
    ) -> Tensor:
        """One batch: move the rows of w, v and alpha ``[a]`` in place; losses ``[a]`` of the mixture."""
        names = cohort.trainable()
        mixture = {**v, **{n: torch.lerp(w[n], v[n], expand_rows(alpha, v[n])) for n in names}}
        losses, mixture_grads = cohort.gradients(step, mixture, self.loss, names)
        _, w_grads = cohort.gradients(step, w, self.loss, names)
        alpha_grad = sum(flat_rows((v[n] - w[n]) * g).sum(1) for n, g in mixture_grads.items())
        move(w_grads, {n: expand_rows(alpha, g) * g for n, g in mixture_grads.items()})
        if self.adaptive:
            alpha.sub_(cohort.rate * alpha_grad).clamp_(0, 1)
        return losses

    def _pfllib_step(
        self, cohort: Cohort, step: Step, w: dict[str, Tensor], v: dict[str, Tensor], alpha: Tensor, move: Move
    ) -> Tensor:
        """One batch: move the rows of w, v and alpha ``[a]`` in place; losses ``[a]`` of v."""
        names = cohort.trainable()
        _, w_grads = cohort.gradients(step, w, self.loss, names)
        losses, v_grads = cohort.gradients(step, v, self.loss, names)
        move(w_grads, v_grads)
        alpha_grad = 0.02 * alpha
        for name in v_grads:
            mean_grad = torch.lerp(w_grads[name], v_grads[name], expand_rows(alpha, v_grads[name]))
            alpha_grad = alpha_grad + flat_rows((v[name] - w[name]) * mean_grad).sum(1)
        if self.adaptive:
            alpha.sub_(cohort.rate * alpha_grad).clamp_(0, 1)
        return losses

    def personalize(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Tree:
        """The mixture with the received network; in ``pfllib`` v_k alone."""
        personal = self._personal(cohort, received)
        if self.variant == "pfllib":
            return personal
        alpha = cohort.state["alpha"].to(cohort.device)
        return mixed(alpha, personal, cohort.common(received["arrays"]), cohort.names("parameters"))


@method("apfl")
@dataclass(kw_only=True)
class APFL(PersonalizedStrategy):
    """Uniform average of the common networks."""

    update = APFLUpdate
    weighting: Weighting = "uniform"
