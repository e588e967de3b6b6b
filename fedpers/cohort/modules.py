"""Layers whose result depends on other samples or on chance, made fit for a cohort.

In a cohort a short batch is padded to the width of its neighbours'. Batch normalization must not see the padding,
and dropout must draw from the client's own numbers, not from a global generator. :func:`prepare` gives a network
layers that do so; parameters, buffers and their names stay as they are.

A parameter or buffer may have several names, because one module does (``self.head = self.classifier``) or because
frozen parameters are tied. The first in the network's order is its canonical name, by which trees know it; the others
are aliases.
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
    layer_index = 0  # tells the dropout layers of one network apart

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        if self.p == 1 or self.key is None:
            return torch.zeros_like(input) if self.p == 1 else F.dropout(input, self.p)
        shape = input.shape[:2] if self.whole_channels else input.shape
        count = 1
        for length in shape:
            count *= length
        bits = _hash(torch.arange(count, device=input.device) + self.layer_index * 0x51ED270B, self.key)
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

    One module may stand under several names, and frozen parameters may be tied, as a language model's embedding and
    output are. Frozen parameters are shared with `module`, see :func:`copy_network`.

    Raises
    ------
    ConfigError
        If trainable parameters or buffers of different modules are tied; a layer draws from a global generator or
        spans processes (``AlphaDropout``, ``SyncBatchNorm``, ``RReLU``, attention and recurrent layers with dropout of
        their own); a layer is a subclass of a batch normalization or dropout whose code is not known, or normalizes by
        the batch in evaluation too.
    """
    if tied := _tied(module):
        allowed = f"a network in which only frozen parameters are tied, not '{tied[0]}' and '{tied[1]}'"
        raise ConfigError("model", type(module).__name__, allowed)
    prepared = copy_network(module)
    for layer_index, (name, layer) in enumerate(prepared.named_modules()):
        if allowed := _objection(layer):
            raise ConfigError("model", f"{type(layer).__name__} at '{name}'", allowed)
        if type(layer) in _REPLACED:
            layer.__class__ = _REPLACED[type(layer)]
            layer.__dict__["layer_index"] = layer_index
    return prepared


def _tied(module: nn.Module) -> tuple[str, str] | None:
    """Names of a trainable parameter or a persistent buffer that two different modules, or two names of one, hold."""
    names: dict[int, str] = {}
    for prefix, layer in module.named_modules():  # each module once, whatever number of names it has
        saved = [(n, b) for n, b in layer._buffers.items() if n not in layer._non_persistent_buffers_set]
        for name, value in [*layer._parameters.items(), *saved]:
            if value is None or (isinstance(value, nn.Parameter) and not value.requires_grad):
                continue
            dotted = f"{prefix}.{name}" if prefix else name
            if id(value) in names:
                return names[id(value)], dotted
            names[id(value)] = dotted
    return None


def copy_network(module: nn.Module, device: torch.device | str | None = None) -> nn.Module:
    """Copy of a network that shares its frozen parameters: however many copies a process has, they lie there once.

    All other parameters and all buffers are the copy's own. Parameters that require no gradient must not be changed in
    place, which ``copy.to(...)`` would do: the copy is made on its device at once.

    Parameters
    ----------
    module : nn.Module
    device : torch.device or str, optional
        Where the copy lies, by default where each part of `module` does. Frozen parameters that lie elsewhere are
        copied there.
    """
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    memo: dict[int, Any] = {id(parameter): parameter for parameter in frozen}
    if device is not None:
        memo = {id(p): nn.Parameter(p.detach().to(device), requires_grad=False) for p in frozen}
    copied = copy.deepcopy(module, memo)
    return copied if device is None else copied.to(device)


def canonical_names(module: nn.Module) -> dict[str, str]:
    """Canonical name of each parameter and buffer, by every name it has: the first in the network's order."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, value in named:
        names[name] = first.setdefault(id(value), name)
    return names


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
        By any name of each; what it lacks keeps its value in `module`.
    x : Tensor ``[B, ...]``
    """
    slots = _facts(module).slots
    before = [(*slots[name], slots[name][0][slots[name][1]]) for name in tensors]
    try:
        for (holder, name, _), tensor in zip(before, tensors.values(), strict=True):
            holder[name] = tensor
        out: Tensor = module(x)
    finally:
        for holder, name, value in before:
            holder[name] = value
    return out


def part_tensors(module: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of one part of a network, by their names in it, for :func:`call` on that part.

    Parameters
    ----------
    module : nn.Module
    name : str
        Dotted name of a submodule, any of those it has.
    tensors : mapping of name to Tensor
        Of the whole network, by any name of each. What stands outside the part is left out.

    Raises
    ------
    AttributeError
        If there is no such submodule.
    """
    facts = _facts(module)
    inside = facts.parts.get(name)
    if inside is None:
        within = canonical_names(module.get_submodule(name))
        local_names = {facts.names[f"{name}.{n}"]: first for n, first in within.items()}
        inside = {n: local_names[canonical] for n, canonical in facts.names.items() if canonical in local_names}
        facts.parts[name] = inside
    return {inside[n]: tensor for n, tensor in tensors.items() if n in inside}


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
    slots: dict[str, tuple[dict[str, Any], str]]  # where each parameter and buffer is kept, by any dotted name
    layers: list[_BatchNorm | _Dropout]
    names: dict[str, str]  # canonical names, see canonical_names
    parts: dict[str, dict[str, str]]  # by part: the names of the network's tensors -> their names in the part


def _facts(module: nn.Module) -> _Facts:
    cached = module.__dict__.get("_cohort_facts")
    if isinstance(cached, _Facts) and cached.owner == id(module):  # a copy of a module looks again
        return cached
    slots = {
        f"{prefix}.{name}" if prefix else name: (holder, name)
        for prefix, layer in module.named_modules(remove_duplicate=False)
        for holder in (layer._parameters, layer._buffers)
        for name in holder
    }
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm | _Dropout)]
    facts = module.__dict__["_cohort_facts"] = _Facts(id(module), slots, layers, canonical_names(module), {})
    return facts


def has_dropout(module: nn.Module) -> bool:
    """Whether a forward pass in training mode draws random numbers."""
    return any(isinstance(layer, nn.modules.dropout._DropoutNd) for layer in module.modules())
