"""The data of all clients: what is refused, and what a run reads from them."""

from dataclasses import replace
from typing import Any

import numpy as np
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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"y": torch.zeros(10)},
            r"y is float32 \[10\], expected class ids, whole numbers \[N\]; targets of",
        ),
        ({"y": torch.zeros(10, 3).long()}, r"y is int64 \[10, 3\], expected class ids"),
        ({"y": torch.arange(10)}, r"labels run from 0 to 9, expected 0 to 0, because num_classes=1\."),
        ({"y": torch.zeros(10).long() - 1}, r"labels run from -1 to -1"),
        ({"y": torch.zeros(9).long()}, r"x has 10 samples but y has 9\."),
        ({"y": torch.full((10,), float("nan")), "task": Regression()}, r"y is not finite"),
        ({"y": torch.zeros(10, 2), "task": Regression()}, r"y is float32 \[10, 2\], expected numbers .* num_classes=1"),
        ({"x": torch.zeros(())}, r"x is \[\] and y is \[10\]"),
        ({"x": ["a"] * 10}, r"x must be a tensor, an array or a list of numbers"),
        (
            {"test": [[5], [2]]},
            r"sample 2 of client 1 stands in train and in test; each of its samples must",
        ),
        ({"test": [[5, 5], [6]]}, r"sample 5 of client 0 stands in test and in test"),
        ({"test": [[5], [0.5]]}, r"test lists float32 \[1\], expected positions, whole numbers"),
        ({"test": [[5], [True]]}, r"test lists bool \[1\], expected positions"),
        ({"test": [[5], [10]]}, r"a test index is outside 0\.\.9"),
        ({"test": [[5]]}, r"must list the same clients"),
        ({"client_names": ("Ulm",)}, r"there are 1 client_names for 2\."),
        ({"class_names": ("a", "b")}, r"there are 2 class_names for 1\."),
        ({"test": [[5], 3]}, r"test lists int64 \[\], expected positions"),
        ({"anchors": (2,)}, r"anchors=\[2\] must name clients 0\.\.1, in ascending order and each once\."),
        ({"elsewhere": (1, 0)}, r"elsewhere=\[1, 0\] must name clients"),
        ({"drift_round": 2}, r"drift_round=2: expected >= 1 with drifted, 0 without\."),
        ({"drifted": list(range(10))}, r"drift_round=0: expected >= 1 with drifted"),
        ({"drifted": [0] * 9, "drift_round": 2}, r"drifted must be a position in x for each of 10 samples\."),
        ({"drifted": [10] * 10, "drift_round": 2}, r"drifted must be a position in x"),
        ({"drifted": [0.5] * 10, "drift_round": 2}, r"drifted lists float32 \[10\], expected positions"),
    ],
)
def test_what_is_documented_is_checked(values: dict[str, Any], message: str) -> None:
    data = made()
    given: dict[str, Any] = {"x": data.x, "y": data.y, "train": data.train, "validation": data.validation}
    with pytest.raises(DataError, match=message):
        FederatedData(**{**given, "test": data.test, "num_classes": 1, **values})


@pytest.mark.parametrize("kind", ["int32", "uint8", "bool", "array", "list"])
def test_arrays_lists_and_other_whole_numbers_are_taken(kind: str) -> None:
    x, y = np.arange(20.0).reshape(10, 2), np.arange(10) % 2
    labels: Any = {"array": y, "list": y.tolist()}.get(kind)
    labels = torch.from_numpy(y).to(getattr(torch, kind)) if labels is None else labels
    data = FederatedData(x.tolist() if kind == "list" else x, labels, [np.array([0, 1]), [2]], [[3], [4]], [[5], []], 2)
    assert data.x.dtype == torch.float32
    assert data.y.dtype == torch.int64
    assert data.y.tolist() == y.tolist()
    assert [positions.tolist() for positions in data.train] == [[0, 1], [2]]
    assert data.test[1].dtype == torch.int64
    wide = FederatedData(torch.from_numpy(x), y, [[0]], [[1]], [[2]], 2)
    assert wide.x.dtype == torch.float64  # a tensor keeps its type


def test_clients_may_share_samples() -> None:
    data = FederatedData(torch.zeros(4, 1), [0] * 4, [[0, 1], [0, 1]], [[2], [2]], [[3], [3]], 1)
    assert data.num_clients == 2
