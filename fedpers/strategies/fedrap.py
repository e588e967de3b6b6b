"""FedRAP: an item table of one's own added to one for all.

Z. Li, G. Long, T. Zhou, Federated Recommendation with Additive Personalization, ICLR 2024, arXiv:2301.09109; authors'
code github.com/mtics/FedRAP (commit d6ee2ac).

User k has a score function (w_k, b_k) and an item table D_k, all have the table C; an item j scores
``sigmoid(w_k . (D_kj + C_j) + b_k)``. A visit takes up to E passes over the user's positives and their drawn negatives,
in batches of B samples (items repeat), and moves everything at once:

    L = BCE - lam * mean_{B,dim} (D_j - C_j)^2 + mu * mean_{B,dim} |C_j|
    x <- x - lr_x * step_decay^t * (dL/dx + weight_decay * x)       t = step in this visit; x = w, b, and all of D and C
    end when |h_e - h_{e-1}| < tolerance * |h_{e-1}|                h_e = mean loss over all samples of passes 1..e
    C <- mean_k C_k                                                 not weighted

Shared: C. Personal: D_k, w_k, b_k. D starts equal for all users.

Rates: ``training.lr`` is that of the score function, ``training.groups.body.lr`` that of both tables (the authors' are
0.5 and 200 to 1000: means over B * dim entries make gradients small); both fall by ``training.lr_decay`` per round.

The code differs from the paper. ``variant=official`` follows the code, which is checked number for
number (but for ``nuc`` and ``inf``, of which there is no trace):

- lam and mu stay constant: the code computes a curriculum (``tanh``, ...) and never uses it.
- The two penalties are means over the sampled rows, so rows that are not sampled feel only weight decay.
- All is moved by one step, not in turns; the score has a bias; nothing is made private.
- Cross-entropy is taken on the float32 probability, logarithms not below -100: a saturated score has no gradient.

``variant=paper``: the curriculum acts, and the penalties are sums over the whole tables, ``-lam ||D - C||_F^2 + mu
||C||_1`` (which takes far smaller rates). The shapes of ``tanh(a/10)`` (round a) are the code's; those of the other
curricula are not known: ``sin(pi/2 min(a/10, 1))``, ``min(a/10, 1)^2``, ``a/(a+10)``.

A visit computes with the rows it samples only. An item that repeats in a batch is one row with a count, so there is
neither gather nor scatter in a step; what decay does to the other rows is one factor, applied exactly. What is sent
are the visited rows of C and that factor, from which the server makes the exact mean. (The whole table would tell as
much: all rows that were not visited changed by the same factor.) Unlike in the code, entries with
``|value| <= threshold`` may be left out of the rows and of the table sent back; they then count as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from flwr.serverapp import Grid
from numpy.typing import NDArray
from torch import Tensor, nn

from fedpers.cohort import Cohort, Fold, Reply, Selection, Training, Tree, View, entries, tree
from fedpers.cohort.plan import batches_per_epoch
from fedpers.cohort.tree import expand_rows
from fedpers.data.federated import FederatedData
from fedpers.data.ratings import RankingData
from fedpers.errors import check, one_of
from fedpers.models import fresh
from fedpers.models.factorization import factorized
from fedpers.randomness import generator
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received
from fedpers.strategies.intake import Form, dtype_name
from fedpers.strategies.records import ARRAYS
from fedpers.strategies.server import Records

VARIANTS = ("official", "paper")
TABLES = ("both", "own", "common")
COMMON, OWN = "common.weight", "own.weight"
_SMALL = 1e-4  # entries up to this size are what the authors' code counts as sparse
_GROUPS = ("all", "body", "head")
_PLAIN = {"optimizer": "sgd", "momentum": 0.0, "schedule": "constant", "clip": None, "steps": None}

CURRICULA: dict[str, Callable[[int], float]] = {
    "constant": lambda round: 1.0,
    "tanh": lambda round: math.tanh(round / 10),
    "sin": lambda round: math.sin(math.pi / 2 * min(round / 10, 1.0)),
    "square": lambda round: min(round / 10, 1.0) ** 2,
    "frac": lambda round: round / (round + 10),
}
"""Factor on lam and mu by round (from 1)."""

Penalty = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From C's rows ``[a, R, dim]`` and their counts ``[a, R]``: the value ``[a]`` and its gradient ``[a, R, dim]``."""


