"""Matrix factorization for implicit feedback, seen from one user: item vectors are the body, the user is the head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpers.data.federated import FederatedData
from fedpers.errors import ConfigError, check
from fedpers.models.networks import Network


class Factorization(Network):
    """Score of an item: inner product of its vector with the user's, plus a bias.

    Parameters
    ----------
    num_items : int
        Number of items m, >= 1.
    dim : int
        Length of the vectors.
    bias : bool
        Whether the head has a bias.
    """

    def __init__(self, num_items: int, dim: int = 32, bias: bool = True) -> None:
        super().__init__(ItemTable(num_items, dim), nn.Linear(dim, 1, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        """Scores (logits) ``[B, 1]`` of items `x`, int64 ids ``[B]`` from 0 to m - 1."""
        return super().forward(x)


def require_factorization(model: nn.Module, data: FederatedData) -> tuple[Factorization, FederatedData]:
    """Return network and data, checked to be a factorization and ratings.

    Raises
    ------
    ConfigError
        If they are something else.
    """
    ratings = rated(data)
    if not isinstance(model, Factorization):
        raise ConfigError("model", type(model).__name__, "factorization for this method")
    return model, ratings


def rated(data: FederatedData) -> FederatedData:
    """Return data that are ratings.

    Raises
    ------
    ConfigError
        If they are something else.
    """
    check(data.num_items > 0, "dataset", data.name, "ratings, e.g. dataset=synthetic_ratings, for this method")
    return data


class ItemTable(nn.Module):
    """One vector per item.

    Attributes
    ----------
    weight : Tensor ``[m, dim]``
        Standard normal at the start.
    """

    def __init__(self, num_items: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_items, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all vectors anew from torch's generator."""
        nn.init.normal_(self.weight)

    def forward(self, items: Tensor) -> Tensor:
        """Vectors ``[B, dim]`` of items ``[B]``."""
        return F.embedding(items, self.weight)
