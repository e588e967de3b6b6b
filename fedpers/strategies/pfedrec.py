"""PFedRec: one item table for all, fine-tuned by each user, under a score function of one's own.

C. Zhang et al., Dual Personalization on Federated Recommendation, IJCAI 2023, arXiv:2301.08143; authors' code
github.com/Zhangcx19/IJCAI-23-PFedRec (commit abc2380).

User k has a score function (w_k, b_k) over item vectors; a visit starts from the received table C and takes two steps
per batch of the user's positives and drawn negatives:

    (w_k, b_k) <- (w_k, b_k) - lr * grad BCE         items fixed
    C_k        <- C_k - item_lr * grad BCE           the new score function fixed; item_lr = lr * item_rate * m items
    C          <- mean_k C_k                         not weighted

Shared: the item table. Personal: the score function, and the fine-tuned table C_k, with which the user predicts as it
was before it was averaged. Weight decay reaches all rows. The authors' settings: lr 0.1, item_rate 80, one pass,
batches of 256, 4 negatives, 32 dimensions, best round chosen on validation.

A user that has not trained yet predicts with the received table and the initial score function. ``variant=official``
does what else the authors' code does, and is checked number for number:

- A user that has not trained yet predicts with the initial table.
- Cross-entropy is taken on the float32 probability, logarithms not below -100: a saturated score has no gradient.
- The training loss is that before the second step of each batch, here that before the first.

The code also sends b_k and averages it; nobody reads that, and nothing of it is sent here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedpers.cohort import Batch, Cohort, Network, Reply, Tree, View
from fedpers.data.federated import FederatedData
from fedpers.errors import check
from fedpers.models.factorization import require_factorization
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, Weighting, method


@dataclass(kw_only=True)
class PFedRecUpdate(LocalUpdate):
    """Per batch, a step of the score function and then one of the item table."""

    shared = "body"
    personal = "all"
    settles_parts = True
    can_finetune = False
    item_rate: Annotated[
        float, Field(gt=0, description="the items' rate is this times their number times training.lr")
    ] = 80.0
    variant: Annotated[Literal["default", "official"], Field(description="see the module")] = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        groups = self.training.groups
        allowed = "null for strategy=pfedrec; strategy.item_rate sets the rate of the items"
        check(not any("lr" in options for options in (groups or {}).values()), "training.groups", groups, allowed)

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Check that there are items to be rated."""
        return require_factorization(model, data)

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Fine-tune the received table under the user's score function."""
        params = cohort.assemble(received["arrays"], personal=cohort.state["model"].select(*cohort.names("head")))
        items = replace(cohort.training, lr=cohort.training.lr * self.item_rate * cohort.data.num_items)
        head, body = cohort.trainable("head"), cohort.trainable("body")
        walk = cohort.walk(params)
        of_head, of_body = walk.optimizer(head), walk.optimizer(body, items)
        for step, rows in walk:
            before, grads = cohort.gradients(step, rows, self.loss, head)
            of_head.update(rows, grads)
            between, grads = cohort.gradients(step, rows, self.loss, body)
            of_body.update(rows, grads)
            cohort.count_loss(step, between if self.variant == "official" else before)
        return cohort.reply(params)

    def loss(self, network: Network, batch: Batch) -> Tensor:
        """Mean binary cross-entropy; in ``official`` of probabilities."""
        if self.variant == "default":
            return super().loss(network, batch)
        probability = torch.sigmoid(self.predict(network, batch.x)).squeeze(1)
        return batch.mean(F.binary_cross_entropy(probability, batch.y.to(probability.dtype), reduction="none"))

    def personalize(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Tree | View:
        """What the user trained last; the received table of a user that has not trained yet, unless ``official``."""
        if self.variant == "default":
            return super().personalize(cohort, received, config)
        trained: Tree = cohort.state["model"]
        return trained


@method("pfedrec")
@dataclass(kw_only=True)
class PFedRec(PersonalizedStrategy):
    """Server: unweighted mean of the item tables."""

    update = PFedRecUpdate
    published_selection = "validation"
    weighting: Weighting = "uniform"
