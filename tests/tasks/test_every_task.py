"""What holds for every task."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fedpers.data import FederatedData
from fedpers.errors import ConfigError
from fedpers.tasks import CLASSIFICATION, Classification, Ranking, Regression, Task
from tests.problems import gaussian_data

TASKS = [CLASSIFICATION, Ranking(), Ranking(3, "official"), Regression()]


def labels_of(task: Task, size: int) -> Tensor:
    if task.classes:
        return torch.arange(size) % 2
    return (torch.arange(size) == 0).float() if task.name == "ranking" else torch.linspace(0, 1, size)


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_tasks_are_values(task: Task) -> None:
    for same in (copy.deepcopy(task), pickle.loads(pickle.dumps(task))):
        assert same == task
        assert hash(same) == hash(task)
    with pytest.raises(AttributeError):
        task.top_k = 1  # type: ignore[attr-defined]
    assert len({*TASKS, Classification(), Ranking(10, "clean")}) == len(TASKS)


@pytest.mark.parametrize("task", TASKS, ids=str)
@pytest.mark.parametrize("finite", [True, False])
def test_no_client_with_samples_goes_missing(task: Task, finite: bool) -> None:
    width = 2 if task.classes else 1
    outputs = [torch.rand(size, width) if finite else torch.full((size, width), torch.nan) for size in (5, 1)]
    metrics = task.measure(outputs, [labels_of(task, 5), labels_of(task, 1)], width)
    assert {"examples", task.headline, *task.also} <= metrics.keys()
    assert all(column.shape == (2,) and column.dtype == torch.float64 for column in metrics.values())
    assert not any(column.isnan().any() for column in metrics.values())
    assert bool((metrics[task.headline] <= 1).all())


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_one_loss_for_each_sample(task: Task) -> None:
    outputs = torch.randn(3, 4, 2 if task.classes else 1)
    y = torch.stack([labels_of(task, 4)] * 3)
    assert torch.func.vmap(task.losses)(outputs, y).shape == (3, 4)


@pytest.mark.parametrize("task", [CLASSIFICATION, Ranking()], ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (2,), (2, 4, 1)])
def test_networks_with_too_few_outputs_are_refused(task: Task, shape: tuple[int, ...]) -> None:
    data: FederatedData = gaussian_data()  # of four classes
    task.check_outputs(torch.zeros(2, 4), data)
    task.check_outputs(torch.zeros(2, 5), data)
    with pytest.raises(ConfigError, match=r"^model=Net: expected a network with 4 outputs, not \["):
        task.check_outputs(torch.zeros(shape), data, "Net")


@pytest.mark.slow
def test_tasks_know_neither_data_nor_cohorts() -> None:
    code = (
        "import sys, fedpers.tasks; print(sorted(name for name in sys.modules if name.startswith('fedpers.') "
        "and name.split('.')[1] not in ('errors', 'evaluation', 'settings', 'tasks')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
