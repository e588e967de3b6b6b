"""Layers whose result depends on other samples or on chance, made fit for a cohort.

In a cohort a short batch is padded to the width of its neighbours'. Batch normalization must not see the padding,
and dropout must draw from the client's own numbers, not from a global generator. :func:`prepare` gives a network
layers that do so; parameters, buffers and their names stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpers.errors import ConfigError

_MASK32 = 0xFFFFFFFF


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalization that leaves padding out of the statistics."""

    weight_of_batch: Tensor | None = None  # [B], 1 for a sample and 0 for padding; None without padding

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        samples = input.numel() // input.shape[1]
        if samples == 1 and self.weight_of_batch is None:
            raise ValueError("batch normalization cannot train on a batch of one value per channel")
        if self.weight_of_batch is None and self.momentum is not None:
            return super().forward(input)
        real = input.new_ones(len(input)) if self.weight_of_batch is None else self.weight_of_batch.to(input.dtype)
        weight = real.view(-1, *([1] * (input.dim() - 1)))
        axes = [axis for axis in range(input.dim()) if axis != 1]
        shape = [1, -1] + [1] * (input.dim() - 2)
        total = real.sum() * (samples // input.shape[0])
        mean = (input * weight).sum(axes) / total
        centered = input - mean.view(shape)
        variance = (centered.square() * weight).sum(axes) / total
        # Under vmap nothing can be raised for one client: a single value gives NaN, for which that client is left out.
        variance = torch.where(total > 1, variance, torch.nan)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            share = 1.0 / self.num_batches_tracked.to(mean.dtype) if self.momentum is None else self.momentum
            unbiased = variance.detach() * (total / (total - 1))
            self.running_mean.add_(share * (mean.detach() - self.running_mean))
            self.running_var.add_(share * (unbiased - self.running_var))
        out = centered * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out


class _BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    pass


class _BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    pass


class _BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    pass


class _Dropout(nn.modules.dropout._DropoutNd):
    """Dropout whose mask is a hash of (client and step, layer, place): the same on every device and cohort."""

    whole_channels = False
    key: Tensor | None = None  # one int64 number for this client and step
    place = 0  # tells the dropout layers of one network apart

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        if self.p == 1 or self.key is None:
            return torch.zeros_like(input) if self.p == 1 else F.dropout(input, self.p)
        shape = input.shape[:2] if self.whole_channels else input.shape
        count = 1
        for length in shape:
            count *= length
        bits = _hash(torch.arange(count, device=input.device) + self.place * 0x51ED270B, self.key)
        keep = (bits >= int(self.p * 2**32)).view(*shape, *([1] * (input.dim() - len(shape))))
        return input * keep.to(input.dtype) / (1 - self.p)


class _ElementDropout(_Dropout, nn.Dropout):
    pass


class _ChannelDropout(_Dropout, nn.Dropout2d):
    whole_channels = True


def _hash(counter: Tensor, key: Tensor) -> Tensor:
    """32 well mixed bits (in int64) per counter value; the finalizer of MurmurHash3, twice keyed."""
    value = counter
    for half in (key & _MASK32, (key >> 32) & _MASK32):
        value = (value * 0x9E3779B1 + half) & _MASK32
        value = ((value ^ (value >> 16)) * 0x85EBCA6B) & _MASK32
        value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _MASK32
        value = value ^ (value >> 16)
    return value


_REPLACED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: _BatchNorm1d,
    nn.BatchNorm2d: _BatchNorm2d,
    nn.BatchNorm3d: _BatchNorm3d,
    nn.Dropout: _ElementDropout,
    nn.Dropout1d: _ChannelDropout,
    nn.Dropout2d: _ChannelDropout,
    nn.Dropout3d: _ChannelDropout,
}
_REFUSED = (nn.AlphaDropout, nn.FeatureAlphaDropout, nn.SyncBatchNorm, nn.RReLU)
_BATCH_LAYERS = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)


