"""How many clients to compute together, and on how many threads: a short measurement on the run's own network.

Small networks gain most from large cohorts, convolutions on a CPU from one client per core, a GPU from as many
clients as fit. On a CPU sizes are compared with a cohort on each core at once, as a run has them by default: small
cohorts keep the interpreter so busy that threads wait for one another. The cohort size for a network and machine is
kept in the cache folder, so that a run repeated on the same machine computes in the same cohorts and gives the same
digits; the number of workers never changes a digit.

No size is tried, and none is chosen, for which the estimate is over :data:`MEMORY_SHARE` of the memory available at
that time: of the GPU's for one cohort; on a CPU for as many cohorts as there are cores. What a client takes is
estimated from a step of one client and, where there is room, of two (:func:`bytes_per_client`). A single client is
computed whatever it takes, and sizes that a user or a method sets are not looked at. A size that was left out is tried
as soon as it fits, so the digits may then change.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedpers.cohort import Step, entries
from fedpers.cohort.modules import copy_network
from fedpers.cohort.plan import batches_per_epoch
from fedpers.cohort.prediction import View, predictions
from fedpers.data.cache import cache_root
from fedpers.errors import TrainingError
from fedpers.failures import described
from fedpers.files import whole_file
from fedpers.process import available_memory, cores, one_thread, processor
from fedpers.runtime.steps import by_size, bytes_per_client, seconds_per_step, seconds_side_by_side, stepper, untrained

if TYPE_CHECKING:
    from fedpers.client.app import CohortApp

log = logging.getLogger(__name__)
LONG_STEP = 0.25
"""Seconds; steps that take longer are timed once."""
TRIES = 3
"""Timings of a size that seems too slow: one alone may have been interrupted, and what it says is kept in the cache."""
SIZES = (1, 4, 16, 64, 256, 1024)
"""Cohort sizes that are tried, beside all clients of a round and a core's part of them."""
MEMORY_SHARE = 0.25
"""Part of the available memory that cohorts may take together by the estimate. They take up to half as much again, for
what is not kept until the backward pass, and received networks and replies need room beside them."""
_TWO = 4  # what two clients take at most, in multiples of one alone: layers mapped over clients may keep twice as much


@dataclass(frozen=True)
class Choice:
    """Cohort size and number of workers.

    Attributes
    ----------
    clients_at_once, workers : int
    how : str
        How the cohort size was chosen: ``given``, ``measured``, ``cached``, ``as the method says``, or ``one at a
        time`` where the network cannot be mapped over clients.
    microseconds : dict
        Time per client and step by cohort size, as measured.
    """

    clients_at_once: int
    workers: int
    how: str
    microseconds: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        times = ", ".join(f"{size}: {us:.0f} us" for size, us in self.microseconds.items())
        measured = f" (per client and step {times})" if times else ""
        clients = "1 client" if self.clients_at_once == 1 else f"{self.clients_at_once} clients"
        return f"cohorts of {clients}, {self.workers} worker{'s' * (self.workers > 1)}, {self.how}{measured}"


@dataclass(frozen=True)
class _Sweep:
    """What was measured of a network on this machine, as it is kept in the cache.

    Attributes
    ----------
    bytes : int
        :func:`bytes_per_client`.
    microseconds : dict of str to float
        Time per client and step by cohort size, ascending.
    beyond : int or None
        The first size that was left out because of the memory.
    """

    bytes: int
    microseconds: dict[str, float]
    beyond: int | None

    def within(self, memory: float) -> dict[str, float]:
        """Times of the sizes that fit into `memory`, at least of the smallest one."""
        first = next(iter(self.microseconds))
        return {s: us for s, us in self.microseconds.items() if s == first or int(s) * self.bytes <= memory}


