"""Traces of GPFL: the authors' own code (folder ``gpfl``), and PFLlib's version of it (``pfllib/GPFL``).

The real server and client halves run in the real in-process runtime; only the drawing of participants and of initial
values is replaced by what was recorded. Both codes evaluate before they train: that is the evaluation of the round
before.

The parameters of a client or of the server are compared as one vector. By itself the bias before a LayerNorm of nearly
constant values has rounding errors of up to 1.4e-6 of its largest entry in the traces: so far they are from double
precision.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flwr.app as flower
import numpy as np
import torch
from torch import nn

from fedpers.cohort import Batch, Cohort, Collect, Given, Network, Training, View, entries
from fedpers.data.federated import FederatedData
from fedpers.flower_private import server_identity
from fedpers.records import from_record
from fedpers.runtime.local import LocalGrid
from fedpers.server.collect import ReplyCollector
from fedpers.strategies import CohortApp, PersonalizedStrategy, make_strategy
from fedpers.strategies.gpfl import GENERIC, PERSONAL, TABLE, TARGET
from tests.traces import Comparison

METHODS = {"gpfl": ("gpfl", "pfllib/GPFL")}
TOLERANCE = 1e-6
Values = Mapping[str, np.ndarray]
_ROLES = (
    ("feature_extractor/", "body."),
    ("head/", "head."),
    ("GCE/embedding.", "gce."),
    ("CoV/Conditional_gamma.", "cov.gamma."),
    ("CoV/Conditional_beta.", "cov.beta."),
    ("model/base.", "body."),
    ("model/head.", "head."),
    ("generic_conditional_input", GENERIC),
    ("personalized_conditional_input", PERSONAL),
    ("cond_generic", GENERIC),
    ("cond_personal", PERSONAL),
)


def renamed(name: str) -> str | None:
    """Our name of a traced entry, or None for another array."""
    for theirs, ours in _ROLES:
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    return None


@dataclass
class Case:
    """One trace in a common form; ``round`` counts from 0."""

    arrays: Values
    meta: dict[str, Any]
    rounds: int
    clients: int
    classes: int
    options: dict[str, Any]
    training: Training
    schedule: list[list[int]]
    from_authors: bool

    def entries(self, prefix: str, *row: int) -> dict[str, np.ndarray]:
        """Entries of the network below a path, by our names; of stacked arrays the given row."""
        inside = {k[len(prefix) + 1 :]: v for k, v in self.arrays.items() if k.startswith(prefix + "/")}
        return {ours: v[row] if row else v for n, v in inside.items() if (ours := renamed(n))}

    def init(self) -> dict[str, np.ndarray]:
        """Initial values of parameters and buffers."""
        if self.from_authors:
            return self.entries("init")
        network = {f"model/{n[8:]}": v for n, v in self.arrays.items() if n.startswith("in/init/")}
        return {renamed(n) or n: v for n, v in network.items()} | self.entries("in/client_init", 0)

    def part(self, client: int, part: str) -> tuple[np.ndarray, np.ndarray]:
        """Samples and labels of a client, in the order in which they are used."""
        form = f"c{client}/{part}_{{}}" if self.from_authors else f"in/{part}_{{}}/c{client}"
        x, y = (self.arrays[form.format(letter)] for letter in "xy")
        if part == "test" and self.from_authors:  # their test loader drops the incomplete batch
            used = len(y) - len(y) % self.training.batch_size
            return x[:used], y[:used]
        return x, y

    def client(self, when: str, round: int, client: int) -> dict[str, np.ndarray]:
        """What a client holds ``before`` or ``after`` its training, or once it ``received`` the averages."""
        if self.from_authors:
            return self.entries(f"r{round}/c{client}/{when}")
        place = {"before": "start", "after": "trained", "received": "end"}[when]
        return self.entries(f"out/client/{place}", round, client)

    def conditions(self, round: int, client: int) -> dict[str, np.ndarray]:
        """Conditional inputs of a client after a round."""
        held = self.entries(f"r{round}/c{client}") if self.from_authors else self.client("received", round, client)
        return {n: v for n, v in held.items() if n in (GENERIC, PERSONAL)}

    def server(self, round: int) -> dict[str, np.ndarray]:
        """The averages."""
        return self.entries(f"r{round}/server") if self.from_authors else self.entries("out/server", round)

    def weights(self, round: int) -> np.ndarray | None:
        """Weights of the participants, ascending."""
        if not self.from_authors:
            return np.asarray(self.arrays["out/agg_weights"][round][self.schedule[round]])
        weights = self.arrays.get(f"r{round}/weights")
        return None if weights is None else weights[np.argsort(self.arrays[f"r{round}/selected"])]

    def evaluation(self, round: int) -> dict[str, np.ndarray]:
        """What is measured before a round's training, or after the last round."""
        if self.from_authors:
            where = "final_eval" if round == self.rounds else f"r{round}/eval"
            return {k[len(where) + 1 :]: v for k, v in self.arrays.items() if k.startswith(where + "/")}
        if round == self.rounds:
            return {}
        values = {k.rpartition("/")[2]: v[round] for k, v in self.arrays.items() if k.startswith("out/eval/main/")}
        scores = {f"scores/{n}": v for n, v in values.items() if n.startswith("c")}
        return {"correct": values["test_correct"], "train_loss_sum": values["train_loss_sum"], **scores}


