"""FedRAP: each user's personal item table added to one for all.

Z. Li, G. Long, T. Zhou, Federated Recommendation with Additive Personalization, ICLR 2024, arXiv:2301.09109; authors'
code github.com/mtics/FedRAP (commit d6ee2ac).

User k has a score function (w_k, b_k) and an item table D_k, all have the table C; an item j scores
``sigmoid(w_k . (D_kj + C_j) + b_k)``. A visit takes up to E passes over the user's positives and their drawn negatives,
in batches of B samples (items repeat), and moves everything jointly:

    L = BCE - lam * mean_{B,dim} (D_j - C_j)^2 + mu * mean_{B,dim} |C_j|
    x <- x - lr_x * step_decay^t * (dL/dx + weight_decay * x)       t = step in this visit; x = w, b, and all of D and C
    end when |h_e - h_{e-1}| < tolerance * |h_{e-1}|                h_e = mean loss over all samples of passes 1..e
    C <- mean_k C_k                                                 not weighted

Shared: the item table C. Personal: the item table D_k, the user vector w_k and its bias b_k. D starts equal for all
users. It is FedMF (:mod:`fedpers.strategies.fedmf`, which says what a user computes and sends) with a second table,
penalties, decay of the rates within a visit and an early end.

Rates: ``training.lr`` is that of the score function, ``training.groups.body.lr`` that of both tables (the authors' are
0.5 and 200 to 1000: means over B * dim entries make gradients small); all fall by ``training.lr_decay`` per round. At
one shared rate D takes the fit first: it is kept whole, while C is a mean over users. So unless ``training.groups`` has
a rate for ``personal`` that is not also that of ``common``, D moves at 1/30 of C's and decays as fast, so that its
random start fades; with ``dataset.protocol=official`` at the same, as in the authors' code. (On MovieLens-100K the
factor was chosen on validation, see ``experiments/ratings``.)

The code differs from the paper. ``variant=official`` follows the code, which is checked number for
number (but for ``nuc`` and ``inf``, of which there is no trace):

- lam and mu stay constant: the code computes a curriculum (``tanh``, ...) and never uses it.
- The two penalties are means over the sampled rows, so rows that are not sampled feel only weight decay.
- All is moved by one step, not in turns; the score has a bias; nothing is made private.
- Cross-entropy is taken on the float32 probability, logarithms not below -100: a saturated score has no gradient.

``variant=paper``: the curriculum acts, and the penalties are over the whole tables, ``-lam ||D - C||_F^2 + mu
||C||_1``, each divided by the number of entries. As sums beside a mean cross-entropy they would grow without bound: a
step moves D and C apart by a factor of ``1 + 4 lam lr``, 81 at the authors' 200 and 0.1 for ML-100K. The curricula of
lam and mu are those of the authors' engine (rounds i from 0): tanh(i/10); sin: (sin(i/10) + 1) / 2; square: 1 and 0 in
turns of 5 rounds; frac: 1 / (i + 1), which falls; fixed or constant: 1.

Unlike in the code, entries of C may be left out of what is sent (``threshold``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedpers.cohort import Cohort, Selection, Training, Tree, entries
from fedpers.cohort.sparse_rows import VisitedRows, sgd_step
from fedpers.cohort.tree import expand_rows
from fedpers.data.federated import FederatedData
from fedpers.errors import check
from fedpers.models.factorization import require_factorization
from fedpers.records import ARRAYS
from fedpers.strategies.base import LocalUpdate, method
from fedpers.strategies.fedmf import FedMF, FedMFUpdate, Values, logistic

COMMON, PERSONAL = "common.weight", "personal.weight"
PERSONAL_SHARE = 1 / 30
"""Rate of the personal table, relative to that of the common one, unless a setting or the protocol says otherwise."""
_SMALL = 1e-4  # entries up to this size are what the authors' code counts as sparse

CURRICULA: dict[str, Callable[[int], float]] = {
    "constant": lambda i: 1.0,
    "fixed": lambda i: 1.0,
    "tanh": lambda i: math.tanh(i / 10),
    "sin": lambda i: (math.sin(i / 10) + 1) / 2,
    "square": lambda i: 1.0 - i // 5 % 2,
    "frac": lambda i: 1 / (i + 1),
}
"""Factor on lam and mu by round, from 0; ``fixed`` is the authors' word for constant."""


