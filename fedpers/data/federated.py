"""Data of all clients: whole arrays that stay resident, and index lists that say whose is what."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpers.errors import DataError
from fedpers.tasks import CLASSIFICATION, Task

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = get_args(Part)
EVALUATED_PARTS: tuple[Part, ...] = ("validation", "test")


@dataclass(frozen=True)
class FederatedData:
    """Samples of all clients and who owns them.

    A batch is a gather from `x` and `y`; no client has a loader or a copy of its own.

    Parameters
    ----------
    x : Tensor ``[N, ...]``
        Inputs, ready for the model: float32 (normalized) for pictures and features, int64 ids for ratings and tokens.
    y : Tensor ``[N]`` or ``[N, D]``
        What `task` learns: class ids, int64, ``0 <= y < num_classes`` (not checked here); or targets, float32.
    train, validation, test : sequence of Tensor ``[n_k]``
        For each client the positions in `x` it owns, int64. The three parts of a client should not overlap, which is
        not checked; candidates of a ranking may stand in more than one.
    num_classes : int
        Outputs of a network: classes, or targets D of a regression.
    name : str
        For tables and manifests.
    public : Tensor ``[p]`` or None
        Positions in `x` of samples that belong to no client, int64, for pretraining; None if there are none.
    unseen : tuple of int
        Clients that never train, ascending; they are evaluated only. Their `train` lists are for adaptation.
    anchors : tuple of int
        Clients that were dealt label sets of their own (``partition=label_sets``), ascending; FedJETs ties each of its
        experts to one of them. Empty if the partition knows no anchors.
    groups : tuple of int
        Group of each client, numbered from 0, where clients fall into groups that are known; else empty.
    elsewhere : tuple of int
        Clients whose samples are on another machine (:meth:`restrict`); their lists here are empty.
    task : Task
        What is learned and how it is measured; keyword-only.

    Raises
    ------
    DataError
        If a client has no training samples, an index is out of range, the lists disagree in length, a public sample
        belongs to a client, `unseen` does not name clients or names all of them, or `groups` does not name a group >= 0
        for each client.
    """

    x: Tensor
    y: Tensor
    train: Sequence[Tensor]
    validation: Sequence[Tensor]
    test: Sequence[Tensor]
    num_classes: int
    name: str = "data"
    public: Tensor | None = None
    unseen: tuple[int, ...] = ()
    anchors: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    elsewhere: tuple[int, ...] = ()
    task: Task = field(default=CLASSIFICATION, kw_only=True)

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise DataError(f"{self.name}: x has {len(self.x)} samples but y has {len(self.y)}.")
        if not len(self.train) == len(self.validation) == len(self.test) > 0:
            raise DataError(f"{self.name}: train, validation and test must list the same clients, at least one.")
        away = set(self.elsewhere)
        for client, indices in enumerate(self.train):
            if len(indices) == 0 and client not in away:
                raise DataError(f"{self.name}: client {client} has no training samples.")
        for part in PARTS:
            used = torch.cat(list(self.part(part)))
            if len(used) and (int(used.min()) < 0 or int(used.max()) >= len(self.x)):
                raise DataError(f"{self.name}: a {part} index is outside 0..{len(self.x) - 1}.")
        if self.public is not None:
            self._check_public(self.public)
        if list(self.unseen) != sorted(set(self.unseen) & set(range(self.num_clients))):
            raise DataError(
                f"{self.name}: unseen={list(self.unseen)} must name clients 0..{self.num_clients - 1}, in ascending "
                f"order and each once."
            )
        if len(self.unseen) == self.num_clients:
            raise DataError(f"{self.name}: all {self.num_clients} clients are unseen, none is left to train.")
        if self.groups and (len(self.groups) != self.num_clients or min(self.groups) < 0):
            raise DataError(f"{self.name}: groups must be one number >= 0 for each of {self.num_clients} clients.")

    def _check_public(self, public: Tensor) -> None:
        if len(public) == 0 or int(public.min()) < 0 or int(public.max()) >= len(self.x):
            raise DataError(f"{self.name}: public must list positions in 0..{len(self.x) - 1}, at least one.")
        unassigned = torch.ones(len(self.x), dtype=torch.bool)
        for part in PARTS:
            unassigned[torch.cat(list(self.part(part))).cpu()] = False
        if not bool(unassigned[public.cpu()].all()):
            count = int((~unassigned[public.cpu()]).sum())
            raise DataError(f"{self.name}: {count} public samples also belong to a client.")

    def part(self, part: Part) -> Sequence[Tensor]:
        """Index lists of one part, one Tensor ``[n_k]`` per client."""
        lists: Sequence[Tensor] = getattr(self, part)
        return lists

    def samples(self, client: int, seed: int, round: int) -> NDArray[np.int64]:
        """Positions a client trains on in a round, int64 ``[n]``.

        Default: the client's training positions. ``RankingData`` overrides it to draw new negatives from (seed, client,
        round).

        Parameters
        ----------
        client : int
        seed : int
            The run's seed; what is drawn anew in each round belongs to (seed, client, round).
        round : int
        """
        positions: NDArray[np.int64] = self.train[client].numpy()
        return positions

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return len(self.train)

    @property
    def device(self) -> torch.device:
        """Where the arrays live."""
        return self.x.device

    @property
    def num_items(self) -> int:
        """Items to recommend; 0 for data that are no ratings."""
        return 0

    def sizes(self, part: Part = "train") -> Tensor:
        """Count samples per client, int64 ``[num_clients]`` on the CPU."""
        return torch.tensor([len(indices) for indices in self.part(part)])

    def label_counts(self, part: Part = "train") -> Tensor:
        """Count samples per client and class, int64 ``[num_clients, num_classes]`` on the CPU.

        Samples whose labels are numbers are counted per client, ``[num_clients, 1]``.
        """
        if not self.task.classes:
            return self.sizes(part).unsqueeze(1)
        y = self.y.cpu()
        rows = [torch.bincount(y[i.cpu()], minlength=self.num_classes) for i in self.part(part)]
        return torch.stack(rows)

    def to(self, device: torch.device | str) -> Self:
        """Copy with arrays on `device`; index lists stay on the CPU, where batches are planned."""
        return replace(self, x=self.x.to(device), y=self.y.to(device))

    def restrict(self, clients: Sequence[int]) -> Self:
        """Keep the samples of some clients only, under the same client numbers; without the public ones."""
        selected = set(clients)
        nothing = torch.zeros(0, dtype=torch.int64)
        lists: dict[Part, list[Tensor]] = {
            part: [positions if client in selected else nothing for client, positions in enumerate(self.part(part))]
            for part in PARTS
        }
        elsewhere = tuple(client for client in range(self.num_clients) if client not in selected)
        return replace(self, elsewhere=elsewhere, public=None, **self._compact(lists))

    def _compact(self, lists: Mapping[Part, list[Tensor]]) -> dict[str, Any]:
        """Fields of data with these index lists, without samples that are in none of them."""
        used = torch.unique(torch.cat([positions for part in PARTS for positions in lists[part]]))
        new_positions = torch.zeros(len(self.x), dtype=torch.int64)
        new_positions[used] = torch.arange(len(used))
        rows = used.to(self.device)
        return {
            "x": self.x[rows],
            "y": self.y[rows],
            **{part: [new_positions[positions] for positions in index_lists] for part, index_lists in lists.items()},
        }

    @cached_property
    def checksum(self) -> str:
        """16 hex digits that change when any sample, label or assignment changes."""
        digest = hashlib.blake2b(digest_size=8)
        for array in (self.x, self.y):
            digest.update(str((tuple(array.shape), array.dtype)).encode())
            digest.update(np.ascontiguousarray(array.cpu().numpy()).data)
        for part in PARTS:
            for indices in self.part(part):
                digest.update(f"{part}{len(indices)}".encode())
                digest.update(np.ascontiguousarray(indices.cpu().numpy()).data)
        if self.public is not None:
            digest.update(f"public{len(self.public)}".encode())
            digest.update(np.ascontiguousarray(self.public.cpu().numpy()).data)
        if self.unseen:
            digest.update(f"unseen{self.unseen}".encode())
        if self.groups:
            digest.update(f"groups{self.groups}".encode())
        digest.update(self._rules().encode())
        return digest.hexdigest()

    def _rules(self) -> str:
        """What besides arrays decides the samples of a round, for the checksum."""
        return ""
