"""Per-FedAvg: a network that adapts well in one step.

A. Fallah et al., Personalized Federated Learning with Theoretical Guarantees: A Model-Agnostic
Meta-Learning Approach, NeurIPS 2020, arXiv:2002.07948 (Algorithm 1).

On two batches D, D' at a time, with F(w) = f_k(w - inner_lr * grad f_k(w; D); D'):

    w_k <- w_k - lr * grad F(w_k)
    w   <- mean_k w_k
    prediction of client k: w - inner_lr * grad f_k(w; a batch)

Shared: the whole network, buffers averaged. Personal: nothing; a client adapts before it predicts, on a batch that is
the same in every round. It is drawn from (seed, "adapt", client).

``hessian: true`` takes the exact gradient of F (the paper's algorithm, which draws a third batch for the second-order
term; here that term sees D). ``hessian: false`` is the paper's first-order variant, Per-FedAvg (FO). Common
implementations take that variant with ``inner_lr = lr``, weight replies by samples, and pass twice over the data in an
epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from fedpers.cohort import Batch, Cohort, Network, Reply, Training, Tree
from fedpers.cohort.plan import smallest_batch
from fedpers.errors import check
from fedpers.randomness import generator
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, Weighting, method


@dataclass(kw_only=True)
class PerFedAvgUpdate(LocalUpdate):
    """Train for what one step of adaptation will make of the network."""

    inner_lr: Annotated[
        float | None,
        Field(gt=0, description="rate of the adaptation, alpha in the paper, in all rounds; null: training.lr"),
    ] = None
    hessian: Annotated[bool, Field(description="let the gradient go through the adaptation")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.training.batch_size
        check(size > 0, "training.batch_size", size, "a whole number >= 1 for strategy=perfedavg")

    @property
    def _rate(self) -> float:
        return self.training.lr if self.inner_lr is None else self.inner_lr

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Pass over the data in pairs of batches."""
        params = cohort.assemble(received["arrays"])
        cohort.fit(params, self.adapted_loss, batch_size=2 * self.training.batch_size)
        cohort.gradients_taken *= 2  # each step takes an inner and an outer one
        return cohort.reply(params)

    def smallest_batch(self, size: int) -> int:
        """Samples in the smaller half of the smallest pair of batches."""
        return max(1, smallest_batch(size, 2 * self.training.batch_size, self.training.drop_last) // 2)

    def adapted_loss(self, network: Network, batch: Batch) -> Tensor:
        """Loss on the second half of the batch after a step on the first."""
        if self.hessian and batch.weight is None:
            # torch 2.13's own batch normalization, mapped over clients, has a wrong second derivative; for a batch with
            # weights that of fedpers.cohort.modules is used
            weight = torch.ones(len(batch.y), device=batch.y.device, dtype=next(iter(network.tensors.values())).dtype)
            batch = replace(batch, weight=weight)
        first, second = _halves(batch)
        trainable = {name for name, parameter in network.module.named_parameters() if parameter.requires_grad}
        start = {name: value for name, value in network.tensors.items() if name in trainable}
        buffers = {name: value for name, value in network.tensors.items() if name not in trainable}

        def inner(tensors: dict[str, Tensor]) -> Tensor:
            copies = {name: value.clone() for name, value in buffers.items()}  # adaptation leaves the statistics alone
            return self.loss(network.replace({**tensors, **copies}).seeing(first), first)

        grads = torch.func.grad(inner)(start)
        rate = self._rate
        adapted = {n: v - rate * (grads[n] if self.hessian else grads[n].detach()) for n, v in start.items()}
        return self.loss(network.replace(adapted).seeing(second), second)

    def personalize(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Tree:
        """Take one plain step on a batch that is drawn once for each client, or its first with ``shuffle: false``.

        Its rate is the same for all parameters. BatchNorm statistics move with it, as they do not in the adaptation
        that training looks through.
        """
        params = cohort.assemble(received["arrays"])
        samples = None
        if self.training.shuffle:
            samples = [generator(cohort.seed, "adapt", c).permutation(cohort.samples(c)) for c in cohort.clients]
        batch_size, drop_last = self.training.batch_size, self.training.drop_last
        plain_step = Training(lr=self._rate, batch_size=batch_size, drop_last=drop_last, shuffle=False)
        cohort.fit(params, self.loss, steps=1, samples=samples, training=plain_step)
        return params


@method("perfedavg")
@dataclass(kw_only=True)
class PerFedAvg(PersonalizedStrategy):
    """Uniform average of whole networks."""

    update = PerFedAvgUpdate
    weighting: Weighting = "uniform"


def _halves(batch: Batch) -> tuple[Batch, Batch]:
    """First and second half of a batch, padding, which comes last, left out; a single sample is both."""
    width = len(batch.y)
    if batch.weight is None:
        half = width // 2
        if not half:
            return batch, batch
        return replace(batch, x=batch.x[:half], y=batch.y[:half]), replace(batch, x=batch.x[half:], y=batch.y[half:])
    count = batch.weight.sum().to(torch.int64)
    half_count = torch.clamp(count // 2, min=1)
    start = torch.where(count > 1, half_count, 0)
    before = torch.arange(max(1, width // 2), device=batch.y.device)
    after = start + torch.arange(width - width // 2, device=batch.y.device)
    inside = after.clamp(max=width - 1)
    kind = batch.weight.dtype
    first, second = (before < half_count).to(kind), (after < count).to(kind)
    return (
        replace(batch, x=batch.x[: len(before)], y=batch.y[: len(before)], weight=first),
        replace(batch, x=batch.x[inside], y=batch.y[inside], weight=second),
    )
