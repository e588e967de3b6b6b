"""Training of a whole network on a public share of the data, before any client is asked; kept in the cache."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from fedpers.data.cache import cache_root
from fedpers.errors import check
from fedpers.files import whole_file
from fedpers.models.networks import Network
from fedpers.process import one_thread
from fedpers.randomness import generator
from fedpers.settings.model import ModelConfig

logger = logging.getLogger(__name__)

_RECIPE = 1  # part of the name of a cached file; to be raised when the training below changes
_EVALUATED_AT_ONCE = 512
_WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class Pretraining:
    """Settings of pretraining, see :class:`~fedpers.settings.ModelConfig`; the rate falls to 0 along a cosine."""

    epochs: int
    lr: float
    batch_size: int
    accuracy: float | None

    @classmethod
    def of(cls, config: ModelConfig) -> Pretraining:
        """Those of a network."""
        return cls(config.pretrain_epochs, config.pretrain_lr, config.pretrain_batch_size, config.pretrain_accuracy)


def pretrain(
    model: Network, x: Tensor, y: Tensor, settings: Pretraining, seed: int, device: torch.device | None = None
) -> None:
    """Train `model` in place, or fill it from the cache; sets ``model.pretrained_accuracy``.

    AdamW with weight decay 0.01 and cross-entropy on nine tenths of the samples, without augmentation; the accuracy is
    that on the last tenth. Which samples are held out and the order of batches follow from `seed` alone. On a CPU it
    uses one thread, so that the number of cores does not change the values.

    Parameters
    ----------
    model : Network
        On the CPU, with its initial values.
    x, y : Tensor ``[N, ...]``, ``[N]``
        The public share, N >= 2; `y` are class ids.
    settings : Pretraining
    seed : int
        The run's seed.
    device : torch.device, optional
        Where to train, default the CPU; the network comes back on the CPU.

    Raises
    ------
    ConfigError
        If there are fewer than 2 samples, or training diverges.
    """
    check(len(x) >= 2, "model.pretrained", "public", f"a public share of at least 2 samples, not {len(x)}")
    device = device or torch.device("cpu")
    path = cache_root() / "pretrained" / f"{_key(model, x, y, settings, seed, device)}.safetensors"
    start = time.perf_counter()
    cached = _read(path, model.state_dict())
    if cached is not None:
        values, reached = cached
        model.load_state_dict(values)
        how = f"from {path}"
    else:
        with one_thread():
            passes, reached = _train(model.to(device), x.to(device), y.to(device), settings, seed)
        model.to("cpu")
        values = model.state_dict()
        finite = all(bool(torch.isfinite(value).all()) for value in values.values())
        check(finite, "model.pretrain_lr", settings.lr, "a smaller rate: pretraining diverged")
        _write(path, values, reached)
        how = f"{passes} passes in {time.perf_counter() - start:.1f} s"
    model.pretrained_accuracy = reached
    logger.info("Pretrained on %d public samples: held-out accuracy %.3f (%s).", len(x), reached, how)
    if settings.accuracy is not None and reached < settings.accuracy:
        logger.warning(
            "Pretraining ended at accuracy %.3f and did not reach model.pretrain_accuracy=%s.",
            reached,
            settings.accuracy,
        )


def _train(model: Network, x: Tensor, y: Tensor, settings: Pretraining, seed: int) -> tuple[int, float]:
    """Train in place; returns passes made and held-out accuracy."""
    order = torch.from_numpy(generator(seed, "pretrain-held-out").permutation(len(x))).to(x.device)
    held, rest = order[: max(1, len(x) // 10)], order[max(1, len(x) // 10) :]
    steps = math.ceil(len(rest) / settings.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps * settings.epochs)
    reached = math.nan
    for epoch in range(1, settings.epochs + 1):
        model.train()
        shuffled = rest[torch.from_numpy(generator(seed, "pretrain", epoch).permutation(len(rest))).to(x.device)]
        for batch in shuffled.tensor_split(steps):  # of nearly equal size: none is too small for batch normalization
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(x[batch]), y[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        if settings.accuracy is not None or epoch == settings.epochs:
            reached = _accuracy(model, x, y, held)
            if settings.accuracy is not None and reached >= settings.accuracy:
                break
    model.train()
    optimizer.zero_grad(set_to_none=True)
    return epoch, reached


@torch.no_grad()
def _accuracy(model: Network, x: Tensor, y: Tensor, held: Tensor) -> float:
    model.eval()
    right = 0
    for part in torch.split(held, _EVALUATED_AT_ONCE):
        right += int((model(x[part]).argmax(1) == y[part]).sum())
    return right / len(held)


# --- cache ----------------------------------------------------------------------------------------------------------


def _key(model: Network, x: Tensor, y: Tensor, settings: Pretraining, seed: int, device: torch.device) -> str:
    """Name that covers all that the result depends on; the initial values stand for the model's settings."""
    text = (_RECIPE, type(model).__name__, str(model), astuple(settings), seed, torch.__version__, device.type)
    return _digest({"x": x, "y": y, **model.state_dict()}, repr(text))


def _digest(values: Mapping[str, Tensor], text: str = "") -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name, value in sorted(values.items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.numpy().data)
    return digest.hexdigest()


def _read(path: Path, like: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float] | None:
    """Values and accuracy stored at `path`; None if there are none or they are damaged (which is logged)."""
    try:
        with safe_open(path, "pt") as stored:
            values = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            facts = stored.metadata() or {}
        if {n: (v.shape, v.dtype) for n, v in values.items()} != {n: (v.shape, v.dtype) for n, v in like.items()}:
            raise ValueError("other names or shapes")
        if facts.get("digest") != _digest(values):
            raise ValueError("wrong checksum")
        return values, float(facts["accuracy"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        logger.warning("The cached network %s is damaged (%s) and will be trained again.", path, error)
        return None


def _write(path: Path, values: Mapping[str, Tensor], accuracy: float) -> None:
    """Store whole or not at all; a cache that cannot be written is only logged."""
    facts = {"accuracy": repr(accuracy), "digest": _digest(values)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as draft:
            save_file({n: v.contiguous() for n, v in values.items()}, draft, metadata=facts)
    except (OSError, SafetensorError) as error:
        logger.info("The pretrained network is not cached, %s cannot be written (%s).", path, error)
