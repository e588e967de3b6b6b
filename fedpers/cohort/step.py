"""What a loss and a step of training see, and ways to change gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpers.cohort.modules import announce, call


class Network:
    """The network with one client's tensors, as a loss sees it: call it on inputs, or one of its parts.

    Parameters
    ----------
    module : nn.Module
        A prepared network (:func:`fedpers.cohort.modules.prepare`) or a part of one.
    tensors : mapping of name to Tensor
        Parameters and buffers.
    weight : Tensor ``[B]``, optional
        0 where the batch it will see is padded, for batch normalization.
    key : Tensor, optional
        Number of this client and step, for dropout.
    """

    def __init__(
        self, module: nn.Module, tensors: Mapping[str, Tensor], weight: Tensor | None = None, key: Tensor | None = None
    ) -> None:
        self.module = module
        self.tensors = tensors
        self.weight = weight
        self.key = key

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the whole network to ``[B, ...]``."""
        announce(self.module, self.weight, self.key)
        return call(self.module, self.tensors, x)

    def part(self, name: str) -> Network:
        """One submodule by its dotted name, e.g. ``network.part("body")(x)`` for features."""
        prefix = name + "."
        inside = {n[len(prefix) :]: t for n, t in self.tensors.items() if n.startswith(prefix)}
        return Network(self.module.get_submodule(name), inside, self.weight, self.key)

    def replace(self, tensors: Mapping[str, Tensor]) -> Network:
        """Return the same network with some tensors exchanged."""
        return Network(self.module, {**self.tensors, **tensors}, self.weight, self.key)

    def seeing(self, batch: Batch) -> Network:
        """Return the same network for another batch than the one the loss was given, e.g. a part of it."""
        return Network(self.module, self.tensors, batch.weight, self.key)


@dataclass(frozen=True)
class Batch:
    """One client's batch, as a loss sees it.

    Attributes
    ----------
    x : Tensor ``[B, ...]``
    y : Tensor ``[B]``
    weight : Tensor ``[B]`` or None
        1 for a sample, 0 for padding; None when nothing is padded.
    """

    x: Tensor
    y: Tensor
    weight: Tensor | None = None

    def mean(self, values: Tensor) -> Tensor:
        """Mean of per-sample `values` (``[B]``) over the samples, padding left out."""
        if self.weight is None:
            return values.mean()
        return (values * self.weight).sum() / self.weight.sum()


def sample_losses(outputs: Tensor, y: Tensor) -> Tensor:
    """Loss of each sample ``[B]``.

    Parameters
    ----------
    outputs : Tensor ``[B, C]``
        Class scores, or with ``C = 1`` the logit of an event.
    y : Tensor ``[B]``
        Class ids (int64): the cross-entropy. Or targets in [0, 1] (floats): the binary cross-entropy.
    """
    if y.is_floating_point():
        return F.binary_cross_entropy_with_logits(outputs.squeeze(1), y.to(outputs.dtype), reduction="none")
    return F.cross_entropy(outputs, y, reduction="none")


Loss = Callable[[Network, Batch], Tensor]
"""Loss of one client on one batch, a scalar; reduce over samples with :meth:`Batch.mean`."""


@dataclass(frozen=True)
class Step:
    """One step of a cohort's training: the batches of the ``a`` clients that still train.

    Attributes
    ----------
    active : int
        Number of clients that train, a.
    x, y : Tensor ``[a, B, ...]``, ``[a, B]``
    weight : Tensor ``[a, B]`` or None
        0 where a batch is padded.
    count : Tensor ``[a]``
        Samples in each batch, on the data's device.
    key : Tensor ``[a]`` or None
        A number per client and step, from which dropout draws.
    rows : Tensor ``[a]`` or None
        Position in the cohort of each; None when they are its first ``a`` clients.
    """

    active: int
    x: Tensor
    y: Tensor
    weight: Tensor | None
    count: Tensor
    key: Tensor | None
    rows: Tensor | None

    def view(self, stacked: Tensor) -> Tensor:
        """As :meth:`take`, to be changed in place.

        Raises
        ------
        RuntimeError
            If clients have numbers of steps that do not fall with their position: then there is no view.
        """
        if self.rows is not None:
            raise RuntimeError("rows of a reordered plan cannot be changed in place; use Cohort.fit")
        return stacked[: self.active]

    def take(self, stacked: Tensor) -> Tensor:
        """Rows of a tensor ``[K, ...]`` that belong to this step's clients; a view of them if `rows` is None."""
        return stacked[: self.active] if self.rows is None else stacked[self.rows.to(stacked.device)]


Adjust = Callable[[Step, Mapping[str, Tensor], dict[str, Tensor]], None]
"""Changes gradients ``[a, ...]`` in place, given the step and the current rows of the parameters."""

Stop = Callable[[Tensor], Tensor]
"""Given mean losses of all passes so far ``[passes, k]``, which of the k clients are done: bool ``[k]``."""


def proximal(mu: float, reference: Mapping[str, Tensor]) -> Adjust:
    """Gradient of ``mu/2 * ||params - reference||^2``; `reference` is stacked ``[K, ...]``, names it lacks are free."""

    def adjust(step: Step, params: Mapping[str, Tensor], grads: dict[str, Tensor]) -> None:
        for name, grad in grads.items():
            if name in reference:
                grad.add_(params[name] - step.take(reference[name]), alpha=mu)

    return adjust


def shifted(shift: Mapping[str, Tensor]) -> Adjust:
    """Add a fixed direction ``[K, ...]`` to each client's gradient."""

    def adjust(step: Step, params: Mapping[str, Tensor], grads: dict[str, Tensor]) -> None:
        for name, grad in grads.items():
            if name in shift:
                grad.add_(step.take(shift[name]))

    return adjust


def small_change(tolerance: float) -> Stop:
    """Stop a client when the mean loss of a pass differs from that of the pass before by less than `tolerance`."""

    def stop(losses: Tensor) -> Tensor:
        if len(losses) < 2:
            return torch.zeros(losses.shape[1], dtype=torch.bool)
        return (losses[-1] - losses[-2]).abs() < tolerance

    return stop
