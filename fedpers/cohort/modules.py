"""Layers whose result depends on other samples or on chance, made fit for a cohort.

In a cohort a short batch is padded to the width of its neighbours'. Batch normalization must not see the padding,
and dropout must draw from the client's own numbers, not from a global generator. :func:`prepare` gives a network
layers that do so; parameters, buffers and their names stay as they are.

A parameter or buffer may have several names, because one module does (``self.head = self.classifier``) or because
two layers are tied, as a language model's embedding and output are. The first in the network's order is its canonical
name, by which trees know it; the others are aliases.

A network that draws from PyTorch's global generator (dropout inside attention and recurrent layers, functions such as
``F.dropout``) works one client at a time: :func:`seeded` gives it the client's own numbers.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from fedpers.errors import ConfigError

_MASK32 = 0xFFFFFFFF
_GLOBAL_GENERATOR = threading.Lock()


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
    """Dropout whose mask is a hash of (client and step, layer, use, place): the same on every device and cohort."""

    whole_channels = False
    key: Tensor | None = None  # one int64 number for this client and step
    layer_index = 0  # tells the dropout layers of one network apart
    uses = 0  # of this layer so far in this step, which may be used several times in a network, or in a loss

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        if self.p == 1 or self.key is None:
            return torch.zeros_like(input) if self.p == 1 else F.dropout(input, self.p)
        shape = input.shape[:2] if self.whole_channels else input.shape
        count = 1
        for length in shape:
            count *= length
        first = self.layer_index * 0x51ED270B + self._next_use() * 0x2545F491
        bits = _hash(torch.arange(count, device=input.device) + first, self.key)
        keep = (bits >= int(self.p * 2**32)).view(*shape, *([1] * (input.dim() - len(shape))))
        return input * keep.to(input.dtype) / (1 - self.p)

    def _next_use(self) -> int:
        """Number of this use, from 0; gradient checkpointing computes uses again, in the backward pass."""
        if torch._C._current_graph_task_id() != -1:
            if self.uses > 1:
                raise RuntimeError("a dropout layer that a network uses several times cannot be checkpointed")
            return 0
        self.__dict__["uses"] += 1
        return self.uses - 1


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
_BATCH_LAYERS = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
_DRAW_THEMSELVES = (nn.AlphaDropout, nn.FeatureAlphaDropout)


def prepare(module: nn.Module) -> nn.Module:
    """Copy of `module` whose batch normalization and dropout layers work in a cohort.

    Frozen parameters are shared with `module`, see :func:`copy_network`.

    Raises
    ------
    ConfigError
        If a name holds a slash; a parameter is not initialized yet (lazy layers) or is of a dtype that is not trained;
        a layer spans processes (``SyncBatchNorm``), is a subclass of a batch normalization or dropout whose code is not
        known, normalizes by the batch in evaluation too, or is an embedding with sparse gradients or a largest norm.
    """
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if "/" in name:
            allowed = f"a network whose parameters and buffers have names without '/' ('{name}')"
            raise ConfigError("model", type(module).__name__, allowed)
        if is_lazy(value):
            allowed = (
                f"a network whose lazy layers know their shapes ('{name}' does not): call it once on a batch before"
            )
            raise ConfigError("model", type(module).__name__, allowed)
        if value.is_complex() or value.dtype in (torch.bfloat16, torch.float16):
            allowed = f"float32 or float64, not {str(value.dtype).removeprefix('torch.')} ('{name}')"
            raise ConfigError("model", type(module).__name__, f"a network whose parameters and buffers are {allowed}")
    prepared = copy_network(module)
    for layer_index, (name, layer) in enumerate(prepared.named_modules()):
        if allowed := _objection(layer):
            raise ConfigError("model", f"{type(layer).__name__} at '{name}'", allowed)
        if type(layer) in _REPLACED:
            layer.__class__ = _REPLACED[type(layer)]
            layer.__dict__.update(layer_index=layer_index, uses=0)
    return prepared


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


def named_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by every name they have, in the order of ``module.state_dict()``.

    Not that itself: a network may change what it returns.
    """
    values: dict[str, Tensor] = {}
    for path, layer in module.named_modules(remove_duplicate=False):
        buffers = {n: b for n, b in layer._buffers.items() if n not in layer._non_persistent_buffers_set}
        held = {**layer._parameters, **buffers}
        values.update({f"{path}.{n}" if path else n: value for n, value in held.items() if value is not None})
    return values


