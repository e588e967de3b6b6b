"""GPFL: global features guided by category embeddings, personal features for a private head.

J. Zhang et al., GPFL: Simultaneously Learning Global and Personalized Feature Information for Personalized Federated
Learning, ICCV 2023, arXiv:2308.10279.

With features f = phi(x) (``[F]``); a valve V, the paper's Conditional Valve (module ``cov``); a table C of one
embedding per category (``[U, F]``), the paper's Global Category Embedding (module ``gce``); its frozen copy C^ as
received in this round; the client's head psi_k and its shares alpha_k of the categories:

    (gamma, beta) = V(c)                        two branches, each LayerNorm(ReLU(Linear(c)))
    f^G = ReLU((gamma + 1) * f + beta)          for the generic input c = g
    f^P = the same                              for the personal input c = p_k

    L_P   = cross-entropy(psi_k(f^P), y)
    L_alg = -log(exp cos(f^G, C_y) / sum_u exp cos(f^G, C_u))           angle level
    L_mlg = ||f^G - C^_y||                                              magnitude level
    phi, V, C, psi_k <- SGD on  L_P + L_alg + lam * L_mlg + mu * (regularization of V and C)
    phi, V, C        <- mean of the clients', by training samples
    prediction: psi_k(f^P) with the received phi and V and the client's p_k, before any local training

Shared: the parameters of body, valve and table. Personal: the head and all buffers, so BatchNorm
statistics of the body stay with their client in both variants (the authors' code averages and sends parameters only;
the published descriptions do not say). No gradient reaches g, p_k and C^: they are given to the loss.

``variant: official`` is the authors' code (PFLlib's too, which has the same update):

- g and p_k come from the table the client held *before* the average replaced it, ``g = 1/U sum_u C_u`` and
  ``p_k = sum_u alpha_k^u C_u`` (no 1/U). They lag and differ between clients: a client that trained in the last round
  uses the table it trained, any other the server's table of the round before. Until the first average both are 0.
  There clients keep the old table; here they keep g and p_k of the table they trained last (``conditions``) and the
  round of that (``last_round``), and the server sends its old table too, as ``previous`` (``U * F`` numbers).
- L_mlg is one Frobenius norm over the whole batch, neither squared nor averaged.
- mu is the weight decay of all parameters of table and valve, biases and LayerNorm among them.

``variant: paper`` follows equations 1 to 5 and the text as far as they were at hand (the sum of losses, g and p_k from
a summary of the paper):

- g and p_k come from the received table in every round, ``p_k = 1/U sum_u alpha_k^u C^_u``, so nothing of them is kept.
- L_mlg is the mean over the samples of each one's norm.
- mu weighs the norms ``||V|| + ||C||``, not squared, over all parameters of each.

Differences from the authors' code in both variants: ``training.weight_decay`` holds for body and head (0 there), and
``training.lr_decay`` for all parts. alpha_k counts the samples that are trained on: with ``drop_last`` and without
``shuffle`` (the authors' setting; PFLlib shuffles) the tail of a client's list is left out; with ``shuffle`` every
sample is as likely to be left out as any other, so all count (PFLlib counts those of one draw). A client with fewer
samples than a batch trains on one smaller batch, where their loader gives it none. All test samples are scored; their
test loader drops the tail too. They initialize from torch's global generator, here values come from the run's seed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedpers.client.requirements import body_and_head, check_classes
from fedpers.cohort import Batch, Cohort, Given, Network, Reply, Training, Tree, View, entries, tree
from fedpers.cohort.tree import expand_rows
from fedpers.data.federated import FederatedData
from fedpers.models.initial import drawing
from fedpers.records import ARRAYS
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, method
from fedpers.tasks import class_losses

PREVIOUS = "previous"
"""Record of the server's table before its last average."""
TABLE = "gce.weight"
GENERIC, PERSONAL, TARGET = "generic", "personal", "target"
"""What loss and prediction are given: the conditional inputs ``[F]``, and the frozen table ``[U, F]``."""
CONDITIONS, LAST_ROUND = "conditions", "last_round"
"""Roles in the personal state of ``official``: conditional inputs of the table trained last, and the round of that."""


