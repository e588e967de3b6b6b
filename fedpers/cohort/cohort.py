"""K clients as one stacked computation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import vmap

from fedpers.cohort.modules import has_dropout
from fedpers.cohort.optim import Optimizer
from fedpers.cohort.plan import BatchPlan, lonely_sample, plan_batches
from fedpers.cohort.step import Adjust, Batch, Loss, Network, Step, Stop
from fedpers.cohort.training import Training
from fedpers.cohort.tree import Selection, Tree, entries, expand_rows, select, tree
from fedpers.data.federated import FederatedData, Part
from fedpers.randomness import derive, generator

EVALUATION_SAMPLES = 2048
"""Samples that go through the network at once in an evaluation, over all clients of a cohort."""


@dataclass(frozen=True)
class View:
    """Tensors to predict with: some stacked ``[K, ...]``, the others shared by the whole cohort.

    What all clients received alike stays one copy, so that a common network sees all their samples at once.
    """

    tensors: dict[str, Tensor]
    stacked: frozenset[str]


@dataclass
class Reply:
    """What a cohort's training yields.

    Attributes
    ----------
    records : dict of name to Tree ``[K]``
        What goes to the server.
    state : Tree ``[K]`` or None
        The clients' new personal state; None leaves it as it was.
    metrics : dict of name to Tensor ``[K]``
        Further numbers about this training, beside loss, steps and samples; the server averages them over clients
        and they are recorded as ``train/NAME``.
    """

    records: dict[str, Tree]
    state: Tree | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Cohort:
    """K clients that are trained and evaluated together.

    Parameters
    ----------
    module : nn.Module
        The prepared network (:func:`fedpers.cohort.modules.prepare`); no other thread may use it meanwhile.
    data : FederatedData
    clients : sequence of int ``[K]``
        Their numbers, with training sets in descending order of size.
    state : Tree ``[K]``
        Their personal state.
    template : Tree
        The initial network, the same for all clients.
    seed, round : int
        What random draws depend on, beside the client.
    training : Training
    needs_pairs : bool
        Whether the network cannot train on a batch of one sample.

    Raises
    ------
    ValueError
        If the clients are not in descending order of size, on which :meth:`Step.take` and speed rely.
    """

    def __init__(
        self,
        module: nn.Module,
        data: FederatedData,
        clients: Sequence[int],
        state: Tree,
        *,
        template: Tree,
        seed: int,
        round: int,
        training: Training,
        needs_pairs: bool = False,
    ) -> None:
        self.module = module
        self.data = data
        self.clients = list(clients)
        self.state = state
        self.template = template
        self.seed = seed
        self.round = round
        self.training = training
        self.size = len(self.clients)
        self.device = data.device
        self.steps_taken = torch.zeros(self.size, dtype=torch.int64)
        self.samples_seen = torch.zeros(self.size, dtype=torch.int64)
        self.gradients_taken = torch.zeros(self.size, dtype=torch.int64)
        self.loss_sum = torch.zeros(self.size, device=self.device)
        self._passes = [0] * self.size
        self._dropout = has_dropout(module)
        self._needs_pairs = needs_pairs
        if any(a < b for a, b in pairwise(self.sizes().tolist())):
            raise ValueError("clients of a cohort must stand in descending order of their number of training samples")

    @property
    def rate(self) -> float:
        """Learning rate of this round."""
        return self.training.lr * self.training.lr_decay ** max(0, self.round - 1)

    # ---------------------------------------------------------------- trees

    def names(self, what: Selection) -> tuple[str, ...]:
        """Names of the network's entries that a selection stands for."""
        known: dict[Selection, tuple[str, ...]] = self.module.__dict__.setdefault("_cohort_names", {})
        key = what if isinstance(what, str) else tuple(what)
        if key not in known:
            known[key] = select(self.module, what)
        return known[key]

    def trainable(self, only: Selection = "parameters") -> tuple[str, ...]:
        """Names of the selected parameters that training may move: those that require a gradient in the network."""
        free = {name for name, parameter in self.module.named_parameters() if parameter.requires_grad}
        return tuple(name for name in self.names(only) if name in free)

    def sizes(self, part: Part = "train") -> Tensor:
        """Samples of each client, int64 ``[K]`` on the CPU."""
        lists = self.data.part(part)
        return torch.tensor([len(lists[c]) for c in self.clients])

    def spread(self, source: Mapping[str, Tensor] | Tree, names: Sequence[str] | None = None) -> Tree:
        """Give each client its own copy of `source`: of one tree, or of its row of a stacked tree; batch size [K]."""
        stacked = isinstance(source, TensorDict) and source.batch_size == torch.Size([self.size])
        tensors = entries(source) if isinstance(source, TensorDict) else source
        out = {}
        for name in tensors if names is None else names:
            value = tensors[name].to(self.device)
            out[name] = value.clone() if stacked else value.expand(self.size, *value.shape).clone()
        return tree(out, self.size)

    def assemble(self, received: Tree, personal: Tree | None = None) -> Tree:
        """Full networks ``[K]``: personal entries from the clients' state, the others as received.

        Parameters
        ----------
        received : Tree
            From the server, one for all (batch size []) or one per client ([K]). What it lacks comes from the
            initial network.
        personal : Tree ``[K]``, optional
            Takes precedence; default ``state["model"]`` if there is one.
        """
        view = self.view(received, personal)
        return tree(
            {
                name: value.clone() if name in view.stacked else value.expand(self.size, *value.shape).clone()
                for name, value in view.tensors.items()
            },
            self.size,
        )

    def view(self, received: Tree, personal: Tree | None = None) -> View:
        """As :meth:`assemble`, but without copies: to predict with, not to train."""
        if personal is None:
            personal = self.state.get("model", None)
        per_client = received.batch_size == torch.Size([self.size])
        own = {} if personal is None else entries(personal)
        given = entries(received)
        tensors = {**entries(self.template), **given, **own}
        stacked = {*own, *given} if per_client else set(own)
        return View({n: tensors[n].to(self.device) for n in self.names("all")}, frozenset(stacked))

    def reply(
        self,
        params: Tree,
        *,
        share: Selection = "all",
        keep: Selection = "none",
        state: Mapping[str, Tensor | Tree] | None = None,
        metrics: Mapping[str, Tensor] | None = None,
        **records: Tree,
    ) -> Reply:
        """Divide trained networks into what is shared and what stays.

        Parameters
        ----------
        params : Tree ``[K]``
        share : selection
            Sent to the server as the record ``arrays``.
        keep : selection
            Kept as personal state ``model``.
        state : mapping, optional
            Further personal state by role.
        metrics : mapping of name to Tensor ``[K]``, optional
            See :class:`Reply`.
        **records : Tree ``[K]``
            Further records for the server.
        """
        kept: dict[str, Any] = dict(state or {})
        if names := self.names(keep):
            kept["model"] = params.select(*names)
        return Reply(
            records={"arrays": params.select(*self.names(share)), **records},
            state=TensorDict(kept, batch_size=[self.size]) if kept else None,
            metrics=dict(metrics or {}),
        )

    # ------------------------------------------------------------- training

    def plan(
        self,
        *,
        epochs: int | None = None,
        steps: int | Sequence[int] | None = None,
        training: Training | None = None,
        batch_size: int | None = None,
        drop_last: bool | None = None,
        purpose: str = "batches",
    ) -> BatchPlan:
        """Batches for the next passes; every order comes from (seed, `purpose`, client, round, pass).

        Without `epochs` and `steps` those of the training settings hold.
        """
        training = training or self.training
        if epochs is None and steps is None:
            epochs, steps = (None, training.steps) if training.steps is not None else (training.epochs, None)
        first = list(self._passes)

        def draw(k: int, epoch: int) -> np.random.Generator:
            self._passes[k] = first[k] + epoch + 1
            return generator(self.seed, purpose, self.clients[k], self.round, first[k] + epoch)

        plan = plan_batches(
            [self.data.samples(c, self.seed, self.round) for c in self.clients],
            batch_size=training.batch_size if batch_size is None else batch_size,
            epochs=epochs,
            steps=steps,
            drop_last=training.drop_last if drop_last is None else drop_last,
            draw=draw if training.shuffle else None,
            device=self.device,
        )
        if self._needs_pairs and bool((plan.count == 1).any()):
            alone = (plan.count == 1).any(0).nonzero().flatten()
            rows = alone if plan.order is None else plan.order[alone]
            raise lonely_sample(training.batch_size if batch_size is None else batch_size, self.clients[int(rows[0])])
        return plan

    def steps(self, plan: BatchPlan, start: int = 0) -> Iterator[Step]:
        """Walk through a plan's steps from `start`."""
        counts = plan.count.to(self.device, torch.float32)
        places = torch.arange(plan.index.shape[2], device=self.device)
        rows = None if plan.order is None else plan.order
        keys = self._keys(plan)
        dtype = self.data.x.dtype if self.data.x.is_floating_point() else torch.float32
        for t in range(start, plan.steps):
            a, width = plan.active[t], plan.width[t]
            index = plan.index[t, :a, :width]
            count = counts[t, :a]
            flat = index.reshape(-1)
            yield Step(
                active=a,
                x=self.data.x.index_select(0, flat).view(a, width, *self.data.x.shape[1:]),
                y=self.data.y.index_select(0, flat).view(a, width, *self.data.y.shape[1:]),
                weight=(places[:width] < count[:, None]).to(dtype) if plan.ragged[t] else None,
                count=count,
                key=None if keys is None else keys[:a] + t,
                rows=None if rows is None else rows[:a],
            )

    def _keys(self, plan: BatchPlan) -> Tensor | None:
        if not self._dropout:
            return None
        own = [derive(self.seed, "dropout", c, self.round) for c in self.clients]
        keys = torch.tensor(own) + self.steps_taken
        return (keys if plan.order is None else keys[plan.order]).to(self.device)

    def gradients(
        self, step: Step, params: Mapping[str, Tensor], loss: Loss, names: Sequence[str], *, frozen: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each client and its gradient.

        Parameters
        ----------
        step : Step
            With ``a`` clients.
        params : mapping of name to Tensor ``[a, ...]``
            All parameters and buffers; buffers that a layer updates are changed in place.
        loss : callable
            See :data:`Loss`.
        names : sequence of str
            Parameters to differentiate by.
        frozen : bool
            Whether layers work as in an evaluation: no dropout, and batch normalization by its statistics as they are.

        Returns
        -------
        Tensor ``[a]``, dict of name to Tensor ``[a, ...]``
            A parameter the loss does not depend on is left out.
        """
        self._mode(training=not frozen)
        rows = slice(0, step.active) if step.rows is None else step.rows
        self.gradients_taken[rows] += 1
        free = set(names)
        if step.active == 1:  # ordinary training, without vmap
            leaves = {n: params[n][0].detach().requires_grad_() for n in names}
            tensors = {n: leaves[n] if n in free else params[n][0] for n in params}
            total = self._loss(
                loss,
                tensors,
                step.x[0],
                step.y[0],
                None if step.weight is None else step.weight[0],
                None if step.key is None else step.key[0],
            )
            found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
            grads = {n: g.unsqueeze(0) for n, g in zip(names, found, strict=True) if g is not None}
            return total.detach().unsqueeze(0), grads

        leaves = {n: params[n].detach().requires_grad_() for n in names}
        rest = {n: params[n] for n in params if n not in free}
        extra = {k: v for k, v in (("weight", step.weight), ("key", step.key)) if v is not None}

        def one(
            leaves: dict[str, Tensor], rest: dict[str, Tensor], x: Tensor, y: Tensor, extra: dict[str, Tensor]
        ) -> Tensor:
            return self._loss(loss, {**leaves, **rest}, x, y, extra.get("weight"), extra.get("key"))

        losses = vmap(one)(leaves, rest, step.x, step.y, extra)
        found = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
        return losses.detach(), {n: g for n, g in zip(names, found, strict=True) if g is not None}

    def _loss(
        self, loss: Loss, tensors: Mapping[str, Tensor], x: Tensor, y: Tensor, weight: Tensor | None, key: Tensor | None
    ) -> Tensor:
        return loss(Network(self.module, tensors, weight, key), Batch(x, y, weight))

    def _mode(self, training: bool) -> None:
        if self.module.training != training:
            self.module.train(training)

    def optimizer(self, names: Sequence[str], plan: BatchPlan, training: Training | None = None) -> Optimizer:
        """Fresh optimizer for `names`, with the rate of this round."""
        training = training or self.training
        return Optimizer(training, self.module, names, plan.client_steps, training.lr_decay ** max(0, self.round - 1))

    def count(self, step: Step, losses: Tensor) -> None:
        """Book a step: its loss and samples (steps are booked by :meth:`finish`)."""
        rows = slice(0, step.active) if step.rows is None else step.rows.to(self.device)
        self.loss_sum[rows] += losses * step.count

    def finish(self, plan: BatchPlan, upto: Tensor | None = None) -> None:
        """Book the steps and samples of a plan, of each client up to its step number `upto` ``[K]``."""
        count = plan.count
        if upto is not None:
            count = torch.where(torch.arange(plan.steps)[:, None] < upto, count, 0)
        rows = slice(None) if plan.order is None else plan.order
        self.steps_taken[rows] += (count > 0).sum(0)
        self.samples_seen[rows] += count.sum(0)

    def fit(
        self,
        params: Tree,
        loss: Loss,
        *,
        only: Selection = "parameters",
        epochs: int | None = None,
        steps: int | Sequence[int] | None = None,
        training: Training | None = None,
        batch_size: int | None = None,
        drop_last: bool | None = None,
        adjust: Adjust | Sequence[Adjust] = (),
        mask: Mapping[str, Tensor] | None = None,
        stop: Stop | None = None,
        frozen: bool = False,
        purpose: str = "batches",
    ) -> None:
        """Train K networks in place.

        Parameters
        ----------
        params : Tree ``[K]``
            Full networks, parameters and buffers; changed in place.
        loss : callable
            Loss of one client, see :data:`Loss`.
        only : selection
            What is trained, see :meth:`trainable`; buffers of layers in training mode change as they always do.
        epochs, steps
            Passes, or steps of all or of each client; default: the training settings.
        training : Training, optional
            Other settings than the cohort's.
        batch_size, drop_last
            Other values than in the settings.
        adjust : callable or sequence
            Change the gradients before clipping and the step (:func:`proximal`, :func:`shifted`).
        mask : mapping of name to Tensor ``[K, ...]``, optional
            1 where an entry may move, 0 where not even weight decay moves it; names it lacks are free.
        stop : callable, optional
            Ends a client's training after a pass, see :data:`Stop`.
        frozen : bool
            Train with layers as in an evaluation, see :meth:`gradients`: buffers do not change.
        purpose : str
            Name of the draw of the batch order.
        """
        plan = self.plan(
            epochs=epochs, steps=steps, training=training, batch_size=batch_size, drop_last=drop_last, purpose=purpose
        )
        names = self.trainable(only)
        optimizer = self.optimizer(names, plan, training)
        hooks = [adjust] if callable(adjust) else list(adjust)
        work = {n: params[n] for n in self.names("all")}
        if plan.order is not None:
            work = {n: value[plan.order.to(value.device)] for n, value in work.items()}
        if stop is None:
            for step in self.steps(plan):
                self._fit_step(step, work, loss, names, hooks, optimizer, mask, frozen)
            self._write_back(params, work, plan.order)
            self.finish(plan)
        else:
            self._fit_until(plan, params, work, loss, names, hooks, optimizer, mask, frozen, stop)

    def _fit_step(
        self,
        step: Step,
        work: Mapping[str, Tensor],
        loss: Loss,
        names: Sequence[str],
        hooks: Sequence[Adjust],
        optimizer: Optimizer,
        mask: Mapping[str, Tensor] | None,
        frozen: bool,
    ) -> Tensor:
        rows = {n: value[: step.active] for n, value in work.items()}
        losses, grads = self.gradients(step, rows, loss, names, frozen=frozen)
        for hook in hooks:
            hook(step, rows, grads)
        optimizer.update(work, grads, None if mask is None else {n: step.take(m) for n, m in mask.items()})
        self.count(step, losses)
        return losses

    def _write_back(self, params: Tree, work: Mapping[str, Tensor], rows: Tensor | None) -> None:
        if rows is not None:
            for name, value in work.items():
                params[name].index_copy_(0, rows.to(value.device), value)

    def _fit_until(
        self,
        plan: BatchPlan,
        params: Tree,
        work: dict[str, Tensor],
        loss: Loss,
        names: Sequence[str],
        hooks: Sequence[Adjust],
        optimizer: Optimizer,
        mask: Mapping[str, Tensor] | None,
        frozen: bool,
        stop: Stop,
    ) -> None:
        """Train until each client's plan or patience ends; those that stop leave the stack."""
        whole = plan
        rows = torch.arange(self.size) if plan.order is None else plan.order
        ended_at = torch.zeros(self.size, dtype=torch.int64)
        history: list[list[float]] = [[] for _ in range(self.size)]
        running = torch.zeros(self.size, 2, device=self.device)  # loss and samples of the current pass
        t = 0
        while t < plan.steps:
            leaving = torch.zeros(len(rows), dtype=torch.bool)
            for step in self.steps(plan, t):
                losses = self._fit_step(step, work, loss, names, hooks, optimizer, mask, frozen)
                own = rows[: step.active].to(self.device)
                running[own] += torch.stack([losses * step.count, step.count], dim=1)
                ended_at[rows[: step.active]] = t + 1
                ends = plan.epoch_end[t, : step.active]
                t += 1
                for k in ends.nonzero().flatten().tolist():
                    client = int(rows[k])
                    total, samples = running[client].tolist()
                    history[client].append(total / samples)
                    running[client] = 0
                    leaving[k] = bool(stop(torch.tensor(history[client])[:, None])[0])
                if leaving.any():
                    break
            if t >= plan.steps:
                break
            self._write_back(params, {n: v[leaving.to(v.device)] for n, v in work.items()}, rows[leaving])
            stay = (~leaving).nonzero().flatten()
            plan, rows = plan.keep(stay), rows[stay]
            work = {n: v[stay.to(v.device)] for n, v in work.items()}
            optimizer.keep(stay)
            if not len(rows):
                break
        if plan is not whole or plan.order is not None:
            self._write_back(params, work, rows)
        self.finish(whole, ended_at if whole.order is None else ended_at[whole.order])

    # ----------------------------------------------------------- evaluation

    def logits(self, params: Tree | View, part: Part, predict: Callable[[Network, Tensor], Tensor]) -> list[Tensor]:
        """Predictions for all samples of one part, a Tensor ``[n_k, C]`` per client, in the order of its list.

        Parameters
        ----------
        params : Tree ``[K]`` or View
        part : {"train", "validation", "test"}
        predict : callable (network, x) -> logits ``[B, C]``
        """
        self._mode(training=False)
        view = params if isinstance(params, View) else View(entries(params), frozenset(entries(params)))
        lists = [self.data.part(part)[c] for c in self.clients]
        sizes = [len(own) for own in lists]
        with torch.no_grad():
            if not view.stacked:  # one network for all: their samples in one row
                out = self._predict_many(view.tensors, torch.cat(lists), predict)
                return list(torch.split(out, sizes))
            if self.size == 1:
                tensors = {n: v[0] if n in view.stacked else v for n, v in view.tensors.items()}
                return [self._predict_many(tensors, lists[0], predict)]
            return self._predict_stacked(view, lists, predict)

    def _predict_many(
        self, tensors: Mapping[str, Tensor], index: Tensor, predict: Callable[[Network, Tensor], Tensor]
    ) -> Tensor:
        if not len(index):  # not every network takes an empty batch
            return torch.zeros(0, self.data.num_classes, device=self.device)
        network = Network(self.module, tensors)
        chunks = torch.split(index.to(self.device), EVALUATION_SAMPLES)
        return torch.cat([predict(network, self.data.x[chunk]) for chunk in chunks])

    def _predict_stacked(
        self, view: View, lists: Sequence[Tensor], predict: Callable[[Network, Tensor], Tensor]
    ) -> list[Tensor]:
        own = {n: v for n, v in view.tensors.items() if n in view.stacked}
        common = {n: v for n, v in view.tensors.items() if n not in view.stacked}

        def one(own: dict[str, Tensor], x: Tensor) -> Tensor:
            return predict(Network(self.module, {**common, **own}), x)

        sizes = [len(positions) for positions in lists]
        index = torch.zeros(self.size, max(sizes), dtype=torch.int64)
        for k, positions in enumerate(lists):
            index[k, : sizes[k]] = positions
        index = index.to(self.device)
        width = max(1, EVALUATION_SAMPLES // self.size)
        pieces: list[list[Tensor]] = [[] for _ in lists]
        start, rows = 0, list(range(self.size))
        while places := [place for place, k in enumerate(rows) if sizes[k] > start]:
            if 4 * len(places) > 3 * (places[-1] + 1):  # the first rows need no copy, and few of them run in vain
                places = list(range(places[-1] + 1))
            if len(places) < len(rows):
                prefix = places[-1] < len(places)
                stay = slice(len(places)) if prefix else torch.tensor(places, device=self.device)
                own, index, rows = {n: v[stay] for n, v in own.items()}, index[stay], [rows[p] for p in places]
            ahead = min(sizes[k] - start for k in rows if sizes[k] > start)  # until the next of them is through
            end = start + max(width, min(ahead, EVALUATION_SAMPLES // len(rows)))
            here = index[:, start:end]
            x = self.data.x[here.reshape(-1)].view(*here.shape, *self.data.x.shape[1:])
            out = vmap(one)(own, x)
            for k, scores in zip(rows, out, strict=True):
                if sizes[k] > start:
                    pieces[k].append(scores[: sizes[k] - start])
            start = end
        empty = torch.zeros(0, self.data.num_classes, device=self.device)
        return [torch.cat(own_pieces) if own_pieces else empty for own_pieces in pieces]

    def labels(self, part: Part) -> list[Tensor]:
        """Labels of each client's samples of one part, ``[n_k]``, in the order of :meth:`logits`."""
        index = torch.cat([self.data.part(part)[c] for c in self.clients]).to(self.device)
        return list(torch.split(self.data.y[index], self.sizes(part).tolist()))


def mixed(share: Tensor, first: Tree, second: Tree, names: Sequence[str]) -> Tree:
    """Mix two stacks of networks: ``share * first + (1 - share) * second`` with `share` ``[K]``.

    Only the entries `names` are mixed; the others, such as buffers, are those of `first`.
    """
    out = {name: value.clone() for name, value in entries(first).items()}
    for name in names:
        out[name] = torch.lerp(second[name], first[name], expand_rows(share, first[name]))
    return tree(out, len(share))
