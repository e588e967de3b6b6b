"""A cohort's way through its batches: order, write-back and booking, for methods with a step of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedpers.cohort.optim import Optimizer
from fedpers.cohort.plan import BatchPlan
from fedpers.cohort.step import Step
from fedpers.cohort.variance import RunningVariance
from fedpers.settings.training import Training

if TYPE_CHECKING:
    from fedpers.cohort.cohort import Cohort

Rows = Mapping[str, Tensor]
"""By name, the rows ``[a, ...]`` of the clients that train in a step: changed in place, not replaced."""


class _Rows(dict[str, Tensor]):
    """Rows that may be changed in place, also by ``rows[name] += ...``, but not replaced: that would change nothing."""

    def __setitem__(self, name: str, value: Tensor) -> None:
        if value is not self.get(name):
            raise TypeError(f"'{name}' of a walk is changed in place, e.g. with copy_: another tensor would be lost")


class Walk:
    """Iterates over the steps of a training, see :meth:`fedpers.cohort.Cohort.walk`.

    Each step comes with the rows of the trees that belong to its clients. What is changed in them in place is in the
    trees after the loop; steps and samples are booked, losses are not (:meth:`Cohort.count_loss`).

    Parameters
    ----------
    cohort : Cohort
    trees : sequence of mapping of name to Tensor ``[K, ...]``
        Changed in place.
    plan : BatchPlan
    """

    def __init__(self, cohort: Cohort, trees: Sequence[Mapping[str, Tensor]], plan: BatchPlan) -> None:
        self.cohort = cohort
        self.trees = trees
        self.plan = plan

    def optimizer(
        self, names: Sequence[str], training: Training | None = None, rates: Tensor | None = None
    ) -> Optimizer:
        """Fresh optimizer for the rows `names`, with the rates of this round.

        Parameters
        ----------
        names : sequence of str
        training : Training, optional
            Other settings than the cohort's.
        rates : Tensor ``[K]``, optional
            Factor on the rates of each client, >= 0.
        """
        training = training or self.cohort.training
        scale: float | Tensor = training.lr_decay ** max(0, self.cohort.round - 1)
        if rates is not None:
            if rates.shape != (self.cohort.size,):
                raise ValueError(f"rates have shape {list(rates.shape)}: expected one for each of {self.cohort.size}")
            scale = scale * (rates if self.plan.order is None else rates[self.plan.order.to(rates.device)])
        return Optimizer(training, self.cohort.module, names, self.plan.client_steps, scale)

    def __iter__(self) -> Iterator[tuple[Step, Any]]:
        """Yield each step and its rows: a mapping for one tree, a tuple of mappings for several."""
        plan, work = self.plan, [dict(values) for values in self.trees]
        order = None if plan.order is None or not plan.steps else plan.order[: plan.active[0]]
        if order is not None:  # those that take no step at all need not be moved
            work = [{name: value[order.to(value.device)] for name, value in stack.items()} for stack in work]
        rows: tuple[Rows, ...] = ()
        num_steps, active = 0, -1
        variances = [self._variance_of(values) for values in self.trees]
        client_steps = plan.client_steps  # in the order of the plan
        try:
            for step in self.cohort.steps(plan):
                if step.active != active:
                    active = step.active
                    rows = tuple(_Rows({n: value[:active] for n, value in stack.items()}) for stack in work)
                for variance, values in zip(variances, rows, strict=True):
                    if variance is not None:
                        variance.add(values, num_steps >= client_steps[:active] // 2, step)
                num_steps += 1
                yield step, rows[0] if len(rows) == 1 else rows
        finally:
            if order is not None:
                for values, stack in zip(self.trees, work, strict=True):
                    for name, value in stack.items():
                        values[name].index_copy_(0, order.to(value.device), value)
            self.cohort.book(plan, num_steps)
        for variance, values in zip(variances, self.trees, strict=True):
            if variance is not None:
                trained = client_steps > 0 if plan.order is None else (client_steps > 0)[plan.order.argsort()]
                variance.add(values, trained)
                self.cohort.variances.append((values, variance.sums()))

    def _variance_of(self, values: Mapping[str, Tensor]) -> RunningVariance | None:
        """For the shared parameters that training may move among `values`; None if there are none, or nobody asks."""
        if not self.cohort.measures_variance:
            return None
        names = [name for name in self.cohort.trainable(self.cohort.shared) if name in values]
        return RunningVariance({name: values[name] for name in names}) if names else None
