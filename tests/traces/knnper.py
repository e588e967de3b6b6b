"""Traces of kNN-Per: memory, neighbours and mixtures of the authors' own code, on the features of a given network.

What each client remembers is replaced by what was recorded. In ``d_dropped`` that includes samples that the authors'
loader dropped, as zeros of class 0; their neighbours are not compared by position, since they tie. In ``c_scale`` all
similarities under the smaller scale underflow in the authors' code: what is NaN there is not compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedpers.cohort import Cohort, Network, View, tree
from fedpers.data.federated import FederatedData, Part
from fedpers.records import from_record
from fedpers.strategies import CohortApp, make_strategy
from fedpers.strategies.knnper import KNOWN, LABELS, MEMORY, SHARE, nearest
from tests.traces import Comparison

METHODS = {"knnper": ("knnper",)}
TOLERANCE = 1e-6
Values = Mapping[str, np.ndarray]


class Recorded(nn.Module):
    """Two layers with ReLU under a linear head."""

    def __init__(self, inputs: int, hidden: int, width: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.ReLU())
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(x))
        return out


def network_of(arrays: Values, dims: Mapping[str, int]) -> nn.Module:
    """The recorded network, ``features`` as body and ``classifier`` as head."""
    weights = {n.removeprefix("init/"): torch.from_numpy(np.array(v)) for n, v in arrays.items() if "init/" in n}
    network = Recorded(*(dims[name] for name in ("input", "hidden", "features", "classes")))
    names = {n: n.replace("features", "body").replace("classifier", "head") for n in weights}
    network.load_state_dict({names[n]: v for n, v in weights.items()})
    return network


def data_of(arrays: Values, clients: int, classes: int) -> FederatedData:
    """The clients' data."""
    xs, ys = [], []
    lists: dict[str, list[torch.Tensor]] = {"train": [], "test": []}
    at = 0
    for client in range(clients):
        for part, positions in lists.items():
            xs.append(arrays[f"c{client}/{part}_x"])
            ys.append(arrays[f"c{client}/{part}_y"])
            positions.append(torch.arange(at, at + len(ys[-1])))
            at += len(ys[-1])
    x, y = torch.from_numpy(np.concatenate(xs)), torch.from_numpy(np.concatenate(ys))
    none = [torch.zeros(0, dtype=torch.int64)] * clients
    return FederatedData(x, y, lists["train"], none, lists["test"], classes, "trace")


def features(network: Network, x: torch.Tensor) -> torch.Tensor:
    return network.part("body")(x)


@dataclass
class Memory:
    """Clients with one memory under one scale, and where it is recorded (``{}`` stands for the client)."""

    compared: Comparison
    arrays: Values
    app: CohortApp
    cohort: Cohort
    view: View
    ties: bool

    def compare(self, place: str, part: Part, correct: str, column: int | None) -> None:
        """Compare neighbours, votes and, for every share, correct predictions."""
        update: Any = self.app.update
        compared, given, labels = self.compared, self.view.given, self.cohort.labels(part)
        queries = self.cohort.logits(self.view, part, features)
        for k, client in enumerate(self.cohort.clients):
            where = place.format(client)
            theirs = {n: self.arrays[f"{where}/{n}"] for n in ("distances", "neighbours", "knn_outputs")}
            mine = {name: value[k] for name, value in given.items()}
            squares, positions = nearest(queries[k], mine[MEMORY], mine[KNOWN], update.neighbours)
            kept = theirs["neighbours"] >= 0
            kept = kept[:, : squares.shape[1]]
            compared.exact("neighbours", squares.isfinite().cpu().numpy(), kept)
            compared.add("distances", squares.cpu().numpy()[kept], theirs["distances"][:, : kept.shape[1]][kept])
            if not self.ties:
                compared.exact(
                    "neighbours", positions.cpu().numpy()[kept], theirs["neighbours"][:, : kept.shape[1]][kept]
                )
            if np.isfinite(theirs["knn_outputs"]).all():
                votes = update.vote(queries[k], mine, theirs["knn_outputs"].shape[1])
                compared.add("votes", votes, theirs["knn_outputs"])
        for i, share in enumerate(self.arrays["weights_grid"]):
            shares = torch.full_like(given[SHARE], float(share))
            scores = self.cohort.logits(replace(self.view, given={**given, SHARE: shares}), part, update.predict)
            for k, client in enumerate(self.cohort.clients):
                if np.isfinite(self.arrays[f"{place.format(client)}/knn_outputs"]).all():
                    counts = self.arrays[correct.format(client)]
                    right = int((scores[k].argmax(1) == labels[k]).sum())
                    compared.exact("correct", right, int(counts[i] if column is None else counts[i, column]))