class AdditiveFactorization(nn.Module):
    """Score of an item: an affine function of the sum of its vectors in one or two tables.

    Parameters
    ----------
    own, common : nn.Module or None
        Item tables with `weight` ``[m, dim]``; at least one.
    head : nn.Linear
        From ``[B, dim]`` to ``[B, 1]``.
    """

    def __init__(self, own: nn.Module | None, common: nn.Module | None, head: nn.Module) -> None:
        super().__init__()
        self.own = own
        self.common = common
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, 1]`` of items `x`, int64 ids ``[B]``."""
        vectors = [table(x) for table in (self.own, self.common) if table is not None]
        out: Tensor = self.head(sum(vectors))
        return out


def _mean_absolute(rows: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    share = _share(rows, count)
    return (rows.abs() * share).sum((1, 2)), rows.sign() * share


def _mean_square(rows: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    share = _share(rows, count)
    return (rows.square() * share).sum((1, 2)), 2 * rows * share


def _nuclear(rows: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the singular values of the sampled rows, repeats included."""
    root = count.sqrt().unsqueeze(2)
    u, s, v = torch.linalg.svd(rows * root, full_matrices=False)
    return s.sum(1), (u @ v) * root


def _largest(rows: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Largest absolute entry of the sampled rows; equal ones share the gradient, repeats counted."""
    seen = count.unsqueeze(2)
    size = rows.abs() * (seen > 0)
    value = size.amax((1, 2))
    at = (size == expand_rows(value, rows)) * seen
    return value, rows.sign() * at / expand_rows(at.sum((1, 2)).clamp(min=1), rows)


def _nothing(rows: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_zeros(len(rows)), torch.zeros_like(rows)


def _share(rows: Tensor, count: Tensor) -> Tensor:
    """Weight of each entry in the mean over the sampled ones, ``[a, R, 1]``."""
    return (count / (count.sum(1, keepdim=True) * rows.shape[2])).unsqueeze(2)


REGULARIZERS: dict[str, Penalty] = {
    "l1": _mean_absolute,
    "l2": _mean_square,
    "nuc": _nuclear,
    "inf": _largest,
    "none": _nothing,
}
"""Penalties on C, means over sampled entries (``l1``, ``l2``) or norms of the sampled rows as one matrix."""


@dataclass
class Visit:
    """What K users compute in a round: the rows they sample, and how often at each step.

    Attributes
    ----------
    rows : Tensor ``[K, R]``
        Items, ascending, int64; places beyond a user's last are ``m``.
    positives, samples : Tensor ``[E, S, K, R]``
        How many of an item's samples in a step are positives, and how many there are; E passes of up to S steps
        (one pass stands for all where every user has all samples in one batch: their order does not matter).
    steps : list of int ``[K]``
        Steps in a pass, not ascending.
    """

    rows: Tensor
    positives: Tensor
    samples: Tensor
    steps: list[int]


@dataclass(kw_only=True)
class FedRAPUpdate(LocalUpdate):
    """Move score function and both tables at once, on the visited rows.

    Parameters
    ----------
    lam : float
        How strongly the tables are pushed apart, >= 0; 0 leaves the difference out.
    mu : float
        How strongly C is kept small, >= 0.
    regularizer : {"l1", "l2", "nuc", "inf", "none"}
        What `mu` weighs.
    curriculum : {"tanh", "sin", "square", "frac", "constant"}
        Growth of `lam` and `mu` over rounds; without effect in ``official``, as in the authors' code.
    variant : {"official", "paper"}
    tables : {"both", "own", "common"}
        Ablations: without C, or without D.
    step_decay : float
        Factor on the rates from step to step of a visit, in (0, 1].
    tolerance : float
        Relative change of the mean loss below which a visit ends, >= 0.
    threshold : float
        Entries of C that are not larger are not sent, >= 0; 0 sends all.

    Raises
    ------
    ConfigError
        If a value is out of range, or data, network or training settings do not fit.
    """

    cohort_size = 8
    lam: float = 0.1
    mu: float = 0.1
    regularizer: str = "l1"
    curriculum: str = "tanh"
    variant: str = "official"
    tables: str = "both"
    step_decay: float = 0.95
    tolerance: float = 1e-4
    threshold: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lam", "mu", "tolerance", "threshold"):
            check(getattr(self, name) >= 0, f"strategy.{name}", getattr(self, name), "a number >= 0")
        check(0 < self.step_decay <= 1, "strategy.step_decay", self.step_decay, "a number > 0 and <= 1")
        known: dict[str, Iterable[str]] = {
            "regularizer": REGULARIZERS,
            "curriculum": CURRICULA,
            "variant": VARIANTS,
            "tables": TABLES,
        }
        for name, options in known.items():
            value = getattr(self, name)
            check(value in options, f"strategy.{name}", value, one_of(options, value))
        allowed = "l1 or none in variant=paper, which has no sampled rows to take a norm of"
        fits = self.variant == "official" or self.regularizer in ("l1", "none")
        check(fits, "strategy.regularizer", self.regularizer, allowed)
        for group in self.training.groups or {}:
            check(
                group in _GROUPS,
                "training.groups",
                group,
                f"{one_of(_GROUPS, group)}, the tables and the score function",
            )
        for name, plain in _PLAIN.items():
            value = getattr(self.training, name)
            allowed = f"{'null' if plain is None else plain} for this method, which has an update of its own"
            check(value == plain, f"training.{name}", value, allowed)

    @property
    def shared(self) -> Selection:  # type: ignore[override]
        """The common table, if there is one."""
        return "none" if self.tables == "own" else "common"

    @property
    def personal(self) -> Selection:  # type: ignore[override]
        """All the rest."""
        return ("all", "-common") if self.tables == "both" else "all" if self.tables == "own" else "head"

    def extend(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Put a second table, drawn for itself, beside the first."""
        model, data = factorized(model, data)
        own = None if self.tables == "common" else deepcopy(model.body)
        common = None if self.tables == "own" else fresh(model, seed).body
        if common is not None and self.threshold:  # what is not sent is 0 from the start
            with torch.no_grad():
                table = common.get_parameter("weight")
                table.mul_(table.abs() > self.threshold)
        return AdditiveFactorization(own, common, deepcopy(model.head)), data

    # ------------------------------------------------------------------ a round

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Visit the sampled rows; decay the others by one factor."""
        visit = self.visit(cohort)
        state = cohort.state.get("model", None)
        own = None if state is None else state.get(OWN, None)
        common = None if self.tables == "own" else self.table(received)
        count = int(cohort.data.num_items) if isinstance(cohort.data, RankingData) else 0
        real = visit.rows < count
        places = visit.rows.clamp(max=count - 1)
        users = torch.arange(cohort.size, device=cohort.device)[:, None]

        assert state is not None
        moved = {name: state[name].clone() for name in ("head.weight", "head.bias") if name in state}
        if own is not None:
            moved[OWN] = own[users, places]
        if common is not None:
            moved[COMMON] = common[places]
        factor, passes = self._descend(cohort, visit, moved)

        kept = {name: value for name, value in moved.items() if name.startswith("head.")}
        if own is not None:
            table = own.mul_(expand_rows(factor, own))  # a copy: the state was gathered for this cohort
            table[users.expand_as(real)[real], visit.rows[real]] = moved[OWN][real]
            kept[OWN] = table
        records = {}
        if common is not None:
            records[ARRAYS] = tree(
                {"rows": torch.where(real, visit.rows, -1).int(), "values": moved[COMMON], "factor": factor},
                cohort.size,
            )
        new = Tree({"model": tree(kept, cohort.size)}, batch_size=[cohort.size])
        return Reply(records, new, {"passes": passes})

    def visit(self, cohort: Cohort) -> Visit:
        """Draw the samples of a round, and count each item's in every step."""
        data = cohort.data
        assert isinstance(data, RankingData)
        items = data.num_items
        size, epochs = cohort.training.batch_size, cohort.training.epochs
        drawn = [data.samples(client, cohort.seed, cohort.round) for client in cohort.clients]
        steps = [batches_per_epoch(len(own), size, cohort.training.drop_last) for own in drawn]
        unique = [np.unique(own % items, return_inverse=True) for own in drawn]
        width = items if self.variant == "paper" else max(len(own) for own, _ in unique)
        # an order that does not matter: everything in one batch, in every pass
        whole = [count == 1 and not (cohort.training.drop_last and len(own) > size > 0)
                 for count, own in zip(steps, drawn, strict=True)]  # fmt: skip
        passes = min(1, epochs) if all(whole) else epochs
        rows = np.full((cohort.size, width), items, dtype=np.int64)
        counts = np.zeros((2, passes, max(steps), cohort.size, width), dtype=np.float32)
        for k, (own, (found, place)) in enumerate(zip(drawn, unique, strict=True)):
            if self.variant == "paper":
                found, place = np.arange(items), own % items
            rows[k, : len(found)] = found
            positive = (own >= items).astype(np.float32)
            for epoch in range(min(1, passes) if whole[k] else passes):
                order = np.arange(len(own)) if whole[k] else self.order(cohort, k, epoch, len(own))
                for step in range(steps[k]):
                    used = order[step * size : (step + 1) * size] if size else order
                    for kind, weight in enumerate((positive[used], None)):
                        counts[kind, epoch, step, k] = np.bincount(place[used], weight, minlength=width)
            if whole[k]:
                counts[:, 1:, 0, k] = counts[:, :1, 0, k]
        dtype = entries(cohort.template)["head.weight"].dtype
        positives, samples = torch.from_numpy(counts).to(cohort.device, dtype)
        return Visit(torch.from_numpy(rows).to(cohort.device), positives, samples, steps)

    def order(self, cohort: Cohort, k: int, epoch: int, size: int) -> NDArray[np.int64]:
        """Order of user k's samples in a pass, positions ``[size]``."""
        if not cohort.training.shuffle:
            return np.arange(size)
        return generator(cohort.seed, "batches", cohort.clients[k], cohort.round, epoch).permutation(size)

    def _descend(self, cohort: Cohort, visit: Visit, moved: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Take all steps of a visit, in place.

        Returns
        -------
        Tensor ``[K]``, Tensor ``[K]``
            What weight decay left of a row that was never visited, and the passes taken.
        """
        stack = dict(moved)  # rows of those that go on; those that end are written back
        factor = visit.positives.new_ones(cohort.size)
        passes = torch.zeros(cohort.size, dtype=torch.float64)
        going = torch.arange(cohort.size, device=cohort.device)
        total = factor.new_zeros(cohort.size, dtype=torch.float64)
        seen, former = torch.zeros_like(total), torch.full_like(total, torch.nan)
        for epoch in range(cohort.training.epochs):
            now = min(epoch, len(visit.positives) - 1)
            steps = [visit.steps[int(k)] for k in going.tolist()]
            for step in range(max(steps)):
                a = sum(count > step for count in steps)
                who = going[:a]
                positives, samples = visit.positives[now, step, who], visit.samples[now, step, who]
                taken = torch.tensor([epoch * count + step for count in steps[:a]], device=cohort.device)
                decay = (self.step_decay ** taken.double()).to(factor.dtype)
                losses = self._step(cohort, {n: v[:a] for n, v in stack.items()}, positives, samples, decay)
                factor[who] *= 1 - decay * self._rate(cohort, "body") * self._decay(cohort, "body")
                total[who] += losses.double() * samples.sum(1)
                seen[who] += samples.sum(1)
                cohort.steps_taken[who.cpu()] += 1
                cohort.gradients_taken[who.cpu()] += 1
            passes[going.cpu()] += 1
            mean = total[going] / seen[going]
            done = (mean - former[going]).abs() < self.tolerance * former[going].abs()
            former[going] = mean
            if bool(done.any()):
                for name, value in stack.items():
                    moved[name][going[done]] = value[done]
                    stack[name] = value[~done]
                going = going[~done]
                if not len(going):
                    break
        for name, value in stack.items():
            if value is not moved[name]:
                moved[name][going] = value
        cohort.loss_sum += total.to(cohort.loss_sum.dtype)
        cohort.samples_seen += seen.long().cpu()
        return factor, passes

    def _step(
        self, cohort: Cohort, at: Mapping[str, Tensor], positives: Tensor, samples: Tensor, decay: Tensor
    ) -> Tensor:
        """One step of a users in place; their losses ``[a]``. Gradients are written out: autograd takes thrice as long.

        Parameters
        ----------
        cohort : Cohort
        at : mapping of name to Tensor
            ``own.weight`` and ``common.weight`` ``[a, R, dim]``, ``head.weight`` ``[a, 1, dim]``, ``head.bias``
            ``[a, 1]``.
        positives, samples : Tensor ``[a, R]``
        decay : Tensor ``[a]``
            Factor on the rates.
        """
        own, common = at.get(OWN), at.get(COMMON)
        vectors = own + common if own is not None and common is not None else own if common is None else common
        assert vectors is not None
        weight, bias = at["head.weight"], at.get("head.bias")
        size = samples.sum(1)
        logit = (vectors @ weight.transpose(1, 2)).squeeze(2)
        chance = torch.sigmoid(logit if bias is None else logit + bias)
        losses = (
            positives * chance.log().clamp(min=-100) + (samples - positives) * (1 - chance).log().clamp(min=-100)
        ).sum(1) / -size
        slope = chance * (1 - chance)
        slope = (samples * chance - positives) * (slope / slope.clamp(min=1e-12)) / size[:, None]
        head = {"head.weight": slope.unsqueeze(1) @ vectors, "head.bias": slope.sum(1, keepdim=True)}

        rate = decay * self._rate(cohort, "body")
        shrink = expand_rows(1 - rate * self._decay(cohort, "body"), vectors)
        push = (expand_rows(rate, slope) * slope).unsqueeze(2) * weight
        paper = self.variant == "paper"
        growth = CURRICULA[self.curriculum](cohort.round) if paper else 1.0
        lam, mu = self.lam * growth, self.mu * growth
        if common is not None:
            everywhere = torch.full_like(samples, vectors.shape[2])  # a mean over these is a sum over the table
            scale = vectors.shape[1] * vectors.shape[2] if paper else 1.0
            value, slope_c = REGULARIZERS[self.regularizer](common, everywhere if paper else samples)
            losses = losses + mu * scale * value
            push_c = slope_c.mul_(expand_rows(rate * mu * scale, slope_c)).add_(push)
            if own is not None and lam:
                share = _share(vectors, everywhere if paper else samples) * scale
                apart = own - common
                losses = losses - lam * (apart.square() * share).sum((1, 2))
                apart.mul_(share * expand_rows(2 * lam * rate, share))
                push_c.add_(apart)
                push = push - apart
            common.mul_(shrink).sub_(push_c)
        if own is not None:
            own.mul_(shrink).sub_(push)
        for name, grad in head.items():
            if name in at:
                step = expand_rows(decay * self._rate(cohort, name), grad)
                at[name].sub_(step * (grad + self._decay(cohort, name) * at[name]))
        return losses

    def _rate(self, cohort: Cohort, name: str) -> float:
        return self._setting(cohort.training, name, "lr") * cohort.training.lr_decay ** max(0, cohort.round - 1)

    def _decay(self, cohort: Cohort, name: str) -> float:
        return self._setting(cohort.training, name, "weight_decay")

    def _setting(self, training: Training, name: str, key: str) -> float:
        """A rate or decay of the tables (``body``) or of the score function, as ``training.groups`` has it."""
        value = float(getattr(training, key))
        for group, options in (training.groups or {}).items():
            if group in ("all", "body" if name == "body" else "head"):
                value = float(options.get(key, value))
        return value

    # ------------------------------------------------------------------ on the way

    def table(self, received: Received) -> Tensor:
        """The received table C, ``[m, dim]``."""
        values = entries(received[ARRAYS])
        return _dense(values) if "places" in values else values[COMMON]

    def personalize(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Tree | View:
        """Own table and score function, and the received table."""
        if self.tables == "own":
            return cohort.view(tree({}))
        sent = received[ARRAYS]
        return cohort.view(tree({COMMON: self.table(received)}) if "places" in entries(sent) else sent)

    def pack(self, records: dict[str, Tree]) -> dict[str, Tree]:
        """Leave out the places that are no rows and, with a threshold, the small values."""
        if ARRAYS not in records:
            return records
        sent = entries(records[ARRAYS])
        real = sent["rows"] >= 0
        rows, values = sent["rows"][real], sent["values"][real]
        packed = {"rows": rows, "values": values, "factor": sent["factor"]}
        if self.threshold:
            packed = {"rows": rows, **_sparse(values, self.threshold), "factor": sent["factor"]}
        return {**records, ARRAYS: tree(packed)}


def _sparse(values: Tensor, threshold: float) -> dict[str, Tensor]:
    """Entries that are larger, and their places in the flattened table."""
    places = (values.abs() > threshold).flatten().nonzero().flatten()
    return {"values": values.flatten()[places], "places": places.int(), "shape": torch.tensor(values.shape)}


def _dense(values: Mapping[str, Tensor]) -> Tensor:
    """Inverse of :func:`_sparse`, 0 where nothing was sent; a ValueError if that makes no table."""
    shape, places = values["shape"].tolist(), values["places"].long()
    if len(shape) != 2 or min(shape) < 0 or (len(places) and not 0 <= int(places.min()) <= int(places.max())):
        raise ValueError("'places' does not belong to a table")
    if len(places) != len(values["values"]) or (len(places) and int(places.max()) >= shape[0] * shape[1]):
        raise ValueError("'places' lie outside of the table")
    table = values["values"].new_zeros(shape[0] * shape[1])
    table[places] = values["values"]
    return table.view(shape)


class RowMean:
    """Mean of tables of which each differs from a common one by a factor and in some rows; see :class:`Fold`.

    Parameters
    ----------
    table : Tensor ``[m, dim]``
        What all users received.
    """

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.rest = 0.0
        self.total = 0.0
        self.change = torch.zeros(table.shape, dtype=torch.float64, device=table.device)

    def add(self, records: Mapping[str, Tree], weight: float, client: int) -> None:
        """Take in ``rows`` ``[r]``, ``values`` ``[r, dim]`` and ``factor`` of a user."""
        if ARRAYS not in records:
            return
        sent = entries(records[ARRAYS])
        rows, factor = sent["rows"].long().to(self.table.device), float(sent["factor"])
        values = sent["values"].to(self.table.device).double()
        self.rest += weight * factor
        self.total += weight
        self.change.index_add_(0, rows, values - factor * self.table[rows].double(), alpha=weight)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "table": None}  # whoever merges it has the table

    def merge(self, other: RowMean) -> None:
        """Take in what another fold took in."""
        self.rest += other.rest
        self.total += other.total
        self.change += other.change.to(self.change.device)

    def result(self) -> dict[str, Tree]:
        """Return the mean table."""
        if not self.total:
            return {}
        mean = (self.table.double() * self.rest + self.change) / self.total
        return {ARRAYS: tree({COMMON: mean.to(self.table.dtype)})}


@dataclass(kw_only=True)
class FedRAP(PersonalizedStrategy):
    """Server: unweighted mean of the common tables.

    Parameters
    ----------
    threshold : float
        See :class:`FedRAPUpdate`.
    """

    update: ClassVar[type[LocalUpdate]] = FedRAPUpdate
    weighting: str = "uniform"
    threshold: float = 0.0

    def send(self, round: int, arrays: Tree, clients: list[int]) -> Mapping[str, Tree]:
        """Send the table, without its small entries if there is a threshold."""
        if not self.threshold or COMMON not in entries(arrays):
            return {ARRAYS: arrays}
        return {ARRAYS: tree(_sparse(arrays[COMMON], self.threshold))}

    def unpack(self, records: dict[str, Tree], client: int) -> dict[str, Tree]:
        """Check rows, and fill in the small values that were not sent."""
        if ARRAYS not in records:
            return records
        table = self.sent_arrays[COMMON]
        sent = dict(entries(records[ARRAYS]))
        if "places" in sent:
            sent["values"] = _dense(sent)
        rows = sent["rows"]
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(table):
            raise ValueError(f"'rows' name items outside 0..{len(table) - 1}")
        if sent["values"].shape != (len(rows), table.shape[1]):
            raise ValueError(f"'values' has shape {list(sent['values'].shape)}, expected {[len(rows), table.shape[1]]}")
        return {**records, ARRAYS: tree({name: sent[name] for name in ("rows", "values", "factor")})}

    def reply_form(self, client: int) -> Form:
        """Rows, values and the factor, or nothing where there is no common table."""
        if COMMON not in entries(self.sent_arrays):
            return {}
        table = self.sent_arrays[COMMON]
        kind = dtype_name(table)
        form: dict[str, tuple[tuple[int, ...], str]] = {"rows": ((-1,), "int32"), "factor": ((), kind)}
        if self.threshold:
            form.update({"values": ((-1,), kind), "places": ((-1,), "int32"), "shape": ((2,), "int64")})
        else:
            form["values"] = ((-1, table.shape[1]), kind)
        return {(ARRAYS, name): value for name, value in form.items()}

    def fold(self) -> Fold:
        """Sum the rows that were visited."""
        values = entries(self.sent_arrays)
        return RowMean(values[COMMON] if COMMON in values else torch.zeros(0, 0))

    def adapt(self, round: int, arrays: Tree, grid: Grid, clients: list[int]) -> tuple[list[int], list[Records]]:
        """As inherited; the rows an unseen user sends are put into the table it received."""
        adapted, found = super().adapt(round, arrays, grid, clients)
        records = []
        for own in found:
            sent = entries(own[ARRAYS]) if ARRAYS in own else {}
            if "rows" in sent:
                table = arrays[COMMON] * sent["factor"].to(arrays[COMMON].device)
                table[sent["rows"].long()] = sent["values"].to(table.device)
                own = {**own, ARRAYS: tree({COMMON: table})}
            records.append(own)
        return adapted, records

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """Take the mean; record the share of its entries that are at most 1e-4 (the authors' measure of sparsity)."""
        if ARRAYS not in means:
            return arrays
        table = means[ARRAYS][COMMON]
        self.report.extra["sparsity"] = float((table.abs() <= _SMALL).double().mean())
        if self.threshold:
            table = torch.where(table.abs() > self.threshold, table, 0.0)
            self.report.extra["sent_share"] = float((table != 0).double().mean())
        return tree({COMMON: table})
