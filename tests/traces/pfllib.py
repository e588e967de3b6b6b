"""Traces of PFLlib's own client and server classes.

The real server and client halves run in the real in-process runtime; only the drawing of participants is replaced by
the recorded schedule.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flwr.app as flower
import numpy as np
import torch
from torch import nn

from fedpers.cohort import Records, Training, Tree, entries
from fedpers.data.federated import FederatedData
from fedpers.flower_private import server_identity
from fedpers.records import ARRAYS, from_record, stack, trees
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import PersonalizedStrategy, make_strategy
from tests.traces import Comparison
from tests.traces.pfllib_methods import METHODS, compare_prototypes, policies_of

TOLERANCE = 1e-4


def toy_network(shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    """Rebuild the traced network (``base`` and ``head``) from the shapes of its entries, as ``body`` and ``head``.

    Entries of ``base`` in their order: a matrix is a linear layer, a vector with running statistics a batch
    normalization; every hidden linear layer is followed by ReLU (after its normalization).
    """
    layers: dict[str, nn.Module] = {}
    names = [n.rsplit(".", 1)[0] for n in shapes if n.endswith(".weight")]
    for i, name in enumerate(names):
        shape = shapes[f"{name}.weight"]
        inner = name.partition(".")[2]
        if name == "head":
            continue
        if len(shape) == 2:
            layers[inner] = nn.Linear(shape[1], shape[0])
            following = names[i + 1]
            if f"{following}.running_mean" not in shapes:
                layers[f"relu_after_{inner}"] = nn.ReLU()
        else:
            layers[inner] = nn.BatchNorm1d(shape[0])
            layers[f"relu_after_{inner}"] = nn.ReLU()

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential()
            for key, layer in layers.items():
                self.body.add_module(key, layer)
            self.head = nn.Linear(shapes["head.weight"][1], shapes["head.weight"][0])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.body(x))
            return out

    return Toy()


class Trace:
    """One ``.npz`` file: inputs as tensors, outputs by key."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.meta: dict[str, Any] = json.loads(str(self.arrays.pop("meta")))
        self.rounds = int(self.meta["rounds"])
        self.clients = int(self.meta["n_clients"])

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays below a path, with the traced library's ``base`` called ``body``."""
        inside = {k[len(prefix) + 1 :]: v for k, v in self.arrays.items() if k.startswith(prefix + "/")}
        return {("body" + n[4:] if n.startswith("base") else n): v for n, v in inside.items()}

    def network(self) -> nn.Module:
        """The toy network with its initial values."""
        init = self.group("in/init")
        theirs = {("base" + n[4:] if n.startswith("body") else n): v.shape for n, v in init.items()}
        module = toy_network(theirs)
        module.load_state_dict({n: torch.from_numpy(np.array(v)) for n, v in init.items()})
        return module

    def data(self, chunk: int) -> FederatedData:
        """The clients' data; training samples stand in the order of the recorded batches of `chunk` samples."""
        xs, ys, train, test = [], [], [], []
        at = 0
        for c in range(self.clients):
            x, y = self.arrays[f"in/train_x/c{c}"], self.arrays[f"in/train_y/c{c}"]
            batches = [b[b >= 0] for b in self.arrays[f"in/batches/c{c}"]]
            if any(len(b) != min(chunk, len(y)) for b in batches[:-1]):
                raise ValueError(f"client {c}: recorded batches do not have {chunk} samples each")
            used = np.concatenate(batches).astype(np.int64)
            order = np.concatenate([used, np.setdiff1d(np.arange(len(y)), used)])
            for part, lists in (((x[order], y[order]), train), (self._test(c), test)):
                xs.append(part[0])
                ys.append(part[1])
                lists.append(torch.arange(at, at + len(part[1])))
                at += len(part[1])
        x_all = torch.from_numpy(np.concatenate(xs).astype(np.float32))
        y_all = torch.from_numpy(np.concatenate(ys).astype(np.int64))
        none = [torch.zeros(0, dtype=torch.int64)] * self.clients
        return FederatedData(x_all, y_all, train, none, test, int(self.meta["num_classes"]), "trace")

    def _test(self, c: int) -> tuple[np.ndarray, np.ndarray]:
        return self.arrays[f"in/test_x/c{c}"], self.arrays[f"in/test_y/c{c}"]


