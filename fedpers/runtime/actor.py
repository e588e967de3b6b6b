"""What runs inside a Ray actor, and how things travel to and from it."""

from __future__ import annotations

import copy
import io
import logging
import os
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import flwr.app as flower
import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.cloudpickle.cloudpickle import Pickler
from torch import Tensor

from fedpers.client.app import CohortApp
from fedpers.client.results import ClientResult
from fedpers.cohort import entries
from fedpers.cohort.state import Block
from fedpers.data.federated import FederatedData
from fedpers.process import one_thread, reproducible_convolutions
from fedpers.records import LiveArray
from fedpers.runtime.engine import CohortEngine, half_the_memory
from fedpers.runtime.probe import Choice, costs, probe
from fedpers.server.collect import Collected, ReplyCollector, ReplyRules

Packed = tuple[bytes, list[NDArray[np.uint8]]]
"""A pickle, and the arrays in it, which actors of one node read from the object store without a copy."""


class _Packer(Pickler):  # type: ignore[misc]
    """Pickles tensors as arrays; one that is there several times travels once."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is Tensor:
            return _to_tensor, _from_tensor(value)
        if type(value) is LiveArray and "tensor" in value.__dict__:
            return LiveArray, (value.__dict__["tensor"],)
        return super().reducer_override(value)


def pack(value: Any) -> Packed:
    """Make what travels of `value`."""
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    _Packer(file, protocol=5, buffer_callback=buffers.append).dump(value)
    return file.getvalue(), [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]


def unpack(packed: Packed) -> Any:
    """Undo :func:`pack`; tensors may be views of shared memory that must not be written."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return pickle.loads(packed[0], buffers=packed[1])


def _from_tensor(tensor: Tensor) -> tuple[NDArray[Any], str]:
    plain = tensor.detach().cpu().contiguous()
    kind = str(plain.dtype).removeprefix("torch.")
    return (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy(), kind


def _to_tensor(array: NDArray[Any], kind: str) -> Tensor:
    tensor = torch.from_numpy(np.asarray(array))
    return tensor.view(torch.bfloat16) if kind == "bfloat16" else tensor


@dataclass
class Answer:
    """What a shard makes of one message to its clients."""

    results: list[ClientResult]
    collected: Collected | None
    changed: bool


class Worker:
    """Actor: computes the clients of its shards.

    Parameters
    ----------
    folder : str, optional
        Where files of personal state that is too large for the memory are made.
    """

    def __init__(self, folder: str | None = None) -> None:
        logging.getLogger("ray").setLevel(logging.ERROR)
        torch.set_num_threads(1)
        self.device = "cuda:0" if ray.get_gpu_ids() else "cpu"
        reproducible_convolutions(self.device)
        self.folder = None if folder is None else Path(folder)
        self.shards: dict[int, CohortEngine] = {}
        self._app: CohortApp | None = None  # without data

    def node(self) -> str:
        """Id of the node this runs on."""
        return str(ray.get_runtime_context().get_node_id())

    def measure(
        self, app: Packed, data: Packed, sampled: int, clients_at_once: int | str
    ) -> tuple[Choice, tuple[float, float] | None]:
        """Choose a cohort size; measure costs (:func:`fedpers.runtime.probe.costs`)."""
        part = self._taken(app, data)
        choice = probe(part, sampled, clients_at_once, 1, part=self._share())
        return choice, costs(part, choice.clients_at_once)

    def host(
        self, shard: int, app: Packed, data: Packed, clients: list[int], choice: Choice, memory: float | None
    ) -> None:
        """Take over a shard, with the state its clients begin with.

        Parameters
        ----------
        shard : int
        app : CohortApp without data, packed
            The same for all shards: it is unpacked once.
        data : FederatedData, packed
            Of the shard's clients.
        clients : list of int
        choice : Choice
        memory : float, optional
            Bytes for personal state in memory; this actor's share of half of the machine's if not given.
        """
        part = self._taken(app, data)
        if memory is None and (whole := half_the_memory(part.device)) is not None:
            memory = whole * self._share()
        engine = CohortEngine(part, choice.clients_at_once, 1, clients=clients, memory=memory, folder=self.folder)
        engine.choose(len(clients))
        if shard in self.shards:
            self.shards[shard].close()
        self.shards[shard] = engine

    def _taken(self, app: Packed, data: Packed) -> CohortApp:
        """An app with some data on this actor's device, sharing frozen parameters with those of other shards.

        Nothing of it keeps memory of the object store.
        """
        if self._app is None:
            self._app = copy.deepcopy(unpack(app)).to(self.device)
        part: FederatedData = copy.deepcopy(unpack(data))
        return self._app.with_data(part.to(self.device))

    def _share(self) -> float:
        """Share of the machine, or of its GPU, that this actor has."""
        has = ray.get_runtime_context().get_assigned_resources()
        if self.device != "cpu":
            return min(1.0, float(has.get("GPU", 1.0)))
        return min(1.0, max(1.0, float(has.get("CPU", 1.0))) / (os.cpu_count() or 1))

    def load(self, shard: int, block: Packed) -> None:
        """Store personal states."""
        clients, state = unpack(block)
        self.shards[shard].store.load(clients.tolist(), state.to(self.device))

    def clear(self, shard: int) -> None:
        """Let all clients of a shard hold the initial state again."""
        self.shards[shard].store.clear()

    def written(self, shard: int) -> list[int]:
        """Clients of a shard that have written state, ascending."""
        store = self.shards[shard].store
        return sorted(store.clients[store.written].tolist())

    def states(self, shard: int, clients: list[int]) -> Packed:
        """Personal states of some clients, a :data:`~fedpers.cohort.state.Block`."""
        block: Block = (torch.tensor(clients), self.shards[shard].store.gather(clients))
        return pack(block)

    def run(
        self,
        shard: int,
        kind: str,
        clients: list[int],
        which: list[int],
        sent: Packed,
        shard_contents: Packed,
        awaited: bool,
    ) -> Packed | None:
        """Compute a message for clients of a shard.

        Parameters
        ----------
        shard : int
        kind : str
            Message type.
        clients : list of int
        which : list of int
            For each of them, which of `sent` it received, or of `shard_contents` counted from behind (-1 is the first).
        sent : (list of RecordDict, ReplyRules or None), packed
            What clients of several shards receive, and how their replies are folded; None returns them.
        shard_contents : list of RecordDict, packed
            What clients of this shard alone receive.
        awaited : bool
            Whether anybody waits for the answer; if not, only personal state is brought up to date.

        Returns
        -------
        Answer, packed
        """
        rules: ReplyRules | None
        contents, rules = unpack(sent)
        more: list[flower.RecordDict] = unpack(shard_contents)
        engine = self.shards[shard]
        engine.changed = False
        if rules is not None:  # what a fold sums up in must not lie in memory that other actors read
            shared = {id(value): value for value in entries(rules.arrays).values()}
            rules.fold = copy.deepcopy(rules.fold, cast(Any, shared))
        collector = None if rules is None else ReplyCollector(rules)
        with one_thread():
            received = [contents[i] if i >= 0 else more[-1 - i] for i in which]
            results = engine.run(kind, clients, received, collector)
        collected = None if collector is None else collector.partial()
        return pack(Answer(results, collected, engine.changed)) if awaited else None
