"""How far networks scatter over a training, held against numpy on the networks of each step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedpers.cohort import Cohort, Training
from fedpers.cohort.step import Step
from fedpers.cohort.variance import RunningVariance
from tests.cohort.helpers import by_size, cross_entropy, make_cohort
from tests.problems import SmallNetwork, gaussian_data

DATA = gaussian_data(dtype=torch.float64)
NETWORK = SmallNetwork(dropout=0.0).double()
TRAINING = Training(lr=0.1, batch_size=8, epochs=2)


def step_of(active: int, rows: torch.Tensor | None = None) -> Step:
    empty = torch.zeros(active, 0)
    return Step(
        active=active, index=empty.long(), x=empty, y=empty, weight=None, count=empty.sum(1), key=None, rows=rows
    )


def test_running_variance_is_that_of_numpy() -> None:
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.normal(size=(9, 3, 2, 2)))
    bias = torch.from_numpy(rng.normal(size=(9, 3, 5)) + 1e4)
    variance = RunningVariance({"w": values[0], "b": bias[0]})
    order = torch.tensor([2, 0, 1])
    for t in range(9):
        counted = torch.tensor([True, t >= 4, t >= 8])
        variance.add({"w": values[t][order], "b": bias[t][order]}, counted, step_of(3, order))
    for client, first in ((2, 0), (0, 4)):
        together = np.concatenate([values[first:, client].flatten(1), bias[first:, client]], 1)
        np.testing.assert_allclose(float(variance.result()[client]), together.var(0, ddof=1).mean(), rtol=1e-9)
        each = values[first:, client].flatten(1).numpy().var(0, ddof=1).sum()
        np.testing.assert_allclose(float(variance.sums()["w"][client]), each, rtol=1e-9)
    assert float(variance.result()[1]) == 0  # of a single network


def watched(**settings: Any) -> Cohort:
    cohort = make_cohort(NETWORK, DATA, training=TRAINING, **settings)
    cohort.measures_variance = True
    return cohort


@pytest.mark.parametrize("steps", [None, [1, 6, 3, 9, 0, 2]])
def test_it_is_that_of_the_networks_before_the_later_steps_and_of_the_last(steps: list[int] | None) -> None:
    cohort = watched()
    params = cohort.assemble(cohort.template)
    names = cohort.names(("head", "body.0"))
    seen: list[list[np.ndarray[Any, Any]]] = [[] for _ in cohort.clients]

    def note(step: Step, rows: Any, grads: Any) -> None:
        order = range(step.active) if step.rows is None else step.rows.tolist()
        for place, row in enumerate(order):
            seen[row].append(torch.cat([rows[name][place].flatten() for name in names]).clone().numpy())

    cohort.fit(
        params, cross_entropy, adjust=note, steps=None if steps is None else [steps[k % 6] for k in range(cohort.size)]
    )
    variance = cohort.variance(params, ("head", "body.0"))
    for row, networks in enumerate(seen):
        last = torch.cat([params[name][row].flatten() for name in names]).numpy()
        counted = np.stack([*networks[len(networks) // 2 :], last])
        expected = counted.var(0, ddof=1).mean() if networks else 0.0
        np.testing.assert_allclose(float(variance[row]), expected, rtol=1e-10)


def test_trainings_of_one_call_add_up_over_the_parameters_each_has_moved() -> None:
    cohort, head, body = watched(), watched(), watched()
    params = cohort.assemble(cohort.template)
    cohort.fit(params, cross_entropy, only="head", epochs=1)
    first = params.clone()
    cohort.fit(params, cross_entropy, only="body")
    parts = []
    for alone, start, what, epochs in ((head, params, "head", 1), (body, first, "body", 2)):
        begun = alone.assemble(alone.template) if what == "head" else start
        if what == "body":  # the second training goes on in the order of batches
            alone.plan(epochs=1)
        alone.fit(begun, cross_entropy, only=what, epochs=epochs)
        parts.append(alone.variance(begun))
    torch.testing.assert_close(cohort.variance(params), parts[0] + parts[1])
    assert (cohort.variance(params, "head") > 0).all()
    with pytest.raises(RuntimeError, match="has no variance: expected the tensor that fit or walk trained"):
        cohort.variance(params.clone())


def test_alone_and_together_give_the_same() -> None:
    cohort = watched()
    params = cohort.assemble(cohort.template)
    cohort.fit(params, cross_entropy)
    for row, client in enumerate(by_size(DATA)):
        alone = watched(clients=[client])
        own_params = alone.assemble(alone.template)
        alone.fit(own_params, cross_entropy)
        torch.testing.assert_close(alone.variance(own_params)[0], cohort.variance(params)[row])


def test_nothing_is_measured_unless_it_is_asked_for() -> None:
    cohort = make_cohort(NETWORK, DATA, training=TRAINING)
    cohort.fit(cohort.assemble(cohort.template), cross_entropy)
    assert not cohort.variances
