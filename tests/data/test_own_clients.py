"""``FederatedData.from_clients``: data as people have them, or a sentence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, TensorDataset

from fedpers.data import FederatedData
from fedpers.data.federated import PARTS
from fedpers.errors import DataError

X = np.arange(40, dtype=np.float64).reshape(20, 2)
Y = np.arange(20) % 3


class Pairs(Dataset[tuple[Any, Any]]):
    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, position: int) -> tuple[Any, Any]:
        return self.x[position], self.y[position]


FORMS: dict[str, Any] = {
    "arrays": (X, Y),
    "lists": (X.tolist(), Y.tolist()),
    "tensors": (torch.from_numpy(X), torch.from_numpy(Y)),
    "tensor set": TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)),
    "data set": Pairs(X, Y),
    "table": pd.DataFrame({"a": X[:, 0], "b": X[:, 1], "label": Y}),
}


@pytest.mark.parametrize("form", FORMS)
def test_any_form_gives_the_same(form: str) -> None:
    data = FederatedData.from_clients([FORMS[form], (X + 1, Y)], seed=2)
    assert data.x.dtype == torch.float32
    assert data.y.dtype == torch.int64
    assert torch.equal(data.x, torch.from_numpy(np.concatenate([X, X + 1])).float())
    assert data.y.tolist() == [*Y, *Y]
    assert data.num_classes == 3
    assert data.client_names == ("0", "1")
    assert data.class_names == ()
    assert [int(data.sizes(part)[0]) for part in PARTS] == [12, 3, 5]
    owned = torch.cat([data.part(part)[0] for part in PARTS])
    assert sorted(owned.tolist()) == list(range(20))


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", "b"], ("a", "b")),
        ([0, 4000, 8000], ("0", "4000", "8000")),
        ([-1, 1, -1], ("-1", "1")),
        ([True, False, True], ("False", "True")),
        ([("x", 1), ("y", 2), ("x", 1)], None),
        ([0, 1, 2], ()),
        (np.array([0, 1, 2], np.int32), ()),
    ],
)
def test_labels_of_any_kind_are_mapped_and_the_map_is_kept(labels: Any, names: tuple[str, ...] | None) -> None:
    if names is None:
        array = np.empty(3, object)
        array[:] = labels
        labels, names = array, ("('x', 1)", "('y', 2)")
    data = FederatedData.from_clients([(X[:3], labels), (X[3:6], labels)])
    assert data.class_names == names
    assert data.y[:3].tolist() == data.y[3:].tolist()
    if names:
        assert [names[label] for label in data.y[:3].tolist()] == [str(label) for label in labels]


def test_a_class_that_a_client_lacks_is_the_same_class_for_all() -> None:
    data = FederatedData.from_clients({"Ulm": (X, ["a"] * 20), "Kiel": (X, ["c", "b"] * 10)})
    assert data.client_names == ("Ulm", "Kiel")
    assert data.class_names == ("a", "b", "c")
    assert set(data.y[20:].tolist()) == {1, 2}


def test_parts_that_are_given_stay() -> None:
    data = FederatedData.from_clients([{"train": (X[:9], Y[:9]), "test": (X[9:], Y[9:])}, (X, Y)])
    assert [len(data.part(part)[0]) for part in PARTS] == [9, 0, 11]
    assert data.test[0].tolist() == list(range(9, 20))


def test_one_set_with_an_owner_for_each_sample() -> None:
    owner = np.array(["Ulm", "Kiel"])[(np.arange(20) < 8).astype(int)]
    data = FederatedData.from_clients(TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), owner=owner)
    assert data.client_names == ("Kiel", "Ulm")
    assert sum(int(data.sizes(part)[0]) for part in PARTS) == 8


def test_numbers_are_targets_of_a_regression() -> None:
    data = FederatedData.from_clients([(X, X[:, :1] / 7), (X, X[:, :1] / 3)])
    assert data.task.name == "regression"
    assert data.num_classes == 1
    assert data.y.shape == (40, 1)


def test_pictures_of_bytes_are_normalized() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    data = FederatedData.from_clients([(pictures, Y), (pictures, Y)])
    assert data.x.shape == (40, 1, 8, 8)
    assert abs(float(data.x.mean())) < 1e-4


@given(st.lists(st.integers(3, 30), min_size=1, max_size=6), st.integers(0, 5))
def test_every_sample_stands_in_one_part_of_one_client(sizes: list[int], seed: int) -> None:
    clients = [(np.zeros((size, 2)), np.arange(size) % 2) for size in sizes]
    data = FederatedData.from_clients(clients, seed=seed)
    owned = [position for part in PARTS for lists in data.part(part) for position in lists.tolist()]
    assert sorted(owned) == list(range(sum(sizes)))
    assert all(len(positions) for part in PARTS for positions in data.part(part))
    again = FederatedData.from_clients(clients, seed=seed)
    assert again.checksum == data.checksum


@pytest.mark.parametrize(
    ("clients", "more", "message"),
    [
        ([], {}, r"^data: there are no clients\.$"),
        (5, {}, r"clients must be a list or a dictionary by name, not int"),
        ({1: (X, Y), "1": (X, Y)}, {}, r"two clients have the same name"),
        ([(X, Y), (X[:5], Y)], {}, r"client 1 has 5 samples but 20 labels"),
        ([(X, Y), (X[:0], Y[:0])], {}, r"client 1 has no samples"),
        ([(X, Y), (X[:2], Y[:2])], {}, r"Client 1 has 2 samples"),
        ([(X, Y), (X[:, :1], Y)], {}, r"differ in the shape of a sample: \(1,\), \(2,\)"),
        ([(X, Y), None], {}, r"client 1 must be a pair .* not NoneType"),
        ([{"train": (X, Y), "tset": (X, Y)}], {}, r"client 0: a dictionary of a client's parts has the keys train"),
        ([{"test": (X, Y)}], {}, r"client 0 has no part for training"),
        ([({"a": X, "b": X}, Y)], {}, r"inputs are dict"),
        ([(X * np.nan, Y)], {}, r"inputs are not finite"),
        ([(X, Y.astype(float))], {}, r"labels are whole numbers as float64"),
        ([(X, Y / 7 * np.nan)], {}, r"labels are not finite"),
        ([(X.astype(str), Y)], {}, r"inputs are <U\d+, expected numbers"),
        ([([[1.0], [1.0, 2.0]], [0, 1])], {}, r"client 0: inputs differ in shape"),
        ([pd.DataFrame({"a": X[:, 0], "klasse": Y})], {}, r"there is no column 'label' among a, klasse"),
        ((X, Y), {"owner": [1, 2]}, r"owner is \[2\], expected one id for each of 20 samples"),
    ],
)
def test_what_cannot_be_meant_is_a_sentence(clients: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        FederatedData.from_clients(clients, **more)


def test_columns_are_not_put_together_by_position() -> None:
    frame = FORMS["table"]
    with pytest.raises(DataError, match="client 1 has the columns b, a, label, the first a, b, label"):
        FederatedData.from_clients([frame, frame[["b", "a", "label"]]])
    with pytest.raises(DataError, match="clients differ in the type or the shape of labels"):
        FederatedData.from_clients([(X, Y), (X, X[:, :1] / 7)])
    with pytest.raises(DataError, match=r"a label is missing \(None\)"):
        FederatedData.from_clients([(X, np.array(["a", None] * 10, dtype=object))])
