"""A cohort in one line, and ordinary PyTorch training of one client to compare it with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpers.cohort import Batch, Cohort, Network, Training, Tree, model_tree, prepare, tree
from fedpers.data.federated import FederatedData
from fedpers.randomness import generator

SEED = 5


def cross_entropy(network: Network, batch: Batch) -> Tensor:
    return batch.mean(F.cross_entropy(network(batch.x), batch.y, reduction="none"))


def by_size(data: FederatedData) -> list[int]:
    """All clients, largest training set first."""
    return sorted(range(data.num_clients), key=lambda c: -len(data.train[c]))


def make_cohort(
    network: nn.Module,
    data: FederatedData,
    clients: Sequence[int] | None = None,
    *,
    training: Training | None = None,
    round: int = 1,
    needs_two_samples: bool = False,
) -> Cohort:
    """A cohort of `clients` (default: all, largest first) without personal state."""
    module = prepare(network)
    chosen = by_size(data) if clients is None else list(clients)
    return Cohort(
        module,
        data,
        chosen,
        tree({}, len(chosen)),
        template=model_tree(module),
        seed=SEED,
        needs_two_samples=needs_two_samples,
        round=round,
        training=training or Training(),
    )


def batches(
    data: FederatedData,
    client: int,
    *,
    size: int,
    first: int = 0,
    round: int = 1,
    drop_last: bool = False,
    seed: int = SEED,
    purpose: str = "batches",
) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """A client's batches without end: inputs, labels, whether a pass ends; `first` is the number of the first pass."""
    samples = data.train[client].numpy()
    size = min(size or len(samples), len(samples))
    while True:
        order = samples[generator(seed, purpose, client, round, first).permutation(len(samples))]
        last = len(samples) - len(samples) % size if drop_last else len(samples)
        for start in range(0, last, size):
            index = torch.from_numpy(order[start : min(start + size, last)])
            yield data.x[index], data.y[index], start + size >= last
        first += 1


def train_alone(
    network: nn.Module,
    data: FederatedData,
    client: int,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    steps: int,
    size: int,
    drop_last: bool = False,
    clip: float | None = None,
    factor: Callable[[int, int], float] | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
) -> dict[str, Tensor]:
    """An ordinary training loop; `factor(step, steps)` multiplies the rate."""
    module = copy.deepcopy(network).train()
    optimizer = make_optimizer(module)
    schedule: Any = None
    if factor is not None:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: factor(t, max(steps, 1)))
    for x, y, _ in islice(batches(data, client, size=size, drop_last=drop_last), steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(module(x), y)
        if penalty is not None:
            loss = loss + penalty(module)
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same(
    actual: Tree | dict[str, Tensor], expected: dict[str, Tensor], row: int | None = None, float64: float = 1e-10
) -> None:
    """All entries agree: to 1e-10 in float64, to 1e-5 in float32, relative to the largest entry of each tensor."""
    for name, value in expected.items():
        ours = actual[name] if row is None else actual[name][row]
        assert ours.shape == value.shape, name
        if not value.is_floating_point():
            assert torch.equal(ours, value), name
            continue
        tolerance = float64 if value.dtype == torch.float64 else 1e-5
        scale = max(float(value.abs().max()), 1e-2)
        gap = float((ours - value).abs().max()) / scale
        assert gap <= tolerance, f"{name}: {gap:.1e}"
