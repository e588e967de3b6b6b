"""FedPAC: features aligned to common mean features of each class, and heads combined for each client.

J. Xu, X. Tong, S.-L. Huang, Personalized Federated Learning with Feature Alignment and Classifier Collaboration,
ICLR 2023, arXiv:2306.11867.

With features f_k(x) (``[F]``), the share p_kj of class j in k's samples, and a global mean feature C_j of each class:

    h_kj     =  p_kj * (mean of f_k(x) over class j),      V_k = 1/n_k * sum_j (p_kj * E_j ||f_k||^2 - ||h_kj||^2)
    head_k  <-  a pass of SGD on f_k                                             the body fixed
    body_k  <-  SGD on  cross-entropy + lam/F * ||f_k(x) - C_y||^2               the head fixed
    body    <-  sum_k n_k / n * body_k
    C_j     <-  sum_k n_kj / n_j * (mean of f_k(x) over class j, f_k as trained)
    head_k  <-  sum_l a_kl * head_l
                with the a_k >= 0 of sum 1 that minimizes  sum_l a_kl^2 * V_l + ||h_k - sum_l a_kl * h_l||^2

h and V are those of the received body. Shared: the body, its BatchNorm statistics averaged with it, and C_j, the mean
features of each class. Personal: the head, which the server combines from those of the clients of a round and keeps for
each (:class:`~fedpers.server.tools.ClientTable`).

The paper's clients all take part. Here a client without a head gets the mean of those of the last round, C_j stays as
it is in a round in which nobody has class j, and a class without C_j draws nobody. In the authors' code the client's
mean feature before training stands in for it, weights of at most 1e-3 are dropped, and the head has a rate of 0.1
(``training.groups``).

``variant: pfllib`` repeats a common implementation: C_j is the mean of the clients' mean features, each counting the
same, and is forgotten in a round in which nobody has class j; weights of at most 1e-3 are dropped, the others not
rescaled; a client without a head gets the initial one. (There heads are also combined in place, so that each
combination sees those made before it, and a client may get the combination of another where replies come in another
order than the clients were drawn.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedpers.client.requirements import body_and_head, check_classes
from fedpers.cohort import (
    Batch,
    Cohort,
    Collect,
    Given,
    Network,
    Records,
    Reply,
    Tree,
    WeightedMean,
    entries,
    tree,
)
from fedpers.cohort.classes import class_sums
from fedpers.cohort.fold import REPLIES
from fedpers.data.federated import FederatedData
from fedpers.errors import check
from fedpers.records import ARRAYS
from fedpers.server.collect import Schema, schema_of
from fedpers.server.tools import ClientTable
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, check_passes, method

TABLE, PROTOTYPES, SUMS, STATISTICS = "table", "prototypes", "sums", "statistics"
"""Name of a table ``[C, F + 1]``; records of C_j, of sums of features with counts, and of h and V."""
HEADS = "heads"
"""Role of the server's state: the clients' heads. C_j stands under ``prototypes``."""


@dataclass(kw_only=True)
class FedPACUpdate(LocalUpdate):
    """Train the head, then the body with features near the global mean features."""

    settles_parts = True
    lam: Annotated[float, Field(ge=0, description="strength of the alignment to the global mean features")] = 1.0
    head_epochs: Annotated[int | None, Field(ge=0, description="passes on the head; null: those of training")] = 1
    body_epochs: Annotated[int | None, Field(ge=0, description="passes on the body; null: those of training")] = None
    variant: Annotated[Literal["paper", "pfllib"], Field(description="see the module")] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_passes(self, "head_epochs", "body_epochs")

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Refuse networks without features that are trained, and data without classes."""
        check_classes("fedpac", data)
        body, _ = body_and_head("fedpac", model)
        trained = any(parameter.requires_grad for parameter in body.parameters())
        check(trained, "model", type(model).__name__, "a network whose body is not frozen, for strategy=fedpac")
        return model, data

    def example_given(self, template: Tree, data: FederatedData) -> Given:
        """Every class has a mean feature."""
        return {TABLE: F.pad(torch.zeros_like(template["head.weight"]), (0, 1), value=1.0)}

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Measure the received features, train the head, train the body, and sum up the features of each class."""
        params, prototypes = cohort.assemble(received[ARRAYS]), cohort.per_client(received[PROTOTYPES])
        _, h, variance = self._statistics(cohort, params)
        cohort.fit(params, super().loss, only="head", epochs=self.head_epochs)
        cohort.fit(params, self.loss, only="body", epochs=self.body_epochs, given=entries(prototypes))
        sums, _, _ = self._statistics(cohort, params)
        return cohort.reply(
            params,
            sums=tree({TABLE: sums}, cohort.size),
            statistics=tree({"h": h, "variance": variance}, cohort.size),
        )

    def _statistics(self, cohort: Cohort, params: Tree) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of features and counts ``[K, C, F + 1]``, h ``[K, C, F]`` and V ``[K]`` of networks."""
        features = cohort.logits(params, "train", lambda network, x: network.part("body")(x))
        rows, outputs = [], params["head.weight"].shape[1]  # of which some may stand for no class
        for x, y in zip(features, cohort.labels("train"), strict=True):
            table = class_sums(x, y, outputs)
            h = table[:, :-1] / len(x)
            spread = (x.square().sum() - h.square().sum() * len(x)) / len(x)
            rows.append((table, h, spread.clamp(min=0) / len(x)))  # rounding must not make a variance negative
        sums, h, variance = (torch.stack(column) for column in zip(*rows, strict=True))
        return sums, h, variance

    def loss(self, network: Network, batch: Batch) -> Tensor:
        """Loss of the task and ``lam`` times the mean squared distance from the global mean features."""
        features, table = network.part("body")(batch.x), cast(Tensor, batch.given[TABLE])[batch.y]
        away = (features - table[:, :-1]).square().mean(1) * table[:, -1]
        return batch.mean(batch.losses(network.part("head")(features)) + self.lam * away)


