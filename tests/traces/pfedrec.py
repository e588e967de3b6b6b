"""Traces of the authors' code of PFedRec.

Negatives and the order of samples are those recorded; everything else is computed. The personal bias, which the code
sends and averages too, is compared where it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import flwr.app as flower

from fedpers.cohort import Cohort, Training, entries
from fedpers.flower_private import server_identity
from fedpers.records import from_record, trees
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import LocalUpdate, PersonalizedStrategy, make_strategy
from tests.traces import Comparison
from tests.traces.fedrap import Trace, compare_evaluation, compare_split, everybody, initial_network, recorded_data
from tests.traces.fedselect import replaying

TOLERANCE = 1e-5
METHODS = ("pfedrec",)
NAMES = {
    "embedding_item.weight": "body.weight",
    "affine_output.weight": "head.weight",
    "affine_output.bias": "head.bias",
}


def compare(method: str, path: Path, device: str = "cpu") -> Comparison:
    """Run the method on a trace and compare every stage of every round."""
    trace = Trace(path, NAMES)
    comparison = Comparison(method, f"pfedrec/{path.stem}", TOLERANCE)
    if "raw" in trace.arrays:
        compare_split(comparison, trace)
        return comparison
    config = trace.config
    training = Training(
        lr=config["lr"], epochs=config["local_epoch"], batch_size=config["batch_size"],
        weight_decay=config["l2_regularization"],
    )  # fmt: skip
    options = {"item_rate": config["lr_eta"], "variant": "official"}
    strategy, update = make_strategy("pfedrec", options, training=training)
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
            table = entries(from_record(arrays))["body.weight"]
            comparison.add("server table", table, trace.arrays[f"r{r}/server/embedding_item.weight"])
    if "eval/test_items" in trace.arrays:
        _compare_predictors(comparison, trace, everybody(grid, app), update, arrays)
    grid.close()
    return comparison


def _compare_users(
    comparison: Comparison,
    trace: Trace,
    strategy: PersonalizedStrategy,
    grid: LocalGrid,
    replies: list[flower.Message],
    r: int,
) -> None:
    """What users hold after a visit, what they send, and what it cost them."""
    assert grid.engine is not None
    for reply in replies:
        user = strategy.exchange.client_of[reply.metadata.src_node_id]
        state = entries(grid.engine.store.gather([user])["model"])
        for name, value in trace.group(f"r{r}/u{user}/after").items():
            comparison.add(f"user {name}", state[name][0], value)
        upload = trace.arrays[f"r{r}/u{user}/upload/embedding_item.weight"]
        comparison.add("upload", entries(trees(reply.content)["arrays"])["body.weight"], upload)
        metrics = reply.content.metric_records["metrics"]
        comparison.add("loss", metrics["train-loss"], trace.arrays[f"r{r}/u{user}/loss"])
        comparison.exact("steps", metrics["steps"], len(trace.arrays[f"r{r}/u{user}/batch_loss_item"]))


def _compare_predictors(
    comparison: Comparison, trace: Trace, cohort: Cohort, update: LocalUpdate, arrays: flower.ArrayRecord
) -> None:
    """What every user predicts with, drawn or not; and its scores, some of which were made to saturate by hand."""
    state = entries(cohort.state["model"])
    for user, factor in trace.meta["boosted_users"].items():
        state["head.weight"][cohort.clients.index(int(user))].mul_(factor)
    for k, user in enumerate(cohort.clients):
        for name, value in trace.group(f"eval/params/u{user}").items():
            comparison.add("predictor", state[name][k], value)
    compare_evaluation(comparison, trace, cohort, update, arrays)


def cases(root: Path, methods: list[str]) -> Iterator[tuple[str, Path]]:
    """All traces under `root`, if the method is asked for."""
    if "pfedrec" in methods:
        yield from (("pfedrec", path) for path in sorted((root / "pfedrec").glob("*.npz")))
