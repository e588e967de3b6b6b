"""What methods need of network and data; what is missing is refused in one sentence, before anything is trained."""

from __future__ import annotations

import torch
from torch import nn

from fedpers.data.federated import FederatedData
from fedpers.errors import ConfigError, check


def check_classes(method: str, data: FederatedData) -> None:
    """Refuse data whose samples have no class label each.

    Parameters
    ----------
    method : str
        As typed after ``strategy=``.
    data : FederatedData

    Raises
    ------
    ConfigError
    """
    classes = data.task.classes and data.y.dtype == torch.int64 and data.y.dim() == 1
    allowed = f"another method for {data.name}, whose samples have no class labels"
    check(classes, "strategy", method, allowed)


def body_and_head(method: str, model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """Return the body of a network, which makes features, and its linear head.

    Parameters
    ----------
    method : str
        As typed after ``strategy=``.
    model : nn.Module

    Raises
    ------
    ConfigError
        If it has none.
    """
    body, head = getattr(model, "body", None), getattr(model, "head", None)
    linear = isinstance(head, nn.Linear) and isinstance(head.weight, nn.Parameter)
    if not isinstance(body, nn.Module) or not linear:
        allowed = f"a network with a 'body' and a linear 'head' for strategy={method}"
        raise ConfigError("model", type(model).__name__, allowed)
    assert isinstance(head, nn.Linear)
    return body, head
