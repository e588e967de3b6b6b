"""Element-wise optimizers over a stack: each client moves exactly as with an optimizer of its own.

``torch.optim`` has one rate and one step count for a whole tensor; here both may differ by client, and the
clients that still train are a prefix of the stack.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedpers.cohort.tree import expand_rows, select, sum_rows
from fedpers.settings.training import Training


class Optimizer:
    """SGD with momentum, Adam or AdamW over stacked parameters; the update rules are those of ``torch.optim``.

    Parameters
    ----------
    training : Training
        Optimizer, rates, momentum, decay, proximal pull, clipping and schedule.
    module : nn.Module
        The network, to resolve ``training.groups``.
    names : sequence of str
        Parameters it updates.
    client_steps : Tensor ``[K]``
        Steps each client will take, for schedules.
    scale : float or Tensor ``[K]``
        Factor on all rates, for one or for each client.
    """

    def __init__(
        self,
        training: Training,
        module: nn.Module,
        names: Sequence[str],
        client_steps: Tensor,
        scale: float | Tensor = 1.0,
    ) -> None:
        self.training = training
        self.lr = dict.fromkeys(names, training.lr)
        self.decay = dict.fromkeys(names, training.weight_decay)
        for group, options in (training.groups or {}).items():
            for name in select(module, group):
                if name in self.lr:
                    self.lr[name] = options.get("lr", self.lr[name])
                    self.decay[name] = options.get("weight_decay", self.decay[name])
        self.client_steps = client_steps
        self.scale = scale
        self.taken = 0  # all clients start together, so this is also the step count of each that still trains
        self.updates = dict.fromkeys(names, 0)  # of each parameter, which has no gradient where a loss does not use it
        self.moments: dict[str, list[Tensor]] = {}
        self.start: dict[str, Tensor] = {}

    def _factor(self, active: int, device: torch.device) -> float | Tensor:
        """Factor on the rates at this step: a number, or ``[active]`` when clients differ."""
        scale = self.scale if isinstance(self.scale, float | int) else self.scale[:active].to(device)
        if self.training.schedule == "constant":
            return scale
        share = self.taken / self.client_steps[:active].to(torch.float64)
        curve = 1 - share if self.training.schedule == "linear" else 0.5 * (1 + torch.cos(math.pi * share))
        return curve.to(device) * scale

    @torch.no_grad()
    def update(
        self, params: Mapping[str, Tensor], grads: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None = None
    ) -> None:
        """Take one step in place.

        Parameters
        ----------
        params : mapping of name to Tensor ``[K, ...]``
            The stack; its first ``a`` rows are moved.
        grads : mapping of name to Tensor ``[a, ...]``
            Gradients of the clients that still train. May be overwritten.
        mask : mapping of name to Tensor ``[a, ...]`` or ``[...]``, optional
            1 where an entry may move and 0 where it stays as it is; clipping and momentum see the whole gradient.
            Names it lacks move freely.
        """
        if not grads:
            return
        training = self.training
        first = next(iter(grads.values()))
        active = first.shape[0]
        if training.proximal:
            grads = {name: self._pulled(name, params[name], grad) for name, grad in grads.items()}
        if training.clip is not None:
            clip_rows(grads, training.clip)
        factor = self._factor(active, first.device)
        self.taken += 1
        for name, grad in grads.items():
            value = params[name][:active]
            decay = self.decay[name]
            if decay and training.optimizer != "adamw":
                grad = grad.add(value, alpha=decay)
            rate = self.lr[name] * factor
            if isinstance(rate, Tensor):
                rate = expand_rows(rate.to(value.dtype), value)
            entry_mask = None if mask is None else mask.get(name)
            if decay and training.optimizer == "adamw":
                value.mul_(1 - rate * decay if entry_mask is None else 1 - rate * decay * entry_mask)
            move = (
                self._sgd(name, params[name], grad)
                if training.optimizer == "sgd"
                else self._adam(name, params[name], grad)
            )
            if entry_mask is not None:
                move = move * entry_mask
            if isinstance(rate, Tensor):
                value.sub_(rate * move)
            else:
                value.sub_(move, alpha=rate)

    def _pulled(self, name: str, stack: Tensor, grad: Tensor) -> Tensor:
        """Gradient of the loss and ``proximal / 2 * ||value - start||^2``."""
        if name not in self.start:  # at the first step, which all clients take
            self.start[name] = stack.clone()
        active = len(grad)
        return grad.add(stack[:active] - self.start[name][:active], alpha=self.training.proximal)

    def _sgd(self, name: str, stack: Tensor, grad: Tensor) -> Tensor:
        momentum = self.training.momentum
        if not momentum:
            return grad
        if name not in self.moments:
            self.moments[name] = [torch.zeros_like(stack)]
        buffer = self.moments[name][0][: len(grad)]
        buffer.mul_(momentum).add_(grad)
        return grad.add(buffer, alpha=momentum) if self.training.nesterov else buffer

    def _adam(self, name: str, stack: Tensor, grad: Tensor) -> Tensor:
        first, second = self.training.betas
        if name not in self.moments:
            self.moments[name] = [torch.zeros_like(stack), torch.zeros_like(stack)]
        mean, square = (value[: len(grad)] for value in self.moments[name])
        self.updates[name] += 1
        mean.lerp_(grad, 1 - first)
        square.mul_(second).addcmul_(grad, grad, value=1 - second)
        denominator = (square.sqrt() / math.sqrt(1 - second ** self.updates[name])).add_(self.training.eps)
        return (mean / denominator).div_(1 - first ** self.updates[name])


def clip_rows(grads: Mapping[str, Tensor], limit: float) -> None:
    """Scale each client's gradient, in place, to a Euclidean norm of at most `limit` over all its entries.

    As ``torch.nn.utils.clip_grad_norm_``: the factor is ``limit / (norm + 1e-6)``, at most 1.
    """
    squares = torch.stack([sum_rows(grad.square()) for grad in grads.values()]).sum(0)
    factor = (limit / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    for grad in grads.values():
        grad.mul_(expand_rows(factor, grad))
