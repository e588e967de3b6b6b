"""How many clients to compute together, and on how many threads: a short measurement on the run's own network.

Small networks gain most from large cohorts, convolutions on a CPU from one client per core, a GPU from as many
clients as fit. The cohort size for a network and machine is kept in the cache folder, so that a run repeated on the
same machine computes in the same cohorts and gives the same digits; the number of workers never changes a digit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedpers.cohort import entries
from fedpers.data.cache import cache_root
from fedpers.errors import TrainingError
from fedpers.threads import one_thread

if TYPE_CHECKING:
    from fedpers.strategies.client import CohortApp

log = logging.getLogger(__name__)
SECONDS_PER_SIZE = 0.1
SIZES = (1, 4, 16, 64, 256, 1024)


@dataclass(frozen=True)
class Choice:
    """Cohort size and number of workers.

    Attributes
    ----------
    cohort, workers : int
    how : str
        How the cohort size was found: ``given``, ``measured``, ``cached`` or ``as the method says``.
    microseconds : dict
        Time per client and step by cohort size, as measured.
    """

    cohort: int
    workers: int
    how: str
    microseconds: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        times = ", ".join(f"{size}: {us:.0f} us" for size, us in self.microseconds.items())
        measured = f" (per client and step {times})" if times else ""
        clients = "1 client" if self.cohort == 1 else f"{self.cohort} clients"
        return f"cohorts of {clients}, {self.workers} worker{'s' * (self.workers > 1)}, {self.how}{measured}"


def probe(app: CohortApp, num_clients: int, cohort: int | str, workers: int | str) -> Choice:
    """Choose what is ``auto`` and keep what is given.

    The cohort size is measured on one worker, whatever `workers` is, so that their number never changes a result.

    Parameters
    ----------
    app : CohortApp
    num_clients : int
        Clients that train in a round.
    cohort, workers : int or "auto"
    """
    own = app.update.cohort_size
    with one_thread():
        times: dict[str, float] = {}
        if cohort == "auto" and own is not None:
            size, how = min(own, app.data.num_clients), "as the method says"
        elif cohort == "auto":
            size, how, times = _cohort_size(app, num_clients)
        else:
            size, how = min(int(cohort), app.data.num_clients), "given"
        most = -(-len(_here(app)) // size)  # more workers than cohorts would have nothing to do
        if workers != "auto":
            return Choice(size, min(int(workers), most), how, times)
        if own is not None:
            return Choice(size, min(cores(), most) if app.device.type == "cpu" else 1, how, times)
        return Choice(size, _useful_workers(app, size, most), how, times)


def _cohort_size(app: CohortApp, num_clients: int) -> tuple[int, str, dict[str, float]]:
    """Best cohort size, how it was found, and microseconds per client and step by size."""
    key = _key(app, num_clients)
    match _read_cache().get(key):
        case {"cohort": int(size), "microseconds": dict(times)} if size >= 1:
            return size, "cached", times
    per_client: dict[int, float] = {}
    for size in [*(s for s in SIZES if s < num_clients), num_clients]:
        try:
            per_client[size] = _time_steps(_stepper(app, size), app.device) / size
        except torch.cuda.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            if not per_client:
                raise TrainingError("one client alone does not fit into the memory of the GPU.") from error
            break
        if per_client[size] > 1.5 * min(per_client.values()):
            break
    best = min(per_client.values())
    size = next(s for s, seconds in per_client.items() if seconds <= 1.05 * best)
    times = {str(s): seconds * 1e6 for s, seconds in per_client.items()}
    _write_cache(key, {"cohort": size, "microseconds": times})
    return size, "measured", times


def _useful_workers(app: CohortApp, size: int, most: int) -> int:
    """All cores if cohorts side by side are clearly faster than one after another, else 1."""
    workers = min(cores(), most)
    if app.device.type != "cpu" or workers == 1:
        return 1
    alone = _time_steps(_stepper(app, size), app.device)
    together = _time_together([_stepper(app, size) for _ in range(workers)])
    return workers if alone * workers > 1.2 * together else 1


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def costs(app: CohortApp, size: int) -> tuple[float, float] | None:
    """Seconds of one client in a cohort of `size`: what it takes beside its steps, and each step; kept like choices.

    None for methods whose training is not made of the core's steps.
    """
    if app.update.cohort_size is not None or not any(p.requires_grad for p in app.module.parameters()):
        return None
    key = f"{_key(app, size)}:costs"
    match _read_cache().get(key):
        case [float(base), float(step)] if base >= 0 and step > 0:
            return base, step
    module = deepcopy(app.module)
    with one_thread():

        def begin() -> None:
            _stepper(app, size, module)

        base = _time_steps(begin, app.device) / size
        step = _time_steps(_stepper(app, size, module), app.device) / size
    _write_cache(key, [base, step])
    return base, step


def _here(app: CohortApp) -> list[int]:
    """Clients whose samples are here, the largest first."""
    return sorted((c for c, size in enumerate(app.sizes) if size), key=lambda c: (-app.sizes[c], c))


def _stepper(app: CohortApp, size: int, module: nn.Module | None = None) -> Callable[[], None]:
    """One training step of a cohort of `size`, on a network of its own unless there is one."""
    by_size = _here(app)
    clients = [by_size[k % len(by_size)] for k in range(size)]
    clients.sort(key=lambda c: (-app.sizes[c], c))
    state = app.initial_state.expand(size).clone()
    cohort = app.cohort(clients, state, {}, deepcopy(app.module) if module is None else module)
    params = cohort.spread(app.template)
    names = cohort.trainable()
    plan = cohort.plan(steps=1)
    step = next(iter(cohort.steps(plan)))
    optimizer = cohort.optimizer(names, plan)
    rows = entries(params)

    def run() -> None:
        _, grads = cohort.gradients(step, rows, app.update.loss, names)
        optimizer.update(rows, grads)

    return run


def _time_steps(step: Callable[[], None], device: torch.device) -> float:
    """Seconds per call, the median of as many as fit into the time after a first one, at least two."""

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
    return sorted(times)[len(times) // 2]


def _time_together(steps: list[Callable[[], None]]) -> float:
    """Seconds per call when all run on threads side by side: the mean of the medians."""
    with ThreadPoolExecutor(len(steps), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        times = list(pool.map(lambda step: _time_steps(step, torch.device("cpu")), steps))
    return sum(times) / len(times)


def _key(app: CohortApp, num_clients: int) -> str:
    shapes = {str(n): list(v.shape) for n, v in app.template.items()}
    device = torch.cuda.get_device_name(app.device) if app.device.type == "cuda" else platform.processor()
    facts = [
        torch.__version__,
        str(app.device),
        device,
        os.cpu_count(),
        type(app.update).__name__,
        type(app.module).__name__,
        shapes,
        list(app.data.x.shape[1:]),
        app.update.training.batch_size,
        num_clients,
    ]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()


def _read_cache() -> dict[str, Any]:
    try:
        found = json.loads((cache_root() / "probe.json").read_text())
    except (OSError, ValueError):  # nothing kept yet, or damaged: measure again
        return {}
    return found if isinstance(found, dict) else {}


def _write_cache(key: str, value: Any) -> None:
    path = cache_root() / "probe.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(json.dumps({**_read_cache(), key: value}, indent=1))
        draft.replace(path)
    except OSError as error:
        log.warning("the choice of cohort size could not be kept in %s: %s", path.parent, error)