def compare(method: str, path: Path, device: str = "cpu") -> Comparison:
    """Run one method on one trace of PFLlib and compare every stage of every round."""
    trace = Trace(path)
    meta = trace.meta
    traced = METHODS[method]
    hyper = dict(meta["hyper"])
    options = {ours: hyper.pop(theirs) for theirs, ours in traced.options.items() if theirs in hyper}
    options.update(traced.settings)
    decay = hyper.pop("learning_rate_decay_gamma", 1.0) if hyper.pop("learning_rate_decay", False) else 1.0
    hyper.pop("drop_last", None)
    hyper.pop("gumbel", None)  # whether FedCP draws noise: what it drew is recorded
    if hyper:
        raise ValueError(f"{path}: hyperparameters {sorted(hyper)} are unknown")
    training = {
        "lr": meta["lr"], "epochs": int(meta["local_epochs"]), "batch_size": int(meta["batch_size"]), "shuffle": False,
        "drop_last": bool(meta["drop_last"]), "lr_decay": decay,
    }  # fmt: skip
    run = {"options": options, "training": training, "chunk": int(meta["batch_size"]), "rounds": trace.rounds}
    if traced.adjust is not None:
        traced.adjust(run)
    strategy, update = make_strategy(method, options, server={"fraction": 1.0}, training=Training(**training))
    schedule = [sorted(int(c) for c in row) for row in meta["selected"]]
    strategy.sample = lambda round: schedule[round - 1]  # type: ignore[method-assign]
    if traced.replay is not None:
        traced.replay(strategy, update, trace)
    app = update.client_app(trace.network(), trace.data(run["chunk"]), device=device)
    strategy.attach(app)
    grid = LocalGrid(app, trace.clients, clients_at_once=trace.clients, workers=1)
    assert grid.engine is not None
    comparison = Comparison(method, f"{traced.folder}/{path.stem}", TOLERANCE)

    arrays = app.initial_arrays()
    config = flower.ConfigRecord()
    strategy.begin()
    with server_identity(1):
        for r in range(trace.rounds):
            strategy.nodes(grid)
            _compare_evaluation(comparison, trace, app, grid, strategy, arrays, r)
            messages = list(strategy.configure_train(r + 1, arrays, config, grid))
            sent = dict(zip(schedule[r], (trees(m.content) for m in messages), strict=True))
            replies = list(grid.send_and_receive(messages))
            clients = {node: client for client, node in strategy.nodes(grid).items()}
            trained = {clients[reply.metadata.src_node_id]: trees(reply.content) for reply in replies}
            _compare_participants(comparison, trace, traced.sent, strategy, app.sizes, sent, trained, r)
            _compare_states(comparison, trace, traced.roles, grid, r)
            new, _ = strategy.aggregate_train(r + 1, replies)
            assert new is not None
            arrays = new
            _compare_server(comparison, trace, strategy, arrays, r)
            if traced.compare is not None:
                traced.compare(comparison, trace, strategy, grid, r)
    grid.close()
    return comparison


def _compare_participants(
    comparison: Comparison,
    trace: Trace,
    role: str | None,
    strategy: PersonalizedStrategy,
    sizes: Sequence[int],
    sent: Mapping[int, Records],
    trained: Mapping[int, Records],
    r: int,
) -> None:
    """What participants were sent, what they reply, and how much it counts."""
    roles = ("local", "model") if role is None else (role,)  # pFedMe's w_i is local
    shared = next(values for values in (trace.group(f"out/client/trained/{role}") for role in roles) if values)
    shared.update(policies_of(trace, "out/client/trained"))
    mixtures = trace.group("out/client/start/client_u")
    prototypes = trace.arrays.get("out/client/trained/protos")
    tables = {client: records.get("sums", records.get("means")) for client, records in trained.items()}
    for client, records in trained.items():
        records = strategy.fold().decode(records, client)
        for name, value in entries(records.get(ARRAYS, Tree())).items():
            comparison.add("client model", value, shared[within_part(name)][r, client])
        for name, value in mixtures.items():
            comparison.add("mixture", sent[client][ARRAYS][name], value[r, client])
        if prototypes is not None:
            means = tables[client]["table"] / tables[client]["table"][:, -1:].clamp(min=1)
            compare_prototypes(comparison, "client prototypes", means, prototypes[r, client])
        if "statistics" in records:
            comparison.add("h", records["statistics"]["h"], trace.arrays["out/extra/h"][r, client])
            comparison.add("V", records["statistics"]["variance"], trace.arrays["out/extra/V"][r, client])
    weights = trace.arrays.get("out/agg_weights")
    if weights is not None:
        counts = {client: 1.0 if strategy.weighting == "uniform" else float(sizes[client]) for client in trained}
        for client, records in trained.items():
            if "fisher" in records:  # FedAS: replies hold their weight
                counts[client] = float(records["fisher"]["trace"])
                comparison.add("fisher", counts[client], trace.arrays["out/extra/fim_trace"][r, client])
        ours = [counts.get(c, 0.0) / sum(counts.values()) for c in range(trace.clients)]
        comparison.add("weights", ours, weights[r])


