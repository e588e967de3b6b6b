"""Whether network, data and method fit, found out before anything is trained."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpers.client.update import LocalUpdate
from fedpers.cohort import Batch, Network, Tree, entries, select
from fedpers.cohort.modules import named_state
from fedpers.cohort.plan import lonely_sample_error
from fedpers.data.federated import FederatedData
from fedpers.errors import ConfigError, check
from fedpers.failures import frames_of_user

log = logging.getLogger(__name__)


class _Examples(dict[str, Any]):
    """What a method says its loss is given; says which name it forgot."""

    def __init__(self, update: LocalUpdate, template: Tree, data: FederatedData) -> None:
        super().__init__(update.example_given(template, data))
        self.method = type(update).__name__

    def __missing__(self, name: str) -> Any:
        allowed = f"a method whose example_given holds '{name}', which its loss or predict reads"
        raise ConfigError("strategy", self.method, allowed)


@dataclass(frozen=True)
class Traits:
    """What a network needs to be trained.

    Attributes
    ----------
    needs_two_samples : bool
        Whether every batch must have two samples or more, as batch normalization wants it.
    draws : bool
        Whether it, or the method's loss, draws from PyTorch's global generator in training.
    mixes_samples : bool
        Whether in training what it computes of a sample, or keeps in a buffer, depends on the padding of its batch.
    """

    needs_two_samples: bool
    draws: bool
    mixes_samples: bool = False


def check_network(update: LocalUpdate, module: nn.Module, template: Tree, data: FederatedData) -> Traits:
    """Try network and loss on samples.

    Parameters
    ----------
    update : LocalUpdate
    module : nn.Module
        Prepared.
    template : Tree
        Its values, batch size [].
    data : FederatedData

    Raises
    ------
    ConfigError
        If the network does not fit the data, changes its inputs in place or a buffer that is not persistent, or in an
        evaluation draws random numbers, changes values of its own, or predicts for a sample what depends on others; if
        the method's loss counts padding; if a client would have a batch of one sample, and the network cannot train on
        it.
    """
    name = type(module).__name__
    key = torch.zeros((), dtype=torch.int64, device=data.device)
    network = Network(module.train(), entries(template.clone()), key=key, given=_Examples(update, template, data))
    x, y = data.x[:3].clone(), data.y[:3]  # not the data themselves, which the network may write into
    with torch.random.fork_rng([data.device] if data.device.type == "cuda" else []), torch.no_grad():
        before, elsewhere = _generator_states(data.device), _states_outside_torch()
        try:
            out = update.predict(network, x[:2])
        except ConfigError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if frames_of_user(error) and not isinstance(error, RuntimeError | IndexError):
                raise
            shape = list(data.x.shape[1:])
            raise ConfigError("model", name, f"a network that takes samples of shape {shape} ({error})") from error
        allowed = f"a network that returns a tensor, not {_kind(out)}; a method's predict may take the scores out of it"
        if type(update).predict is not LocalUpdate.predict:
            method = f"{type(update).__name__}.predict"
            check(isinstance(out, Tensor), "strategy", method, f"a predict that returns a tensor, not {_kind(out)}")
        check(isinstance(out, Tensor), "model", name, allowed)
        data.task.check_outputs(out, data, name)
        unsaved = _unsaved_buffers(module)
        allowed = "a network that leaves its inputs as they are: x = x - 1 in place of x -= 1, no inplace=True first"
        check(torch.equal(x, data.x[:3]) or not bool((x == x).all()), "model", name, allowed)
        if type(update).loss is LocalUpdate.loss:
            _warn_of_probabilities(update, network, data)
        _loss(update, network, Batch(x, y, None, network.given, data.task))
        for buffer, value in _unsaved_buffers(module).items():
            same = buffer in unsaved and torch.equal(value, unsaved[buffer])
            check(same, "model", name, f"a network whose buffer '{buffer}', which training changes, is persistent")
        draws = _changed(before, data.device)
        allowed = "a network that draws from PyTorch's generator alone, which is seeded for each client and step"
        check(elsewhere == _states_outside_torch(), "model", name, allowed)
        mixes_samples = False
        if not draws:  # else clients are computed one at a time, and nothing is padded
            mixes_samples = _padding_matters(update, network, template, data)
        if not draws and not mixes_samples:
            _check_padding(update, network, data)
        _check_logit_adjustment(update, network, data)
        _check_evaluation(update, network, x)
        if not _fails_alone(update, network, data):
            return Traits(needs_two_samples=False, draws=draws, mixes_samples=mixes_samples)
    for client, size in enumerate(data.sizes("train").tolist()):
        if 1 in (update.smallest_batch(size), update.finetune_epochs and LocalUpdate.smallest_batch(update, size)):
            raise lonely_sample_error(update.training.batch_size, client, size)
    return Traits(needs_two_samples=True, draws=draws, mixes_samples=mixes_samples)


def _warn_of_probabilities(update: LocalUpdate, network: Network, data: FederatedData) -> None:
    """Say that a network ends in a softmax or sigmoid: cross-entropy takes a softmax itself, and learns slowly."""
    x, name = data.x[:32].clone(), type(network.module).__name__
    out = update.predict(network, x)
    several = data.task.classes and out.dim() == 2 and out.shape[1] > 1 and len(out) > 1
    if not several or not _in_unit_range(out):
        return
    if x.is_floating_point() and not _in_unit_range(update.predict(network, 100 * x)):  # there by chance
        return
    softmax = torch.allclose(out.sum(1), out.new_ones(len(out)), atol=1e-4)
    values, last = ("probabilities, rows that sum to 1", "softmax") if softmax else ("values from 0 to 1", "sigmoid")
    if softmax or out.numel() >= 32:  # of fewer numbers all may lie there by chance
        log.warning(
            "model=%s returns %s; the loss expects scores and takes their softmax itself, so that the network learns "
            "slowly. Leave out its last %s.",
            name, values, last,
        )  # fmt: skip


def _in_unit_range(values: Tensor) -> bool:
    return bool(((values >= 0) & (values <= 1)).all())


def _unsaved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Copies of buffers that are no state of a client, because they are not persistent."""
    saved = named_state(module)
    return {name: value.clone() for name, value in module.named_buffers() if name not in saved}


