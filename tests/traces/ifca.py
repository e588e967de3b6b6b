"""Traces of the authors' code of IFCA.

The real server and client halves run in the real in-process runtime; initial networks, participants and the order of
samples are those recorded. In ``e_*`` a penalty of a weight is part of the objective, also where a network is chosen.

Not compared: ``b_gradient_em``, where every client trains every network by weights that favour the worse one; the
authors' notes say it is not used.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import flwr.app as flower
import numpy as np
import torch
from torch import Tensor, nn

from fedpers.cohort import Batch, Cohort, Collect, Network, Training, Tree, entries, tree
from fedpers.data.federated import FederatedData, Part
from fedpers.flower_private import server_identity
from fedpers.records import from_record
from fedpers.runtime.local import LocalGrid
from fedpers.server.collect import ReplyCollector
from fedpers.strategies import CohortApp, PersonalizedStrategy, make_strategy
from fedpers.strategies.ifca import CHOICE, IFCAUpdate
from fedpers.tasks import Classification, Regression
from tests.traces import Comparison
from tests.traces.fedselect import replaying

TOLERANCE = 1e-5
METHODS = ("ifca",)
PENALIZED = "fc1.weight"


class MLP(nn.Module):
    """Two layers, or one without bias (``linear1``)."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, (outputs, inputs) in shapes.items():
            self.add_module(name, nn.Linear(inputs, outputs, bias=name != "linear1"))

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.children()
        x = first(x)
        for layer in others:
            x = layer(torch.relu(x))
        return x


class Penalized(IFCAUpdate):
    """The objective contains half the squared norm of a weight, times a penalty."""

    penalty = 0.0

    def loss(self, network: Network, batch: Batch) -> Tensor:
        return super().loss(network, batch) + self.penalty / 2 * network.tensors[PENALIZED].square().sum()

    def losses(self, cohort: Cohort, clusters: Tree, part: Part) -> Tensor:
        norms = clusters[PENALIZED].square().flatten(-2).sum(-1)
        return super().losses(cohort, clusters, part) + self.penalty / 2 * norms


class Trace:
    """One ``.npz`` file."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.meta: dict[str, Any] = json.loads(str(self.arrays.pop("meta")))
        self.config: dict[str, Any] = self.meta["config"]
        self.rounds = int(self.meta["rounds"])
        self.clients = int(self.meta["n_clients"])
        self.clusters = int(self.meta["n_clusters"])

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays below a path, by the rest of it."""
        return {k[len(prefix) + 1 :]: v for k, v in self.arrays.items() if k.startswith(prefix + "/")}

    def init(self, cluster: int) -> Tree:
        """Initial values of one network."""
        return tree({n: torch.from_numpy(v[cluster].copy()) for n, v in self.group("init/models").items()})

    def participants(self, round: int) -> list[int]:
        """Who trains in a round, ascending."""
        drawn = self.arrays.get("rounds/participants")
        return list(range(self.clients)) if drawn is None else sorted(drawn[round - 1].tolist())

    def data(self) -> FederatedData:
        """The clients' samples; those of further clients, to be tested on, are the first clients' test samples."""
        parts = {part: self.arrays.get(f"{part}_x", self.arrays["train_x"][:0]) for part in ("train", "test")}
        lists: dict[str, list[Tensor]] = {part: [] for part in parts}
        at = 0
        for part, x in parts.items():
            for client in range(self.clients):
                size = x.shape[1] if client < len(x) else 0
                lists[part].append(torch.arange(at, at + size))
                at += size
        both = [torch.from_numpy(x.reshape(-1, x.shape[2]).astype(np.float32)) for x in parts.values()]
        labels = [torch.from_numpy(self.arrays[f"{part}_y"].flatten()) for part in parts if f"{part}_y" in self.arrays]
        y, none = torch.cat(labels), [torch.zeros(0, dtype=torch.int64)] * self.clients
        numbers = y.is_floating_point()
        classes, task = (1, Regression()) if numbers else (int(self.config["num_classes"]), Classification())
        y = y.float() if numbers else y.long()
        return FederatedData(torch.cat(both), y, lists["train"], none, lists["test"], classes, "trace", task=task)

    def training(self) -> Training:
        """Full batches, or minibatches with a rate that falls."""
        config = self.config
        if "batch_size" not in config:
            return Training(lr=config["lr"], epochs=config.get("tau", 1), batch_size=0, shuffle=False)
        return Training(lr=config["lr"], epochs=config["tau"], batch_size=config["batch_size"], lr_decay=0.99)