def combination_weights(h: Tensor, variance: Tensor) -> Tensor:
    """Weights a ``[n, n]``, float64, of each client's combination from h ``[n, C, F]`` and V ``[n]``.

    With P the matrix of the quadratic form, a is b / sum b for the b >= 0 that minimizes b'Pb / 2 - sum b: both have
    the same optimality conditions. That is a problem of nonnegative least squares.
    """
    from scipy.optimize import nnls  # takes long to import

    flat = h.double().flatten(1).cpu()
    ones = torch.ones(len(flat), dtype=torch.float64)
    rows = []
    for mine in flat:
        away = mine - flat
        form = torch.diag(variance.double().cpu()) + away @ away.T
        form.diagonal().add_(1e-12 * max(1.0, float(form.diagonal().max())))  # singular where features do not spread
        root = torch.linalg.cholesky(form)
        target = torch.linalg.solve_triangular(root, ones[:, None], upper=False)[:, 0]
        solution = torch.from_numpy(nnls(root.T.numpy(), target.numpy())[0])
        rows.append(solution / solution.sum())
    return torch.stack(rows)


@method("fedpac")
@dataclass(kw_only=True)
class FedPAC(PersonalizedStrategy):
    """Averages bodies and mean features, and combines heads."""

    update = FedPACUpdate
    common_options = ("variant",)
    client_update: FedPACUpdate = field(default_factory=FedPACUpdate)

    def send(self, round: int, arrays: Tree, clients: list[int]) -> Records | Sequence[Records]:
        """Send each client the body under its head, and the mean features."""
        prototypes = self.state.get(PROTOTYPES)
        if prototypes is None:
            prototypes = tree({TABLE: F.pad(torch.zeros_like(arrays["head.weight"]), (0, 1))})
        if HEADS not in self.state:
            return {ARRAYS: arrays, PROTOTYPES: prototypes}
        heads = self._heads(arrays).rows(clients)
        return [
            {ARRAYS: tree({**entries(arrays), **{n: v[k] for n, v in heads.items()}}), PROTOTYPES: prototypes}
            for k in range(len(clients))
        ]

    def reply_schema(self, clients: list[int]) -> Schema:
        """The network, sums of features, and their statistics before training."""
        weight = self.sent_arrays["head.weight"]
        statistics = {"h": weight, "variance": weight[0, 0]}
        sums = {TABLE: F.pad(weight, (0, 1))}
        arrays = schema_of(ARRAYS, entries(self.sent_arrays))
        return {**arrays, **schema_of(SUMS, sums), **schema_of(STATISTICS, statistics)}

    def fold(self) -> Collect:
        """Keep the replies apart."""
        return Collect()

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """Average the bodies and combine the heads; the head among the server's arrays is for further clients."""
        networks, statistics = entries(means[ARRAYS]), means[STATISTICS]
        weights = combination_weights(statistics["h"], statistics["variance"])
        table = self._heads(arrays)
        heads = {name: networks[name] for name in self._head_names(arrays)}
        if self.client_update.variant == "pfllib":
            weights = weights * (weights > 1e-3)
            networks = {name: value for name, value in networks.items() if name not in heads}
        table.put(clients, self.combined(heads, weights))
        self.state.update({HEADS: table.values, PROTOTYPES: self._prototypes(means[SUMS][TABLE])})
        average = WeightedMean()
        average.add_stack({ARRAYS: tree(networks, len(clients))}, means[REPLIES]["weight"])
        return tree({**entries(arrays), **entries(average.result()[ARRAYS])})

    def combined(self, heads: Mapping[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
        """Combinations ``[n, ...]`` of the heads ``[n, ...]`` of a round's clients by weights ``[n, n]``."""
        return {name: torch.tensordot(weights.to(value), value, 1) for name, value in heads.items()}

    def _prototypes(self, sums: Tensor) -> Tree:
        """Mean features of all clients from their sums and counts ``[n, C, F + 1]``."""
        paper = self.client_update.variant == "paper"
        total = (sums if paper else sums / sums[:, :, -1:].clamp(min=1)).sum(0)
        fresh = total[:, -1:] > 0
        before = self.state[PROTOTYPES][TABLE] if paper and PROTOTYPES in self.state else torch.zeros_like(total)
        return tree({TABLE: torch.where(fresh, total / torch.where(fresh, total[:, -1:], 1.0), before)})

    def _heads(self, arrays: Tree) -> ClientTable:
        """The clients' heads and, for other clients, the server's."""
        head = {name: arrays[name] for name in self._head_names(arrays)}
        return ClientTable(lambda client: head, self.state.get(HEADS))

    @staticmethod
    def _head_names(arrays: Tree) -> list[str]:
        return [name for name in entries(arrays) if name.startswith("head.")]
