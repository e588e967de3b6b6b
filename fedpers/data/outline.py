"""What of a data set networks and methods are built from, without its samples; checkpoints hold it.

With it a run's networks can be made where its data are not. Whatever asks for samples is told that there are none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from fedpers.data.federated import FederatedData
from fedpers.data.fields import InputField
from fedpers.data.ratings import RankingData
from fedpers.errors import DataError
from fedpers.tasks import Classification, NextToken, Ranking, Regression, Task

_TASKS: dict[str, type[Task]] = {kind.name: kind for kind in (Classification, NextToken, Ranking, Regression)}
_FEWEST = 3
"""Samples with which networks are tried."""
_MOST_CLIENTS = 10**7


class SamplesNeededError(DataError):
    """Samples were asked of an outline."""


def outline_of(data: FederatedData) -> dict[str, Any] | None:
    """Plain values from which :func:`outlined` makes data without samples; None for a task of the user's own."""
    if _TASKS.get(data.task.name) is not type(data.task):
        return None
    return {
        "name": data.name,
        "x": [list(data.x.shape[1:]), str(data.x.dtype).removeprefix("torch.")],
        "y": [list(data.y.shape[1:]), str(data.y.dtype).removeprefix("torch.")],
        "task": {"name": data.task.name, **asdict(data.task)},  # type: ignore[call-overload]
        "clients": data.num_clients,
        "classes": data.num_classes,
        "tokens": data.num_tokens,
        "items": data.num_items,
        "fields": [asdict(each) for each in data.fields],
        "unseen": list(data.unseen),
        "anchors": list(data.anchors),
        "groups": list(data.groups),
        "client_names": list(data.client_names),
        "class_names": list(data.class_names),
    }


def outlined(outline: Mapping[str, Any], batch_size: int = 0) -> FederatedData:
    """Data of which everything is as :func:`outline_of` says but the samples.

    Parameters
    ----------
    outline : mapping
    batch_size : int
        Of the training, to which a network must not object.

    Raises
    ------
    DataError
        If it says nothing that data can be.
    """
    try:
        settings = dict(outline["task"])
        task = _TASKS[settings.pop("name")](**settings)
        count = int(outline["clients"])
        if not 1 <= count <= _MOST_CLIENTS:
            raise ValueError(f"{count} clients")
        name, client_names = str(outline["name"]), tuple(map(str, outline["client_names"]))
        unseen = tuple(map(int, outline["unseen"]))
        if isinstance(task, Ranking):
            lists = [np.zeros(1, dtype=np.int64)] * count
            of_items = OutlinedRatings.of_items
            return of_items(
                int(outline["items"]), lists, lists, lists, name=name, unseen=unseen, negatives=0,
                protocol=task.protocol_name, top_k=task.top_k, client_names=client_names,
            )  # fmt: skip
        size = max(_FEWEST, batch_size)
        first = next(client for client in range(count) if client not in unseen)  # it has all the samples there are
        samples = [torch.zeros(0, dtype=torch.int64)] * count
        samples[first] = torch.arange(size)
        nothing = [torch.zeros(0, dtype=torch.int64)] * count
        return OutlinedData(
            _zeros(size, outline["x"]),
            _zeros(size, outline["y"]),
            samples,
            nothing,
            nothing,
            int(outline["classes"]),
            name,
            unseen=unseen,
            anchors=tuple(map(int, outline["anchors"])),
            groups=tuple(map(int, outline["groups"])),
            elsewhere=tuple(client for client in range(count) if client != first),
            class_names=tuple(map(str, outline["class_names"])),
            num_tokens=int(outline["tokens"]),
            fields=tuple(InputField(str(f["name"]), tuple(f["shape"]), bool(f["whole"])) for f in outline["fields"]),
            task=task,
            client_names=client_names,
        )
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, StopIteration, DataError) as error:
        raise DataError(f"what a checkpoint says of its data cannot be used ({error}).") from error


def _zeros(size: int, said: Any) -> Tensor:
    """Zeros of a shape and a type, which take no memory."""
    shape, kind = said
    dtype = getattr(torch, str(kind))
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"no type '{kind}'")
    return torch.zeros((), dtype=dtype).expand(size, *map(int, shape))


class WithoutSamples(FederatedData):
    """Says of clients' samples that they are not there."""

    def samples(self, client: int, seed: int, round: int) -> NoReturn:
        """Refuse."""
        raise SamplesNeededError(f"the samples of client {client} are needed.")

    def positions(self, part: Any, client: int, round: int) -> NoReturn:
        """Refuse."""
        raise SamplesNeededError(f"the samples of client {client} are needed.")

    def sizes(self, part: Any = "train") -> Tensor:
        """As if each client had all samples there are."""
        return torch.full((self.num_clients,), len(self.x))

    def label_counts(self, part: Any = "train") -> NoReturn:
        """Refuse."""
        raise SamplesNeededError("the labels of all clients are needed.")


class OutlinedData(WithoutSamples):
    """:class:`FederatedData` without samples."""


class OutlinedRatings(WithoutSamples, RankingData):
    """:class:`RankingData` without ratings."""