def probe(
    app: CohortApp, num_clients: int, clients_at_once: int | str, workers: int | str, *, part: float | None = None
) -> Choice:
    """Choose what is ``auto`` and keep what is given.

    The cohort size is measured with a worker on each core, whatever `workers` is, so that their number never changes a
    result.

    Parameters
    ----------
    app : CohortApp
    num_clients : int
        Clients that train in a round.
    clients_at_once, workers : int or "auto"
    part : float, optional
        Part of this machine, or of its GPU, that one cohort may count on, in (0, 1]; if not given, that of one core on
        a CPU and all of a GPU.

    Returns
    -------
    Choice

    Raises
    ------
    TrainingError
        If one client alone does not fit into the memory of the GPU.
    """
    app = app.largest_kind
    size_of_method = app.update.cohort_size
    on_cpu = app.device.type == "cpu"
    memory = MEMORY_SHARE * available_memory(app.device)
    with one_thread():
        times: dict[str, float] = {}
        if clients_at_once != 1 and (reason := _one_at_a_time(app, num_clients, clients_at_once)):
            log.info("clients are computed one at a time: %s", reason)
            size, how = 1, "one at a time"
        elif clients_at_once == "auto" and size_of_method is not None:
            size, how = min(size_of_method, app.data.num_clients), "as the method says"
        elif clients_at_once == "auto":
            if part is None:
                part = 1 / cores() if on_cpu else 1.0
            size, how, times = _cohort_size(app, num_clients, part * memory)
        else:
            size, how = min(int(clients_at_once), app.data.num_clients), "given"
        most = -(-len(by_size(app)) // size)  # more workers than cohorts would have nothing to do
        if workers != "auto":
            return Choice(size, min(int(workers), most), how, times)
        most = min(cores(), most) if on_cpu else 1
        if size_of_method is None:
            most = _useful_workers(app, size, most, memory)
        return Choice(size, most, how, times)


def _one_at_a_time(app: CohortApp, num_clients: int, clients_at_once: int | str) -> str:
    """Why clients cannot be computed together; empty if they can.

    Raises
    ------
    Exception
        What the method raises for a single client too.
    """
    if app.traits.draws:
        return "the network draws from PyTorch's global generator"
    if app.traits.mixes_samples:
        return "in training the network computes over the samples of a batch, where cohorts have padding"
    if app.update.cohort_size is not None or len(by_size(app)) < 2 or (num_clients < 2 and clients_at_once == "auto"):
        return ""
    sweep = _read_sweep(_key(app, num_clients)) if clients_at_once == "auto" else None
    if sweep is not None and any(int(size) > 1 for size in sweep.microseconds):  # it was tried before
        return ""
    try:
        _try(app, 2)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
    except Exception as error:  # whatever layers raise that cannot be mapped over clients
        _try(app, 1)
        return described(error)
    return ""


def _try(app: CohortApp, size: int) -> None:
    """Let a cohort of `size` compute gradients on its first samples and predict; nothing is drawn."""
    cohort, given = untrained(app, size)
    rows = entries(cohort.per_client(app.template))
    lists = [app.data.train[client][:2] for client in cohort.clients]
    index = torch.stack([positions[: min(map(len, lists))] for positions in lists]).to(app.device)
    if cohort.trainable():
        x, y, keys = app.data.x[index], app.data.y[index], torch.arange(size, device=app.device)
        step = Step(size, index, x, y, None, torch.full((size,), float(index.shape[1])), keys, None)
        cohort.gradients(step, rows, app.update.loss, cohort.trainable(), given=dict(given.items()))
    cohort.module.eval()
    view = View(rows, frozenset(rows), dict(given.items()))
    predictions(cohort.module, app.data, view, list(index[:, :1].cpu()), app.update.predict)


def _cohort_size(app: CohortApp, num_clients: int, memory: float) -> tuple[int, str, dict[str, float]]:
    """Best cohort size of those that fit, how it was found, and microseconds per client and step by size."""
    key = _key(app, num_clients)
    sweep, how = _read_sweep(key), "cached"
    if sweep is None or (sweep.beyond is not None and sweep.beyond * sweep.bytes <= memory):
        sweep, how = _measure(app, num_clients, memory), "measured"
        _write_cache(key, asdict(sweep))
    times = sweep.within(memory)
    best = min(times.values())
    return next(int(size) for size, us in times.items() if us <= 1.05 * best), how, times


def _sizes(app: CohortApp, num_clients: int) -> list[int]:
    """Sizes that are tried, ascending: as a round is divided into cohorts of nearly equal size, see CohortEngine."""
    at_most = [*SIZES, num_clients, -(-num_clients // _threads(app))]
    cohorts = {-(-num_clients // most) for most in at_most if most <= num_clients}
    return sorted({-(-num_clients // number) for number in cohorts})


def _threads(app: CohortApp) -> int:
    """Cohorts that may be computed side by side."""
    return cores() if app.device.type == "cpu" else 1


def _measure(app: CohortApp, num_clients: int, memory: float) -> _Sweep:
    """Time ascending cohort sizes until they get clearly slower or do not fit into `memory`."""
    times: dict[str, float] = {}
    size, sizes = 1, _sizes(app, num_clients)
    try:
        one = bytes_per_client(app)
        several = len(sizes) > 1 and _TWO * one <= memory  # layers of a single client need not be mapped
        if several:
            try:
                one = bytes_per_client(app, 2)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                several = False
        for size in sizes:
            if times and not (several and size * one <= memory):
                log.info("cohorts of %d clients are not tried: a client takes %.3g MB", size, one / 1e6)
                return _Sweep(one, times, size if several else max(size, _TWO))
            for _ in range(TRIES):
                seconds = _time_per_client(app, size, num_clients)
                times[str(size)] = min(1e6 * seconds, times.get(str(size), math.inf))
                slower = [us / min(times.values()) for us in times.values()]
                past_the_best = slower[-1] > 1.5 or min(slower[-2:]) > 1.15
                if not past_the_best or seconds * size > LONG_STEP:
                    break
            if past_the_best:
                break
    except torch.cuda.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        if not times:
            raise TrainingError("one client alone does not fit into the memory of the GPU.") from error
        return _Sweep(max(one, int(memory / size) + 1), times, size)  # tried again only where there is more memory
    return _Sweep(one, times, None)


def _time_per_client(app: CohortApp, size: int, num_clients: int) -> float:
    """Seconds of a client and step in a round, in cohorts of `size` of which one runs on each core.

    Clients take steps by their samples, so that a core with small clients may wait for one with large ones. Short steps
    are timed twice, and the better time counts: the other may have been interrupted.
    """
    steps = _steps_of_a_round(app, num_clients)
    threads = min(_threads(app), -(-num_clients // size))
    module = copy_network(app.module)

    def step() -> float:
        if threads == 1:
            return seconds_per_step(stepper(app, size, module), app.device)
        return seconds_side_by_side([stepper(app, size) for _ in range(threads)])

    begin = seconds_per_step(lambda: stepper(app, size, module), app.device)
    seconds = step()
    if seconds < LONG_STEP:
        seconds = min(seconds, step())
    return _seconds_of_a_round(steps, size, threads, begin, seconds) / sum(steps)


def _steps_of_a_round(app: CohortApp, num_clients: int) -> list[int]:
    """Steps of `num_clients` clients, descending, who stand for all of them."""
    training = app.update.training
    sizes = [app.sizes[client] for client in by_size(app)]
    chosen = [sizes[i * len(sizes) // num_clients] for i in range(num_clients)]
    if training.steps is not None:
        return [max(1, training.steps)] * num_clients
    batches = [batches_per_epoch(size, training.batch_size, training.drop_last) for size in chosen]
    return [max(1, training.epochs * number) for number in batches]


def _seconds_of_a_round(steps: list[int], size: int, threads: int, begin: float, seconds: float) -> float:
    """Time until the last cohort is through, each taken by the first thread that is free.

    Parameters
    ----------
    steps : list of int
        Of each client, descending.
    size : int
        Clients of a cohort.
    threads : int
    begin, seconds : float
        Time of a cohort before its first step, and of a step of all its clients.
    """
    free = [0.0] * threads
    for cohort in np.array_split(steps, -(-len(steps) // size)):  # as CohortEngine divides a round
        heapq.heapreplace(free, free[0] + begin + seconds * float(cohort.sum()) / size)
    return max(free)


def _useful_workers(app: CohortApp, size: int, most: int, memory: float) -> int:
    """`most` workers, or as many as fit, if cohorts side by side are faster than one after another; else 1."""
    if most > 1:
        fit = memory / (size * bytes_per_client(app, min(size, 2)))
        most = most if fit >= most else int(fit)
    if most <= 1:
        return 1
    alone = seconds_per_step(stepper(app, size), app.device)
    together = seconds_side_by_side([stepper(app, size) for _ in range(most)])
    return most if alone * most > 1.05 * together else 1


def costs(app: CohortApp, size: int) -> tuple[float, float] | None:
    """Seconds of one client in a cohort of `size`: what it takes beside its steps, and each step; kept like choices.

    None for methods whose training is not made of the core's steps.
    """
    app = app.largest_kind
    if app.update.cohort_size is not None or not any(p.requires_grad for p in app.module.parameters()):
        return None
    key = f"{_key(app, size)}_costs"
    match _read_cache(key):
        case [float(base), float(step)] if base >= 0 and step > 0:
            return base, step
    module = copy_network(app.module)
    with one_thread():

        def begin() -> None:
            stepper(app, size, module)

        base = seconds_per_step(begin, app.device) / size
        step = seconds_per_step(stepper(app, size, module), app.device) / size
    _write_cache(key, [base, step])
    return base, step


def _key(app: CohortApp, num_clients: int) -> str:
    """Digest of all that a measurement depends on: machine, network, method, data and what a round consists of."""
    shapes = {str(n): list(v.shape) for n, v in app.template.items()}
    device = torch.cuda.get_device_name(app.device) if app.device.type == "cuda" else processor()
    facts = [
        "rounds on all cores, means of steps",
        torch.__version__,
        str(app.device),
        device,
        cores(),
        f"{type(app.update).__module__}.{type(app.update).__qualname__}",
        f"{type(app.module).__module__}.{app.module!r}",
        shapes,
        list(app.data.x.shape[1:]),
        sum(p.numel() for p in app.module.parameters() if not p.requires_grad),
        app.update.training.batch_size,
        app.update.training.optimizer,
        app.update.training.momentum,
        _steps_of_a_round(app, num_clients),
    ]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()


def _read_sweep(key: str) -> _Sweep | None:
    """What the cache holds for a key; None if that is nothing, or damaged."""
    match _read_cache(key):
        case {"bytes": int(one), "microseconds": dict(times), "beyond": None | int() as beyond} if one > 0 and times:
            if all(size.isdigit() and isinstance(us, float) and us > 0 for size, us in times.items()):
                return _Sweep(one, times, beyond)
    return None


def _cache_file(key: str) -> Path:
    """A file for each key: runs side by side write at the same time."""
    return cache_root() / "cohort_sizes" / f"{key}.json"


def _read_cache(key: str) -> Any:
    try:
        return json.loads(_cache_file(key).read_text())
    except (OSError, ValueError):  # nothing kept yet, or damaged: measure again
        return None


def _write_cache(key: str, value: Any) -> None:
    path = _cache_file(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as draft:
            draft.write_text(json.dumps(value))
    except OSError as error:
        log.warning("the choice of cohort size could not be kept in %s: %s", path.parent, error)
