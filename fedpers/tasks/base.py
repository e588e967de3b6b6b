"""What every task says: its loss, what a network has to give, its measures, and which of them ranks rounds and runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fedpers.errors import check

if TYPE_CHECKING:
    from fedpers.data.federated import FederatedData, Part


class Task(ABC):
    """What is learned from samples and their labels, and how it is measured; data carry it as ``data.task``.

    Subclasses are frozen dataclasses, so that they compare, hash and travel between processes.

    Attributes
    ----------
    name : str
        For tables and manifests.
    classes : bool
        Whether labels are class ids and a network gives a score for each class.
    per_token : bool
        Whether a network gives scores at each position of a sequence, ``[B, T, V]``, not for a sample as a whole.
    spread : bool
        Whether the distribution of the headline over clients (deviation, worst decile) says something.
    parts_overlap : bool
        Whether a sample may stand in several parts of a client, as items do that are candidates of a ranking.
    baselines : tuple of str
        Strategies that belong in every table of this task.
    """

    name: ClassVar[str]
    classes: ClassVar[bool] = False
    per_token: ClassVar[bool] = False
    spread: ClassVar[bool] = True
    parts_overlap: ClassVar[bool] = False
    baselines: ClassVar[tuple[str, ...]] = ("local", "fedavg")

    @property
    @abstractmethod
    def headline(self) -> str:
        """Name of the metric by which rounds and runs are ranked: at most 1, more is better."""

    @property
    def also(self) -> tuple[str, ...]:
        """Further metrics that a table shows, in percent."""
        return ()

    @property
    def selected_on(self) -> Part:
        """Part on which the best round is chosen."""
        return "validation"

    @property
    def latest_wins(self) -> bool:
        """Whether the latest of equally good rounds is the best one, not the earliest."""
        return False

    @property
    def protocol(self) -> str:
        """How the reported round is chosen, for tables."""
        return "validation-selected"

    @abstractmethod
    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Loss of each sample, ``[B]``; works under ``torch.func.vmap``.

        Parameters
        ----------
        outputs : Tensor ``[B, ...]``
            Of a network for one client's batch.
        y : Tensor ``[B, ...]``
            Its labels.
        """

    def prepare_labels(self, y: Tensor, num_classes: int, name: str) -> Tensor:
        """Labels in the form that :meth:`losses` and :meth:`measure` take; the default changes nothing.

        Parameters
        ----------
        y : Tensor ``[N, ...]``
            As a user gives them.
        num_classes : int
        name : str
            Of the data, for errors.

        Raises
        ------
        DataError
            If they are no labels of this task.
        """
        return y

    def check_outputs(self, outputs: Tensor, data: FederatedData, network: str = "network") -> None:
        """Refuse a network whose outputs do not fit the labels; the default asks for ``[B, C]``, ``C >= num_classes``.

        Parameters
        ----------
        outputs : Tensor ``[B, ...]``
            For some samples of `data`.
        data : FederatedData
        network : str
            What the error calls the network.

        Raises
        ------
        ConfigError
            If they do not fit.
        """
        fits = outputs.dim() == 2 and outputs.shape[1] >= data.num_classes
        allowed = f"a network with {data.num_classes} outputs, not {list(outputs.shape[1:])}"
        check(fits, "model", network, allowed)

    @abstractmethod
    def measure(
        self, outputs: Sequence[Tensor], labels: Sequence[Tensor], num_classes: int, *, auc: bool = False
    ) -> dict[str, Tensor]:
        """Metrics of K clients on one part of their samples.

        A prediction that is not finite counts as a wrong one. NaN stands for a client without samples, and for nothing
        else: a reply with any other NaN is refused as unusable.

        Parameters
        ----------
        outputs : sequence of Tensor ``[n_k, ...]``
            What each client's network gives for its samples.
        labels : sequence of Tensor ``[n_k, ...]``
            The labels of the same samples.
        num_classes : int
        auc : bool
            Also the area under the ROC curve, where that is defined.

        Returns
        -------
        dict of name to Tensor ``[K]``
            float64 on the CPU; ``examples``, the number of samples, and the metrics.
        """


def sum_by_client(values: Tensor, sizes: Tensor) -> Tensor:
    """Sum ``[K, ...]`` of each client's samples; `values` ``[N, ...]``, float64, holds client after client."""
    owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    return torch.zeros(len(sizes), *values.shape[1:], dtype=torch.float64).index_add_(0, owner, values)
