"""FedMF: one item table for all, a user vector of one's own.

D. Chai et al., Secure Federated Matrix Factorization, IEEE Intelligent Systems 2021, arXiv:1906.05108.

User k has a vector w_k (and a bias b_k), all have the item table C; item j scores ``sigmoid(w_k . C_j + b_k)``.

    w_k, b_k, C <- passes of SGD on the binary cross-entropy of the user's positives and drawn negatives, jointly
    C           <- mean_k C_k                                                  not weighted

Shared: the item table C. Personal: the user vector w_k and its bias b_k. Rates: ``training.lr`` is that of the user
vector, ``training.groups.body.lr`` that of the table.

The paper factorizes explicit ratings and encrypts what is sent; here, as in the comparisons of papers on implicit
feedback, the loss is theirs and nothing is encrypted. Cross-entropy is taken on the float32 probability, logarithms not
below -100, as FedRAP's authors do: a saturated score has no gradient.

A user computes with the rows of C it samples, and sends those and one factor for what weight decay did to the others
(:mod:`fedpers.cohort.sparse_rows`), from which the server makes the exact mean. (The whole table would tell as much:
all other rows changed by the same factor.) Entries with ``|value| <= threshold`` may be left out of the rows and of the
table sent back; they then count as 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fedpers.cohort import Cohort, Fold, Records, Reply, Tree, View, entries, tree
from fedpers.cohort.sparse_rows import (
    RowMean,
    VisitedRows,
    dense,
    packed,
    sgd_step,
    sparse,
    with_rows,
)
from fedpers.data.federated import FederatedData
from fedpers.errors import check
from fedpers.models import fresh
from fedpers.models.factorization import require_factorization
from fedpers.records import ARRAYS
from fedpers.server.collect import Entry, Schema, dtype_name
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, SampleWeighting, method

_REQUIRED_TRAINING = {
    "optimizer": "sgd",
    "momentum": 0.0,
    "schedule": "constant",
    "clip": None,
    "steps": None,
    "proximal": 0.0,
}
Values = Mapping[str, Tensor]


@dataclass(kw_only=True)
class FedMFUpdate(LocalUpdate):
    """Move user vector and item table jointly, on the visited rows.

    Attributes
    ----------
    shared_table_name : str
        Name of the table that all have.
    """

    shared = "body"
    personal = "head"
    settles_parts = True
    can_finetune = False
    cohort_size = 16  # set here, because timing the steps of Cohort.fit says nothing about this update
    shared_table_name: ClassVar[str] = "body.weight"
    threshold: Annotated[
        float,
        Field(
            ge=0,
            description="entries of the shared item table with absolute value <= threshold are not sent; 0 sends all",
        ),
    ] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, required in _REQUIRED_TRAINING.items():
            value = getattr(self.training, name)
            allowed = f"{'null' if required is None else required} for this method, which has an update of its own"
            check(value == required, f"training.{name}", value, allowed)

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Draw the common table from its own random stream."""
        network, data = require_factorization(model, data)
        network = deepcopy(network)
        network.body = self.common_table(network, seed)
        return network, data

    def common_table(self, model: nn.Module, seed: int) -> nn.Module:
        """The first common table; what is not sent is 0 from the start."""
        table = fresh(model, seed).get_submodule("body")
        if self.threshold:
            with torch.no_grad():
                weight = table.get_parameter("weight")
                weight.mul_(weight.abs() > self.threshold)
        return table

    # -------------------------------------------------------------------- training

    def visited(self, cohort: Cohort) -> VisitedRows:
        """Item rows that the cohort's clients sample this round."""
        return VisitedRows(cohort)

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Move the visited rows; decay the others by one factor."""
        visited = self.visited(cohort)
        personal_values, sent = entries(cohort.state["model"]), entries(self.common(received))
        tables = cohort.names("body")
        tensors = {n: visited.gather(v) if n in tables else v.clone() for n, v in {**personal_values, **sent}.items()}
        one = tensors["head.weight"].new_ones(cohort.size)
        factors = {name: one.clone() for name in tables}
        metrics = self.descend(cohort, visited, tensors, factors)
        cohort.gradients_taken += cohort.steps_taken
        # tables are written where they are: the state was gathered for this cohort
        new = {
            n: visited.put(v, tensors[n], factors[n]) if n in tables else tensors[n] for n, v in personal_values.items()
        }
        shared = self.shared_table_name
        records = {ARRAYS: visited.message(tensors[shared], factors[shared])} if sent else {}
        return Reply(records, tree({"model": tree(new, cohort.size)}, cohort.size), metrics)

    def descend(
        self, cohort: Cohort, visited: VisitedRows, tensors: dict[str, Tensor], factors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Take all steps of a round in place.

        Parameters
        ----------
        cohort : Cohort
        visited : VisitedRows
        tensors : dict of name to Tensor ``[K, ...]``
            The network: of tables the visited rows ``[K, R, dim]``.
        factors : dict of name to Tensor ``[K]``
            By table, what weight decay leaves of the other rows.

        Returns
        -------
        dict of name to Tensor ``[K]``
            Metrics.
        """
        walk = cohort.walk(tensors, factors, training=visited.training)
        optimizer = walk.optimizer(list(tensors))
        rate_factors = torch.ones(cohort.size, dtype=torch.float64, device=cohort.device)
        for step, (rows, decay_factors) in walk:
            losses, grads = self.gradients_of_step(cohort, rows, *visited.counts(step))
            sgd_step(optimizer, rows, grads, decay_factors, rate_factors[: step.active])
            cohort.count_loss(step, losses)
        return {}

    def gradients_of_step(
        self, cohort: Cohort, tensors: Values, positives: Tensor, samples: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses ``[a]`` of a step and their gradients, written out: autograd takes thrice as long.

        Parameters
        ----------
        cohort : Cohort
        tensors : mapping of name to Tensor
            Tables ``[a, R, dim]``, ``head.weight`` ``[a, 1, dim]``, and perhaps ``head.bias`` ``[a, 1]``.
        positives, samples : Tensor ``[a, R]``
            How many of an item's samples in the step are positives, and how many there are.
        """
        losses, grads, by_vectors = logistic(tensors[self.shared_table_name], tensors, positives, samples)
        return losses, {**grads, self.shared_table_name: by_vectors}

    # ------------------------------------------------------------------ on the way

    def common(self, received: Received) -> Tree:
        """The received table ``[m, dim]`` by its name; nothing if there is none."""
        sent = received.get(ARRAYS, tree({}))
        values = entries(sent)
        return tree({self.shared_table_name: dense(values)}) if "indices" in values else sent

    def personalize(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Tree | View:
        """What the user keeps, and the received table."""
        return cohort.view(self.common(received))

    def encode(self, records: dict[str, Tree]) -> dict[str, Tree]:
        """Drop padding rows and, with a threshold, entries with ``|value| <= threshold``."""
        return {name: packed(entries(values), self.threshold) for name, values in records.items()}


def logistic(
    vectors: Tensor, head: Values, positives: Tensor, samples: Tensor
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Mean binary cross-entropy of affine scores, and its gradients.

    Taken on the probability, logarithms not below -100.

    Parameters
    ----------
    vectors : Tensor ``[a, R, dim]``
        Of the items.
    head : mapping of name to Tensor
        ``head.weight`` ``[a, 1, dim]``, and perhaps ``head.bias`` ``[a, 1]``.
    positives, samples : Tensor ``[a, R]``
        How many samples of each item are positives, and how many there are.

    Returns
    -------
    Tensor ``[a]``, dict of name to Tensor, Tensor ``[a, R, dim]``
        Losses; gradients by the head and by the vectors.
    """
    weight, bias = head["head.weight"], head.get("head.bias")
    size = samples.sum(1)
    logit = (vectors @ weight.transpose(1, 2)).squeeze(2)
    probability = torch.sigmoid(logit if bias is None else logit + bias)
    logs = positives * probability.log().clamp(min=-100)
    logs = logs + (samples - positives) * (1 - probability).log().clamp(min=-100)
    derivative = probability * (1 - probability)
    # as autograd does: the derivative of binary cross-entropy divides by max(p(1-p), 1e-12) and sigmoid's multiplies
    # by p(1-p): 1 unless p is saturated, then 0
    unsaturated = derivative / derivative.clamp(min=1e-12)
    grad_logit = (samples * probability - positives) * unsaturated / size[:, None]
    grads = {"head.weight": grad_logit.unsqueeze(1) @ vectors}
    if bias is not None:
        grads["head.bias"] = grad_logit.sum(1, keepdim=True)
    return logs.sum(1) / -size, grads, grad_logit.unsqueeze(2) * weight


@method("fedmf")
@dataclass(kw_only=True)
class FedMF(PersonalizedStrategy):
    """Server: unweighted mean of the item tables."""

    update: ClassVar[type[LocalUpdate]] = FedMFUpdate
    common_options = ("threshold",)
    client_update: FedMFUpdate = field(default_factory=FedMFUpdate)
    weighting: SampleWeighting = "uniform"

    @property
    def sent_table(self) -> tuple[str, Tensor] | None:
        """Name and values ``[m, dim]`` of the table that all have, before the round; None if there is none."""
        return next(iter(entries(self.sent_arrays).items()), None)

    def send(self, round: int, arrays: Tree, clients: list[int]) -> Records:
        """Send the table, without its small entries if there is a threshold."""
        tables, threshold = list(entries(arrays).values()), self.client_update.threshold
        return {ARRAYS: tree(sparse(tables[0], threshold)) if threshold and tables else arrays}

    def reply_schema(self, clients: list[int]) -> Schema:
        """Rows, values and the factor; nothing where there is no common table."""
        if self.sent_table is None:
            return {}
        _, table = self.sent_table
        kind = dtype_name(table)
        schema = {"rows": Entry((-1,), "int32"), "values": Entry((-1, table.shape[1]), kind), "factor": Entry((), kind)}
        if self.client_update.threshold:
            schema |= {"values": Entry((-1,), kind), "indices": Entry((-1,), "int32"), "shape": Entry((2,), "int64")}
        return {(ARRAYS, name): entry for name, entry in schema.items()}

    def fold(self) -> Fold:
        """Mean of the rows that were visited."""
        return super().fold() if self.sent_table is None else RowMean(*self.sent_table)

    def adapted_records(self, sent: Records, reply: Mapping[str, Tree]) -> Records:
        """Put the rows an unseen user sends into the table it received."""
        rows = entries(reply[ARRAYS]) if ARRAYS in reply else {}
        if not rows:
            return sent
        tables = entries(self.client_update.common(sent))
        return {**sent, ARRAYS: tree({name: with_rows(table, rows) for name, table in tables.items()})}

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """Take the mean; with a threshold its small entries are 0, and the share of the others is recorded."""
        new = means.get(ARRAYS, arrays)
        threshold = self.client_update.threshold
        if not threshold or ARRAYS not in means:
            return new
        thresholded = {name: torch.where(table.abs() > threshold, table, 0.0) for name, table in entries(new).items()}
        (table,) = thresholded.values()
        self.report.extra["sent_share"] = float((table != 0).double().mean())
        return tree(thresholded)
