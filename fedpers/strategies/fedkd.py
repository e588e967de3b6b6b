"""FedKD: a network of the client and a shared one teach each other, and what is sent has low rank.

C. Wu et al., Communication-efficient federated learning via knowledge distillation, Nature Communications 2022,
arXiv:2108.13323.

With the client's network t_k (the teacher, or mentor), its copy s_k of the shared one (the student, or mentee), their
mean cross-entropies a and b on a batch, features h_t and h_s, and a projection P_k:

    s_k <- s
    t_k      <- SGD on  a + (mean KL(s_k || t_k) + mean |h_t - P_k h_s|^2 / F) / (a + b)    no gradient reaches s_k, P_k
    s_k, P_k <- SGD on  b + (mean KL(t_k || s_k) + mean |h_t - P_k h_s|^2 / F) / (a + b)    no gradient reaches t_k
    s        <- s + low(mean_k low(s_k - s))
    prediction of client k: t_k

    low(M): the largest singular values of M, as few as hold more than the share T of the sum of their squares
    T = energy_start + (energy_end - energy_start) * (round - 1) / (energy_rounds - 1), at most energy_end

Shared: a second network (``shared``). Personal: the client's network (``local``) and a projection of its features
(``projection``). Both networks have the form and the initial values of the given one, buffers included, as in
``strategy=fml``; the paper's student is smaller. A client that has never trained predicts with the initial t_k.

Entries of two and more axes are matrices, all axes but the first in one; they travel as two factors where these are
smaller. The others travel and are averaged as they are. The server sends s itself, not the change in factors: bytes
down are not those of the paper. The features are the last hidden states; the paper distils those of all layers and
attention maps of a transformer. Rounds count from 0 in T; the paper counts what is finished of the training.

``variant: pfllib`` repeats a common implementation: KL is divided by the number of classes too; all three follow the
gradient of ``a + b + (KL + KL + 2 |h_t - P_k h_s|^2 / F) / (a + b)``; s_k and s themselves are cut to low rank, not
their changes; and a matrix becomes 0 of which all singular values but the last do not hold enough.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from fedpers.client.requirements import body_and_head, check_classes
from fedpers.cohort import Batch, Cohort, Network, Reply, Tree, WeightedMean, entries, tree
from fedpers.data.federated import FederatedData
from fedpers.models.initial import drawing
from fedpers.records import ARRAYS
from fedpers.server.collect import Entry, Schema, dtype_name
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, Weighting, method
from fedpers.strategies.fml import LOCAL, SHARED, MutualNetworks, divergence

ENERGY = "energy"
"""Record of the share T, from which a reply is encoded; it does not travel."""
LEFT, RIGHT = ".left", ".right"
"""Endings of the names of a matrix's factors."""
_Share = Annotated[float, Field(gt=0, le=1)]


class ProjectingNetworks(MutualNetworks):
    """Two networks, and a projection of the shared one's features ``[B, F]``.

    Parameters
    ----------
    network : nn.Module
        With a linear head.
    features : int
        F.
    """

    def __init__(self, network: nn.Module, features: int) -> None:
        super().__init__(network)
        first = next(network.parameters())
        self.projection = nn.Linear(features, features, bias=False).to(first)


@dataclass(kw_only=True)
class FedKDUpdate(LocalUpdate):
    """Train both networks on the labels and on predictions and features of the other."""

    shared = SHARED
    personal = (LOCAL, "projection")
    settles_parts = True
    energy_start: Annotated[_Share, Field(description="share of squared singular values that is sent at first")] = 0.95
    energy_end: Annotated[_Share, Field(description="the same at last")] = 0.98
    energy_rounds: Annotated[int, Field(ge=1, description="round in which energy_end is reached")] = 50
    variant: Annotated[Literal["paper", "pfllib"], Field(description="see the module")] = "paper"

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Put two networks and a projection in the place of one; refuse networks without features, and no classes."""
        check_classes("fedkd", data)
        _, head = body_and_head("fedkd", model)
        with drawing(seed, "fedkd"):
            return ProjectingNetworks(model, head.in_features), data

    def energy(self, round: int) -> float:
        """The share T of a round, which counts from 1."""
        progress = min(1.0, (round - 1) / (self.energy_rounds - 1)) if self.energy_rounds > 1 else 1.0
        return self.energy_start + progress * (self.energy_end - self.energy_start)

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train both networks; send the shared one's matrices, or their changes, to be cut to low rank."""
        params = cohort.assemble(received[ARRAYS])
        start = {name: params[name].clone() for name in cohort.names(SHARED)}
        cohort.fit(params, self.loss)
        cohort.gradients_taken *= 2  # of both networks
        share = torch.full((cohort.size,), self.energy(cohort.round), dtype=torch.float64)
        reply = cohort.reply(params, **{ENERGY: tree({"share": share}, cohort.size)})
        if self.variant == "paper":
            sent = entries(reply.records[ARRAYS])
            changes = {n: v - start[n] if is_matrix(v[0]) else v for n, v in sent.items()}
            reply.records[ARRAYS] = tree(changes, cohort.size)
        return reply

    def loss(self, network: Network, batch: Batch) -> Tensor:
        """Sum of both networks' losses; each network sees the gradient of its part alone."""
        of_local, of_shared = (network.part(f"{name}.body")(batch.x) for name in (LOCAL, SHARED))
        local, shared = network.part(f"{LOCAL}.head")(of_local), network.part(f"{SHARED}.head")(of_shared)
        projected = network.part("projection")(of_shared)
        local_task, shared_task = batch.mean(batch.losses(local)), batch.mean(batch.losses(shared))

        def taught(student: Tensor, teacher: Tensor, ahead: Tensor, behind: Tensor) -> Tensor:
            kl = divergence(student, teacher)
            kl = kl / student.shape[1] if self.variant == "pfllib" else kl
            return batch.mean(kl + (ahead - behind).square().mean(1))

        if self.variant == "pfllib":
            both = taught(local, shared, of_local, projected) + taught(shared, local, of_local, projected)
            return local_task + shared_task + both / (local_task + shared_task)
        to_local = taught(local, shared.detach(), of_local, projected.detach()) / (local_task + shared_task.detach())
        to_shared = taught(shared, local.detach(), of_local.detach(), projected) / (local_task.detach() + shared_task)
        return local_task + to_local + shared_task + to_shared

    def predict(self, network: Network, x: Tensor) -> Tensor:
        """Scores ``[B, C]`` of the client's network."""
        return network.part(LOCAL)(x)

    def encode(self, records: dict[str, Tree]) -> dict[str, Tree]:
        """Cut matrices to low rank; as two factors where these are smaller."""
        energy, sent = float(records[ENERGY]["share"]), {}
        for name, value in entries(records[ARRAYS]).items():
            if not is_matrix(value):
                sent[name] = value
                continue
            left, right = self.factors(value, energy)
            if left.numel() + right.numel() < value.numel():
                sent.update({name + LEFT: left, name + RIGHT: right})
            else:
                sent[name] = (left @ right).view(value.shape)
        return {ARRAYS: tree(sent)}

    def factors(self, value: Tensor, energy: float) -> tuple[Tensor, Tensor]:
        """Factors ``[m, r]`` and ``[r, n]`` of a matrix ``[m, ...]`` cut to low rank."""
        left, singular, right = torch.linalg.svd(value.flatten(1), full_matrices=False)
        squares = singular.double().square()
        held = torch.cat([squares.new_zeros(1), squares.cumsum(0)])  # by the first 0, 1, ... singular values
        enough = (held > energy * squares.sum()).nonzero().flatten().tolist()
        rank = enough[0] if enough else len(singular)
        if self.variant == "pfllib" and rank == len(singular):
            rank = 0
        return left[:, :rank] * singular[:rank], right[:rank]


