"""Losses of clients and their gradients: of one client, or mapped over many."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from fedpers.cohort.step import Step
from fedpers.cohort.tree import map_tensors

# torch.func says it of layers that it maps over clients one after the other; how fast that is, is measured before a run
warnings.filterwarnings(
    "ignore", message="There is a performance drop because we have not yet implemented the batching"
)

Evaluate = Callable[[Mapping[str, Tensor], Tensor, Tensor, Mapping[str, Any]], Tensor]
"""Loss of one client: (its tensors, x ``[B, ...]``, y ``[B, ...]``, what else the loss sees) -> scalar."""


def gradients_of_one(
    evaluate: Evaluate, step: Step, params: Mapping[str, Tensor], names: Sequence[str], extra: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradient of a step with a single client, computed without vmap as in ordinary training.

    Parameters
    ----------
    evaluate : callable
        See :data:`Evaluate`.
    step : Step
        With one active client.
    params : mapping of name to Tensor ``[1, ...]``
        All parameters and buffers.
    names : sequence of str
        Parameters to differentiate by.
    extra : mapping
        What else the loss sees, nested, each tensor ``[1, ...]``.

    Returns
    -------
    Tensor ``[1]``, dict of name to Tensor ``[1, ...]``
        Without parameters that the loss does not depend on; gradients lie in memory as their parameters do.
    """
    leaves = {name: params[name][0].detach().requires_grad_() for name in names}
    tensors = {name: leaves.get(name, value[0]) for name, value in params.items()}
    loss = evaluate(tensors, step.x[0], step.y[0], map_tensors(extra, lambda value: value[0]))
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    out = {}
    for name, grad in zip(names, grads, strict=True):
        if grad is not None:
            alike = grad.stride() == leaves[name].stride()
            out[name] = grad.unsqueeze(0) if alike else torch.empty_like(params[name]).copy_(grad)
    return loss.detach().unsqueeze(0), out


def gradients_of_many(
    evaluate: Evaluate, step: Step, params: Mapping[str, Tensor], names: Sequence[str], extra: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses ``[a]`` and gradients ``[a, ...]`` of a step's clients, the loss mapped over them.

    Parameters and results are those of :func:`gradients_of_one`, with ``a`` rows.
    """
    leaves = {name: params[name].detach().requires_grad_() for name in names}
    others = {name: value for name, value in params.items() if name not in leaves}

    def one(
        leaves: dict[str, Tensor], others: dict[str, Tensor], x: Tensor, y: Tensor, extra: Mapping[str, Any]
    ) -> Tensor:
        return evaluate({**leaves, **others}, x, y, extra)

    losses = vmap(one)(leaves, others, step.x, step.y, extra)
    grads = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
    return losses.detach(), {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}
