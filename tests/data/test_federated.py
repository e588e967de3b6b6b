"""The data of all clients: what is refused, and what a run reads from them."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedpers.data import FederatedData
from fedpers.errors import DataError
from fedpers.tasks import CLASSIFICATION, Regression


def made(**values: Any) -> FederatedData:
    lists = {
        "train": [torch.tensor([0, 1]), torch.tensor([2])],
        "validation": [torch.tensor([3]), torch.tensor([4])],
        "test": [torch.tensor([5]), torch.tensor([6])],
    }
    return FederatedData(torch.zeros(10, 2), torch.zeros(10).long(), **lists, num_classes=1, **values)


def test_what_a_run_reads() -> None:
    data = made()
    assert data.task is CLASSIFICATION
    assert data.num_items == 0
    assert data.public is None
    assert data.unseen == ()
    samples = data.samples(0, seed=1, round=2)
    assert samples.tolist() == [0, 1]
    assert samples.ctypes.data == data.train[0].numpy().ctypes.data  # no copy


def test_targets_of_a_regression_are_counted_per_client() -> None:
    data = replace(made(), y=torch.linspace(-1, 1, 20).view(10, 2), num_classes=2, task=Regression())
    assert data.label_counts().tolist() == [[2], [1]]
    assert data.label_counts("test").tolist() == [[1], [1]]
    part = data.restrict([1]).to("cpu")
    assert part.task == Regression()
    assert torch.equal(part.y[part.train[1]], data.y[data.train[1]])


def test_checksum_of_present_data_stays() -> None:
    assert made().checksum == "749d136739aeb9ce"
    sums = {
        made().checksum,
        made(public=torch.tensor([7])).checksum,
        made(public=torch.tensor([8])).checksum,
        made(unseen=(0,)).checksum,
        made(unseen=(1,)).checksum,
    }
    assert len(sums) == 5
    assert made(unseen=(1,), public=torch.tensor([7])).to("cpu").unseen == (1,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"public": torch.tensor([7, 1])}, r"data: 1 public samples also belong to a client\."),
        ({"public": torch.tensor([6, 4])}, r"data: 2 public samples also belong to a client\."),
        ({"public": torch.tensor([10])}, r"data: public must list positions in 0\.\.9, at least one\."),
        ({"public": torch.tensor([], dtype=torch.int64)}, r"data: public must list positions"),
        ({"unseen": (2,)}, r"data: unseen=\[2\] must name clients 0\.\.1, in ascending order and each once\."),
        ({"unseen": (1, 0)}, r"data: unseen=\[1, 0\] must name"),
        ({"unseen": (0, 0)}, r"data: unseen=\[0, 0\] must name"),
        ({"unseen": (0, 1)}, r"data: all 2 clients are unseen, none is left to train\."),
    ],
)
def test_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        made(**values)
