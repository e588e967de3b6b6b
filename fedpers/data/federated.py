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

from fedpers.data.fields import InputField
from fedpers.data.mapped import blocks
from fedpers.errors import DataError, reason
from fedpers.tasks import CLASSIFICATION, Task

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = get_args(Part)
EVALUATED_PARTS: tuple[Part, ...] = ("validation", "test")


@dataclass(frozen=True)
class FederatedData:
    """Samples of all clients and who owns them.

    A batch is a gather from `x` and `y`; no client has a loader or a copy of its own. `x` may be mapped from a file
    (:func:`~fedpers.data.mapped.mapped`): then only the samples that are used are read.

    Parameters
    ----------
    x : Tensor ``[N, ...]``
        Inputs, ready for the model: float32 (normalized) for pictures and features, int64 for items of ratings
        ``[N]`` and tokens ``[N, T]``.
    y : Tensor ``[N]``, ``[N, D]`` or ``[N, T]``
        What `task` learns: class ids, whole numbers with ``0 <= y < num_classes``; targets, floats; or the next token
        at each position.
    train, validation, test : sequence of Tensor ``[n_k]``
        For each client the positions in `x` it owns. Each stands in one of its three parts, once; only candidates of a
        ranking may stand in more than one. A client without samples for testing is not evaluated.
    num_classes : int
        Outputs of a network: classes, targets D of a regression, or the vocabulary's size.
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
    drifted_groups : tuple of int
        Group of each client from `drift_round` on; empty without a drift or without groups.
    client_names : tuple of str
        What the data call each client, for tables; empty if they do not.
    class_names : tuple of str
        What the data call each class; empty if they do not.
    elsewhere : tuple of int
        Clients whose samples are on another machine (:meth:`restrict`); their lists here are empty.
    num_tokens : int
        Size of the vocabulary where inputs are tokens: whole numbers >= 0 ``[N, T]`` count as such, and if it is not
        given it is the largest of them plus one. 0 for other inputs.
    fields : tuple of InputField
        What the columns of `x` ``[N, F]`` are where samples have several inputs: networks of a user's own are given a
        dictionary of them. Empty for one input.
    global_test : Tensor ``[g]`` or None
        Positions in `x` of samples that belong to no client, int64, on which a network that all clients have in common
        is tested; None if there are none.
    global_owners : Tensor ``[g]`` or None
        Client that each of these was taken from, int64, by whose shift it changes (:func:`apply_heterogeneity`).
    drift_round : int
        First round in which clients have drifted, >= 1; 0 without a drift.
    drifted : Tensor ``[N]`` or None
        Position in `x` of what a sample is from `drift_round` on, int64 (:meth:`positions`); None without a drift.
    task : Task
        What is learned and how it is measured; keyword-only.

    Notes
    -----
    NumPy arrays and lists are taken for tensors: floats become float32, the default of PyTorch's layers, and whole
    numbers int64. A tensor keeps its type, except for labels, which become int64 where they are class ids.

    Raises
    ------
    DataError
        If labels are none of `task`'s, a client has no training samples, a position is out of range or stands twice
        with a client, the lists disagree in length, a public sample belongs to a client, `unseen`, `anchors` or
        `elsewhere` do not name clients or `unseen` names all of them, there is not a name or a group >= 0 for each
        client, `fields` are not the columns of `x`, tokens are out of range, or `drifted` is no position for each
        sample.
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
    client_names: tuple[str, ...] = field(default=(), kw_only=True)
    class_names: tuple[str, ...] = field(default=(), kw_only=True)
    num_tokens: int = field(default=0, kw_only=True)
    fields: tuple[InputField, ...] = field(default=(), kw_only=True)
    global_test: Tensor | None = field(default=None, kw_only=True)
    global_owners: Tensor | None = field(default=None, kw_only=True)
    drift_round: int = field(default=0, kw_only=True)
    drifted: Tensor | None = field(default=None, kw_only=True)
    drifted_groups: tuple[int, ...] = field(default=(), kw_only=True)
    task: Task = field(default=CLASSIFICATION, kw_only=True)

    @classmethod
    def from_clients(
        cls,
        clients: Any,
        *,
        owner: Any = None,
        label: str = "label",
        tokens: bool = False,
        task: Literal["classification", "regression"] | None = None,
        validation: float = 0.15,
        test: float = 0.25,
        seed: int = 0,
        name: str = "data",
    ) -> FederatedData:
        """Make data of samples that lie client by client.

            FederatedData.from_clients({"Kiel": (x1, y1), "Ulm": (x2, y2)})
            FederatedData.from_clients(TensorDataset(x, y), owner=hospital_of_each_sample)
            FederatedData.from_clients({"Kiel": (token_ids, y1)}, tokens=True)

        Parameters
        ----------
        clients : sequence, or mapping by the client's name
            Samples of each client: a pair of inputs ``[n, ...]`` and labels ``[n]`` or ``[n, D]`` (tensors, arrays or
            lists), a data frame, a PyTorch ``Dataset`` of such pairs; or a mapping from ``train``, ``validation`` and
            ``test`` to these. Inputs may be several, a mapping by name, which a network of your own is then given.
            With `owner`, one such set.
        owner : sequence ``[N]``, optional
            Client of each sample, numbers or text.
        label : str
            The column of a data frame that holds the labels; all others are inputs.
        tokens : bool
            Whether inputs are ids of tokens ``[n, T]``, which stay int64 and which a network embeds; otherwise whole
            numbers are features like other numbers. Sequences may differ in length: shorter ones are padded with 0 in
            front. Labels that are sequences too are the next tokens, -1 where none is to be predicted; then padding
            stands behind.
        task : {"classification", "regression"}, optional
            What numbers as labels stand for. Default: whole numbers are classes, floats are targets of a regression.
        validation, test : float
            Shares of the samples of a client that is not split yet.
        seed : int
            Of the split; a client's depends on `seed`, its number and its samples.
        name : str

        Returns
        -------
        FederatedData
            Inputs are float32, whole numbers too (pictures of bytes ``[n, H, W]`` or ``[n, H, W, C]`` normalized to
            ``[n, C, H, W]``, everything else as it is), or int64 with `tokens`; several are columns of one tensor
            (`fields`), of which a network is given float32 and, of whole numbers, int64. Labels of any hashable kind
            become class ids, and `class_names` keeps what they were, unless they are 0, 1, ... already; floats are
            targets of a regression.

        Raises
        ------
        DataError
            If something else is given; it names the client.
        ConfigError
            If a share or `task` cannot be used.
        """
        from fedpers.data.clients import data_of_clients  # which needs this class

        return data_of_clients(
            clients, owner=owner, label=label, tokens=tokens, task_name=task, validation=validation, test=test,
            seed=seed, name=name,
        )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("x", "y"):
            object.__setattr__(self, name, _as_tensor(getattr(self, name), f"{self.name}: {name}"))
        for part in PARTS:
            lists = [_as_positions(positions, f"{self.name}: {part}") for positions in self.part(part)]
            object.__setattr__(self, part, lists)
        for named in ("public", "global_test", "global_owners", "drifted"):
            if (positions := getattr(self, named)) is not None:
                object.__setattr__(self, named, _as_positions(positions, f"{self.name}: {named}"))
        self._check()
        object.__setattr__(self, "y", self.task.prepare_labels(self.y, self.num_classes, self.name))
        if self.x.dim() == 2 and not self.x.is_floating_point() and self.x.numel() and not self.x.is_meta:
            object.__setattr__(self, "num_tokens", self._count_tokens())

    def _check(self) -> None:
        if self.x.dim() == 0 or self.y.dim() == 0 or (len(self.x) == 0 and not self.elsewhere):
            raise DataError(f"{self.name}: x is {list(self.x.shape)} and y is {list(self.y.shape)}, expected [N, ...].")
        if len(self.x) != len(self.y):
            raise DataError(f"{self.name}: x has {len(self.x)} samples but y has {len(self.y)}.")
        if not len(self.train) == len(self.validation) == len(self.test) > 0:
            raise DataError(f"{self.name}: train, validation and test must list the same clients, at least one.")
        away = set(self.elsewhere)
        for client, indices in enumerate(self.train):
            if len(indices) == 0 and client not in away:
                raise DataError(f"{self.name}: client {client} has no training samples.")
        used = {part: torch.cat(list(self.part(part))) for part in PARTS}
        for part, positions in used.items():
            if len(positions) and (int(positions.min()) < 0 or int(positions.max()) >= len(self.x)):
                raise DataError(f"{self.name}: a {part} index is outside 0..{len(self.x) - 1}.")
        if not self.task.parts_overlap:
            self._check_disjoint(torch.cat(list(used.values())))
        for named, count in (("client_names", self.num_clients), ("class_names", self.num_classes)):
            if len(getattr(self, named)) not in (0, count):
                raise DataError(f"{self.name}: there are {len(getattr(self, named))} {named} for {count}.")
        if self.fields and len(self.x) and sum(each.width for each in self.fields) != self.x[:1].numel():
            raise DataError(f"{self.name}: fields do not add up to the {self.x[:1].numel()} columns of x.")
        for named in ("public", "global_test"):
            if (positions := getattr(self, named)) is not None:
                self._check_unowned(named, positions)
        if self.global_owners is not None:
            owned = 0 if self.global_test is None else len(self.global_test)
            if len(self.global_owners) != owned:
                raise DataError(f"{self.name}: there are {len(self.global_owners)} global_owners for {owned} samples.")
        for named in ("unseen", "anchors", "elsewhere"):
            clients = list(getattr(self, named))
            if clients != sorted(set(clients) & set(range(self.num_clients))):
                raise DataError(
                    f"{self.name}: {named}={clients} must name clients 0..{self.num_clients - 1}, in ascending order "
                    f"and each once."
                )
        if len(self.unseen) == self.num_clients:
            raise DataError(f"{self.name}: all {self.num_clients} clients are unseen, none is left to train.")
        if (self.drift_round > 0) != (self.drifted is not None):
            raise DataError(f"{self.name}: drift_round={self.drift_round}: expected >= 1 with drifted, 0 without.")
        if self.drifted is not None:
            within = len(self.drifted) == 0 or 0 <= int(self.drifted.min()) <= int(self.drifted.max()) < len(self.x)
            if len(self.drifted) != len(self.x) or not within:
                raise DataError(f"{self.name}: drifted must be a position in x for each of {len(self.x)} samples.")
        for named in ("groups", "drifted_groups"):
            numbers = getattr(self, named)
            if numbers and (len(numbers) != self.num_clients or min(numbers) < 0):
                raise DataError(f"{self.name}: {named} must be one number >= 0 for each of {self.num_clients} clients.")

    def _count_tokens(self) -> int:
        low, high = int(self.x.min()), int(self.x.max())
        if low < 0 and not self.num_tokens and not self.task.per_token:
            return 0  # numbers of another kind
        if low < 0 or 0 < self.num_tokens <= high:
            expected = (
                f"to {self.num_tokens - 1}, because num_tokens={self.num_tokens}" if self.num_tokens > 0 else "or more"
            )
            raise DataError(f"{self.name}: tokens in x run from {low} to {high}, expected 0 {expected}.")
        return self.num_tokens or high + 1

    def _check_disjoint(self, used: Tensor) -> None:
        """Refuse a position that stands twice with one client; clients may share some (``partition=label_sets``).

        `used` ``[n]`` are all clients' positions, one part after the other.
        """
        if len(used) == 0 or int(torch.bincount(used).max()) <= 1:
            return
        owner = torch.cat([torch.repeat_interleave(torch.arange(self.num_clients), self.sizes(part)) for part in PARTS])
        owned, counts = torch.unique(owner * len(self.x) + used, return_counts=True)
        if int(counts.max()) > 1:
            client, position = divmod(int(owned[counts > 1][0]), len(self.x))
            places = [part for part in PARTS for sample in self.part(part)[client].tolist() if sample == position]
            raise DataError(
                f"{self.name}: sample {position} of client {client} stands in {' and in '.join(places)}; each of its "
                f"samples must stand in one part, once."
            )

    def _check_unowned(self, named: str, positions: Tensor) -> None:
        if len(positions) == 0 or int(positions.min()) < 0 or int(positions.max()) >= len(self.x):
            raise DataError(f"{self.name}: {named} must list positions in 0..{len(self.x) - 1}, at least one.")
        unassigned = torch.ones(len(self.x), dtype=torch.bool)
        for part in PARTS:
            unassigned[torch.cat(list(self.part(part))).cpu()] = False
        if named == "global_test" and self.public is not None:
            unassigned[self.public] = False
        if not bool(unassigned[positions].all()):
            count = int((~unassigned[positions]).sum())
            owner = "a client" if named == "public" else "a client or are public"
            raise DataError(f"{self.name}: {count} {named} samples also belong to {owner}.")

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
        positions: NDArray[np.int64] = self.positions("train", client, round).numpy()
        return positions

    def positions(self, part: Part, client: int, round: int) -> Tensor:
        """Positions in `x` of a client's samples in a round, int64 ``[n_k]``: those of :meth:`part`, or after a drift.

        Parameters
        ----------
        part : {"train", "validation", "test"}
        client : int
        round : int
        """
        listed = self.part(part)[client]
        return listed if self.drifted is None or round < self.drift_round else self.drifted[listed]

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

        For a task without classes (:attr:`Task.classes`), samples per client, ``[num_clients, 1]``.
        """
        if not self.task.classes:
            return self.sizes(part).unsqueeze(1)
        y = self.y.cpu()
        rows = [torch.bincount(y[i.cpu()], minlength=self.num_classes) for i in self.part(part)]
        return torch.stack(rows)

    def to(self, device: torch.device | str) -> Self:
        """The same data with arrays on `device`, uncopied if they are there; index lists stay on the CPU."""
        x, y = self.x.to(device), self.y.to(device)
        return self if x is self.x and y is self.y else replace(self, x=x, y=y)

    def restrict(self, clients: Sequence[int]) -> Self:
        """Keep the samples of some clients only.

        Client numbers stay, the lists of all others become empty (`elsewhere`), `public` and `global_test` become None,
        and positions in `x` are numbered anew where a copy takes only what is used.

        Parameters
        ----------
        clients : sequence of int
            Of which the data are here: not `elsewhere` already.
        """
        selected = set(clients)
        nothing = torch.zeros(0, dtype=torch.int64)
        lists: dict[Part, list[Tensor]] = {
            part: [positions if client in selected else nothing for client, positions in enumerate(self.part(part))]
            for part in PARTS
        }
        elsewhere = tuple(client for client in range(self.num_clients) if client not in selected)
        return replace(
            self, elsewhere=elsewhere, public=None, global_test=None, global_owners=None, **self._compact(lists)
        )

    def _compact(self, lists: Mapping[Part, list[Tensor]]) -> dict[str, Any]:
        """Fields of data with these index lists, without samples that are in none of them."""
        used = torch.cat([positions for part in PARTS for positions in lists[part]])
        used = torch.unique(used if self.drifted is None else torch.cat([used, self.drifted[used]]))
        new_positions = torch.zeros(len(self.x), dtype=torch.int64)
        new_positions[used] = torch.arange(len(used))
        rows, all_used = used.to(self.device), len(used) == len(self.x)
        return {
            "x": self.x if all_used else self.x[rows],
            "y": self.y if all_used else self.y[rows],
            "drifted": None if self.drifted is None else new_positions[self.drifted[used]],
            **{part: [new_positions[positions] for positions in index_lists] for part, index_lists in lists.items()},
        }

    @cached_property
    def checksum(self) -> str:
        """16 hex digits that change when any sample, label or assignment changes."""
        digest = hashlib.blake2b(digest_size=8)
        for array in (self.x, self.y):
            digest.update(str((tuple(array.shape), array.dtype)).encode())
            for block in blocks(array):
                digest.update(np.ascontiguousarray(block).data)
        for part in PARTS:
            for indices in self.part(part):
                digest.update(f"{part}{len(indices)}".encode())
                digest.update(np.ascontiguousarray(indices.cpu().numpy()).data)
        if self.public is not None:
            digest.update(f"public{len(self.public)}".encode())
            digest.update(np.ascontiguousarray(self.public.cpu().numpy()).data)
        if self.global_test is not None:
            digest.update(f"global{len(self.global_test)}".encode())
            digest.update(np.ascontiguousarray(self.global_test.numpy()).data)
        if self.unseen:
            digest.update(f"unseen{self.unseen}".encode())
        if self.groups:
            digest.update(f"groups{self.groups}".encode())
        if self.drifted is not None:
            digest.update(f"drift{self.drift_round}".encode())
            digest.update(np.ascontiguousarray(self.drifted.numpy()).data)
        digest.update(self._rules().encode())
        return digest.hexdigest()

    def _rules(self) -> str:
        """What besides arrays decides the samples of a round, for the checksum."""
        return ""


def _as_tensor(values: Any, what: str) -> Tensor:
    """A tensor as it is; arrays and lists with PyTorch's default types."""
    if isinstance(values, Tensor):
        return values
    try:
        array = np.asarray(values)
        tensor = torch.as_tensor(array)
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} must be a tensor, an array or a list of numbers ({reason(error)}).") from error
    if tensor.is_floating_point():
        return tensor.to(torch.get_default_dtype())
    return tensor if tensor.is_complex() or tensor.dtype == torch.bool else tensor.long()


def _as_positions(values: Any, what: str) -> Tensor:
    """Int64 ``[n]`` on the CPU."""
    if isinstance(values, Tensor) and values.dtype == torch.int64 and values.dim() == 1:  # most are, of 10^5 clients
        return values if values.is_cpu else values.cpu()
    tensor = _as_tensor(values, what).cpu()
    if tensor.dim() == 1 and len(tensor) == 0:  # an empty list has no type
        return tensor.long()
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise DataError(f"{what} lists {kind} {list(tensor.shape)}, expected positions, whole numbers [n].")
    return tensor.long()