def check_parts(update: LocalUpdate) -> None:
    """Refuse to override `shared` or `personal` of a method that settles them itself.

    Raises
    ------
    ConfigError
    """
    if not update.settles_parts:
        return
    kinds = type(update).__mro__
    method = next(kind for kind in kinds if "settles_parts" in vars(kind))
    for kind in kinds[: kinds.index(method)]:
        for name in ("shared", "personal"):
            allowed = f"no override: {method.__name__} itself settles what is shared and what is personal"
            check(name not in vars(kind), f"{kind.__name__}.{name}", vars(kind).get(name), allowed)


def check_groups(groups: Iterable[str], module: nn.Module) -> None:
    """Refuse groups of training settings that select no entry of the network."""
    for group in groups:
        select(module, group, "training.groups")


def _loss(update: LocalUpdate, network: Network, batch: Batch) -> Tensor:
    """Loss of a batch; refuse a method whose loss takes none."""
    name = f"{type(update).__name__}.loss"
    trained = select(network.module, "parameters")
    leaves = {n: value.detach().requires_grad_() for n, value in network.tensors.items() if n in trained}
    try:
        with torch.enable_grad():  # a loss may take gradients itself, as a penalty on them does
            loss = update.loss(_at_same_step(network, {**network.tensors, **leaves}), batch)
    except ConfigError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ConfigError("strategy", name, f"a loss that takes batches of the data ({error})") from error
    check(isinstance(loss, Tensor), "strategy", name, f"a loss that returns a tensor, not {_kind(loss)}")
    return loss.detach()


def _check_logit_adjustment(update: LocalUpdate, network: Network, data: FederatedData) -> None:
    """Refuse ``training.logit_adjustment`` where there are no classes or the method's loss would ignore it."""
    strength, key = update.training.logit_adjustment, "training.logit_adjustment"
    if not strength:
        return
    check(data.task.classes, key, strength, f"0, for the task of {data.name} is {data.task.name}, not classification")
    x, y = data.x[:3], data.y[:3]
    offsets = torch.linspace(-1.0, 1.0, data.num_classes, device=x.device)
    plain = Batch(x, y, None, network.given, data.task)
    losses = []
    for given in (None, offsets):
        torch.manual_seed(0)  # of a network that draws from PyTorch's generator; the caller restores it
        losses.append(_loss(update, network, replace(plain, offsets=given)))
    allowed = f"0, for the loss of {type(update).__name__} is not one of the scores of classes alone (batch.losses)"
    check(not torch.equal(*losses), key, strength, allowed)


