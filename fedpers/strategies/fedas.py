"""FedAS: the received body is aligned to what the client's own computed before, and well-trained bodies count more.

X. Yang, W. Huang, M. Ye, FedAS: Bridging Inconsistency in Personalized Federated Learning, CVPR 2024.

With features f_b(x) (``[F]``) of a body b, the client's network (b_k, h_k) after its last training and classes j:

    m_kj       = mean of f_{b_k}(x) over all of k's training samples of class j
    b_k        <- b, then SGD with the rate align_lr on  sum_j (mean of (f_{b_k}(x) - m_kj)^2)
                  over the classes in a batch, each the mean over its samples and the F features; one pass
    (b_k, h_k) <- E passes of SGD on f_k over body and head together
    T_k        = mean of ||grad log p(y | x)||^2 over k's training samples, the trace of the empirical Fisher matrix
    b          <- sum_k T_k / T * b_k
    prediction: (b_k, h_k)

Shared: the body, its buffers averaged with it. Personal: the whole network (b_k, h_k). For m_kj, the alignment and T_k
layers work as in an evaluation. T_k is over the parameters of body and head, and takes a gradient for each sample.
Where all T_k are 0 they count the same. Before its first training a client's body is the one it received.

Batches of 16, the rate 0.01 and plain SGD in the alignment are those of the authors' code, in which it changes the
server's body itself, so that a client receives what was aligned to the clients before it; here each receives the
server's. ``variant: pfllib`` repeats a common implementation: T_k is the sum over the batches of a pass of the squared
norm of each one's mean gradient; before its first training a client's network is the initial one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedpers.client.requirements import check_classes
from fedpers.cohort import Batch, Cohort, Network, Records, Reply, Training, Tree, WeightedMean, entries, tree
from fedpers.cohort.classes import class_sums
from fedpers.cohort.tree import flat_rows
from fedpers.data.federated import FederatedData
from fedpers.errors import check
from fedpers.records import ARRAYS
from fedpers.server.collect import Schema, schema_of
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, method

FISHER, TRACE = "fisher", "trace"
"""Record of a reply that holds T_k, and its name there."""
MEANS = "means"
"""What the alignment is given: the mean feature ``[C, F]`` of each class."""
SMALLEST = 1e-30
"""Weight of a client whose gradients are all 0."""


@dataclass(kw_only=True)
class FedASUpdate(LocalUpdate):
    """Align the received body, train it with the head, then measure the Fisher information."""

    shared = "body"
    personal = "all"
    settles_parts = True
    align_lr: Annotated[float, Field(ge=0, description="rate of the alignment; 0: none")] = 0.01
    align_batch_size: Annotated[int, Field(ge=0, description="samples in a batch of it; 0: all at once")] = 16
    variant: Annotated[Literal["paper", "pfllib"], Field(description="see the module")] = "paper"

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Refuse networks without features and data without classes."""
        check_classes("fedas", data)
        fits = all(isinstance(getattr(model, part, None), nn.Module) for part in ("body", "head"))
        check(fits, "model", type(model).__name__, "a network with a 'body' and a 'head' for strategy=fedas")
        return model, data

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Align, train, measure."""
        params = self.personalize(cohort, received, config)
        means = _class_means(cohort, params)
        for name, value in entries(cohort.per_client(received[ARRAYS])).items():
            params[name].copy_(value)
        if self.align_lr:
            settings = Training(lr=self.align_lr, batch_size=self.align_batch_size, shuffle=cohort.training.shuffle)
            cohort.fit(params, _alignment, only="body", given={MEANS: means}, epochs=1, training=settings, frozen=True)
        cohort.fit(params, self.loss)
        return cohort.reply(params, fisher=tree({TRACE: self._trace(cohort, params)}, cohort.size))

    def personalize(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Tree:
        """The client's network."""
        return cohort.state["model"].clone() if self.variant == "pfllib" else cohort.assemble(received[ARRAYS])

    def _trace(self, cohort: Cohort, params: Tree) -> Tensor:
        """T_k, float64 ``[K]``."""
        trace = torch.zeros(cohort.size, dtype=torch.float64, device=cohort.device)
        size = 1 if self.variant == "paper" else cohort.training.batch_size
        plan = cohort.plan(epochs=1, batch_size=size, drop_last=False, frozen=True, purpose="fisher")
        for step in cohort.steps(plan):
            rows = {name: step.take(params[name]) for name in cohort.names("all")}
            _, grads = cohort.gradients(step, rows, self.loss, cohort.trainable(), frozen=True)
            at = step.places(cohort.device)
            trace[at] += sum(flat_rows(grad).square().sum(1) for grad in grads.values())
        return trace if self.variant == "pfllib" else trace / cohort.sizes().clamp(min=1).to(trace)


def _class_means(cohort: Cohort, params: Tree) -> Tensor:
    """Mean feature of each class over a client's training samples, ``[K, C, F]``; 0 without samples."""
    means = []
    features = cohort.logits(params, "train", _features)
    for rows, y in zip(features, cohort.labels("train"), strict=True):
        sums = class_sums(rows, y, cohort.data.num_classes)
        means.append(sums[:, :-1] / sums[:, -1:].clamp(min=1))
    return torch.stack(means)


def _features(network: Network, x: Tensor) -> Tensor:
    return network.part("body")(x).flatten(1)


def _alignment(network: Network, batch: Batch) -> Tensor:
    """Sum over classes of the mean squared distance from the class's mean."""
    means = cast(Tensor, batch.given[MEANS])
    away = (_features(network, batch.x) - means[batch.y]).square().mean(1)
    weight = torch.ones_like(away) if batch.weight is None else batch.weight
    counts = weight @ F.one_hot(batch.y, len(means)).to(weight)
    return (away * weight / counts[batch.y]).sum()


class FisherMean(WeightedMean):
    """Mean of the bodies in which each counts by its client's T_k."""

    def add(self, records: Records, weight: float, client: int = -1) -> None:
        """Take in one client's body."""
        super().add({ARRAYS: records[ARRAYS]}, max(float(records[FISHER][TRACE]), SMALLEST))

    def add_stack(self, records: Records, weights: Tensor, clients: Sequence[int] = ()) -> None:
        """Take in the bodies of K clients."""
        super().add_stack({ARRAYS: records[ARRAYS]}, records[FISHER][TRACE].clamp(min=SMALLEST))


@method("fedas")
@dataclass(kw_only=True)
class FedAS(PersonalizedStrategy):
    """Averages bodies by Fisher information."""

    update = FedASUpdate
    common_options = ("variant",)
    client_update: FedASUpdate = field(default_factory=FedASUpdate)
    weighting: Annotated[Literal["uniform"], Field(description="replies hold weights of their own")] = "uniform"

    def reply_schema(self, clients: list[int]) -> Schema:
        """A body and its weight."""
        trace = torch.zeros((), dtype=torch.float64)
        return {**schema_of(ARRAYS, entries(self.sent_arrays)), **schema_of(FISHER, {TRACE: trace})}

    def fold(self) -> FisherMean:
        """Weigh by Fisher information."""
        return FisherMean()
