"""FedGH: the server trains one head for all clients on their mean features of each class.

L. Yi et al., FedGH: Heterogeneous Federated Learning with Generalized Global Header, ACM MM 2023, arXiv:2303.13137.

With features f_k(x) (``[F]``) of the client's body and the common head h:

    b_k, h_k <- b_k, h, then SGD on f_k(b_k, h_k)                       h_k is forgotten
    r_kj     =  mean of f_k(x) over all of k's training samples of class j, f_k as trained
    h        <- SGD on the cross-entropy of h(r_kj) and j              a pass over all r_kj of the round
    prediction: h(f_k(x))

Shared: the head, which the server keeps; of clients it receives r_kj, a table ``[C, F + 1]`` whose last column is 1
where the client has the class. Personal: the body, BatchNorm statistics included. Bodies may differ from client to
client as long as they have the same number of features (``model.kinds``).

As in the paper the server takes a step for each r_kj (``server_batch_size: 1``); common implementations take batches
of them. The server needs the network (``attach``) and trains with the clients' optimizer. In the authors' script the
optimizer of that step is one of another network, so that the head does not move, and r_kj is a mean over batches of
the mean of each; neither is repeated here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedpers.client.requirements import body_and_head, check_classes
from fedpers.cohort import Batch, Cohort, Collect, Network, Reply, Tree, entries, tree
from fedpers.cohort.classes import class_sums
from fedpers.data.federated import FederatedData
from fedpers.records import ARRAYS
from fedpers.server.collect import Schema, schema_of
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, method

TABLE, MEANS = "table", "means"
"""Name of the table of mean features, and the record in which it comes."""


@dataclass(kw_only=True)
class FedGHUpdate(LocalUpdate):
    """Train the network under the common head, then take the mean feature of each class."""

    shared = "head"
    personal = "body"
    settles_parts = True
    mixes_networks = True

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Refuse networks without features and data without classes."""
        check_classes("fedgh", data)
        body_and_head("fedgh", model)
        return model, data

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train body and head; the server gets no part of them."""
        params = cohort.assemble(received[ARRAYS])
        cohort.fit(params, self.loss)
        features = cohort.logits(params, "train", lambda network, x: network.part("body")(x))
        classes = cohort.data.num_classes
        tables = [class_means(rows, y, classes) for rows, y in zip(features, cohort.labels("train"), strict=True)]
        return cohort.reply(params, share="none", means=tree({TABLE: torch.stack(tables)}, cohort.size))


def class_means(features: Tensor, y: Tensor, classes: int) -> Tensor:
    """Mean feature of each class, ``[C, F + 1]``, whose last column is 1 where there is one, from ``[n, F]``."""
    sums = class_sums(features, y, classes)
    return sums / sums[:, -1:].clamp(min=1)


@method("fedgh")
@dataclass(kw_only=True)
class FedGH(PersonalizedStrategy):
    """Keeps the head and trains it. It needs :meth:`attach`."""

    update = FedGHUpdate
    weighting: Annotated[Literal["uniform"], Field(description="every mean feature counts the same")] = "uniform"
    server_epochs: Annotated[int, Field(ge=1, description="passes of the server over the clients' mean features")] = 1
    server_lr: Annotated[float | None, Field(gt=0, description="of the server; null: training.lr")] = None
    server_batch_size: Annotated[int, Field(ge=1, description="mean features in a batch of the server")] = 1

    def reply_schema(self, clients: list[int]) -> Schema:
        """A table of mean features."""
        weight = self.sent_arrays["head.weight"]
        classes = self.work.app.data.num_classes
        return schema_of(MEANS, {TABLE: weight.new_zeros(classes, weight.shape[1] + 1)})

    def fold(self) -> Collect:
        """Keep the replies apart."""
        return Collect()

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """Train the head."""
        tables = means[MEANS][TABLE]
        known = tables[:, :, -1] > 0
        labels = torch.arange(tables.shape[1], device=tables.device).expand(known.shape)[known]
        return self.trained_head(arrays, tables[known][:, :-1], labels)

    def trained_head(self, arrays: Tree, features: Tensor, labels: Tensor) -> Tree:
        """Train the head `arrays` on features ``[n, F]`` of classes ``[n]``."""
        work = self.work
        none = [torch.arange(0)]
        everything = [torch.arange(len(labels))]
        data = FederatedData(features, labels, everything, none, none, work.app.data.num_classes, task=work.task)
        cohort = work.cohort(data, self.report.round)
        params = cohort.assemble(arrays, tree({}, 1))
        settings: dict[str, Any] = {"batch_size": self.server_batch_size, "epochs": self.server_epochs, "steps": None}
        settings["logit_adjustment"] = 0.0  # of a client's class shares, which these are not
        training = work.app.update.training
        if self.server_lr is not None:  # which counts for the head before the rate of any group
            rates = {group: {k: v for k, v in of.items() if k != "lr"} for group, of in (training.groups or {}).items()}
            settings |= {"lr": self.server_lr, "groups": rates or None}
        training = replace(training, **settings)
        # as in an evaluation: there is no body whose layers would need more than one sample
        cohort.fit(params, self._loss, only="head", training=training, purpose="server", frozen=True)
        return tree({name: params[name][0] for name in entries(arrays)})

    @staticmethod
    def _loss(network: Network, batch: Batch) -> Tensor:
        return batch.mean(batch.losses(network.part("head")(batch.x)))
