"""An app written for Flower alone: linear regression, different data on every node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy

FEATURES = 3


def data_of(partition: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of a node; node k has 10 + k samples."""
    rng = np.random.default_rng(partition)
    x = rng.normal(size=(10 + partition, FEATURES))
    return x, x @ np.arange(1.0, FEATURES + 1) + 0.3 * partition + rng.normal(scale=0.1, size=len(x))


def initial_arrays() -> ArrayRecord:
    return ArrayRecord({"w": Array(np.zeros(FEATURES)), "b": Array(np.zeros(1))})


def fit(w: np.ndarray, b: np.ndarray, partition: int, lr: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Five steps of gradient descent and the loss before them."""
    x, y = data_of(partition)
    before = float(np.mean((x @ w + b - y) ** 2))
    for _ in range(5):
        error = x @ w + b - y
        w = w - lr * x.T @ error / len(y)
        b = b - lr * error.mean(keepdims=True)
    return w, b, before


def client_app(mods: list[Any] | None = None) -> ClientApp:
    app = ClientApp()

    @app.train(mods=mods)
    def train(message: Message, context: Context) -> Message:
        arrays, config = message.content["arrays"], message.content["config"]
        partition = int(context.node_config["partition-id"])
        state = context.state.setdefault("seen", MetricRecord({"calls": 0}))
        state["calls"] += 1
        w, b, loss = fit(arrays["w"].numpy(), arrays["b"].numpy(), partition, float(config.get("lr", 0.1)))
        metrics = {"num-examples": 10 + partition, "train_loss": loss, "calls": state["calls"], "one": 1}
        content = {"arrays": ArrayRecord({"w": Array(w), "b": Array(b)}), "metrics": MetricRecord(metrics)}
        return Message(RecordDict(content), reply_to=message)

    @app.train("other", mods=mods)
    def train_other(message: Message, context: Context) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({"other": 1})}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        arrays = message.content["arrays"]
        x, y = data_of(int(context.node_config["partition-id"]))
        loss = float(np.mean((x @ arrays["w"].numpy() + arrays["b"].numpy() - y) ** 2))
        metrics = MetricRecord({"num-examples": len(y), "loss": loss, "one": 1})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        known = {**context.node_config, **context.run_config, "node": context.node_id}
        return Message(RecordDict({"known": ConfigRecord(known)}), reply_to=message)

    return app


def server_app(
    results: dict[str, Any], strategy: Callable[[], Strategy] = FedAvg, rounds: int = 3, lr: float = 0.1
) -> ServerApp:
    """Server app that leaves its result in `results`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        result = strategy().start(grid, initial_arrays(), num_rounds=rounds, train_config=ConfigRecord({"lr": lr}))
        results["arrays"] = {name: array.numpy() for name, array in result.arrays.items()}
        results["train"] = {r: dict(metrics) for r, metrics in result.train_metrics_clientapp.items()}
        results["evaluate"] = {r: dict(metrics) for r, metrics in result.evaluate_metrics_clientapp.items()}

    return app