def read(path: Path) -> Case:
    """Read a trace of either source."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    meta: dict[str, Any] = json.loads(str(arrays.pop("meta")))
    from_authors = "args" in meta
    hyper = meta["args"] if from_authors else meta["hyper"]
    rounds = int(meta["rounds"])
    clients = int(meta["num_clients" if from_authors else "n_clients"])
    if from_authors:
        schedule = [sorted(map(int, arrays.get(f"r{r}/selected", range(clients)))) for r in range(rounds)]
    else:
        schedule = [sorted(map(int, row)) for row in meta["selected"]]
    training = Training(
        lr=hyper["local_learning_rate"] if from_authors else meta["lr"],
        epochs=int(hyper["local_steps"] if from_authors else meta["local_epochs"]),
        batch_size=int(hyper["batch_size"] if from_authors else meta["batch_size"]),
        shuffle=False,
        drop_last=from_authors or bool(meta["drop_last"]),
    )
    options = {"lam": hyper["lamda"], "mu": hyper["mu"]}
    classes = int(meta["num_classes"])
    return Case(arrays, meta, rounds, clients, classes, options, training, schedule, from_authors)


def network_of(init: Values, picture: bool) -> nn.Module:
    """Rebuild a traced network from its entries; layers stand at the places their names say."""
    body = nn.Sequential()
    places = sorted({int(n.split(".")[1]) for n in init if n.startswith("body.")})
    flat = not picture
    for place in range(max(places) + 1):
        weight = init.get(f"body.{place}.weight")
        if weight is None:  # before the first linear layer everything is flattened, elsewhere there is ReLU
            linear = init.get(f"body.{place + 1}.weight")
            flatten = not flat and linear is not None and linear.ndim == 2
            body.append(nn.Flatten() if flatten else nn.ReLU())
            flat = flat or flatten
        elif weight.ndim == 4:
            body.append(nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2]))
        elif weight.ndim == 2:
            body.append(nn.Linear(weight.shape[1], weight.shape[0]))
        else:
            body.append(nn.BatchNorm2d(len(weight)))
    body.append(nn.ReLU())
    network = nn.Module()
    network.body = body
    network.head = nn.Linear(*reversed(init["head.weight"].shape))
    return network


def data_of(case: Case) -> FederatedData:
    """The clients' data."""
    xs, ys = [], []
    lists: dict[str, list[torch.Tensor]] = {"train": [], "test": []}
    at = 0
    for client in range(case.clients):
        for part, positions in lists.items():
            x, y = case.part(client, part)
            xs.append(x)
            ys.append(y)
            positions.append(torch.arange(at, at + len(y)))
            at += len(y)
    x_all = torch.from_numpy(np.concatenate(xs).astype(np.float32))
    y_all = torch.from_numpy(np.concatenate(ys).astype(np.int64))
    none = [torch.zeros(0, dtype=torch.int64)] * case.clients
    return FederatedData(x_all, y_all, lists["train"], none, lists["test"], case.classes, "trace")