def compare(method: str, path: Path, device: str = "cpu") -> Comparison:
    """Run IFCA on one trace and compare every stage of every round."""
    trace = Trace(path)
    compared = Comparison(method, f"ifca/{path.stem}", TOLERANCE)
    options = {
        "clusters": trace.clusters,
        "averaging": "gradients" if trace.meta["variant"] == "gradient averaging" else "models",
    }
    strategy, update = make_strategy(method, options, training=trace.training())
    assert isinstance(update, IFCAUpdate)
    if penalty := trace.config.get("weight_decay_fc1"):
        update.__class__ = type("Penalized", (Penalized,), {"penalty": penalty})
    strategy.sample = trace.participants  # type: ignore[method-assign]
    app = _app(trace, update, device)
    grid = LocalGrid(app, trace.clients, clients_at_once=4, workers=1)
    arrays, settings = app.initial_arrays(), flower.ConfigRecord()
    order = trace.arrays.get("rounds/order")
    strategy.begin()
    with contextlib.ExitStack() as stack:
        stack.enter_context(server_identity(1))
        if order is not None:
            stack.enter_context(replaying(lambda client, round, epoch: order[round - 1, client, epoch]))
        for r in range(trace.rounds):
            _compare_evaluation(compared, trace, app, from_record(arrays), r)
            _compare_losses(compared, trace, app, from_record(arrays), r)
            replies = list(grid.send_and_receive(strategy.configure_train(r + 1, arrays, settings, grid)))
            _compare_trained(compared, trace, strategy, replies, r)
            new, _ = strategy.aggregate_train(r + 1, replies)
            assert new is not None
            arrays = new
            for name, value in entries(from_record(arrays)).items():
                compared.add("models", value, trace.arrays[f"rounds/models/{name}"][r])
    _compare_evaluation(compared, trace, app, from_record(arrays), trace.rounds)
    grid.close()
    return compared


def _app(trace: Trace, update: IFCAUpdate, device: str) -> CohortApp:
    """The clients' app with the recorded initial networks."""
    extend = update.adapt_model

    def recorded(model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        network, data = extend(model, data, seed)
        network.load_state_dict(entries(trace.init(0)))
        network.others = [trace.init(j) for j in range(1, trace.clusters)]  # type: ignore[assignment]
        return network, data

    update.adapt_model = recorded  # type: ignore[method-assign]
    shapes = {n.removesuffix(".weight"): v.shape for n, v in entries(trace.init(0)).items() if n.endswith(".weight")}
    return update.client_app(MLP(shapes), trace.data(), device=device)


def _cohort(app: CohortApp, clients: list[int], round: int) -> Cohort:
    state = torch.stack([app.initial_state] * len(clients))
    return app.cohort(clients, state, {"server-round": round})


def _compare_losses(compared: Comparison, trace: Trace, app: CohortApp, arrays: Tree, r: int) -> None:
    """What each client's samples cost under each network."""
    update, clients = app.update, trace.participants(r + 1)
    assert isinstance(update, IFCAUpdate)
    losses = update.losses(_cohort(app, clients, r + 1), arrays, "train")
    compared.add("losses", losses, trace.arrays["rounds/losses"][r][clients])
    if "rounds/min_loss" in trace.arrays:
        compared.add("losses", losses.amin(1).mean(), trace.arrays["rounds/min_loss"][r])


def _compare_trained(
    compared: Comparison, trace: Trace, strategy: PersonalizedStrategy, replies: list[flower.Message], r: int
) -> None:
    """What participants chose, and the networks they send."""
    clients, fold = trace.participants(r + 1), Collect()
    collector = ReplyCollector(replace(strategy.reply_rules(clients), fold=fold))
    collector.take(strategy.exchange.answers(replies, clients))
    assert fold.clients == clients
    for client in clients:
        records = fold.kept[client][0]
        compared.exact("choice", int(records[CHOICE][CHOICE]), trace.arrays["rounds/assign"][r, client])
        for name, value in trace.group("rounds/local").items():
            compared.add("local", records["arrays"][name], value[r, client])
        if "rounds/local_loss" in trace.arrays:
            loss = trace.arrays["rounds/local_loss"][r, client].mean()
            compared.add("training loss", collector.collected.metrics[client]["train-loss"], loss)


def _compare_evaluation(compared: Comparison, trace: Trace, app: CohortApp, arrays: Tree, r: int) -> None:
    """Losses and choices after `r` rounds, and how many samples are right under the network of the lowest loss."""
    update = app.update
    assert isinstance(update, IFCAUpdate)
    parts: tuple[Part, ...] = ("train", "test")
    for part in parts:
        if f"eval/{part}_losses" not in trace.arrays:
            continue
        theirs = {k.removeprefix(f"{part}_"): v[r] for k, v in trace.group("eval").items() if k.startswith(part)}
        clients = list(range(len(theirs["losses"])))
        cohort = _cohort(app, clients, r)
        losses = update.losses(cohort, arrays, part)
        chosen = losses.argmin(1).cpu()
        compared.add("evaluation losses", losses, theirs["losses"])
        compared.add("evaluation losses", losses.amin(1).mean(), theirs["loss"])
        compared.exact("evaluation choice", chosen.numpy(), theirs["assign"])
        columns = []
        for j in range(trace.clusters):
            view = cohort.view(tree({n: v[j] for n, v in entries(arrays).items()}))
            outputs = zip(cohort.logits(view, part, update.predict), cohort.labels(part), strict=True)
            columns.append(torch.stack([(scores.argmax(1) == y).sum() for scores, y in outputs]).cpu())
        correct = torch.stack(columns, 1)
        compared.exact("correct", correct.numpy(), theirs["correct"])
        right = correct[clients, chosen].sum() / cohort.sizes(part).sum()
        compared.add("accuracy", right, theirs["acc"])


def cases(root: Path, methods: list[str]) -> Iterator[tuple[str, Path]]:
    """All traces of the method that exist under `root`."""
    if "ifca" in methods:
        yield from (("ifca", path) for path in sorted((root / "ifca").glob("*.npz")))