def compare(method: str, path: Path, device: str = "cpu") -> Comparison:
    """Compare all capacities and scales of one trace."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    meta: dict[str, Any] = json.loads(str(arrays.pop("meta")))
    compared = Comparison(method, f"authors/{path.stem}", TOLERANCE)
    network, clients = network_of(arrays, meta["dims"]), int(meta["n_clients"])
    data = data_of(arrays, clients, int(meta["dims"]["classes"]))
    options = {
        "neighbours": int(meta["k"]), "share": 0.0, "variant": "official",
        "mixture": "logits" if meta["interpolate_logits"] else "probabilities",
    }  # fmt: skip
    for s, scale in enumerate(arrays["scales"]):
        _, update = make_strategy(method, {**options, "scale": float(scale)})
        app = update.client_app(network, data, device=device)
        order = sorted(range(clients), key=lambda c: -app.sizes[c])
        cohort = app.cohort(order, tree({}, clients), {"server-round": 1})
        folder = f"c{{}}/scale{s}" if len(arrays["scales"]) > 1 else "c{}"
        for q, capacity in enumerate(arrays["capacities_grid"]):
            selected = {c: arrays[f"{folder.format(c)}/cap{q}/selected"] for c in order}
            if not capacity:  # no memory: the common network alone
                _compare_alone(compared, arrays, app, cohort, q)
                continue
            update.remembered = lambda cohort, client, size, selected=selected: selected[client]
            view = update.personalize(cohort, {"arrays": from_record(app.initial_arrays())}, {})
            _compare_memory(compared, arrays, cohort, view, selected)
            dropped = any(len(arrays[f"c{c}/never_passed"]) for c in order)
            if dropped:
                view = replace(view, given={**view.given, **_as_recorded(arrays, order, view)})
            memory = Memory(compared, arrays, app, cohort, view, dropped)
            memory.compare(f"{folder}/cap{q}", "test", f"{folder}/correct", q)
            if capacity == 1 and s == 0 and "c0/train_mode/correct" in arrays:
                memory.compare("c{}/train_mode", "train", "c{}/train_mode/correct", None)
    assert "correct" in compared.worst
    return compared


def _compare_alone(compared: Comparison, arrays: Values, app: CohortApp, cohort: Cohort, column: int) -> None:
    """Outputs and correct predictions of the network without a memory, the same for every share."""
    view = cohort.view(from_record(app.initial_arrays()))
    scores = cohort.logits(view, "test", lambda network, x: network(x))
    for client, rows, labels in zip(cohort.clients, scores, cohort.labels("test"), strict=True):
        compared.add("outputs", torch.softmax(rows, 1), arrays[f"c{client}/test_outputs"])
        for count in arrays[f"c{client}/correct"][:, column]:
            compared.exact("correct", int((rows.argmax(1) == labels).sum()), int(count))


def _compare_memory(
    compared: Comparison, arrays: Values, cohort: Cohort, view: View, selected: Mapping[int, np.ndarray]
) -> None:
    """What clients remember, but for samples that were dropped."""
    for k, client in enumerate(cohort.clients):
        passed = ~np.isin(selected[client], arrays[f"c{client}/never_passed"])
        chosen = selected[client]
        memory, labels = (view.given[name][k, : len(chosen)].cpu().numpy()[passed] for name in (MEMORY, LABELS))
        compared.add("memory", memory, arrays[f"c{client}/train_features"][chosen][passed])
        compared.exact("memory", labels, arrays[f"c{client}/train_labels"][chosen][passed])


def _as_recorded(arrays: Values, clients: list[int], view: View) -> dict[str, torch.Tensor]:
    """The memories with zeros of class 0 for samples that were dropped."""
    memory, labels = view.given[MEMORY].clone(), view.given[LABELS].clone()
    for k, client in enumerate(clients):
        dropped = torch.from_numpy(arrays[f"c{client}/never_passed"]).to(memory.device)
        memory[k, dropped], labels[k, dropped] = 0.0, 0
    return {MEMORY: memory, LABELS: labels}


def cases(root: Path, methods: list[str]) -> Iterator[tuple[str, Path]]:
    """All traces of the methods that exist under `root`."""
    for method in methods:
        for folder in METHODS.get(method, ()):
            yield from ((method, path) for path in sorted((root / folder).glob("*.npz")))