class AdditiveFactorization(nn.Module):
    """Score of an item: an affine function of the sum of its vectors in one or two tables.

    Parameters
    ----------
    personal, common : nn.Module or None
        Item tables with `weight` ``[m, dim]``; at least one.
    head : nn.Linear
        From ``[B, dim]`` to ``[B, 1]``.
    """

    def __init__(self, personal: nn.Module | None, common: nn.Module | None, head: nn.Module) -> None:
        super().__init__()
        self.personal = personal
        self.common = common
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, 1]`` of items `x`, int64 ids ``[B]``."""
        vectors = [table(x) for table in (self.personal, self.common) if table is not None]
        out: Tensor = self.head(sum(vectors))
        return out


# ------------------------------------------------------------------ penalties

Penalty = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From C's rows ``[a, R, dim]``, their counts and the weights of their entries ``[a, R]``: the value ``[a]`` and its
gradient ``[a, R, dim]``."""


def _absolute(rows: Tensor, count: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    return (rows.abs().sum(2) * share).sum(1), rows.sign().mul_(share.unsqueeze(2))


def _square(rows: Tensor, count: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    return (rows.square().sum(2) * share).sum(1), rows * (2 * share.unsqueeze(2))


def _nuclear(rows: Tensor, count: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the singular values of the sampled rows, repeats included."""
    root = count.sqrt().unsqueeze(2)
    u, s, v = torch.linalg.svd(rows * root, full_matrices=False)
    return s.sum(1), (u @ v) * root


def _largest(rows: Tensor, count: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Largest absolute entry of the sampled rows; equal ones share the gradient, repeats counted."""
    seen = count.unsqueeze(2)
    size = rows.abs() * (seen > 0)
    value = size.amax((1, 2))
    at = (size == expand_rows(value, rows)) * seen
    return value, rows.sign() * at / expand_rows(at.sum((1, 2)).clamp(min=1), rows)


def _nothing(rows: Tensor, count: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_zeros(len(rows)), torch.zeros_like(rows)


REGULARIZERS: dict[str, Penalty] = {
    "l1": _absolute,
    "l2": _square,
    "nuc": _nuclear,
    "inf": _largest,
    "none": _nothing,
}
"""Penalties on C, means over sampled entries (``l1``, ``l2``) or norms of the sampled rows as one matrix."""


@dataclass(kw_only=True)
class FedRAPUpdate(FedMFUpdate):
    """Move score function and both tables jointly, on the visited rows."""

    shared_table_name: ClassVar[str] = COMMON
    settles_parts = True
    lam: Annotated[
        float,
        Field(ge=0, description="how strongly the tables are pushed apart (authors' logs: 0.01 for MovieLens-1M)"),
    ] = 0.1
    mu: Annotated[
        float,
        Field(
            ge=0,
            description="how strongly the common table is kept small (authors' logs: 0.01 for MovieLens-1M, 1.0 for "
            "Last.fm)",
        ),
    ] = 0.1
    regularizer: Annotated[Literal["l1", "l2", "nuc", "inf", "none"], Field(description="what mu weighs")] = "l1"
    curriculum: Annotated[
        Literal["tanh", "sin", "square", "frac", "constant", "fixed"],
        Field(
            description="lam and mu over rounds, see the module; without effect in official, as in the authors' code"
        ),
    ] = "tanh"
    variant: Annotated[Literal["official", "paper"], Field(description="see the module")] = "official"
    tables: Annotated[
        Literal["both", "personal", "common"],
        Field(description="personal: without the common table; common: without the personal one"),
    ] = "both"
    step_decay: Annotated[float, Field(gt=0, le=1, description="factor on the rates from step to step of a visit")] = (
        0.95
    )
    tolerance: Annotated[
        float, Field(ge=0, description="relative change of the mean loss that ends a visit, from pass 2 on")
    ] = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = "l1 or none in variant=paper, which has no sampled rows to take a norm of"
        fits = self.variant == "official" or self.regularizer in ("l1", "none")
        check(fits, "strategy.regularizer", self.regularizer, allowed)

    @property
    def shared(self) -> Selection:  # type: ignore[override]
        """The common table, if there is one."""
        return "none" if self.tables == "personal" else "common"

    @property
    def personal(self) -> Selection:  # type: ignore[override]
        """All the rest."""
        return ("all", "-common") if self.tables == "both" else "all" if self.tables == "personal" else "head"

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Put a second table, drawn from its own random stream, beside the first."""
        network, data = require_factorization(model, data)
        personal = None if self.tables == "common" else deepcopy(network.body)
        common = None if self.tables == "personal" else self.common_table(network, seed)
        return AdditiveFactorization(personal, common, deepcopy(network.head)), data

    # ------------------------------------------------------------------ a visit

    def visited(self, cohort: Cohort) -> VisitedRows:
        """The sampled rows; all of them where penalties are over whole tables."""
        visited = VisitedRows(cohort, everything=self.variant == "paper")
        visited.training = self._with_rates(visited.training, cohort)
        return visited

    def _with_rates(self, training: Training, cohort: Cohort) -> Training:
        """Training settings in which the personal table has its default rate, unless a group sets it apart."""
        groups = training.groups or {}
        if self.tables != "both" or cohort.data.task.protocol == "official":
            return training
        common: dict[str, float] = {"lr": training.lr, "weight_decay": training.weight_decay}
        chosen: dict[str, float] = {}
        for group, options in groups.items():
            names = cohort.names(group)
            given = {str(name): value for name, value in options.items()}
            if COMMON in names:
                common |= given
            elif PERSONAL in names:
                chosen |= given
        if "lr" in chosen:
            return training
        personal: dict[Any, float] = {
            "lr": PERSONAL_SHARE * common["lr"],
            "weight_decay": common["weight_decay"] / PERSONAL_SHARE,
            **chosen,
        }
        return replace(training, groups={**groups, PERSONAL: personal})

    def descend(
        self, cohort: Cohort, visited: VisitedRows, tensors: dict[str, Tensor], factors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Walk pass by pass, until the mean loss of a user no longer changes; ``passes`` counts them."""
        total = torch.zeros(cohort.size, dtype=torch.float64, device=cohort.device)
        rate_factors = torch.ones_like(total)
        passes = torch.zeros(cohort.size, dtype=torch.float64)
        former = torch.full_like(passes, math.nan)
        next_steps = torch.tensor(visited.batches)  # steps of the next pass
        optimizer = None
        for _ in range(cohort.training.epochs):
            trees = tensors, factors, {"rate_factors": rate_factors, "total": total}
            walk = cohort.walk(*trees, steps=next_steps.tolist(), training=visited.training, phase="visit")
            optimizer = optimizer or walk.optimizer(list(tensors), visited.training)
            for step, (rows, decay_factors, visit) in walk:
                losses, grads = self.gradients_of_step(cohort, rows, *visited.counts(step))
                sgd_step(optimizer, rows, grads, decay_factors, visit["rate_factors"])
                visit["rate_factors"].mul_(self.step_decay)
                visit["total"].add_(losses.double() * step.count)
                cohort.count_loss(step, losses)
            passes += next_steps > 0
            mean = total.cpu() / cohort.samples_seen
            next_steps[(mean - former).abs() < self.tolerance * former.abs()] = 0
            if not bool(next_steps.any()):
                break
            former = mean
        return {"passes": passes}

    def gradients_of_step(
        self, cohort: Cohort, tensors: Values, positives: Tensor, samples: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses of a step and their gradients: cross-entropy of the sum of the tables, and the penalties."""
        personal, common = tensors.get(PERSONAL), tensors.get(COMMON)
        tables = [table for table in (personal, common) if table is not None]
        vectors = tables[0] if len(tables) == 1 else tables[0] + tables[1]
        losses, grads, by_vectors = logistic(vectors, tensors, positives, samples)
        if common is None:
            return losses, {**grads, PERSONAL: by_vectors}
        paper = self.variant == "paper"
        growth = CURRICULA[self.curriculum](cohort.round - 1) if paper else 1.0
        share = samples / (samples.sum(1, keepdim=True) * vectors.shape[2])
        if paper:  # means over whole tables
            share = torch.full_like(share, 1 / vectors[0].numel())
        value, by_common = REGULARIZERS[self.regularizer](common, samples, share)
        losses = losses + self.mu * growth * value
        grads[COMMON] = by_common.mul_(self.mu * growth).add_(by_vectors)
        if personal is not None:
            grads[PERSONAL] = by_vectors
            if self.lam:
                apart = personal - common
                losses = losses - self.lam * growth * (apart.square().sum(2) * share).sum(1)
                apart.mul_((2 * self.lam * growth * share).unsqueeze(2))
                grads[COMMON].add_(apart)
                grads[PERSONAL] = by_vectors.sub_(apart)
        return losses, grads


@method("fedrap")
@dataclass(kw_only=True)
class FedRAP(FedMF):
    """Server: unweighted mean of the common tables."""

    update: ClassVar[type[LocalUpdate]] = FedRAPUpdate
    client_update: FedRAPUpdate = field(default_factory=FedRAPUpdate)

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """As inherited; record the share of entries that are at most 1e-4 (the authors' measure of sparsity)."""
        if ARRAYS in means:
            (table,) = entries(means[ARRAYS]).values()
            self.report.extra["sparsity"] = float((table.abs() <= _SMALL).double().mean())
        return super().combine(arrays, means, clients)
