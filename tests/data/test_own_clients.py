"""``FederatedData.from_clients``: data as people have them, or a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from fedpers import simulate
from fedpers.cohort import Training
from fedpers.data import FederatedData
from fedpers.data.federated import PARTS
from fedpers.data.values import numbers_of
from fedpers.errors import ConfigError, DataError
from fedpers.models import ModelConfig, build_model
from fedpers.strategies import CohortApp, FedAvg, FedAvgUpdate

X = np.arange(40, dtype=np.float64).reshape(20, 2)
Y = np.arange(20) % 3


class Pairs(Dataset[tuple[Any, Any]]):
    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, position: int) -> tuple[Any, Any]:
        return self.x[position], self.y[position]


class Stream(IterableDataset[tuple[Any, Any]]):
    def __len__(self) -> int:
        return 20

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return zip(X, Y, strict=True)


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
        ([(X, Y), (X[:2], Y[:2])], {}, r"client 1 has 2 samples, but its parts .* need one each; leave it out, or set"),
        ([(X, Y), (X[:, :1], Y)], {}, r"differ in the shape of a sample: \[2\] of client 0, \[1\] of client 1"),
        ([(X, Y), None], {}, r"client 1 must be a pair .* not NoneType"),
        ([{"train": (X, Y), "tset": (X, Y)}], {}, r"client 0: a dictionary of a client's parts has the keys train"),
        ([{"test": (X, Y)}], {}, r"client 0 has no part for training"),
        ([({"a": X, "b": X[:5]}, Y)], {}, r"client 0: inputs differ in their number of samples: a 20, b 5"),
        ([({"a": X}, Y), ({"b": X}, Y)], {}, r"client 1: inputs are b \[2\], of the first client a \[2\]"),
        ([({"a": X}, Y), (X, Y)], {}, r"client 1 has one input for a sample, .* client 0 several"),
        ([({"a": np.full(20, 2**24)}, Y)], {}, r"client 0: input 'a' has whole numbers beyond 16777215"),
        ([({"a": X * np.nan}, Y)], {}, r"client 0: input 'a' is not finite"),
        ([({}, Y)], {}, r"client 0: inputs differ in their number of samples: there are none"),
        ([({"a": X}, Y)], {"tokens": True}, r"inputs are dict, expected sequences because of tokens=True"),
        (
            [([[1], [1, 2]] * 10, [[1], [1]] * 10)],
            {"tokens": True},
            r"client 0: sample 1 has 2 tokens but 1 next tokens",
        ),
        ([([[1], []] * 10, Y)], {"tokens": True}, r"client 0: inputs have an empty sequence \(sample 1\)"),
        ([([[1]] * 20, [[1]] * 20), ([[1]] * 20, Y)], {"tokens": True}, r"client 1: labels are classes, but of other"),
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
    with pytest.raises(DataError, match="client 1 has the columns b, a, label, the first a, b, label"):
        FederatedData.from_clients([frame, {"train": frame, "test": frame[["b", "a", "label"]]}])
    with pytest.raises(DataError, match=r"client 1: a label is missing \(None\)"):
        FederatedData.from_clients([(X, ["a"] * 20), (X, np.array(["a", None] * 10, dtype=object))])


# ------------------------------------------------------------------------- whole numbers


WHOLE: dict[str, Any] = {
    "counts": np.arange(40).reshape(20, 2),
    "small counts": np.arange(40, dtype=np.uint8).reshape(20, 2),
    "yes or no": np.arange(40).reshape(20, 2) % 2 == 0,
    "tensor": torch.arange(40).view(20, 2),
    "lists": np.arange(40).reshape(20, 2).tolist(),
    "table": pd.DataFrame({"a": np.arange(20), "b": np.arange(20) % 2 == 0}),
    "nullable": pd.DataFrame({"a": np.arange(20), "b": np.arange(20) % 2}).astype({"a": "Int64", "b": "boolean"}),
}


@pytest.mark.parametrize("form", WHOLE)
def test_whole_numbers_are_features_of_every_network_unless_they_are_tokens(form: str) -> None:
    data = FederatedData.from_clients([(WHOLE[form], Y), (WHOLE[form], Y)])
    assert data.x.dtype == torch.float32
    assert data.x.tolist() == np.asarray(WHOLE[form]).astype(float).tolist() * 2
    model = build_model(ModelConfig("mlp"), (2,), data.num_classes, 0)
    FedAvgUpdate().client_app(model, data)  # which tries network and loss on samples


def test_whole_numbers_of_a_table_with_its_labels() -> None:
    frame = pd.DataFrame({"a": np.arange(20), "b": np.arange(20) % 2 == 0, "label": Y})
    data = FederatedData.from_clients([frame, frame.astype({"a": "Int64", "label": "Int64"})])
    assert data.x.dtype == torch.float32
    assert data.y.tolist() == [*Y, *Y]
    assert data.class_names == ()


def test_tokens_stay_whole_numbers() -> None:
    ids = np.arange(40, dtype=np.int32).reshape(20, 2)
    for form in (ids, torch.from_numpy(ids), pd.DataFrame(ids), list(ids), ids.tolist()):
        data = FederatedData.from_clients([(form, Y), (form, Y)], tokens=True)
        assert data.x.dtype == torch.int64
        assert data.x.flatten().tolist() == [*range(40), *range(40)]
    with pytest.raises(DataError, match=r"client 1: inputs are float64, expected whole numbers >= 0 because of tokens"):
        FederatedData.from_clients([(ids, Y), (X, Y)], tokens=True)
    with pytest.raises(DataError, match=r"client 0: inputs are -1, expected whole numbers >= 0 because of tokens=True"):
        FederatedData.from_clients([(ids - 1, Y)], tokens=True)


def test_sequences_of_any_length_are_padded() -> None:
    said = [[1, 2], [3, 1, 2], [2]] * 7
    data = FederatedData.from_clients(
        [(said, [0, 1, 0] * 7), Pairs([torch.tensor(row) for row in said], [1] * 21)], tokens=True
    )
    assert data.x[:3].tolist() == data.x[21:24].tolist() == [[0, 1, 2], [3, 1, 2], [0, 0, 2]]
    assert (data.num_tokens, data.num_classes, data.task.name) == (4, 2, "classification")
    following = [[2, 1], [1, 2, 5], [-1]] * 7
    data = FederatedData.from_clients({"Ann": (said, following)}, tokens=True)
    assert data.x[:3].tolist() == [[1, 2, 0], [3, 1, 2], [2, 0, 0]]
    assert data.y[:3].tolist() == [[2, 1, -1], [1, 2, 5], [-1, -1, -1]]
    assert (data.num_tokens, data.num_classes, data.task.name) == (6, 6, "next_token")
    owned = FederatedData.from_clients((said, following), owner=["Ann"] * 21, tokens=True)
    assert torch.equal(owned.x, data.x)


class Wide(nn.Module):
    """Takes a picture and an age by name."""

    def __init__(self) -> None:
        super().__init__()
        self.look, self.years, self.head = nn.Linear(4, 3), nn.Embedding(100, 3), nn.Linear(3, 2)

    def forward(self, x: dict[str, torch.Tensor]) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.tanh(self.look(x["scan"].flatten(1))) + self.years(x["age"]))
        return out


def test_several_inputs_reach_the_network_by_name() -> None:
    rng = np.random.default_rng(0)
    scans, ages = rng.normal(size=(40, 2, 2)), rng.integers(100, size=40)
    label = (ages > 50).astype(int)
    items = [{"scan": scan, "age": age} for scan, age in zip(scans, ages, strict=True)]
    data = FederatedData.from_clients([({"scan": scans, "age": ages}, label), Pairs(items, label)])
    assert data.x.shape == (80, 5)
    fields = [(field.name, field.shape, field.whole) for field in data.fields]
    assert fields == [("age", (), True), ("scan", (2, 2), False)]
    torch.manual_seed(0)
    network = Wide()
    accuracies = []
    for clients_at_once in (1, 2):
        app = FedAvgUpdate(training=Training(lr=0.5, epochs=20, batch_size=8)).client_app(network, data, seed=0)
        server = ServerApp()

        @server.main()
        def main(grid: Grid, context: Context, app: CohortApp = app) -> None:
            result = FedAvg().start(grid, app.initial_arrays(), num_rounds=5)
            accuracies.append(result.evaluate_metrics_clientapp[5]["test-accuracy"])

        simulate(server, app, num_supernodes=2, clients_at_once=clients_at_once)
    assert accuracies[0] == accuracies[1] > 0.7  # ages of the test part that nobody trained on are guessed
    assert not network._forward_pre_hooks  # the user's own is left alone


# -------------------------------------------------------------------------------- labels


def test_a_task_says_what_numbers_stand_for() -> None:
    ages = np.arange(20) + 30
    data = FederatedData.from_clients([(X, ages), (X, ages.astype(float))], task="regression")
    assert data.task.name == "regression"
    assert data.y.tolist() == [[float(age)] for age in ages] * 2
    data = FederatedData.from_clients([(X, Y), (X, Y.astype(float))], task="classification")
    assert data.task.name == "classification"
    assert data.y.tolist() == [*Y, *Y]
    one_hot = np.eye(3)[Y]
    data = FederatedData.from_clients([(X, one_hot), (X, one_hot)], task="regression")
    assert (data.num_classes, data.y.shape) == (3, (40, 3))
    with pytest.raises(ConfigError, match=r"task=regression: expected classification, because the label of client 0"):
        FederatedData.from_clients([(X, ["a", "b"] * 10)], task="regression")
    with pytest.raises(ConfigError, match=r"task=classification: expected regression, because the label of client 1"):
        FederatedData.from_clients([(X, Y), (X, Y / 7)], task="classification")
    with pytest.raises(ConfigError, match=r"task=ranking: expected classification, regression or None"):
        FederatedData.from_clients([(X, Y)], task="ranking")  # type: ignore[arg-type]


def test_more_classes_than_usual_are_said(caplog: pytest.LogCaptureFixture) -> None:
    x = np.zeros((1500, 1))
    FederatedData.from_clients([(x, np.arange(1500))])
    assert "data: the labels are 1500 classes; task='regression' predicts them as numbers" in caplog.text
    caplog.clear()
    FederatedData.from_clients([(x, np.arange(1500))], task="classification")
    assert not caplog.records


def test_text_of_a_table_is_numbered_as_text_of_an_array() -> None:
    frame = pd.DataFrame({"a": np.arange(20.0), "label": ["b", "a"] * 10})
    data = FederatedData.from_clients([frame, frame.astype({"label": "category"})])
    assert data.class_names == ("a", "b")
    assert data.y[:2].tolist() == data.y[20:22].tolist() == [1, 0]


# ---------------------------------------------------------------------------- containers


def test_numbers_that_numpy_does_not_have_are_read() -> None:
    halves = torch.from_numpy(X).bfloat16()
    items = [(row, label) for row, label in zip(halves, Y / 7, strict=True)]
    for form in ((halves, Y / 7), Pairs(*zip(*items, strict=True))):
        data = FederatedData.from_clients([form])
        assert data.x.tolist() == X.tolist()
    data = FederatedData.from_clients([(np.ma.masked_array(X, False), Y)])
    assert data.x.tolist() == X.tolist()


def test_an_owner_goes_with_its_sample_whatever_the_order() -> None:
    owner, order = np.array(["Ulm", "Kiel"])[Y % 2], np.random.default_rng(0).permutation(20)
    one = FederatedData.from_clients((X, Y), owner=owner)
    other = FederatedData.from_clients((X[order], Y[order]), owner=owner[order].tolist())
    for client in range(2):
        rows = [
            sorted(data.x[position].tolist() for part in PARTS for position in data.part(part)[client])
            for data in (one, other)
        ]
        assert rows[0] == rows[1]
    frame = pd.DataFrame({"a": X[:, 0], "label": Y, "site": owner})
    shuffled = frame.sample(frac=1, random_state=0)
    with pytest.raises(DataError, match=r"data: samples and owner have the same index in another order"):
        FederatedData.from_clients(shuffled[["a", "label"]], owner=frame["site"])
    with pytest.raises(DataError, match=r"client 0: inputs and labels have the same index in another order"):
        FederatedData.from_clients([(shuffled[["a"]], frame["label"])])
    assert FederatedData.from_clients(shuffled[["a", "label"]], owner=shuffled["site"]).client_names == ("Kiel", "Ulm")


FRAME = pd.DataFrame({"a": X[:, 0], "label": Y})
SPARSE = torch.from_numpy(X).to_sparse()
PICTURES = np.zeros((20, 3, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("client", "message"),
    [
        (set(), r"client Ulm must be a pair \(inputs, labels\), a data frame or a PyTorch Dataset .*, not set\."),
        ((k for k in range(3)), r"client Ulm must be a pair .*, not generator\."),
        ("samples", r"client Ulm must be a pair .*, not str\."),
        (X, r"client Ulm must be a pair .*, not ndarray\."),
        ((X, Y, Y), r"client Ulm must be a pair .*, not tuple of 3\."),
        (pa.table({"a": X[:, 0], "label": Y}), r"client Ulm must be a pair .*, not Table; give its to_pandas\(\)"),
        (Stream(), r"client Ulm must be a pair .*, not Stream\."),
        ({}, r"client Ulm has no part for training"),
        ({"train": (X[:0], Y[:0]), "test": (X, Y)}, r"client Ulm has no samples for training"),
        ({"train": {"x": X}}, r"client Ulm, train must be a pair .*, not dict"),
        ({"image": X, "age": X, "label": Y}, r"client Ulm: .* not image, age, label; several inputs are a pair"),
        (({"image": X, "age": {1, 2}}, Y), r"client Ulm: inputs: 'age' are set, expected an entry for each sample"),
        (([X, X[:, :1]], Y), r"client Ulm: inputs differ in shape"),
        (([X[0], X[0, :1]] * 10, Y), r"client Ulm: inputs differ in shape"),
        (((x for x in X), Y), r"client Ulm: inputs are generator, expected an entry for each sample"),
        ((set(), Y), r"client Ulm: inputs are set, expected an entry"),
        ((X, None), r"client Ulm: labels are NoneType, expected an entry"),
        ((X[:, :0], Y), r"inputs of client Ulm are \[20, 0\], without any numbers"),
        ((X.astype(object), Y), r"client Ulm: inputs are object, expected numbers"),
        ((X.astype(complex), Y), r"client Ulm: inputs are complex128, expected numbers"),
        ((torch.from_numpy(X).to(torch.complex64), Y), r"client Ulm: inputs are complex64, expected numbers"),
        ((X.astype("datetime64[s]"), Y), r"client Ulm: inputs are datetime64\[s\], expected numbers"),
        ((X * 1e300, Y), r"client Ulm: inputs are not finite"),
        ((PICTURES, Y), r"inputs of client Ulm are uint8 \[20, 3, 8, 8\], expected pictures \[n, H, W\]"),
        ((np.ma.masked_less(X, 3), Y), r"client Ulm: inputs are masked; fill in what is missing"),
        (([np.ma.masked_less(row, 3) for row in X], Y), r"client Ulm: inputs are masked"),
        ((SPARSE, Y), r"client Ulm: inputs are a tensor of layout torch.sparse_coo; give its to_dense\(\)"),
        ((SPARSE.to_sparse_csr(), Y), r"client Ulm: inputs are a tensor of layout torch.sparse_csr"),
        ((torch.zeros(20, 2, device="meta"), Y), r"client Ulm: inputs cannot be read"),
        (([torch.ones(2, requires_grad=True)] * 20, Y), r"client Ulm: inputs cannot be read"),
        (Pairs([{"a": 1}] * 19 + [{"b": 1}], Y), r"client Ulm: samples differ in the names of their inputs"),
        (Pairs([[1], [1, 2]] * 10, Y), r"client Ulm: inputs differ in shape: \(1,\), \(2,\)"),
        (Pairs([SPARSE[0]] * 20, Y), r"client Ulm: inputs are a tensor of layout"),
        (TensorDataset(SPARSE.to_dense()), r"client Ulm: samples of the data set must be pairs .*, not 1 values"),
        (pd.DataFrame(), r"client Ulm: there is no column 'label' in a data frame without columns"),
        (FRAME[:0], r"client Ulm has no samples"),
        (FRAME[["label"]], r"client Ulm: there is no column of inputs beside 'label'"),
        (FRAME[["a", "a", "label"]], r"client Ulm: there are several columns 'a'"),
        (FRAME.assign(a="text"), r"client Ulm: column 'a' is \w+, but inputs are numbers; turn it into numbers"),
        (FRAME.assign(a=pd.Timestamp(0)), r"client Ulm: column 'a' is datetime64\[\w+\], but inputs are numbers"),
        (FRAME.assign(a=1j), r"client Ulm: column 'a' is complex128, but inputs are numbers"),
        (FRAME.assign(a=pd.array([1, None] * 10, "Int64")), r"client Ulm: inputs are not finite"),
        (FRAME.assign(label=pd.array([1, None] * 10, "Int64")), r"client Ulm: a label is missing \(row 2\)"),
        (FRAME.assign(label=pd.Timestamp(0)), r"labels of client Ulm are datetime64"),
        ((FRAME[["a"]].assign(b="text"), Y), r"client Ulm: inputs: column 'b' is \w+, but inputs are numbers"),
        ((X, pd.array([1, None] * 10, "Int64")), r"client Ulm: labels are masked; fill in what is missing"),
        ((X, Y.astype(complex)), r"labels of client Ulm are complex128 \[20\], expected one class for each sample"),
        ((X, Y[:, None]), r"labels of client Ulm are int64 \[20, 1\], expected one class for each sample \[n\], or fl"),
        ((X, np.eye(3)[Y]), r"labels of client Ulm are one-hot \[n, 3\]; .* labels.argmax\(1\) .* task='regression'"),
        ((X, np.eye(3, dtype=int)[Y]), r"labels of client Ulm are one-hot \[n, 3\]"),
        ((X, [{"a": 1}] * 20), r"labels must be hashable"),
    ],
)
def test_no_container_ends_in_a_traceback(client: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        FederatedData.from_clients({"Ulm": client})
    assert str(error.value).startswith("data: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("clients", "owner", "message"),
    [
        ((X, Y), [None, "Ulm"] * 10, r"owner has no value for a sample"),
        ((X, Y), np.array([np.nan, 1.0] * 10), r"owner has no value for a sample"),
        ((X, Y), pd.array(["Ulm", None] * 10, "string"), r"owner has no value for a sample"),
        ((X, Y), np.array(["2020", "NaT"] * 10, "datetime64[s]"), r"owner has no value for a sample"),
        ((X, Y), [[1], [1, 2]] * 10, r"owner differ in shape"),
        ((X, Y), "site", r"owner are str, expected an entry for each sample"),
        ((X, Y), set(), r"owner are set, expected an entry for each sample"),
        ({"x": X, "y": Y}, Y, r"data must be a pair .*, not dict"),
        (TensorDataset(torch.zeros(20, 2), torch.zeros(20)), None, r"list or a dictionary .* needs owner="),
        ({"Ulm", "Kiel"}, None, r"clients must be a list or a dictionary by name, not set"),
        (iter([(X, Y)]), None, r"clients must be a list or a dictionary by name, not list_iterator"),
        ("Ulm", None, r"clients must be a list or a dictionary by name, not str"),
        (pd.DataFrame(), None, r"clients must be a list or a dictionary by name, not DataFrame"),
    ],
)
def test_owners_and_all_clients_together_are_a_sentence_too(clients: Any, owner: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        FederatedData.from_clients(clients, owner=owner)


def test_pictures_of_bytes_and_other_numbers_do_not_go_together() -> None:
    pictures = np.zeros((20, 8, 8), np.uint8)
    with pytest.raises(DataError, match=r"differ in the type of inputs: uint8 of client 0, float64 of client 1"):
        FederatedData.from_clients([(pictures, Y), (pictures / 255, Y)])


def test_whole_numbers_that_int64_does_not_hold_become_floats() -> None:
    large = pd.DataFrame({"a": np.array([2**63 + 2**20, 1], np.uint64), "b": [1, 2]})
    assert numbers_of(large, "made").tolist() == [[float(2**63 + 2**20), 1.0], [1.0, 2.0]]
    assert numbers_of(large[1:], "made").dtype == np.int64
