"""Traces of the authors' code of pFedHN: a step there, of one client, is a round here.

The real server and client halves run in the real in-process runtime; initial values, the client of each step and its
batches are those recorded.

``e_local_head`` is compared until a client comes back: there the optimizer of its head keeps its momentum, here
optimizers start anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import flwr.app as flower
import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedpers.cohort import Collect, Training, Tree, entries, tree
from fedpers.cohort import cohort as core
from fedpers.cohort.plan import BatchPlan
from fedpers.data.federated import FederatedData
from fedpers.flower_private import server_identity
from fedpers.records import from_record, to_record
from fedpers.runtime.local import LocalGrid
from fedpers.server.collect import ReplyCollector
from fedpers.server.tools import ClientTable
from fedpers.strategies import CohortApp, PFedHN, make_strategy
from fedpers.strategies.pfedhn import EMBEDDINGS, HYPERNETWORK
from tests.traces import Comparison

TOLERANCE = 2e-5
METHODS = ("pfedhn",)
LAYERS = {"c1": "conv1", "c2": "conv2", "l1": "fc1", "l2": "fc2", "l3": "fc3"}
CLIP = 50.0
Values = dict[str, Tensor]


class Target(nn.Module):
    """What is generated, and perhaps a local head after it."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            outputs, inputs, *kernel = shape
            self.add_module(name, nn.Conv2d(inputs, outputs, kernel[0]) if kernel else nn.Linear(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        *layers, last = self.children()
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                x = F.max_pool2d(torch.relu(layer(x)), 2)
            else:
                x = torch.relu(layer(x.flatten(1)))
        out: Tensor = last(x)
        return out


class Trace:
    """One ``.npz`` file."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.meta: dict[str, Any] = json.loads(str(self.arrays.pop("meta")))
        self.args: dict[str, Any] = self.meta["args"]
        self.clients = int(self.meta["n_clients"])
        self.schedule: list[int] = self.arrays["schedule"].tolist()
        self.local_head = any(key.startswith("init/local") for key in self.arrays)
        self.shapes = {k.rpartition("/")[2]: v.shape[1:] for k, v in self.arrays.items() if k.startswith("steps/sent/")}
        self.steps = len(self.schedule)
        if self.local_head:
            again = [s for s, client in enumerate(self.schedule) if client in self.schedule[:s]]
            self.steps = min(again, default=self.steps)

    def group(self, prefix: str, step: int | None = None) -> dict[str, np.ndarray]:
        """Arrays below a path, by the rest of it; of one step."""
        inside = {k[len(prefix) + 1 :]: v for k, v in self.arrays.items() if k.startswith(prefix + "/")}
        return inside if step is None else {name: value[step] for name, value in inside.items()}

    def hypernetwork(self, values: Mapping[str, np.ndarray]) -> Values:
        """Recorded values by the names of this project, ``embeddings`` among them."""
        renamed = {}
        for name, value in values.items():
            module, _, part = name.rpartition(".")
            layer, _, kind = module.partition("_")
            tensor = torch.from_numpy(np.array(value))
            if module == "embeddings":
                renamed[EMBEDDINGS] = tensor
            elif module.startswith("mlp."):
                renamed[f"mlp.{int(module.partition('.')[2]) // 2}.{part}"] = tensor
            else:
                entry = f"{LAYERS[layer]}.{'bias' if kind == 'bias' else 'weight'}"
                renamed[f"{part}.{entry}"] = tensor.reshape(*self.shapes[entry], *tensor.shape[1:])
        return renamed

    def data(self) -> FederatedData:
        """The clients' samples."""
        xs, ys, lists = [], [], {"train": [], "val": [], "test": []}
        at = 0
        for client in range(self.clients):
            for part, positions in lists.items():
                xs.append(self.arrays[f"c{client}/{part}_x"])
                ys.append(self.arrays[f"c{client}/{part}_y"])
                positions.append(torch.arange(at, at + len(ys[-1])))
                at += len(ys[-1])
        x, y = torch.from_numpy(np.concatenate(xs)).float(), torch.from_numpy(np.concatenate(ys)).long()
        classes = self.network().get_parameter("head.bias" if self.local_head else self._last()).shape[0]
        return FederatedData(x, y, lists["train"], lists["val"], lists["test"], classes, "trace")

    def _last(self) -> str:
        return [name for name in self.shapes if name.endswith(".bias")][-1]

    def network(self) -> nn.Module:
        """The clients' network."""
        shapes = {n.removesuffix(".weight"): shape for n, shape in self.shapes.items() if n.endswith(".weight")}
        if self.local_head:
            shapes["head"] = self.arrays["init/local/c0/layer.0.weight"].shape
        return Target(shapes)

    def plan(self, step: int, positions: np.ndarray, device: torch.device) -> BatchPlan:
        """The recorded batches of one step."""
        batches = [row[row >= 0] for row in self.arrays["steps/batches"][step]]
        index = torch.from_numpy(np.stack([positions[row] for row in batches]))[:, None].to(device)
        sizes = [len(row) for row in batches]
        count = torch.tensor(sizes)[:, None]
        return BatchPlan(index, count, [1] * len(sizes), sizes, [False] * len(sizes), None)


class Running:
    """One case as it runs here."""

    def __init__(self, trace: Trace, device: str) -> None:
        args = trace.args
        adam = args["optim"] == "adam"
        options = {
            "embedding_lr": args["embed_lr"],
            "server_optimizer": "adam" if adam else "momentum",
            "server_lr": args["lr"],
            "server_decay": 0.0 if adam else args["wd"],  # theirs knows none
            "server_clip": CLIP,
            "local_head": trace.local_head,
        }
        training = Training(
            lr=args["inner_lr"], steps=args["inner_steps"], momentum=0.9, weight_decay=args["inner_wd"], clip=CLIP
        )
        strategy, update = make_strategy("pfedhn", options, training=training)
        assert isinstance(strategy, PFedHN)
        self.trace, self.strategy = trace, strategy
        self.strategy.sample = lambda round: [trace.schedule[round - 1]]  # type: ignore[method-assign]
        self.app: CohortApp = update.client_app(trace.network(), trace.data(), device=device)
        self.grid = LocalGrid(self.app, trace.clients, clients_at_once=1, workers=1)
        assert self.grid.engine is not None
        self.store = self.grid.engine.store
        for client in range(trace.clients if trace.local_head else 0):
            local = trace.group(f"init/local/c{client}")
            state = self.store.gather([client])
            for part in ("weight", "bias"):
                state["model"][f"head.{part}"] = torch.from_numpy(local[f"layer.0.{part}"])[None].to(device)
            self.store.scatter([client], state, torch.tensor([True]))
        strategy.begin()
        strategy.nodes(self.grid)
        phi = dict(trace.hypernetwork(trace.group("init/hnet")))
        embeddings = phi.pop(EMBEDDINGS)
        moments = strategy._embedding_optimizer.moments
        table = ClientTable(lambda client: {"value": embeddings[client], **moments(embeddings[client])})
        table.add(range(trace.clients))
        strategy.state[EMBEDDINGS] = table.values
        strategy.state[HYPERNETWORK] = tree({n: v for n, v in phi.items() if not n.startswith("bias.")})
        self.arrays: Tree = tree({n.removeprefix("bias."): v for n, v in phi.items() if n.startswith("bias.")})

    def networks(self, clients: Sequence[int]) -> list[Values]:
        """What clients predict with."""
        sent = self.strategy.send(1, self.arrays, list(clients))
        networks = []
        for client, records in zip(clients, sent, strict=True):
            state = self.store.gather([client])
            kept = entries(state["model"]) if self.trace.local_head else {}
            networks.append({**entries(records["arrays"]), **{name: value[0].cpu() for name, value in kept.items()}})
        return networks

    def outputs(self, network: Values, client: int, part: str) -> tuple[Tensor, Tensor]:
        """Scores and labels of one client's samples."""
        positions = getattr(self.app.data, part)[client]
        x, y = self.app.data.x[positions], self.app.data.y[positions]
        on_device = {name: value.to(x.device) for name, value in network.items()}
        return functional_call(self.app.module.eval(), on_device, (x,)).detach().cpu(), y.cpu()


def compare(method: str, path: Path, device: str = "cpu") -> Comparison:
    """Run pFedHN on one trace and compare every step."""
    trace = Trace(path)
    compared = Comparison(method, f"pfedhn/{path.stem}", TOLERANCE)
    with server_identity(1):
        run = Running(trace, device)
        evaluations = {int(v): k.split("/")[0] for k, v in trace.arrays.items() if k.endswith("/after_step")}
        accuracies = {}
        for s, client in enumerate(trace.schedule[: trace.steps]):
            _step(compared, run, s, client)
            if s in evaluations:
                accuracies[s] = _compare_evaluation(compared, run, evaluations[s])
    if trace.steps == len(trace.schedule):
        best = max(accuracies, key=lambda s: accuracies[s])
        compared.exact("best step", best, int(trace.arrays["best_step"]))
        compared.add("accuracy", accuracies[best], trace.arrays["best_val_acc"])
    run.grid.close()
    return compared


def _step(compared: Comparison, run: Running, s: int, client: int) -> None:
    """One client trains; then the hypernetwork and all embeddings move."""
    trace, strategy = run.trace, run.strategy
    (sent,) = run.networks([client])
    for name, value in trace.group("steps/sent", s).items():
        compared.add("sent", sent[name], value)
    settings, record = flower.ConfigRecord(), to_record(run.arrays)
    with mock.patch.object(core, "plan_batches", lambda samples, device, **_: trace.plan(s, samples[0], device)):
        messages = strategy.configure_train(s + 1, record, settings, run.grid)
        replies = list(run.grid.send_and_receive(messages))
    fold = Collect()
    collector = ReplyCollector(replace(strategy.reply_rules([client]), fold=fold))
    collector.take(strategy.exchange.answers(replies, [client]))
    changes = entries(fold.kept[client][0]["arrays"])
    for name, value in trace.group("steps/trained", s).items():
        compared.add("trained", sent[name] + changes[name].cpu(), value)
    loss = collector.collected.metrics[client]["train-loss"]
    compared.add("training loss", loss, trace.arrays["steps/inner_loss"][s].mean())
    if trace.local_head:
        head = run.networks([client])[0]
        for part in ("weight", "bias"):
            compared.add("head", head[f"head.{part}"], trace.arrays[f"steps/local/layer.0.{part}"][s])
    new, _ = strategy.aggregate_train(s + 1, replies)
    assert new is not None
    run.arrays = from_record(new)
    ours = {**entries(strategy.state[HYPERNETWORK]), EMBEDDINGS: strategy.state[EMBEDDINGS]["value"]}
    ours.update({f"bias.{name}": value for name, value in entries(run.arrays).items()})
    for name, value in trace.hypernetwork(trace.group("steps/hnet", s)).items():
        compared.add("embeddings" if name == EMBEDDINGS else "hypernetwork", ours[name], value)


def _compare_evaluation(compared: Comparison, run: Running, where: str) -> float:
    """What all clients score with what is generated for them; the accuracy on the validation samples of all."""
    accuracy = 0.0
    clients = list(range(run.trace.clients))
    for theirs, part in (("test", "test"), ("val", "validation")):
        recorded = run.trace.group(f"{where}/{theirs}")
        outputs = [run.outputs(network, c, part) for c, network in zip(clients, run.networks(clients), strict=True)]
        correct = np.array([int((scores.argmax(1) == y).sum()) for scores, y in outputs])
        compared.exact("correct", correct, recorded["correct"])
        total = np.array([len(y) for _, y in outputs])
        compared.exact("correct", total, recorded["total"])
        size = run.trace.args["bs"]
        losses = [  # the mean of the means over batches
            np.mean([float(F.cross_entropy(scores[i : i + size], y[i : i + size])) for i in range(0, len(y), size)])
            for scores, y in outputs
        ]
        compared.add("evaluation loss", losses, recorded["loss"])
        accuracy = correct.sum() / total.sum()
        compared.add("accuracy", accuracy, recorded["avg_acc"])
    return float(accuracy)


def cases(root: Path, methods: list[str]) -> Iterator[tuple[str, Path]]:
    """All traces of the method that exist under `root`."""
    if "pfedhn" in methods:
        yield from (("pfedhn", path) for path in sorted((root / "pfedhn").glob("*.npz")))
