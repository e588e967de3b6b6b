"""PFedRec: one item table for all, fine-tuned by each user, under a score function of one's own.

C. Zhang et al., Dual Personalization on Federated Recommendation, IJCAI 2023, arXiv:2301.08143; authors' code
github.com/Zhangcx19/IJCAI-23-PFedRec (commit abc2380).

User k has a score function (w_k, b_k) over item vectors; a visit starts from the received table C and takes two steps
per batch of the user's positives and drawn negatives:

    (w_k, b_k) <- (w_k, b_k) - lr * grad BCE         items fixed
    C_k        <- C_k - item_lr * grad BCE           the new score function fixed; item_lr = lr * item_rate * m items
    C          <- mean_k C_k

Shared: the item table. Personal: the score function, and the fine-tuned table C_k, with which the user predicts.

The authors predict with C_k as it is before it is averaged, and average without weights; so does this file. A user
that has not trained yet predicts with the received table. The authors' settings: lr 0.1, item_rate 80, one pass,
batches of 256, 4 negatives, 32 dimensions, best round chosen on validation. There is no trace of their code; this is
written from what is published of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fedpers.cohort import Cohort, Reply, Tree, entries
from fedpers.cohort.tree import expand_rows
from fedpers.data.federated import FederatedData
from fedpers.data.ratings import RankingData
from fedpers.errors import check
from fedpers.models.factorization import factorized
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received


@dataclass(kw_only=True)
class PFedRecUpdate(LocalUpdate):
    """Per batch, a step of the score function and then one of the item table.

    Parameters
    ----------
    item_rate : float
        The item table's rate is `item_rate` times the number of items times ``training.lr``, > 0.
    """

    shared = "body"
    personal = "all"
    item_rate: float = 80.0

    def __post_init__(self) -> None:
        check(self.item_rate > 0, "strategy.item_rate", self.item_rate, "a number > 0")
        groups = self.training.groups
        allowed = "null for strategy=pfedrec; strategy.item_rate sets the rate of the items"
        check(not any("lr" in options for options in (groups or {}).values()), "training.groups", groups, allowed)

    def extend(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Check that there are items to be rated."""
        return factorized(model, data)

    def initial_state(self, model: Tree, module: nn.Module) -> Tree:
        """Add whether the user has trained: not yet."""
        state = super().initial_state(model, module)
        state["trained"] = torch.zeros((), dtype=torch.bool, device=model["body.weight"].device)
        return state

    def personalize(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Tree:
        """Own score function and fine-tuned table; the received table of who has none yet."""
        own = cohort.state["model"]
        params = cohort.assemble(received["arrays"], personal=own.select(*cohort.names("head")))
        for name in cohort.names("body"):
            trained = expand_rows(cohort.state["trained"], own[name])
            params[name] = torch.where(trained, own[name], params[name])
        return params

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Fine-tune the received table under the own score function."""
        assert isinstance(cohort.data, RankingData)
        own = cohort.state["model"].select(*cohort.names("head"))
        params = cohort.assemble(received["arrays"], personal=own)
        plan = cohort.plan()
        items = replace(cohort.training, lr=cohort.training.lr * self.item_rate * cohort.data.num_items)
        phases = [
            (cohort.trainable(part), cohort.optimizer(cohort.trainable(part), plan, training))
            for part, training in (("head", None), ("body", items))
        ]
        work = entries(params)
        if plan.order is not None:
            work = {name: value[plan.order.to(value.device)] for name, value in work.items()}
        for step in cohort.steps(plan):
            for place, (names, optimizer) in enumerate(phases):
                losses, grads = cohort.gradients(step, {n: v[: step.active] for n, v in work.items()}, self.loss, names)
                optimizer.update(work, grads)
                if place == 0:
                    cohort.count(step, losses)
        if plan.order is not None:
            for name, value in work.items():
                params[name].index_copy_(0, plan.order.to(value.device), value)
        cohort.finish(plan)
        trained = torch.ones_like(cohort.state["trained"])
        return cohort.reply(params, share=self.shared, keep=self.personal, state={"trained": trained})


@dataclass(kw_only=True)
class PFedRec(PersonalizedStrategy):
    """Server: unweighted mean of the item tables."""

    update = PFedRecUpdate
    weighting: str = "uniform"