def _objection(layer: nn.Module) -> str:
    """What to use instead of `layer`; empty if it works in a cohort."""
    if isinstance(layer, nn.SyncBatchNorm):
        return "layers that stay in one process, such as nn.BatchNorm2d"
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
        return "track_running_stats=False" if layer.track_running_stats else ""
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and (layer.sparse or layer.max_norm is not None):
        return "sparse=False: gradients are dense" if layer.sparse else "max_norm=None: only training changes weights"
    if not isinstance(layer, _BATCH_LAYERS) or type(layer) in _DRAW_THEMSELVES:
        return ""
    if type(layer) not in _REPLACED and not isinstance(layer, _BatchNorm | _Dropout):
        return "PyTorch's own batch normalization and dropout layers"
    if getattr(layer, "track_running_stats", True) is False:
        return "track_running_stats=True: predictions must not depend on which samples are evaluated together"
    return ""


def call(module: nn.Module, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Apply `module` with other parameters and buffers, which may be those of one client under ``vmap``.

    As ``torch.func.functional_call`` with ``tie_weights=False``, in a tenth of its time: for small networks that call
    costs as much as the computation. No other thread may use `module` meanwhile. What the network assigns to a
    buffer is written into `tensors`, as what it changes in place is.

    Parameters
    ----------
    module : nn.Module
    tensors : mapping of name to Tensor
        By any name of each; what it lacks keeps its value in `module`.
    x : Tensor ``[B, ...]``
    """
    slots = _facts(module).slots
    before = [(*slot, slot[0][slot[1]], tensor) for name, tensor in tensors.items() for slot in slots[name]]
    try:
        for holder, name, _, tensor in before:
            holder[name] = tensor
        out: Tensor = module(x)
        for holder, name, _, tensor in before:
            if holder[name] is not tensor:  # a buffer that the network assigned, rather than changed in place
                tensor.copy_(holder[name].detach())
    finally:
        for holder, name, value, _ in before:
            holder[name] = value
    return out


@contextmanager
def seeded(key: Tensor | None, device: torch.device) -> Iterator[None]:
    """Let PyTorch's global generator give the numbers of one client and step; its state is restored.

    Other threads wait meanwhile: there is one such generator for all of them.

    Parameters
    ----------
    key : Tensor or None
        One int64 number for this client and step; None leaves the generator alone.
    device : torch.device
        Where the network computes.
    """
    if key is None:
        yield
        return
    with _GLOBAL_GENERATOR, torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(key))
        yield


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
        elif layer.key is not key:
            layer.__dict__.update(key=key, uses=0)


def linear_weights(module: nn.Module) -> frozenset[str]:
    """Canonical names of the weights of linear layers and of attention's joint projection."""
    return _facts(module).linear_weights


@dataclass
class _Facts:
    """What is looked up once per module: it is called at every step."""

    owner: int
    slots: dict[str, list[tuple[dict[str, Any], str]]]  # all places of a parameter or buffer, by any dotted name
    layers: list[_BatchNorm | _Dropout]
    names: dict[str, str]  # canonical names, see canonical_names
    linear_weights: frozenset[str]
    parts: dict[str, dict[str, str]]  # by part: the names of the network's tensors -> their names in the part


def _facts(module: nn.Module) -> _Facts:
    cached = module.__dict__.get("_cohort_facts")
    if isinstance(cached, _Facts) and cached.owner == id(module):  # a copy of a module looks again
        return cached
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for layer in module.modules():
        for holder in (layer._parameters, layer._buffers):
            for name, value in holder.items():
                places.setdefault(id(value), []).append((holder, name))
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    slots = {name: places[id(value)] for name, value in named}
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm | _Dropout)]
    names = canonical_names(module)
    held = {nn.Linear: "weight", nn.MultiheadAttention: "in_proj_weight"}
    linear = [
        f"{name}.{weight}".removeprefix(".")
        for name, layer in module.named_modules()
        for kind, weight in held.items()
        if isinstance(layer, kind)
    ]
    weights = frozenset(names[name] for name in linear if name in names)
    facts = module.__dict__["_cohort_facts"] = _Facts(id(module), slots, layers, names, weights, {})
    return facts


def has_dropout(module: nn.Module) -> bool:
    """Whether a network has layers of dropout, which need a key in training."""
    return any(isinstance(layer, nn.modules.dropout._DropoutNd) for layer in module.modules())
