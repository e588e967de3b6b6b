"""Initial values that depend on a seed alone."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import nn

from fedpers.errors import check
from fedpers.randomness import derive

M = TypeVar("M", bound=nn.Module)


@contextlib.contextmanager
def drawing(seed: int, purpose: str, *ids: int) -> Iterator[None]:
    """Let torch's layers draw their values on the CPU from (seed, purpose, ids).

    They know only the global generator; afterwards it is as it was.
    """
    with torch.random.fork_rng(devices=[]):  # devices=[]: only the CPU generator is used, no GPU is looked at
        torch.default_generator.manual_seed(derive(seed, purpose, *ids))
        yield


def fresh(model: M, seed: int, *ids: int) -> M:
    """Copy of a network with all values drawn anew, as a newly built one has them.

    Parameters
    ----------
    model : nn.Module
        Left as it is. Every layer that owns parameters must have ``reset_parameters``, as PyTorch's and ours do.
    seed : int
        The run's seed.
    *ids : int
        What tells this copy from others, e.g. the expert's number. Equal seeds and ids give equal values.

    Returns
    -------
    nn.Module
        On the device of `model`, with the same frozen parameters and mode; running statistics start anew.

    Raises
    ------
    ConfigError
        If a layer cannot be drawn anew.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    new = copy.deepcopy(model).to("cpu")
    if getattr(new, "pretrained_accuracy", None) is not None:
        new.pretrained_accuracy = None  # type: ignore[assignment]
    with drawing(seed, "fresh", *ids):
        for name, layer in reversed(list(new.named_modules())):  # a network's own rules come after its layers'
            reset = _reset_of(layer)
            owns = next(layer.parameters(recurse=False), None) is not None
            allowed = "a layer with a method reset_parameters"
            check(reset is not None or not owns, "model", f"{type(layer).__name__} at '{name}'", allowed)
            if reset is not None:
                reset()
    return new.to(device)


def _reset_of(layer: nn.Module) -> Callable[[], object] | None:
    for method in ("reset_parameters", "_reset_parameters"):  # nn.MultiheadAttention hides its own
        bound_method = getattr(layer, method, None)
        if callable(bound_method):
            reset: Callable[[], object] = bound_method
            return reset
    return None
