"""Traces of the authors' code of FedRAP.

Negatives and the order of samples are those recorded; everything else is computed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flwr.app as flower
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedpers.cohort import Cohort, Training, entries
from fedpers.cohort.sparse_rows import with_rows
from fedpers.data import DatasetConfig, FederatedData, RankingData, SplitConfig
from fedpers.data.ratings import leave_one_out
from fedpers.data.sets.rating_files import Ratings
from fedpers.flower_private import server_identity
from fedpers.models import Factorization
from fedpers.records import from_record, trees
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import CohortApp, FedRAP, FedRAPUpdate, LocalUpdate
from fedpers.strategies.fedrap import CURRICULA
from fedpers.tasks import Ranking
from fedpers.tasks.ranking import hit_and_gain
from tests.traces import Comparison
from tests.traces.fedselect import replaying

TOLERANCE = 1e-5
METHODS = ("fedrap",)
NAMES = {
    "item_personality.weight": "personal.weight",
    "item_commonality.weight": "common.weight",
    "affine_output.weight": "head.weight",
    "affine_output.bias": "head.bias",
}


class Trace:
    """One ``.npz`` file, and what its parameters are called here."""

    def __init__(self, path: Path, names: Mapping[str, str] = NAMES) -> None:
        self.names = names
        with np.load(path, allow_pickle=False) as file:
            self.arrays: dict[str, NDArray[Any]] = dict(file)
        self.meta: dict[str, Any] = json.loads(str(self.arrays.pop("meta")))
        self.config: dict[str, Any] = self.meta.get("config", {})

    def group(self, prefix: str) -> dict[str, NDArray[Any]]:
        """Arrays below a path, by our names."""
        inside = {k[len(prefix) + 1 :]: v for k, v in self.arrays.items() if k.startswith(prefix + "/")}
        return {self.names.get(name, name): value for name, value in inside.items()}

    def order(self, client: int, round: int, epoch: int) -> NDArray[np.int64]:
        """Order of a user's samples in a pass of a round from 1."""
        recorded: NDArray[np.int64] = self.arrays[f"r{round - 1}/u{client}/order"][epoch]
        return recorded

    def participants(self, round: int) -> list[int]:
        """Users that train in a round from 1, ascending."""
        users: list[int] = sorted(self.arrays[f"r{round - 1}/participants"].tolist())
        return users


@dataclass(frozen=True)
class RecordedData(RankingData):
    """Users whose samples of each round were recorded."""

    trace: Trace | None = None

    def samples(self, client: int, seed: int, round: int) -> NDArray[np.int64]:
        """Positives and negatives as they were drawn."""
        assert self.trace is not None
        items, ratings = (self.trace.arrays[f"data/r{round - 1}/u{client}/{name}"] for name in ("items", "ratings"))
        drawn: NDArray[np.int64] = items + self.num_items * ratings.astype(np.int64)
        return drawn