def is_matrix(value: Tensor) -> bool:
    """Whether an entry is cut to low rank."""
    return value.dim() > 1 and value.is_floating_point()


class FactoredMean(WeightedMean):
    """Weighted mean of networks of which matrices come in factors.

    Parameters
    ----------
    arrays : mapping of name to Tensor
        The server's.
    changes : bool
        Whether factors are those of a change, to be added to the server's.
    """

    def __init__(self, arrays: Mapping[str, Tensor], *, changes: bool) -> None:
        super().__init__()
        self.arrays = dict(arrays)
        self.changes = changes

    def decode(self, records: dict[str, Tree], client: int) -> dict[str, Tree]:
        """Undo :meth:`FedKDUpdate.encode`.

        Raises
        ------
        ValueError
            If a matrix is missing, is there twice, or its factors do not fit together.
        """
        sent, network = entries(records[ARRAYS]), {}
        for name, before in self.arrays.items():
            value, left, right = (sent.get(name + ending) for ending in ("", LEFT, RIGHT))
            if value is None and left is not None and right is not None and left.shape[1] == right.shape[0]:
                value = (left @ right).view(before.shape)
            elif value is None or left is not None or right is not None:
                raise ValueError(f"'{name}' is neither whole nor in two factors that fit")
            network[name] = before.to(value.device) + value if self.changes and is_matrix(before) else value
        return {ARRAYS: tree(network)}

    def partial(self) -> Self:
        """The same without the server's arrays, which whoever merges it has."""
        part = copy.copy(self)
        part.arrays = {}
        return part


@method("fedkd")
@dataclass(kw_only=True)
class FedKD(PersonalizedStrategy):
    """Uniform average of the shared networks, cut to low rank as replies are."""

    update = FedKDUpdate
    common_options = ("energy_start", "energy_end", "energy_rounds", "variant")
    client_update: FedKDUpdate = field(default_factory=FedKDUpdate)
    weighting: Weighting = "uniform"

    def reply_schema(self, clients: list[int]) -> Schema:
        """The shared network; of a matrix two factors of any rank, or all of it."""
        schema: Schema = {}
        for name, value in entries(self.sent_arrays).items():
            dtype, matrix = dtype_name(value), is_matrix(value)
            schema[ARRAYS, name] = Entry(tuple(value.shape), dtype, optional=matrix)
            if matrix:
                rows, columns = value.flatten(1).shape
                schema[ARRAYS, name + LEFT] = Entry((rows, -1), dtype, optional=True)
                schema[ARRAYS, name + RIGHT] = Entry((-1, columns), dtype, optional=True)
        return schema

    def fold(self) -> FactoredMean:
        """Mean of what the factors stand for."""
        return FactoredMean(entries(self.sent_arrays), changes=self.client_update.variant == "paper")

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """Cut the mean change, or the mean, to low rank."""
        update, new = self.client_update, entries(means[ARRAYS])
        energy = update.energy(self.report.round)
        for name, mean in new.items():
            if is_matrix(mean):
                base = arrays[name] if update.variant == "paper" else torch.zeros_like(mean)
                left, right = update.factors(mean - base, energy)
                new[name] = base + (left @ right).view(mean.shape)
        return tree(new)
