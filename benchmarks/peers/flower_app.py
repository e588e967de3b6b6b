"""The textbook loop as a Flower app, of as many clients as a round has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from benchmarks.local_grid import server
from benchmarks.peers.problem import Problem, problem, train_client

ROUNDS = 4


@functools.cache
def loaded(name: str) -> Problem:
    """The clients' samples, made once by each process, as Flower's examples do."""
    return problem(name)


class Strict(FedAvg):
    """Ends a run in which a client fails, which would take no time."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """Aggregate replies without errors."""
        replies = list(replies)
        errors = {reply.error.reason for reply in replies if reply.has_error()}
        if errors:
            raise RuntimeError(f"clients failed: {errors}")
        return super().aggregate_train(server_round, replies)


def client_app(name: str) -> ClientApp:
    """Clients that train with one thread each."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        model = loaded(name).network()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        x, y = loaded(name).train[int(context.node_config["partition-id"])]
        train_client(model, x, y)
        metrics = MetricRecord({"num-examples": len(y)})
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

    return app


def flower_app(run: Callable[..., None], name: str) -> list[float]:
    """Seconds of each round but the first under an engine, which takes what ``run_simulation`` takes."""
    stamps: list[float] = []
    strategy = Strict(fraction_train=1.0, fraction_evaluate=0.0)
    first = functools.partial(ArrayRecord, loaded(name).network().state_dict())
    run(server(strategy, first, ROUNDS, stamps), client_app(name), loaded(name).sampled)
    return [after - before for before, after in pairwise(stamps[1:])]
