"""What a loss and a step of training see, and ways to change gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpers.cohort.modules import announce, call, part_tensors
from fedpers.tasks import CLASSIFICATION, Task

Given = Mapping[str, Any]
"""What a loss may see beside network and batch: tensors, or mappings of name to tensor, by name."""


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
    given : mapping, optional
        This client's part of what the method passed along (``Cohort.fit(given=...)``, :class:`View`).
    frozen : bool
        Whether its layers always work as in an evaluation, see :meth:`as_frozen`.
    """

    def __init__(
        self,
        module: nn.Module,
        tensors: Mapping[str, Tensor],
        weight: Tensor | None = None,
        key: Tensor | None = None,
        given: Given | None = None,
        *,
        frozen: bool = False,
    ) -> None:
        self.module = module
        self.tensors = tensors
        self.weight = weight
        self.key = key
        self.given: Given = {} if given is None else given
        self.frozen = frozen

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the whole network to ``[B, ...]``."""
        announce(self.module, self.weight, self.key)
        if not (self.frozen and self.module.training):
            return call(self.module, self.tensors, x)
        self.module.eval()
        try:
            return call(self.module, self.tensors, x)
        finally:
            self.module.train()

    def part(self, name: str) -> Network:
        """One submodule by its dotted name, e.g. ``network.part("body")(x)`` for features."""
        return self._with(self.module.get_submodule(name), part_tensors(self.module, name, self.tensors))

    def replace(self, tensors: Mapping[str, Tensor]) -> Network:
        """Return the same network with some tensors exchanged."""
        return self._with(self.module, {**self.tensors, **tensors})

    def seeing(self, batch: Batch) -> Network:
        """Return the same network for another batch than the one the loss was given, e.g. a part of it."""
        return Network(self.module, self.tensors, batch.weight, self.key, self.given, frozen=self.frozen)

    def as_frozen(self) -> Network:
        """Return the same network with layers as in an evaluation, also in a training: for teachers and anchors.

        No dropout, batch normalization by the statistics as they are, and no statistics are changed.
        """
        return Network(self.module, self.tensors, self.weight, self.key, self.given, frozen=True)

    def _with(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> Network:
        return Network(module, tensors, self.weight, self.key, self.given, frozen=self.frozen)


@dataclass(frozen=True)
class Batch:
    """One client's batch, as a loss sees it.

    Attributes
    ----------
    x : Tensor ``[B, ...]``
    y : Tensor ``[B, ...]``
    weight : Tensor ``[B]`` or None
        1 for a sample, 0 for padding; None when nothing is padded.
    given : mapping
        What the method passed to ``Cohort.fit(given=...)``, of this client: its row of each tensor.
    task : Task
        What is learned, see :mod:`fedpers.tasks`.
    offsets : Tensor ``[C]`` or None
        Added to the scores of classes in :meth:`losses`, see ``training.logit_adjustment``.
    """

    x: Tensor
    y: Tensor
    weight: Tensor | None = None
    given: Given = field(default_factory=dict)
    task: Task = CLASSIFICATION
    offsets: Tensor | None = None

    def losses(self, outputs: Tensor) -> Tensor:
        """Loss ``[B]`` of each sample by the data's task, for the network's `outputs` ``[B, ...]``."""
        if self.offsets is None:
            return self.task.losses(outputs, self.y)
        more = outputs.shape[-1] - len(self.offsets)  # outputs that stand for no class
        return self.task.losses(outputs + F.pad(self.offsets, (0, more), value=-math.inf), self.y)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of per-sample `values` (``[B]``) over the samples, padding left out."""
        if self.weight is None:
            return values.mean()
        return (values * self.weight).sum() / self.weight.sum()


Loss = Callable[[Network, Batch], Tensor]
"""Loss of one client on one batch, a scalar; reduce over samples with :meth:`Batch.mean`."""


@dataclass(frozen=True)
class Step:
    """One step of a cohort's training: the batches of the ``a`` clients that still train.

    Attributes
    ----------
    active : int
        Number of clients that train, a.
    index : Tensor ``[a, B]``
        Positions of the samples in the data, int64; padded places repeat a batch's first sample.
    x, y : Tensor ``[a, B, ...]``, ``[a, B, ...]``
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
    index: Tensor
    x: Tensor
    y: Tensor
    weight: Tensor | None
    count: Tensor
    key: Tensor | None
    rows: Tensor | None

    def places(self, device: torch.device | str) -> slice | Tensor:
        """Where this step's clients stand in a tensor ``[K, ...]`` on a device."""
        return slice(self.active) if self.rows is None else self.rows.to(device)

    def take(self, stacked: Tensor) -> Tensor:
        """Rows of a tensor ``[K, ...]`` that belong to this step's clients; a view of them if `rows` is None."""
        return stacked[self.places(stacked.device)]

    def aligned(self, name: str, value: Tensor, rows: Tensor) -> Tensor:
        """Rows of `value` that belong to this step's `rows` ``[a, ...]`` of an entry of the network.

        Parameters
        ----------
        name : str
            Of the entry, for errors.
        value : Tensor ``[K, ...]`` or ``[...]``
            Of all clients of the cohort, or of one network, the same for all.
        rows : Tensor ``[a, ...]``

        Raises
        ------
        ValueError
            If `value` has another shape.
        """
        if value.shape == rows.shape[1:]:
            return value
        fits = value.shape[1:] == rows.shape[1:] and len(value) >= len(rows)
        if not fits or (self.rows is not None and len(value) <= int(self.rows.max())):
            one = ", ".join(map(str, rows.shape[1:]))
            shape = list(value.shape)
            raise ValueError(f"the value for '{name}' has shape {shape}: expected [K, {one}] or [{one}]")
        return self.take(value)


Adjust = Callable[[Step, Mapping[str, Tensor], dict[str, Tensor]], None]
"""Changes gradients ``[a, ...]`` in place, given the step and the current rows of the parameters."""


def proximal(mu: float, reference: Mapping[str, Tensor]) -> Adjust:
    """Gradient of ``mu/2 * ||params - reference||^2``.

    Parameters
    ----------
    mu : float
    reference : mapping of name to Tensor ``[K, ...]`` or ``[...]``
        A network for each client, or one for all; names it lacks are free. A copy, ``params.clone()``, where it is what
        training begins with.

    Raises
    ------
    ValueError
        In training, if `reference` has another shape, or is the very network that is trained.
    """

    def adjust(step: Step, params: Mapping[str, Tensor], grads: dict[str, Tensor]) -> None:
        for name, grad in grads.items():
            if name in reference:
                start = step.aligned(name, reference[name], params[name])
                if start.data_ptr() == params[name].data_ptr():
                    raise ValueError(f"proximal pulls '{name}' to itself: expected a copy, such as params.clone()")
                grad.add_(params[name] - start, alpha=mu)

    return adjust


def shifted(shift: Mapping[str, Tensor]) -> Adjust:
    """Add a fixed direction to gradients: ``[K, ...]``, one for each client, or ``[...]``, the same for all."""

    def adjust(step: Step, params: Mapping[str, Tensor], grads: dict[str, Tensor]) -> None:
        for name, grad in grads.items():
            if name in shift:
                grad.add_(step.aligned(name, shift[name], grad))

    return adjust