@dataclass
class Running:
    """One case as it runs here."""

    case: Case
    compared: Comparison
    strategy: PersonalizedStrategy
    app: CohortApp
    grid: LocalGrid
    arrays: flower.ArrayRecord

    def cohort(self, round: int) -> Cohort:
        """All clients after `round` rounds."""
        assert self.grid.engine is not None
        clients = sorted(range(self.case.clients), key=lambda c: (-self.app.sizes[c], c))
        return self.app.cohort(clients, self.grid.engine.store.gather(clients), {"server-round": round})

    def predictors(self, cohort: Cohort) -> tuple[View, list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
        """What all clients predict with, and each client's rows of it: tensors, and what is given."""
        received = self.strategy.send(cohort.round, from_record(self.arrays), cohort.clients)
        assert isinstance(received, Mapping)
        view = self.app.update.personalize(cohort, received, {"server-round": cohort.round})
        assert isinstance(view, View)
        rows = [{n: v[k] if n in view.stacked else v for n, v in view.tensors.items()} for k in range(cohort.size)]
        conditions = [{n: v[k] for n, v in view.given.items() if isinstance(v, torch.Tensor)} for k in range(len(rows))]
        return view, rows, conditions


def start(method: str, case: Case, name: str, device: str) -> Running:
    """Make both halves, with the recorded schedule and initial values."""
    strategy, update = make_strategy(method, case.options, server={"fraction": 1.0}, training=case.training)
    strategy.sample = lambda round: case.schedule[round - 1]  # type: ignore[method-assign]
    init = case.init()
    extend = update.adapt_model

    def recorded(model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        network, data = extend(model, data, seed)
        network.load_state_dict({n: torch.from_numpy(np.array(v)) for n, v in init.items()})
        return network, data

    update.adapt_model = recorded  # type: ignore[method-assign]
    data = data_of(case)
    app = update.client_app(network_of(init, data.x.dim() > 2), data, device=device)
    grid = LocalGrid(app, case.clients, clients_at_once=case.clients, workers=1)
    return Running(case, Comparison(method, name, TOLERANCE), strategy, app, grid, app.initial_arrays())


def compare(method: str, path: Path, device: str = "cpu") -> Comparison:
    """Run GPFL on one trace and compare every stage of every round."""
    case = read(path)
    run = start(method, case, f"{'authors' if case.from_authors else 'pfllib'}/{path.stem}", device)
    _compare_gradients(run)
    with server_identity(1):
        run.strategy.begin()
        run.strategy.nodes(run.grid)
        for r in range(case.rounds):
            _compare_evaluation(run, r)
            messages = list(run.strategy.configure_train(r + 1, run.arrays, flower.ConfigRecord(), run.grid))
            replies = list(run.grid.send_and_receive(messages))
            _compare_trained(run, replies, r)
            new, _ = run.strategy.aggregate_train(r + 1, replies)
            assert new is not None
            run.arrays = new
            ours = entries(from_record(new))
            average = {n: v for n, v in case.server(r).items() if n in ours}  # statistics are recorded, but never sent
            _compare_entries(run.compared, "server", ours, average)
            _compare_received(run, r)
        _compare_evaluation(run, case.rounds)
    run.grid.close()
    assert "client" in run.compared.worst
    return run.compared


def _compare_gradients(run: Running) -> None:
    """Gradients at the first step of the first client, where they were recorded (without weight decay)."""
    theirs = run.case.entries("r0/c0/grad")
    if not theirs:
        return
    app = run.app
    module = app.module.train()
    tensors = {n: v.clone() for n, v in entries(app.template).items()}
    free = {n: tensors[n].requires_grad_() for n in theirs}
    first = app.data.train[0][: run.case.training.batch_size]
    given = app.update.example_given(app.template, app.data)  # what there is before the first average
    loss = app.update.loss(Network(module, tensors), Batch(app.data.x[first], app.data.y[first], given=given))
    for (name, _), gradient in zip(free.items(), torch.autograd.grad(loss, list(free.values())), strict=True):
        run.compared.add("gradient", gradient, theirs[name])


def _compare_entries(compared: Comparison, kind: str, ours: Mapping[str, torch.Tensor], theirs: Values) -> None:
    """Parameters as one vector, statistics by name, counts exactly; conditional inputs are compared elsewhere."""
    free = [n for n in theirs if "running" not in n and "tracked" not in n and n not in (GENERIC, PERSONAL)]
    if not free:  # this stage was not recorded
        return
    if any(tuple(ours[n].shape) != theirs[n].shape for n in free):
        compared.exact(kind, 0, 1)
        return
    compared.add(kind, torch.cat([ours[n].flatten() for n in free]), np.concatenate([theirs[n].ravel() for n in free]))
    for name, value in theirs.items():
        if "running" in name:
            compared.add("statistics", ours[name], value)
        elif "tracked" in name:
            compared.exact("statistics", ours[name].cpu().numpy(), value)


def _compare_trained(run: Running, replies: list[flower.Message], r: int) -> None:
    """What participants hold after training, before aggregation."""
    engine, case, sampled = run.grid.engine, run.case, run.case.schedule[r]
    assert engine is not None
    fold = Collect()
    collector = ReplyCollector(replace(run.strategy.reply_rules(sampled), fold=fold))
    collector.take(run.strategy.exchange.answers(replies, sampled))
    assert fold.clients == sampled
    for client in sampled:
        sent = entries(fold.kept[client][0]["arrays"])
        kept = {n: v[0] for n, v in entries(engine.store.gather([client])["model"]).items()}
        _compare_entries(run.compared, "client", {**kept, **sent}, case.client("after", r, client))
        losses = case.arrays.get(f"r{r}/c{client}/batch_loss")
        if losses is not None:  # all batches are of one size
            run.compared.add("loss", collector.collected.metrics[client]["train-loss"], losses.mean())
    weights = case.weights(r)
    if weights is not None:
        run.compared.add("weights", fold.weights() / fold.weights().sum(), weights)


def _compare_received(run: Running, r: int) -> None:
    """What all clients hold after the averages arrived, also those that did not train."""
    cohort = run.cohort(r + 1)
    _, rows, conditions = run.predictors(cohort)
    for client, held, given in zip(cohort.clients, rows, conditions, strict=True):
        _compare_entries(run.compared, "received", held, run.case.client("received", r, client))
        for name, value in run.case.conditions(r, client).items():
            run.compared.add("conditions", given[name], value)
        frozen = run.case.arrays.get(f"r{r}/c{client}/GCE_frozen")
        if frozen is not None:  # what the next training draws features towards
            run.compared.add("target", held[TABLE], frozen)


def _compare_evaluation(run: Running, r: int) -> None:
    """What every client predicts after `r` rounds, and its loss on its training batches."""
    case, app, update = run.case, run.app, run.app.update
    theirs = case.evaluation(r)
    if not theirs:
        return
    cohort = run.cohort(r)
    view, rows, conditions = run.predictors(cohort)
    logits = cohort.logits(view, "test", update.predict)
    measured = update.measure(cohort, logits, "test", {"auc": True})
    total = correct = 0
    for k, client in enumerate(cohort.clients):
        hits = int((logits[k].argmax(1) == app.data.y[app.data.test[client]]).sum())
        run.compared.exact("correct", hits, int(theirs["correct"][client]))
        if "test_num" in theirs:
            run.compared.exact("correct", len(logits[k]), int(theirs["test_num"][client]))
        if "auc" in theirs:
            run.compared.add("auc", measured["auc"][k], theirs["auc"][client])
        if f"scores/c{client}" in theirs:
            run.compared.add("scores", torch.softmax(logits[k], 1), theirs[f"scores/c{client}"])
        correct, total = correct + hits, total + len(logits[k])
        network = Network(app.module.eval(), rows[k])
        given: Given = {**conditions[k], TARGET: rows[k][TABLE]}
        plan = cohort.plan(epochs=1)
        loss = 0.0
        with torch.no_grad():
            place = k if plan.order is None else int((plan.order == k).nonzero())
            for batch, size in zip(plan.index[:, place], plan.count[:, place].tolist(), strict=True):
                if size:
                    one = Batch(app.data.x[batch[:size]], app.data.y[batch[:size]], given=given)
                    loss += float(update.loss(network, one)) * size
        run.compared.add("objective", loss, theirs["train_loss_sum"][client])
    if "accuracy" in theirs:
        run.compared.add("accuracy", correct / total, theirs["accuracy"])


def cases(root: Path, methods: list[str]) -> Iterator[tuple[str, Path]]:
    """All traces of the methods that exist under `root`."""
    for method in methods:
        for folder in METHODS.get(method, ()):
            yield from ((method, path) for path in sorted((root / folder).glob("*.npz")))