def prepare(module: nn.Module) -> nn.Module:
    """Copy of `module` whose batch normalization and dropout layers work in a cohort.

    Raises
    ------
    ConfigError
        If parameters are tied; a layer draws from a global generator or spans processes (``AlphaDropout``,
        ``SyncBatchNorm``, ``RReLU``, attention and recurrent layers with dropout of their own); a layer is a subclass
        of a batch normalization or dropout whose code is not known, or normalizes by the batch in evaluation too.
    """
    names = list(module.state_dict())
    if len({id(value) for value in module.state_dict(keep_vars=True).values()}) < len(names):
        raise ConfigError("model", type(module).__name__, "a network without tied parameters")
    prepared = copy.deepcopy(module)
    for place, (name, layer) in enumerate(prepared.named_modules()):
        if allowed := _objection(layer):
            raise ConfigError("model", f"{type(layer).__name__} at '{name}'", allowed)
        if type(layer) in _REPLACED:
            layer.__class__ = _REPLACED[type(layer)]
            layer.__dict__["place"] = place
    return prepared


def _objection(layer: nn.Module) -> str:
    """What to use instead of `layer`; empty if it works in a cohort."""
    if isinstance(layer, _REFUSED):
        return "layers that need no global generator"
    if isinstance(layer, nn.MultiheadAttention | nn.RNNBase) and layer.dropout:
        return "dropout=0 in attention and recurrent layers, and nn.Dropout layers of their own"
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
        return "track_running_stats=False" if layer.track_running_stats else ""
    if not isinstance(layer, _BATCH_LAYERS):
        return ""
    if type(layer) not in _REPLACED and not isinstance(layer, _BatchNorm | _Dropout):
        return "PyTorch's own batch normalization and dropout layers"
    if getattr(layer, "track_running_stats", True) is False:
        return "track_running_stats=True: predictions must not depend on which samples are evaluated together"
    return ""


def call(module: nn.Module, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Apply `module` with other parameters and buffers, which may be those of one client under ``vmap``.

    As ``torch.func.functional_call`` with ``tie_weights=False``, in a tenth of its time: for small networks that call
    costs as much as the computation. No other thread may use `module` meanwhile.

    Parameters
    ----------
    module : nn.Module
    tensors : mapping of name to Tensor
        What it lacks keeps its value in `module`.
    x : Tensor ``[B, ...]``
    """
    slots = _facts(module).slots
    before = [(*slots[name], slots[name][0][slots[name][1]]) for name in tensors]
    try:
        for (own, name, _), tensor in zip(before, tensors.values(), strict=True):
            own[name] = tensor
        out: Tensor = module(x)
    finally:
        for own, name, value in before:
            own[name] = value
    return out


def announce(module: nn.Module, weight: Tensor | None, key: Tensor | None) -> None:
    """Tell a prepared network's layers about the coming batch.

    Parameters
    ----------
    module : nn.Module
    weight : Tensor ``[B]`` or None
        1 for a sample, 0 for padding.
    key : Tensor or None
        One int64 number for this client and step.
    """
    for layer in _facts(module).layers:
        if isinstance(layer, _BatchNorm):
            layer.__dict__["weight_of_batch"] = weight
        else:
            layer.__dict__["key"] = key


@dataclass
class _Facts:
    """What is looked up once per module: it is called at every step."""

    owner: int
    slots: dict[str, tuple[dict[str, Any], str]]  # where each parameter and buffer is kept, by dotted name
    layers: list[_BatchNorm | _Dropout]


def _facts(module: nn.Module) -> _Facts:
    known = module.__dict__.get("_cohort_facts")
    if isinstance(known, _Facts) and known.owner == id(module):  # a copy of a module looks again
        return known
    slots = {
        f"{prefix}.{name}" if prefix else name: (own, name)
        for prefix, layer in module.named_modules()
        for own in (layer._parameters, layer._buffers)
        for name in own
    }
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm | _Dropout)]
    facts = module.__dict__["_cohort_facts"] = _Facts(id(module), slots, layers)
    return facts


def has_dropout(module: nn.Module) -> bool:
    """Whether a forward pass in training mode draws random numbers."""
    return any(isinstance(layer, nn.modules.dropout._DropoutNd) for layer in module.modules())