def _padding_matters(update: LocalUpdate, network: Network, template: Tree, data: FederatedData) -> bool:
    """Whether predictions or buffers in training change with padding, as means over the batch of one's own do."""
    if len(data.x) < 3:
        return False
    results = []
    for batch in _plain_and_padded(network, data):
        tensors = entries(template.clone())
        fresh = _at_same_step(network, tensors)
        results.append({**tensors, "": update.predict(fresh.seeing(batch), batch.x)[:3]})
    plain, padded = results
    return not all(torch.allclose(plain[n], padded[n], rtol=1e-3, atol=1e-5, equal_nan=True) for n in plain)


def _at_same_step(network: Network, tensors: Mapping[str, Tensor]) -> Network:
    """The network with other tensors, at the beginning of the same step: dropout draws what it has drawn before."""
    key = None if network.key is None else network.key.clone()
    return Network(network.module, tensors, network.weight, key, network.given, frozen=network.frozen)


def _plain_and_padded(network: Network, data: FederatedData) -> tuple[Batch, Batch]:
    """Three samples, and the same with two more that are padding."""
    x, y = data.x[:3].clone(), data.y[:3]
    weight = torch.tensor([1.0, 1, 1, 0, 0], device=x.device, dtype=x.dtype if x.is_floating_point() else None)
    plain = Batch(x, y, None, network.given, data.task)
    return plain, Batch(torch.cat([x, x[:2]]), torch.cat([y, y[:2]]), weight, network.given, data.task)


def _check_evaluation(update: LocalUpdate, network: Network, x: Tensor) -> None:
    """Refuse predictions outside of training that are drawn, change the network, or depend on which others are made."""
    module, name = network.module, type(network.module).__name__
    values = {n: value.clone() for n, value in network.tensors.items()}
    module.eval()
    before = _generator_states(x.device)
    together = update.predict(network, x[:2])
    draws = _changed(before, x.device)
    alone = update.predict(network, x[:1])
    module.train()
    check(not draws, "model", name, "a network that draws no random numbers in an evaluation")
    for entry, value in values.items():
        same = torch.equal(value, network.tensors[entry]) or not bool((value == value).all())
        check(same, "model", name, f"a network that leaves '{entry}' as it is in an evaluation (if self.training: ...)")
    allowed = "a network whose prediction for a sample does not depend on which others are evaluated with it"
    same = torch.allclose(together[:1], alone, rtol=1e-2, atol=1e-3, equal_nan=True)
    check(same, "model", name, allowed)


def _check_padding(update: LocalUpdate, network: Network, data: FederatedData) -> None:
    """Refuse a method whose loss counts padding: the same samples, padded, must give the same loss."""
    if type(update).loss is LocalUpdate.loss or len(data.x) < 3:
        return
    plain, padded = _plain_and_padded(network, data)
    without, masked = _loss(update, network, plain), _loss(update, network.seeing(padded), padded)
    if not torch.allclose(without, masked, rtol=1e-3, atol=1e-5, equal_nan=True):
        allowed = "a loss that leaves padding out: reduce over samples with batch.mean"
        raise ConfigError("strategy", f"{type(update).__name__}.loss", allowed)


def _kind(value: object) -> str:
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else f"a {type(value).__name__}"


def _fails_alone(update: LocalUpdate, network: Network, data: FederatedData) -> bool:
    """Whether predictions fail on a batch of one sample, as batch normalization does."""
    try:
        return not bool(update.predict(network, data.x[:1]).isfinite().all())
    except ValueError:  # what batch normalization raises for one value per channel
        return True


def _generator_states(device: torch.device) -> list[Tensor]:
    """State of torch's global generators."""
    states = [torch.random.get_rng_state()]
    return states if device.type != "cuda" else [*states, torch.cuda.get_rng_state(device)]


def _states_outside_torch() -> tuple[object, ...]:
    """State of the generators of ``random`` and NumPy."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 (the one of networks, not ours)
    return random.getstate(), kind, np.asarray(keys).tobytes(), *rest


def _changed(before: Sequence[Tensor], device: torch.device) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(before, _generator_states(device), strict=True))