def within_part(name: str) -> str:
    """Name of an entry in its own network, of a method that puts the client's and the shared one side by side."""
    return name.removeprefix("local.").removeprefix("shared.")


def _compare_states(comparison: Comparison, trace: Trace, roles: Mapping[str, str], grid: LocalGrid, r: int) -> None:
    """What all clients keep after training, before aggregation, also those that did not train."""
    assert grid.engine is not None
    state = grid.engine.store.gather(range(trace.clients))
    for theirs, ours in roles.items():
        kept, path = state[ours], f"out/client/trained/{theirs}"
        if path in trace.arrays:
            comparison.add(theirs, kept, trace.arrays[path][r])
            continue
        values = trace.group(path)
        values.update({f"projection.{n}": v for n, v in trace.group("out/client/trained/W_h").items()})  # of FedKD
        for name, value in ((within_part(n), v) for n, v in entries(kept).items()):
            if name == "context":  # FedCP's is recorded at the end of a round
                continue
            if np.isfinite(values[name][r]).all():  # FedALA's weights do not exist in its first round
                comparison.add(f"kept {theirs}", value, values[name][r])


def _compare_server(comparison: Comparison, trace: Trace, strategy: Any, arrays: flower.ArrayRecord, r: int) -> None:
    ours = {within_part(name): value for name, value in entries(from_record(arrays)).items()}
    roles = ("compressed", "model", "base")  # what FedKD sends is not the mean itself
    server = next((values for values in (trace.group(f"out/server/{role}") for role in roles) if values), {})
    server.update({f"head.{name}": value for name, value in trace.group("out/server/head").items()})
    if not any(name in ours for name in server):  # a role of its own for the shared part: names without the prefix
        server = {f"body.{name}": value for name, value in server.items()}
    for name, value in ours.items():
        if name in server:
            comparison.add("server model", value, server[name][r])
    for name, value in trace.group("out/server/c").items():
        comparison.add("server control", strategy.state["control"][name], value[r])
    if "out/server/protos" in trace.arrays and "table" in ours:
        compare_prototypes(comparison, "server prototypes", ours["table"], trace.arrays["out/server/protos"][r])


def _compare_evaluation(
    comparison: Comparison, trace: Trace, app: Any, grid: LocalGrid, strategy: Any, arrays: flower.ArrayRecord, r: int
) -> None:
    """What every client predicts before the round's training."""
    assert grid.engine is not None
    kinds = trace.meta["eval_kinds"]
    kind = "personalized" if "personalized" in kinds else "main"
    clients = sorted(range(trace.clients), key=lambda c: (-app.sizes[c], c))
    received = strategy.send(r + 1, from_record(arrays), clients)
    if not isinstance(received, Mapping):
        received = stack(received)
    cohort = app.cohort(clients, grid.engine.store.gather(clients), {"server-round": r + 1})
    logits = cohort.logits(app.update.personalize(cohort, received, {}), "test", app.update.predict)
    for k, c in enumerate(clients):
        if trace.arrays[f"out/eval/{kind}/test_num"][r, c] < 1:  # FedProto before there are prototypes; FedPHP
            continue
        scores = logits[k]
        key = f"out/eval/{kind}/test_scores/c{c}"
        if key in trace.arrays:
            theirs = torch.from_numpy(np.array(trace.arrays[key][r]))
            if trace.meta["method"] in ("Ditto", "FedROD", "FedCP"):  # recorded as probabilities
                comparison.add("scores", torch.softmax(scores, 1), theirs)
            else:
                comparison.add("scores", scores, theirs)
        correct = int((scores.argmax(1) == app.data.y[app.data.test[c]]).sum())
        comparison.exact("correct", correct, int(trace.arrays[f"out/eval/{kind}/test_correct"][r, c]))


def cases(root: Path, methods: list[str]) -> Iterator[tuple[str, Path]]:
    """All traces of the methods that exist under `root`."""
    for method in methods:
        if method in METHODS:
            yield from ((method, path) for path in sorted((root / "pfllib" / METHODS[method].folder).glob("*.npz")))
