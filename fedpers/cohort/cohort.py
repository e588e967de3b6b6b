"""K clients as one stacked computation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedpers.cohort.fold import ARRAYS
from fedpers.cohort.gradients import gradients_of_many, gradients_of_one
from fedpers.cohort.modules import has_dropout, seeded
from fedpers.cohort.networks import ClientNetworks
from fedpers.cohort.plan import BatchPlan, PlanOptions, batches_per_epoch, lonely_sample_error, plan_batches
from fedpers.cohort.prediction import Predict, View, predictions
from fedpers.cohort.step import Adjust, Batch, Given, Loss, Network, Step
from fedpers.cohort.tensordicts import TensorDict
from fedpers.cohort.tree import Selection, Tree, entries, map_tensors, tree
from fedpers.cohort.walk import Walk
from fedpers.data.federated import FederatedData, Part
from fedpers.errors import ConfigError, check, one_of
from fedpers.randomness import derive, generator
from fedpers.settings.training import Training

SMALLEST_VARIANCE = 1e-12
"""A variance below this counts as this where clients are weighted by it."""


@dataclass
class Reply:
    """What a cohort's training yields.

    Attributes
    ----------
    records : dict of name to Tree ``[K]``
        What goes to the server.
    state : Tree ``[K]`` or None
        The clients' new personal state, all of it; None for methods that keep none, and for answers to questions.
    metrics : dict of name to Tensor ``[K]``
        Further numbers about this training, beside loss, steps and samples; the server averages them over clients
        and they are recorded as ``train/NAME``.
    """

    records: dict[str, Tree]
    state: Tree | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Cohort(ClientNetworks):
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
    needs_two_samples : bool
        Whether the network cannot train on a batch of one sample.
    draws : bool
        Whether it draws from PyTorch's global generator in training; only a cohort of one can then be trained.
    shared, personal : selection
        The method's (``LocalUpdate.shared``, ``personal``), which :meth:`reply` divides networks by.
    max_steps : int, optional
        No phase of a training (:class:`PlanOptions`; each plan by itself if none is named) takes more steps, whatever
        its epochs and steps: unseen clients are measured after so many.
    inverse_variance : bool
        Whether :meth:`reply` adds the metric ``inverse_variance``, 1 / :meth:`variance` of the parameters it sends.

    Attributes
    ----------
    measures_variance : bool
        Whether the shared parameters are watched in training, for :meth:`variance`; a method that asks for it itself
        sets it before it trains.
    variances : list
        Of each training so far (:class:`~fedpers.cohort.walk.Walk`), for each tree that it changed: the tree, and by
        name the variances of all coordinates added up, ``[K]``.
    steps_taken, samples_seen, gradients_taken : Tensor ``[K]``
        Of each client so far in this call: steps of the optimizer, samples of their batches, and gradients, int64. A
        method that computes some without :meth:`fit` adds them itself.
    longest_phase : Tensor ``[K]``
        Steps of the longest of each client's phases of training, int64.
    loss_sum : Tensor ``[K]``
        Sum of the losses of all its samples.

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
        needs_two_samples: bool = False,
        draws: bool = False,
        shared: Selection = "all",
        personal: Selection = "none",
        max_steps: int | None = None,
        inverse_variance: bool = False,
    ) -> None:
        super().__init__(
            module, state, template, shared=shared, personal=personal, size=len(clients), device=data.device
        )
        self.data = data
        self.clients = list(clients)
        self.seed = seed
        self.round = round
        self.max_steps = max_steps
        self.inverse_variance = self.measures_variance = inverse_variance
        self.variances: list[tuple[Mapping[str, Tensor], dict[str, Tensor]]] = []
        self.training = training
        self.steps_taken = torch.zeros(self.size, dtype=torch.int64)
        self.samples_seen = torch.zeros(self.size, dtype=torch.int64)
        self.longest_phase = torch.zeros(self.size, dtype=torch.int64)
        self.gradients_taken = torch.zeros(self.size, dtype=torch.int64)
        self.loss_sum = torch.zeros(self.size, device=self.device)
        self._phase_steps: dict[str | None, Tensor] = {}
        self._passes = [0] * self.size
        self._samples: dict[int, NDArray[np.int64]] = {}
        self._offsets: Tensor | None = None
        self._draws = draws
        self._dropout = draws or has_dropout(module)
        self._needs_two_samples = needs_two_samples
        if any(a < b for a, b in pairwise(self.sizes().tolist())):
            raise ValueError("clients of a cohort must stand in descending order of their number of training samples")

    @property
    def rate(self) -> float:
        """Learning rate of this round."""
        return self.training.lr * self.training.lr_decay ** max(0, self.round - 1)

    def sizes(self, part: Part = "train") -> Tensor:
        """Samples of each client, int64 ``[K]`` on the CPU."""
        lists = self.data.part(part)
        return torch.tensor([len(lists[c]) for c in self.clients])

    def batches_per_pass(self) -> list[int]:
        """Batches ``[K]`` of each client in one pass over what it trains on in this round."""
        training = self.training
        sizes = [len(self.samples(client)) for client in self.clients]
        return [batches_per_epoch(size, training.batch_size, training.drop_last) for size in sizes]

    def samples(self, client: int) -> NDArray[np.int64]:
        """Positions a client trains on in this round, int64 ``[n]``; what is drawn for it is drawn once."""
        if client not in self._samples:
            self._samples[client] = self.data.samples(client, self.seed, self.round)
        return self._samples[client]

    def reply(
        self,
        params: Tree,
        *,
        share: Selection | None = None,
        keep: Selection | None = None,
        state: Mapping[str, Tensor | Tree] | None = None,
        metrics: Mapping[str, Tensor] | None = None,
        **records: Tree,
    ) -> Reply:
        """Divide trained networks into what is shared and what stays.

        Parameters
        ----------
        params : Tree ``[K]``
        share : selection, optional
            Sent to the server as the record ``arrays``; default what the method shares.
        keep : selection, optional
            Kept as personal state ``model``, unless `state` has that; default what the method says is personal.
        state : mapping, optional
            Further personal state by role.
        metrics : mapping of name to Tensor ``[K]``, optional
            See :class:`Reply`.
        **records : Tree ``[K]``
            Further records for the server.

        Raises
        ------
        TypeError
            If a metric is no tensor ``[K]`` or a record no tree ``[K]``.
        """
        for name, column in (metrics or {}).items():
            if not isinstance(column, Tensor) or column.shape != (self.size,):
                raise TypeError(
                    f"metric '{name}' is {_form(column)}: expected a tensor [{self.size}], one number a client"
                )
        for name, record in records.items():
            if not isinstance(record, TensorDict) or record.batch_size != (self.size,):
                raise TypeError(f"record '{name}' is {_form(record)}: expected a tree of {self.size} clients")
        personal_state: dict[str, Any] = dict(state or {})
        names = self.names(self.personal if keep is None else keep)
        if names and "model" not in personal_state:
            personal_state["model"] = params.select(*names)
        sent = self.names(self.shared if share is None else share)
        columns = dict(metrics or {})
        if self.inverse_variance and "inverse_variance" not in columns:
            weights = 1 / self.variance(params, sent).clamp(min=SMALLEST_VARIANCE)
            columns["inverse_variance"] = weights.where(self.steps_taken.to(weights.device) > 0, torch.nan)
        return Reply(
            records={ARRAYS: params.select(*sent), **records},
            state=tree(personal_state, self.size) if personal_state else None,
            metrics=columns,
        )

    # ------------------------------------------------------------- training

    def plan(self, **options: Unpack[PlanOptions]) -> BatchPlan:
        """Batches for the next passes; every order comes from (seed, purpose, client, round, pass).

        Parameters
        ----------
        **options
            See :class:`PlanOptions`.

        Raises
        ------
        TypeError
            If an option is unknown.
        """
        for name in sorted(options.keys() - PlanOptions.__annotations__.keys()):
            raise TypeError(f"unknown option '{name}': expected {one_of(PlanOptions.__annotations__, name)}")
        training = options.get("training") or self.training
        epochs, steps, samples = options.get("epochs"), options.get("steps"), options.get("samples")
        batch_size, drop_last = options.get("batch_size"), options.get("drop_last")
        purpose = options.get("purpose", "batches")
        if batch_size is None:
            batch_size = training.batch_size
        if epochs is None and steps is None:
            epochs, steps = (None, training.steps) if training.steps is not None else (training.epochs, None)
        first = list(self._passes)

        def draw(k: int, epoch: int) -> np.random.Generator:
            self._passes[k] = first[k] + epoch + 1
            return generator(self.seed, purpose, self.clients[k], self.round, first[k] + epoch)

        phase = options.get("phase")
        most: int | list[int] | None = self.max_steps
        if self.max_steps is not None and phase in self._phase_steps:
            most = (self.max_steps - self._phase_steps[phase]).tolist()
        plan = plan_batches(
            [self.samples(client) for client in self.clients] if samples is None else samples,
            batch_size=batch_size,
            epochs=epochs,
            steps=steps,
            most=most,
            drop_last=training.drop_last if drop_last is None else drop_last,
            draw=draw if training.shuffle else None,
            device=self.device,
            phase=phase,
            purpose=purpose,
        )
        if self._needs_two_samples and not options.get("frozen") and bool((plan.count == 1).any()):
            alone = (plan.count == 1).any(0).nonzero().flatten()
            rows = alone if plan.order is None else plan.order[alone]
            row = int(rows[0])
            raise lonely_sample_error(batch_size, self.clients[row], int(self.sizes()[row]))
        return plan

    def steps(self, plan: BatchPlan) -> Iterator[Step]:
        """Batches of a plan, step by step."""
        counts = plan.count.to(self.device, torch.float32)
        positions = torch.arange(plan.index.shape[2], device=self.device)
        rows = plan.order
        keys = self._keys(plan)
        dtype = self.data.x.dtype if self.data.x.is_floating_point() else torch.float32
        for t in range(plan.steps):
            a, width = plan.active[t], plan.width[t]
            index = plan.index[t, :a, :width]
            count = counts[t, :a]
            flat = index.reshape(-1)
            yield Step(
                active=a,
                index=index,
                x=self.data.x.index_select(0, flat).view(a, width, *self.data.x.shape[1:]),
                y=self.data.y.index_select(0, flat).view(a, width, *self.data.y.shape[1:]),
                weight=(positions[:width] < count[:, None]).to(dtype) if plan.ragged[t] else None,
                count=count,
                key=None if keys is None else keys[:a] + t,
                rows=None if rows is None else rows[:a],
            )

    def _keys(self, plan: BatchPlan) -> Tensor | None:
        if not self._dropout:
            return None
        purpose = "dropout" if plan.purpose == "batches" else f"dropout {plan.purpose}"
        seeds = [derive(self.seed, purpose, c, self.round) for c in self.clients]
        keys = torch.tensor(seeds) + self.steps_taken
        return (keys if plan.order is None else keys[plan.order]).to(self.device)

    def walk(self, *trees: Mapping[str, Tensor] | Tree, **options: Unpack[PlanOptions]) -> Walk:
        """Go through the clients' batches with a step of one's own.

        ``for step, rows in cohort.walk(params): ...`` yields each step with the rows ``[a, ...]`` of the clients that
        train in it, as a mapping whose tensors are changed in place; ``for step, (w, v) in cohort.walk(w, v)`` those of
        two trees. ``walk.optimizer(names)`` makes an optimizer for them.

        Parameters
        ----------
        *trees : Tree ``[K]`` or mapping of name to Tensor ``[K, ...]``
            Changed in place.
        **options
            See :class:`PlanOptions`.
        """
        return Walk(self, [entries(t) if isinstance(t, TensorDict) else t for t in trees], self.plan(**options))

    def gradients(
        self,
        step: Step,
        params: Mapping[str, Tensor],
        loss: Loss,
        names: Sequence[str],
        *,
        frozen: bool = False,
        given: Given | None = None,
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
        given : mapping of name to Tensor ``[K, ...]`` or mapping of such, optional
            What the loss may see beside network and batch, a row for each client of the cohort; see ``Batch.given``.

        Returns
        -------
        Tensor ``[a]``, dict of name to Tensor ``[a, ...]``
            Each client's loss, as `loss` gives it, and its gradient; a parameter the loss does not depend on is left
            out.

        Raises
        ------
        ConfigError
            If there is no parameter to differentiate by.
        RuntimeError
            If a network that draws from PyTorch's global generator is trained with more than one client.
        TypeError
            If the loss is no scalar.
        ValueError
            If what is given has not a row for each client of the cohort.
        """
        allowed = "a network that has parameters to train which are not frozen"
        check(bool(names), "model", type(self.module).__name__, allowed)
        self._mode(training=not frozen)
        self.gradients_taken[step.places("cpu")] += 1
        extra: dict[str, Any] = {k: v for k, v in (("weight", step.weight), ("key", step.key)) if v is not None}
        extra["given"] = self._rows_of(step, given)
        if self.training.logit_adjustment:
            extra["offsets"] = step.take(self._class_offsets())

        draws = self._draws and not frozen
        if draws and step.active > 1:
            raise RuntimeError("a network that draws from PyTorch's global generator is trained one client at a time")

        def evaluate(tensors: Mapping[str, Tensor], x: Tensor, y: Tensor, extra: Mapping[str, Any]) -> Tensor:
            weight, given = extra.get("weight"), extra["given"]
            network = Network(self.module, tensors, weight, extra.get("key"), given)
            with seeded(extra.get("key") if draws else None, self.device):
                value = loss(network, Batch(x, y, weight, given, self.data.task, extra.get("offsets")))
            if not isinstance(value, Tensor) or value.dim():
                shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"a loss is {shape}: expected a scalar tensor; reduce over samples with batch.mean")
            return value

        compute = gradients_of_one if step.active == 1 else gradients_of_many
        return compute(evaluate, step, params, names, extra)

    def _rows_of(self, step: Step, given: Given | None) -> dict[str, Any]:
        """Rows of what is given that belong to a step's clients; ValueError if it has none for each client."""
        for name, value in (given or {}).items():
            for tensor in [value] if isinstance(value, Tensor) else value.values():
                if not tensor.dim() or len(tensor) != self.size:
                    shape = list(tensor.shape)
                    raise ValueError(
                        f"given '{name}' has shape {shape}: expected {self.size} rows, one for each client"
                    )
        return map_tensors(given, step.take)

    def class_counts(self, outputs: int = 0, samples: Sequence[NDArray[np.int64]] | None = None) -> Tensor:
        """Training samples of each class in this round, int64 ``[K, C]``, for data with classes.

        C is the larger of the number of classes and `outputs`: a network may have outputs that stand for no class.
        `samples` are positions ``[n_k]`` of each client's, if not all (:meth:`samples`) are to be counted.
        """
        counted = [self.samples(c) for c in self.clients] if samples is None else samples
        labels = (self.data.y[torch.from_numpy(positions).to(self.device)] for positions in counted)
        return torch.stack([torch.bincount(y, minlength=max(outputs, self.data.num_classes)) for y in labels])

    def _class_offsets(self) -> Tensor:
        """What ``training.logit_adjustment`` adds to the scores of classes, ``[K, C]``; -inf for one a client lacks."""
        if self._offsets is None:
            counts = self.class_counts()
            dtype = next(iter(entries(self.template).values())).dtype
            shares = counts.to(dtype) / counts.sum(1, keepdim=True)
            self._offsets = self.training.logit_adjustment * shares.log()
        return self._offsets

    def _mode(self, training: bool) -> None:
        if self.module.training != training:
            self.module.train(training)

    def count_loss(self, step: Step, losses: Tensor) -> None:
        """Book the losses ``[a]`` of a step, weighted by samples, for the mean training loss of the round."""
        self.loss_sum[step.places(self.device)] += losses * step.count

    def book(self, plan: BatchPlan, num_steps: int) -> None:
        """Book the first `num_steps` steps of a plan and their samples."""
        count = plan.count[:num_steps]
        rows = slice(None) if plan.order is None else plan.order
        steps = (count > 0).sum(0)
        self.steps_taken[rows] += steps
        if plan.phase is not None:
            taken = self._phase_steps.setdefault(plan.phase, torch.zeros_like(self.longest_phase))
            taken[rows] += steps
            steps = taken[rows]
        self.longest_phase[rows] = torch.maximum(self.longest_phase[rows], steps)
        self.samples_seen[rows] += count.sum(0)

    def fit(
        self,
        params: Tree,
        loss: Loss,
        *,
        only: Selection = "parameters",
        adjust: Adjust | Iterable[Adjust] = (),
        mask: Mapping[str, Tensor] | None = None,
        given: Given | None = None,
        rates: Tensor | None = None,
        **options: Unpack[PlanOptions],
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
        adjust : callable or iterable
            Change the gradients before clipping and the step (:func:`proximal`, :func:`shifted`).
        mask : mapping of name to Tensor ``[K, ...]`` or ``[...]``, optional
            1 where an entry may move, 0 where not even weight decay moves it, for each client or for all; names it
            lacks are free.
        given : mapping of name to Tensor ``[K, ...]`` or Tree ``[K]``, optional
            What the loss may see beside network and batch: it is mapped over clients beside them, and the loss finds
            its client's row in ``batch.given[name]`` (of a tree, a mapping of name to tensor).
        rates : Tensor ``[K]``, optional
            Factor on the learning rates of each client, >= 0.
        **options
            Batches, other training settings, and whether layers are frozen (:meth:`gradients`), so that buffers do not
            change; see :class:`PlanOptions`.

        Raises
        ------
        ConfigError
            If nothing that `only` selects is trained.
        TypeError
            If the loss is no scalar.
        ValueError
            If `params` are not networks of K clients, or what is given, masks or hooks have another shape.
        """
        walk = self.walk({name: params[name] for name in self.names("all")}, **options)
        training, frozen = options.get("training"), options.get("frozen", False)
        names = self.trainable(only)
        if not names and self.trainable():
            raise ConfigError("only", only, "parts of the network with parameters that are not frozen")
        shapes = {name: value.shape for name, value in entries(self.template).items()}
        for name, value in walk.trees[0].items():
            if value.shape != (self.size, *shapes[name]):
                shape = list(value.shape)
                expected = f"expected networks of {self.size} clients, as cohort.assemble makes them"
                raise ValueError(f"'{name}' has shape {shape}: {expected}")
        optimizer = walk.optimizer(names, training, rates)
        hooks = [adjust] if callable(adjust) else list(adjust)
        for step, rows in walk:
            losses, grads = self.gradients(step, rows, loss, names, frozen=frozen, given=given)
            for hook in hooks:
                hook(step, rows, grads)
            masks = {n: step.aligned(n, m, rows[n]) for n, m in (mask or {}).items() if n in grads}
            optimizer.update(rows, grads, masks)
            self.count_loss(step, losses)

    def variance(self, params: Tree, only: Selection = "parameters") -> Tensor:
        """How far parameters scattered over the second half of the steps of each training in this call.

        Parameters
        ----------
        params : Tree ``[K]``
            Networks that were trained (:meth:`fit`, :meth:`walk`) while :attr:`measures_variance` held: these very
            tensors, not copies.
        only : selection
            Parameters that count, see :meth:`trainable`.

        Returns
        -------
        Tensor ``[K]``
            Variance of a coordinate over the networks before each of these steps and after the last, mean over
            coordinates, float64; of several trainings the sum. 0 for a client that took no step.

        Raises
        ------
        RuntimeError
            If one of them was in no training that was watched.
        """
        values = {name: params[name] for name in self.trainable(only)}
        total = torch.zeros(self.size, dtype=torch.float64, device=self.device)
        for name, value in values.items():
            known = [sums[name] for trained, sums in self.variances if name in sums and trained[name] is value]
            if not known:
                raise RuntimeError(f"'{name}' has no variance: expected the tensor that fit or walk trained")
            total += torch.stack(known).sum(0)
        mean: Tensor = total / max(1, sum(value[0].numel() for value in values.values()))
        return mean

    # ----------------------------------------------------------- evaluation

    def logits(self, params: Tree | View, part: Part, predict: Predict) -> list[Tensor]:
        """Predictions for all samples of one part, a Tensor ``[n_k, C]`` per client, in the order of its list.

        Parameters
        ----------
        params : Tree ``[K]`` or View
        part : {"train", "validation", "test"}
        predict : callable (network, x) -> logits ``[B, C]``
        """
        self._mode(training=False)
        view = View.of(params)
        lists = [self.data.positions(part, client, self.round) for client in self.clients]
        return predictions(self.module, self.data, view, lists, predict)

    def labels(self, part: Part) -> list[Tensor]:
        """Labels of each client's samples of one part, ``[n_k]``, in the order of :meth:`logits`."""
        index = torch.cat([self.data.positions(part, c, self.round) for c in self.clients]).to(self.device)
        return list(torch.split(self.data.y[index], self.sizes(part).tolist()))


def _form(value: object) -> str:
    """Shape of a tensor, clients of a tree, type of anything else."""
    if isinstance(value, TensorDict):
        return f"a tree {list(value.batch_size)}"
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