class Valve(nn.Module):
    """Scale and shift of features under a condition.

    Parameters
    ----------
    features : int
        F.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.gamma = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.LayerNorm(features))
        self.beta = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.LayerNorm(features))

    def forward(self, condition: Tensor) -> Tensor:
        """Gamma and beta ``[..., 2, F]`` of conditions ``[..., F]``."""
        return torch.stack([self.gamma(condition), self.beta(condition)], dim=-2)


class ConditionalNetwork(nn.Module):
    """Body and head of a network, embeddings of the categories and a valve; :class:`GPFLUpdate` applies them.

    Parameters
    ----------
    body : nn.Module
        Samples to features ``[B, F]``.
    head : nn.Linear
        Features to scores ``[B, U]``.
    categories : int
        U, the number of classes.
    """

    def __init__(self, body: nn.Module, head: nn.Linear, categories: int) -> None:
        super().__init__()
        self.body = body
        self.head = head
        self.gce = nn.Embedding(categories, head.in_features).to(head.weight)
        self.cov = Valve(head.in_features).to(head.weight)


def conditioned(features: Tensor, scale_shift: Tensor) -> Tensor:
    """``ReLU((gamma + 1) * f + beta)`` (equations 1 and 2) of features ``[B, F]``.

    Parameters
    ----------
    features : Tensor ``[B, F]``
    scale_shift : Tensor ``[2, F]``
        Gamma and beta, as :class:`Valve` returns them.
    """
    return torch.relu((scale_shift[0] + 1) * features + scale_shift[1])


def _tensors(given: Given) -> Mapping[str, Tensor]:
    return cast(Mapping[str, Tensor], given)  # `given` may also hold trees; here it holds tensors only


@dataclass(kw_only=True)
class GPFLUpdate(LocalUpdate):
    """Train body, head, table and valve together, conditioned on mixtures of embeddings."""

    shared = ("parameters", "-head")
    personal = ("head", "buffers")
    settles_parts = True
    lam: Annotated[
        float,
        Field(
            ge=0,
            description="weight of the magnitude-level loss; the authors': 0.01 (MLP, CNN), 0.0001 (ResNet-18)",
        ),
    ] = 0.01
    mu: Annotated[
        float,
        Field(
            ge=0,
            description="regularization of table and valve, in official in place of training.weight_decay; the "
            "authors': 0.1 (MLP, CNN), 0 (ResNet-18)",
        ),
    ] = 0.1
    variant: Annotated[
        Literal["official", "paper"], Field(description="official: the authors' code; paper: equations 1 to 5")
    ] = "official"

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Add table and valve between the network's body and head.

        Raises
        ------
        ConfigError
            If the network is not a body under a linear head, or samples have no class labels.
        """
        body, head = body_and_head("gpfl", model)
        check_classes("gpfl", data)
        with drawing(seed, "gpfl"):
            return ConditionalNetwork(copy.deepcopy(body), copy.deepcopy(head), data.num_classes), data

    def initial_state(self, template: Tree, module: nn.Module) -> Tree:
        """Head and buffers.

        For ``official`` also the conditional inputs of the table trained last and the round of that training.
        """
        state = super().initial_state(template, module)
        if self.variant == "official":
            zeros = template[TABLE].new_zeros(template[TABLE].shape[1])
            state[CONDITIONS] = tree({GENERIC: zeros, PERSONAL: zeros.clone()})
            state[LAST_ROUND] = zeros.new_zeros((), dtype=torch.int64)
        return state

    def example_given(self, template: Tree, data: FederatedData) -> Given:
        """Conditional inputs as before the first average, and the initial table."""
        zeros = template[TABLE].new_zeros(template[TABLE].shape[1])
        return {GENERIC: zeros, PERSONAL: zeros, TARGET: template[TABLE]}

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train everything at once; the table trained here gives the next conditional inputs."""
        params = cohort.assemble(received[ARRAYS])
        given = {**self._conditions(cohort, received, cohort.round - 1), TARGET: params[TABLE].clone()}
        cohort.fit(params, self.loss, training=self.effective_training(cohort.training), given=given)
        state: dict[str, Tensor | Tree] = {}
        if self.variant == "official":
            state[CONDITIONS] = tree(self._inputs(cohort, params[TABLE]), cohort.size)
            state[LAST_ROUND] = torch.full_like(cohort.state[LAST_ROUND], cohort.round)
        return cohort.reply(params, state=state)

    def personalize(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> View:
        """Received body and valve, the client's head and conditional inputs."""
        return replace(cohort.view(received[ARRAYS]), given=self._conditions(cohort, received, cohort.round))

    def predict(self, network: Network, x: Tensor) -> Tensor:
        """Scores ``[B, U]`` of the head for the personal features."""
        scale_shift = network.part("cov")(_tensors(network.given)[PERSONAL])
        return network.part("head")(conditioned(network.part("body")(x), scale_shift))

    def loss(self, network: Network, batch: Batch) -> Tensor:
        """Loss of the personal features under the head plus those of the generic features (equations 3 to 5)."""
        table, given = network.tensors[TABLE], _tensors(batch.given)
        features = network.part("body")(batch.x)
        scale_shifts = network.part("cov")(torch.stack([given[GENERIC], given[PERSONAL]]))
        generic, personal = (conditioned(features, scale_shift) for scale_shift in scale_shifts)
        cosines = F.normalize(generic, dim=1) @ F.normalize(table, dim=1).T
        return (
            batch.mean(batch.losses(network.part("head")(personal)))
            + batch.mean(class_losses(cosines, batch.y))
            + self.lam * self._distance(generic - given[TARGET][batch.y], batch)
            + self._penalty(network.tensors)
        )

    def _distance(self, difference: Tensor, batch: Batch) -> Tensor:
        """Magnitude-level loss; its gradient at 0 is 0."""
        if self.variant == "paper":
            return batch.mean(torch.linalg.vector_norm(difference, dim=1))
        if batch.weight is not None:  # padding (weight 0) must not count
            difference = difference * batch.weight[:, None]
        whole: Tensor = torch.linalg.vector_norm(difference)
        return whole

    def _penalty(self, tensors: Mapping[str, Tensor]) -> Tensor | float:
        if self.variant != "paper" or not self.mu:
            return 0.0
        valve_parameters = torch.cat([value.flatten() for name, value in tensors.items() if name.startswith("cov.")])
        norms: Tensor = torch.linalg.vector_norm(valve_parameters) + torch.linalg.vector_norm(tensors[TABLE])
        return self.mu * norms

    def effective_training(self, training: Training) -> Training:
        """Settings with mu as the weight decay of table and valve; as the last groups they win over the user's."""
        if self.variant == "paper":
            return training
        groups = dict(training.groups or {})
        for pattern in ("gce.*", "cov.*"):
            # `gce.**` matches the same names as `gce.*`: the user's entry stays, and this one, being last, wins
            while pattern in groups:
                pattern += "*"
            groups[pattern] = {"weight_decay": self.mu}
        return replace(training, groups=groups)

    def _conditions(self, cohort: Cohort, received: Received, latest_round: int) -> dict[str, Tensor]:
        """Conditional inputs ``[K, F]`` by name.

        A client that trained in `latest_round` uses those it stored then; any other derives them from the server's
        former table (``previous``). In ``paper`` all derive them from the received table.
        """
        if self.variant == "paper":
            return self._inputs(cohort, cohort.per_client(received[ARRAYS], [TABLE])[TABLE])
        conditions = {name: value.to(cohort.device) for name, value in entries(cohort.state[CONDITIONS]).items()}
        if PREVIOUS not in received:  # nothing has been averaged yet
            return conditions
        just_trained = (cohort.state[LAST_ROUND] == latest_round).to(cohort.device)
        before = self._inputs(cohort, cohort.per_client(received[PREVIOUS])[TABLE])
        return {n: torch.where(expand_rows(just_trained, v), v, before[n]) for n, v in conditions.items()}

    def _inputs(self, cohort: Cohort, tables: Tensor) -> dict[str, Tensor]:
        """Conditional inputs ``[K, F]`` of tables ``[K, U, F]``."""
        shares = self._shares(cohort).to(tables)
        personal = (shares[:, :, None] * tables).sum(1)
        if self.variant == "paper":
            personal = personal / tables.shape[1]
        return {GENERIC: tables.mean(1), PERSONAL: personal}

    def _shares(self, cohort: Cohort) -> Tensor:
        """Share of each category in the samples a client trains on, float64 ``[K, U]``."""
        training = cohort.training
        trained_on = []
        for client in cohort.clients:
            positions = cohort.samples(client)
            size = len(positions)
            if training.drop_last and not training.shuffle and 0 < training.batch_size <= size:
                size -= size % training.batch_size
            trained_on.append(positions[:size])
        counts = cohort.class_counts(samples=trained_on).double()
        return counts / counts.sum(1, keepdim=True)


@method("gpfl")
@dataclass(kw_only=True)
class GPFL(PersonalizedStrategy):
    """Average of body, table and valve; remembers the table before."""

    update = GPFLUpdate
    common_options = ("variant",)
    client_update: GPFLUpdate = field(default_factory=GPFLUpdate)

    def send(self, round: int, arrays: Tree, clients: list[int]) -> Mapping[str, Tree]:
        """Send the table before the last average too, once there is one."""
        return {ARRAYS: arrays, **({PREVIOUS: self.state[PREVIOUS]} if PREVIOUS in self.state else {})}

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """Take the means and keep the former table."""
        if self.client_update.variant == "official":
            self.state[PREVIOUS] = tree({TABLE: arrays[TABLE]})
        return means[ARRAYS]
