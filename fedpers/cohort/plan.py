"""Which samples each client of a cohort sees at each step; drawn per client, so cohort size cannot change it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpers.errors import ConfigError, check
from fedpers.settings.training import Training


class PlanOptions(TypedDict, total=False):
    """Which batches a training sees; what is not given is as in the training settings.

    Attributes
    ----------
    epochs : int or None
        Passes of every client over its samples, >= 0.
    steps : int or sequence of int ``[K]`` or None
        Steps of every client, or of each, >= 0, instead of `epochs`.
    training : Training or None
        Other settings than the cohort's.
    batch_size : int or None
        Another size than in the settings.
    drop_last : bool or None
        Another rule than in the settings.
    samples : sequence of int64 arrays ``[n_k]``
        Positions in the data for each client; default all of the round (``Cohort.samples``).
    frozen : bool
        Whether layers will work as in an evaluation (see ``Cohort.gradients``), so that a batch of one sample is
        enough for all of them.
    purpose : str
        Name of the draws of the batch order and of dropout.
    phase : str
        Name of the phase of training that this plan is a part of, where a method makes a plan for each pass:
        `max_steps` and `longest_phase` are of all plans of a phase together.
    """

    epochs: int | None
    steps: int | Sequence[int] | None
    training: Training | None
    batch_size: int | None
    drop_last: bool | None
    samples: Sequence[NDArray[np.int64]] | None
    frozen: bool
    purpose: str
    phase: str


@dataclass(frozen=True)
class BatchPlan:
    """Batches of K clients for all steps of one training.

    Clients stand in descending order of their number of steps, so those that still train at a step are a prefix.

    Attributes
    ----------
    index : Tensor ``[S, K, B]``
        Positions in the data, int64 on the data's device. Places beyond a batch's end repeat its first sample.
    count : Tensor ``[S, K]``
        Samples in each batch, int64 on the CPU; 0 for a client that is done.
    active : list of int
        Clients that train at each step (the prefix length), length S.
    width : list of int
        Largest batch of each step, length S.
    ragged : list of bool
        Whether the batches of a step differ in size, length S.
    order : Tensor ``[K]`` or None
        Position in the cohort of each row of the plan; None when they are the same.
    phase : str or None
        Name of the phase of training that it is a part of.
    purpose : str
        Name of the draws of its batch order and of dropout.
    """

    index: Tensor
    count: Tensor
    active: list[int]
    width: list[int]
    ragged: list[bool]
    order: Tensor | None
    phase: str | None = None
    purpose: str = "batches"

    @property
    def steps(self) -> int:
        """Steps of the client that trains longest."""
        return len(self.active)

    @property
    def client_steps(self) -> Tensor:
        """Steps of each client, int64 ``[K]`` on the CPU."""
        return (self.count > 0).sum(0)


def batches_per_epoch(size: int, batch_size: int, drop_last: bool) -> int:
    """Batches in one pass over `size` samples; a batch never holds more than the client has."""
    whole, rest = divmod(size, min(batch_size, size)) if batch_size else (1, 0)
    return whole + (1 if rest and not drop_last else 0)


def smallest_batch(size: int, batch_size: int, drop_last: bool) -> int:
    """Samples in the smallest batch of a pass over `size` samples."""
    width = min(batch_size, size) if batch_size else size
    rest = size % width
    return rest if rest and not drop_last else width


def lonely_sample_error(batch_size: int, client: int, samples: int) -> ConfigError:
    """Error for a batch of one sample in a network that normalizes over the batch, of a client with so many."""
    if samples == 1:
        allowed = f"other data, since batch normalization cannot train on the one training sample of client {client}"
        return ConfigError("training.batch_size", batch_size, f"{allowed}: leave this client out")
    allowed = f"a size (or training.drop_last=true) that leaves client {client} no batch of one sample"
    return ConfigError("training.batch_size", batch_size, f"{allowed}, on which batch normalization cannot train")


def plan_batches(
    samples: Sequence[np.ndarray],
    *,
    batch_size: int,
    epochs: int | None = None,
    steps: int | Sequence[int] | None = None,
    most: int | Sequence[int] | None = None,
    drop_last: bool = False,
    draw: Callable[[int, int], np.random.Generator] | None = None,
    device: torch.device | str = "cpu",
    phase: str | None = None,
    purpose: str = "batches",
) -> BatchPlan:
    """Cut each client's samples into batches.

    Parameters
    ----------
    samples : sequence of int64 arrays ``[n_k]``
        Each client's samples, at least one.
    batch_size : int
        Samples in a batch; 0 means all samples of a client in one batch. A client with fewer has smaller batches.
    epochs : int, optional
        Passes over the data; exactly one of `epochs` and `steps` is given.
    steps : int or sequence of int ``[K]``, optional
        Steps of every client or of each; passes follow one another until they are reached.
    most : int or sequence of int ``[K]``, optional
        Steps of a client, or of each, at most, >= 0.
    drop_last : bool
        Leave out the incomplete last batch of a pass. A client smaller than one batch keeps its single batch.
    draw : callable (client's position, pass) -> Generator, optional
        Source of the order of each pass; None keeps the given order.
    device : torch.device or str
        Where `index` goes.
    phase : str, optional
        Noted in the plan.
    purpose : str
        Noted in the plan.

    Raises
    ------
    ConfigError
        If the number of passes or steps is negative or not whole, both or neither are given, `steps` are not one for
        each client, or the batch size is negative.
    """
    if (epochs is None) == (steps is None):
        raise ConfigError("epochs, steps", (epochs, steps), "exactly one of the two")
    clients = len(samples)
    (batch_size,) = _whole_numbers("batch_size", batch_size, 1)
    per_epoch = [batches_per_epoch(len(s), batch_size, drop_last) for s in samples]
    if steps is None:
        (passes,) = _whole_numbers("epochs", epochs, 1)
        num_steps = [passes * n for n in per_epoch]
    else:
        num_steps = _whole_numbers("steps", steps, clients)
    if most is not None:
        limits = [most] * clients if isinstance(most, int) else most
        num_steps = [min(n, limit) for n, limit in zip(num_steps, limits, strict=True)]
    total = max(num_steps)
    width = max(min(batch_size, len(s)) if batch_size else len(s) for s in samples)
    index = np.zeros((total, clients, width), dtype=np.int64)
    count = np.zeros((total, clients), dtype=np.int64)
    for k, positions in enumerate(samples):
        size = min(batch_size, len(positions)) if batch_size else len(positions)
        cut = np.arange(per_epoch[k] * size).reshape(per_epoch[k], size)
        sizes = np.minimum(len(positions) - cut[:, 0], size)
        inside = np.where(cut < len(positions), cut, cut[:, :1])  # beyond the end: the batch's first sample again
        done = 0
        epoch = 0
        while done < num_steps[k]:
            order = positions if draw is None else positions[draw(k, epoch).permutation(len(positions))]
            take = min(per_epoch[k], num_steps[k] - done)
            index[done : done + take, k, :size] = order[inside[:take]]
            index[done : done + take, k, size:] = order[inside[:take, :1]]
            count[done : done + take, k] = sizes[:take]
            done += take
            epoch += 1

    order_rows: Tensor | None = None
    if any(a < b for a, b in pairwise(num_steps)):
        by_steps = np.argsort([-n for n in num_steps], kind="stable")
        index, count = index[:, by_steps], count[:, by_steps]
        order_rows = torch.from_numpy(by_steps)
    active = (count > 0).sum(1)
    largest = count.max(1, initial=0)
    smallest = np.where(count > 0, count, largest[:, None]).min(1, initial=np.iinfo(np.int64).max)
    ragged = (smallest < largest).tolist()
    placed = torch.from_numpy(index).to(device)
    return BatchPlan(
        placed, torch.from_numpy(count), active.tolist(), largest.tolist(), ragged, order_rows, phase, purpose
    )


def _whole_numbers(name: str, value: Any, clients: int) -> list[int]:
    """A whole number >= 0, for each of so many clients, or one for each.

    Raises
    ------
    ConfigError
        If it is something else.
    """
    numbers = np.asarray(value)
    each = f", or one for each of {clients} clients" if clients > 1 else ""
    fits = numbers.dtype.kind in "iu" and numbers.shape in ((), (clients,)) and bool((numbers >= 0).all())
    check(fits, name, value, f"a whole number >= 0{each}")
    return [int(n) for n in np.broadcast_to(numbers, clients)]