class RecordedUpdate(FedRAPUpdate):
    """Takes the first common table from the trace."""

    trace: Trace

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Start with the recorded table C."""
        network, data = super().adapt_model(model, data, seed)
        with torch.no_grad():
            network.common.weight.copy_(torch.from_numpy(self.trace.arrays["init/C0"]))  # type: ignore[union-attr,operator]
        return network, data


def recorded_data(trace: Trace) -> RecordedData:
    """The users of a trace; what they are evaluated on, if that was recorded."""
    m, users = int(trace.config["num_items"]), int(trace.config["num_users"])
    liked = [trace.arrays[f"data/r0/u{u}/items"][trace.arrays[f"data/r0/u{u}/ratings"] > 0] for u in range(users)]
    held = [torch.zeros(0, dtype=torch.int64)] * users
    test = list(held)
    if "eval/test_items" in trace.arrays:
        negatives = trace.arrays["eval/neg_items"].reshape(users, -1)
        for place, user in enumerate(trace.arrays["eval/test_users"]):
            test[user] = torch.from_numpy(np.r_[trace.arrays["eval/test_items"][place] + m, negatives[place]])
    items = torch.arange(m)
    return RecordedData(
        torch.cat([items, items]), torch.arange(2).repeat_interleave(m).float(),
        [torch.from_numpy(positives + m) for positives in liked], held, test, 1, "trace",
        num_items=m, negatives=0, task=Ranking(protocol_name="official"), trace=trace,
    )  # fmt: skip


def initial_network(trace: Trace) -> Factorization:
    """The template: its table, vector and bias."""
    model = Factorization(int(trace.config["num_items"]), int(trace.config["latent_dim"]))
    init = trace.group("init/template")
    table = init.get("personal.weight", init.get("body.weight"))
    values = {"body.weight": table, "head.weight": init["head.weight"], "head.bias": init["head.bias"]}
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in values.items()})
    return model


def compare(method: str, path: Path, device: str = "cpu") -> Comparison:
    """Run the method on a trace and compare every stage of every round."""
    trace = Trace(path)
    comparison = Comparison(method, f"fedrap/{path.stem}", TOLERANCE)
    if "raw" in trace.arrays:
        compare_split(comparison, trace)
        return comparison
    config = trace.config
    training = Training(
        lr=config["lr_network"], groups={"body": {"lr": config["lr_args"]}}, epochs=config["local_epoch"],
        batch_size=config["batch_size"], weight_decay=config["l2_regularization"], lr_decay=config["decay_rate"],
    )  # fmt: skip
    update = RecordedUpdate(
        lam=config["lambda"], mu=config["mu"], regularizer=config["regular"], curriculum=config["vary_param"],
        tolerance=config["tol"], training=training,
    )  # fmt: skip
    update.trace = trace
    strategy = FedRAP()
    strategy.sample = trace.participants  # type: ignore[method-assign]
    app = update.client_app(initial_network(trace), recorded_data(trace), device=device)
    grid = LocalGrid(app, app.data.num_clients, clients_at_once=3, workers=1)
    arrays, settings = app.initial_arrays(), flower.ConfigRecord()
    strategy.begin()
    with replaying(trace.order), server_identity(1):
        for r in range(int(trace.meta["rounds"])):
            replies = list(grid.send_and_receive(strategy.configure_train(r + 1, arrays, settings, grid)))
            _compare_users(comparison, trace, strategy, grid, replies, r)
            new, _ = strategy.aggregate_train(r + 1, replies)
            assert new is not None
            arrays = new
            table = entries(from_record(arrays))["common.weight"]
            comparison.add("server table", table, trace.arrays[f"r{r}/server/item_commonality.weight"])
            growth = CURRICULA[config["vary_param"]](r)
            planned = np.array([config["lambda"], 0.0 if config["regular"] == "none" else config["mu"]]) * growth
            comparison.add("curriculum", torch.from_numpy(planned), trace.arrays[f"r{r}/curriculum_attributes"])
            comparison.add("sparsity", strategy.report.extra["sparsity"], trace.arrays[f"r{r}/sparsity"])
    if "eval/test_items" in trace.arrays:
        cohort = everybody(grid, app)
        for k, user in enumerate(cohort.clients):  # some scores were made to saturate by hand
            for name, value in trace.group(f"eval/params/u{user}").items():
                if name != "common.weight":
                    cohort.state["model", name][k] = torch.from_numpy(value)
        compare_evaluation(comparison, trace, cohort, update, arrays)
    grid.close()
    return comparison


def _compare_users(
    comparison: Comparison, trace: Trace, strategy: FedRAP, grid: LocalGrid, replies: list[flower.Message], r: int
) -> None:
    """What users hold after a visit, what they send, and what it cost them."""
    assert grid.engine is not None
    for reply in replies:
        user = strategy.exchange.client_of[reply.metadata.src_node_id]
        state = {n: v[0] for n, v in entries(grid.engine.store.gather([user])["model"]).items()}
        table = with_rows(strategy.sent_arrays["common.weight"], entries(trees(reply.content)["arrays"]))
        for name, value in trace.group(f"r{r}/u{user}/after").items():
            comparison.add(f"user {name}", table if name == "common.weight" else state[name], value)
        key = f"r{r}/u{user}/upload/item_commonality.weight"
        comparison.add("upload", table, trace.arrays[key])
        metrics = reply.content.metric_records["metrics"]
        comparison.add("loss", metrics["train-loss"], trace.arrays[f"r{r}/u{user}/loss"])
        comparison.exact("steps", metrics["steps"], len(trace.arrays[f"r{r}/u{user}/batch_loss"]))


def everybody(grid: LocalGrid, app: CohortApp) -> Cohort:
    """All users as they are."""
    assert grid.engine is not None
    users = sorted(range(app.data.num_clients), key=lambda user: -app.sizes[user])
    return app.cohort(users, grid.engine.store.gather(users), {"server-round": 1})


def compare_evaluation(
    comparison: Comparison, trace: Trace, cohort: Cohort, update: LocalUpdate, arrays: flower.ArrayRecord
) -> None:
    """Scores, and the metric of hand-made scores."""
    users = cohort.clients
    networks = update.personalize(cohort, {"arrays": from_record(arrays)}, {})
    outputs = cohort.logits(networks, "test", update.predict)
    negatives = trace.arrays["eval/neg_scores"].reshape(len(users), -1)
    scores: list[torch.Tensor] = [torch.zeros(0)] * len(users)
    for k, user in enumerate(users):
        place = int(np.flatnonzero(trace.arrays["eval/test_users"] == user)[0])
        scores[place] = torch.sigmoid(outputs[k]).flatten().cpu()
        comparison.add("scores", scores[place], np.r_[trace.arrays["eval/test_scores"][place], negatives[place]])
    _compare_metric(comparison, trace, "eval", scores)
    for part in ("ties", "nan"):
        if f"{part}/test_scores" not in trace.arrays:
            continue
        held, others = (trace.arrays[f"{part}/{name}"] for name in ("test_scores", "neg_scores"))
        _compare_metric(
            comparison, trace, part, [torch.from_numpy(np.r_[a, b]) for a, b in zip(held, others, strict=True)]
        )


def _compare_metric(comparison: Comparison, trace: Trace, part: str, scores: list[torch.Tensor]) -> None:
    if f"{part}/rank" in trace.arrays:
        ranks = [1 + int((candidates[1:] >= candidates[0]).sum()) for candidates in scores]
        comparison.exact("rank", ranks, trace.arrays[f"{part}/rank"])
    for place, top_k in enumerate(trace.arrays[f"{part}/top_k"].tolist()):
        metric = hit_and_gain(scores, top_k)
        comparison.add("hr", metric[f"hr@{top_k}"].mean(), trace.arrays[f"{part}/hr"][place])
        comparison.add("ndcg", metric[f"ndcg@{top_k}"].mean(), trace.arrays[f"{part}/ndcg"][place])


def compare_split(comparison: Comparison, trace: Trace) -> None:
    """Who trains, validates and tests on what."""
    user, item, rating, time = trace.arrays["raw"].T
    config = DatasetConfig("ratings", "trace.csv", protocol="official", min_interactions=10)
    ratings = Ratings(user, item, rating.astype(float), time, "trace")
    data = leave_one_out(ratings, config, SplitConfig("leave_one_out"), 0)
    m = data.num_items
    comparison.exact("items", m, trace.meta["num_items"])
    for part, name in ((data.validation, "val"), (data.test, "test")):
        comparison.exact(name, [int(candidates[0]) - m for candidates in part], trace.arrays[f"split/{name}"][:, 1])
    recorded = trace.arrays["split/train"]
    for u in range(int(trace.meta["num_users"])):
        liked = np.sort(data.train[u].numpy() - m)
        comparison.exact("train", liked, np.sort(recorded[recorded[:, 0] == u, 1]))
        allowed = np.setdiff1d(np.arange(m), data.excluded(u))
        comparison.exact("allowed negatives", allowed, np.sort(trace.arrays[f"allowed_negatives/u{u}"]))


def cases(root: Path, methods: list[str]) -> Iterator[tuple[str, Path]]:
    """All traces under `root`, if the method is asked for."""
    if "fedrap" in methods:
        yield from (("fedrap", path) for path in sorted((root / "fedrap").glob("*.npz")))
