"""What a training step of a cohort takes on this machine: seconds, and bytes of memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedpers.cohort import Batch, Cohort, Loss, Network, Step, Tree, entries, leaves, tree
from fedpers.cohort.modules import copy_network
from fedpers.cohort.optim import Optimizer

if TYPE_CHECKING:
    from fedpers.client.app import CohortApp

SECONDS_PER_SIZE = 0.04
"""For which steps of a size are timed, at least two of them."""


def by_size(app: CohortApp) -> list[int]:
    """Clients with samples, the largest first."""
    return sorted((c for c, size in enumerate(app.sizes) if size), key=lambda c: (-app.sizes[c], c))


@dataclass
class Trial:
    """A cohort's first step, to be measured."""

    cohort: Cohort
    step: Step
    rows: dict[str, Tensor]
    given: Tree
    optimizer: Optimizer

    def gradients(self, loss: Loss) -> dict[str, Tensor]:
        """Gradients of all trainable parameters."""
        given: dict[str, Any] = dict(self.given.items())
        return self.cohort.gradients(self.step, self.rows, loss, self.cohort.trainable(), given=given)[1]


def untrained(app: CohortApp, size: int, module: nn.Module | None = None) -> tuple[Cohort, Tree]:
    """A cohort of `size` that has not trained, and what its losses are given."""
    largest_first = by_size(app)
    clients = [largest_first[k % len(largest_first)] for k in range(size)]
    clients.sort(key=lambda c: (-app.sizes[c], c))
    state = app.initial_state.expand(size).clone()
    given = tree(app.update.example_given(app.template, app.data)).expand(size).clone()
    return app.cohort(clients, state, {}, copy_network(app.module) if module is None else module), given


def begin(app: CohortApp, size: int, module: nn.Module | None = None) -> Trial:
    """Prepare the first step of a cohort of `size`, on a network of its own unless there is one."""
    cohort, given = untrained(app, size, module)
    rows = entries(cohort.per_client(app.template))
    walk = cohort.walk(rows, steps=1)
    return Trial(cohort, next(cohort.steps(walk.plan)), rows, given, walk.optimizer(cohort.trainable()))


def stepper(app: CohortApp, size: int, module: nn.Module | None = None) -> Callable[[], None]:
    """One training step of a cohort of `size`."""
    trial = begin(app, size, module)

    def run() -> None:
        trial.optimizer.update(trial.rows, trial.gradients(app.update.loss))

    return run


def seconds_per_step(step: Callable[[], object], device: torch.device) -> float:
    """Seconds per call, the mean of as many as fit into the time after a first one, at least two.

    Not their median: beside other programs most short steps are not interrupted and most long ones are, so that small
    cohorts would seem the faster ones.
    """

    def once() -> float:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    times = [once(), once()]
    while sum(times) < SECONDS_PER_SIZE:
        times.append(once())
    return sum(times) / len(times)


def seconds_side_by_side(steps: list[Callable[[], None]]) -> float:
    """Seconds per call when all run on threads side by side: their mean."""
    with ThreadPoolExecutor(len(steps), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        times = list(pool.map(lambda step: seconds_per_step(step, torch.device("cpu")), steps))
    return sum(times) / len(times)


def bytes_per_client(app: CohortApp, size: int = 1) -> int:
    """Estimate what a client takes while it trains, from one step of a cohort of `size`.

    Parameters, buffers and personal state, what the loss is given, gradients, the optimizer's moments, the batch, and
    what automatic differentiation keeps between the forward and the backward pass: the storages of its saved tensors,
    each once.
    """
    trial = begin(app, size)
    common = [*trial.cohort.module.parameters(), *trial.cohort.module.buffers()]
    stacked = [*trial.rows.values(), *leaves(trial.cohort.state).values(), *leaves(trial.given).values()]

    def plain(network: Network, batch: Batch) -> Tensor:
        return app.update.predict(network, batch.x).sum()

    try:
        saved_bytes = _kept_bytes(
            partial(trial.gradients, app.update.loss), [*common, *stacked], [trial.step.x, trial.step.y]
        )
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:  # transforms of torch.func, such as a gradient inside the loss, allow no hooks: two passes
        saved_bytes = 2 * _kept_bytes(
            partial(trial.gradients, plain), [*common, *stacked], [trial.step.x, trial.step.y]
        )
    grads = {name: torch.zeros_like(trial.rows[name]) for name in trial.cohort.trainable()}
    trial.optimizer.update(trial.rows, grads)
    moments = [moment for pair in trial.optimizer.moments.values() for moment in pair]
    return -(-(saved_bytes + sum(value.nbytes for value in [*stacked, *grads.values(), *moments])) // size)


def _kept_bytes(compute: Callable[[], object], held: Iterable[Tensor], batch: Iterable[Tensor]) -> int:
    """Bytes of `batch` and of all that is saved for a backward pass in `compute`, without what lies in `held`."""
    held_pointers = {value.untyped_storage().data_ptr() for value in held}
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage() for value in batch}

    def note(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in held_pointers:
            storages[storage.data_ptr()] = storage  # held on to, so that no other takes its place
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        compute()
    return sum(storage.nbytes() for storage in storages.values())
