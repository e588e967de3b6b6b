"""Weights for ViT-B/16, from torchvision, timm or a file."""

from __future__ import annotations

import importlib
import pickle
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedpers.data.torchvision_shim import import_torchvision
from fedpers.errors import ConfigError, DataError
from fedpers.models.networks import Network

DOWNLOAD_TIMEOUT = 30.0  # seconds without an answer

_BLOCK = r"^(?:encoder\.layers\.encoder_layer_|blocks\.)(\d+)\."
_NAMES = [  # torchvision's names, timm's, or both -> ours; the first that matches
    (r"^class_token$|^cls_token$", r"body.cls"),
    (r"^encoder\.pos_embedding$|^pos_embed$", r"body.positions"),
    (r"^(?:conv_proj|patch_embed\.proj)\.", r"body.patch."),
    (_BLOCK + r"(?:ln_|norm)([12])\.", r"body.blocks.\1.norm\2."),
    (_BLOCK + r"self_attention\.in_proj_", r"body.blocks.\1.qkv."),
    (_BLOCK + r"attn\.qkv\.", r"body.blocks.\1.qkv."),
    (_BLOCK + r"(?:self_attention\.out_proj|attn\.proj)\.", r"body.blocks.\1.out."),
    (_BLOCK + r"mlp\.(?:0|linear_1|fc1)\.", r"body.blocks.\1.fc1."),  # linear_1: torchvision's published file
    (_BLOCK + r"mlp\.(?:3|linear_2|fc2)\.", r"body.blocks.\1.fc2."),
    (r"^(?:encoder\.ln|norm)\.", r"body.norm."),
]
_HEADS = ("head.", "heads.", "pre_logits.")


def load_weights(model: Network, weights: str) -> None:
    """Give the body of a ViT-B/16 the values of trained weights; the head keeps its own.

    The weights were trained on ImageNet's pictures, normalized by their mean and deviation; a data set's pictures are
    normalized by its own here, and the difference is small.

    Parameters
    ----------
    model : Network
        With a :class:`fedpers.models.vit.VisionBody`.
    weights : str
        ``imagenet`` (torchvision's ``IMAGENET1K_V1``, downloaded once to torch's cache), ``timm:NAME`` (needs timm) or
        the path of a state dict with torchvision's, timm's or our own names, ``.safetensors`` or saved by torch.
        ``random`` is no weights and never comes here.

    Raises
    ------
    ConfigError
        If there is no such file, it holds something else, or timm is needed and not installed.
    DataError
        If the weights can neither be found nor downloaded.
    """
    if weights == "imagenet":
        state = _imagenet()
    elif weights.startswith("timm:"):
        state = _timm(weights)
    else:
        state = _file(weights)
    _fill(model, state, weights)


def _imagenet() -> Mapping[str, Tensor]:
    import_torchvision()
    from torchvision.models import ViT_B_16_Weights

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        source = ViT_B_16_Weights.IMAGENET1K_V1
        state: dict[str, Tensor] = source.get_state_dict(
            progress=False, check_hash=True, map_location="cpu", weights_only=True
        )
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(
            f"vit_b16: the weights are not in {torch.hub.get_dir()}/checkpoints and the download failed "
            f"({_reason(error)}); set model.weights to the path of a file, or to random."
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return state


def _timm(weights: str) -> Mapping[str, Tensor]:
    try:
        timm: Any = importlib.import_module("timm")  # optional
    except ImportError as error:
        allowed = "imagenet, random or the path of a file, because timm is not installed"
        raise ConfigError("model.weights", weights, allowed) from error
    name = weights.removeprefix("timm:")
    try:
        with torch.random.fork_rng(devices=[]):  # its layers draw values before they get the weights
            state: dict[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # the errors of timm, of the hub's client and of the network have no common base
        raise DataError(f"vit_b16: timm cannot provide the weights '{name}' ({_reason(error)}).") from error
    return state


def _file(weights: str) -> Mapping[str, Tensor]:
    path = Path(weights).expanduser()
    if not path.is_file():
        raise ConfigError("model.weights", weights, "imagenet, random, timm:NAME or the path of a file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise whatever their reader happens to meet
        raise ConfigError("model.weights", weights, f"a readable file of weights ({_reason(error)})") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError("model.weights", weights, "a file that holds a state dict: names and tensors")
    return state


def _fill(model: Network, state: Mapping[str, Tensor], weights: str) -> None:
    """Rename, check and copy."""
    body_state = {name: value for name, value in model.state_dict().items() if name.startswith("body.")}
    known = {_rename(name): value for name, value in state.items() if not name.startswith(_HEADS)}
    renamed = {name: _in_our_shape(name, value) for name, value in known.items()}
    wrong = [f"{name} is missing" for name in body_state if name not in renamed]
    wrong += [f"{name} is unknown" for name in renamed if name not in body_state]
    for name, value in body_state.items():
        if name in renamed and renamed[name].shape != value.shape:
            wrong.append(f"{name} has shape {tuple(known[name].shape)} instead of {tuple(value.shape)}")
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        kind = "weights of a ViT-B/16 for 224x224 pictures in torchvision's or timm's layout"
        raise ConfigError("model.weights", weights, f"{kind} ({wrong[0]}{more})")
    for name, value in body_state.items():
        value.copy_(renamed[name])  # state_dict() shares memory with the parameters


def _rename(name: str) -> str:
    for pattern, replacement in _NAMES:
        new, matches = re.subn(pattern, replacement, name)
        if matches:
            return new
    return name


def _in_our_shape(name: str, value: Tensor) -> Tensor:
    """Their class token and positions have leading axes of length 1; their patch layer is a convolution."""
    if name in ("body.cls", "body.positions"):
        while value.dim() > (1 if name == "body.cls" else 2) and len(value) == 1:
            value = value[0]
    return value.flatten(1) if name == "body.patch.weight" and value.dim() == 4 else value


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".:") if lines else type(error).__name__
