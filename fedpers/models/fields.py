"""Networks that take several inputs by name, on data that hold them as columns of one tensor."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fedpers.data.fields import InputField, unpacked
from fedpers.models.networks import Network


class SplitFields:
    """Forward hook that turns a batch ``[B, F]`` into the network's inputs by name."""

    def __init__(self, fields: Sequence[InputField]) -> None:
        self.fields = tuple(fields)

    def __call__(self, module: nn.Module, args: tuple[object, ...]) -> tuple[object, ...] | None:
        """Replace the columns, which are the only argument."""
        return (unpacked(args[0], self.fields),) if len(args) == 1 and isinstance(args[0], Tensor) else None


def take_fields(model: nn.Module, fields: Sequence[InputField]) -> nn.Module:
    """Let a network of a user's own be given a dictionary of inputs; ours take the columns as they are.

    Parameters
    ----------
    model : nn.Module
        Changed in place, once.
    fields : sequence of InputField
        Of the data; without any the network is left alone.
    """
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    if fields and not isinstance(model, Network) and not any(isinstance(hook, SplitFields) for hook in hooks):
        model.register_forward_pre_hook(SplitFields(fields))
    return model
