"""Networks whose last layer has another name than ``head``."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fedpers.errors import ConfigError, check, one_of
from fedpers.models.networks import Network


def with_head(model: nn.Module, name: str, sample: Tensor) -> Network:
    """Network with the parts ``body`` and ``head`` that computes what `model` does.

    The layer called `name` is the head. The body is the rest of the network, in which an identity stands wherever the
    layer did; so ``fc.weight`` becomes ``head.weight``, and ``layer1.weight`` becomes ``body.layer1.weight``.

    Parameters
    ----------
    model : nn.Module
        Left as it is. One of ours is only copied if `name` is ``head``.
    name : str
        Dotted name of the layer that is applied last, e.g. ``fc``, ``classifier.6`` or, in an ``nn.Sequential``, ``2``;
        of several names for one module any.
    sample : Tensor ``[B, ...]``
        Samples to compare the outputs on, on the device of `model`. A function after the layer that changes none of
        them, such as dropout, is not noticed.

    Raises
    ------
    ConfigError
        If there is no such layer, it has no parameters, or it is not the last one applied.
    """
    if name == "head" and isinstance(model, Network):
        return copy.deepcopy(model)
    layers = [layer for layer, _ in model.named_modules(remove_duplicate=False) if layer]
    check(name in layers, "model.head", name, one_of(layers, name))
    body = copy.deepcopy(model)
    modes = [(module, module.training) for module in body.modules()]
    head, identity = body.get_submodule(name), nn.Identity()
    check(next(head.parameters(), None) is not None, "model.head", name, "a layer that has parameters")
    with torch.no_grad():
        try:
            before = body.eval()(sample)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            allowed = f"a network that takes samples of shape {list(sample.shape[1:])} ({error})"
            raise ConfigError("model", type(model).__name__, allowed) from error
        for parent in list(body.modules()):
            for child, module in parent._modules.items():
                if module is head:
                    parent._modules[child] = identity
        network = Network(body, head)
        try:
            same = _equal(network.eval()(sample), before)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):  # what follows needs another shape
            same = False
    check(same, "model.head", name, "the layer that is applied last, whose output is the output of the network")
    for module, training in [(network, model.training), (identity, model.training), *modes]:
        module.training = training
    network.pretrained_accuracy = getattr(model, "pretrained_accuracy", None)
    return network


def _equal(one: object, other: object) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != other.shape:
        return False
    return torch.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)
