"""Clients that never train: they adapt on their own at the end of a run and are measured once more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import flwr.app as flower
from flwr.serverapp import Grid

from fedpers.cohort import Records, Tree, entries
from fedpers.identity import ADAPTING
from fedpers.records import ARRAYS, from_record
from fedpers.server.collect import evaluation_metrics, validated_reply

if TYPE_CHECKING:
    from fedpers.server.strategy import PersonalizedStrategy


def adapt_clients(
    strategy: PersonalizedStrategy, round: int, arrays: Tree, grid: Grid, clients: list[int]
) -> tuple[list[int], list[Records]]:
    """Let clients train once on what the server sends, and put their arrays in the place of the server's.

    Parameters and results are those of ``PersonalizedStrategy.adapt``.
    """
    strategy.sent_arrays = arrays
    able = strategy.prepare(round, arrays, clients, grid, "evaluate")
    sent = strategy.send(round, arrays, able)
    each = [sent] * len(able) if isinstance(sent, Mapping) else sent
    config = flower.ConfigRecord({"server-round": round, ADAPTING: True})
    results, _ = strategy.exchange.call(grid, flower.MessageType.TRAIN, sent, config, able)
    declared, fold = strategy.reply_schema(able), strategy.fold()
    schemas = [declared] * len(able) if isinstance(declared, dict) else declared
    adapted: list[int] = []
    records: list[Records] = []
    for client, before, schema in zip(able, each, schemas, strict=True):
        try:
            trained = fold.decode(validated_reply(results[client], schema)[0], client)
        except ValueError as problem:
            strategy.leave_out(client, f"it did not adapt: {problem}", "evaluate")
            continue
        adapted.append(client)
        mine = {ARRAYS: trained[ARRAYS]} if ARRAYS in trained and entries(trained[ARRAYS]) else {}
        records.append({**before, **mine})
    return adapted, records


def evaluate_adapted(
    strategy: PersonalizedStrategy, arrays: flower.ArrayRecord, config: flower.ConfigRecord, grid: Grid
) -> None:
    """Let the unseen clients adapt and measure them, into ``report.adapted``."""
    connected = strategy.nodes(grid)
    unseen = sorted(strategy.unseen)
    for client in unseen:
        if client not in connected:
            strategy.leave_out(client, "it is not connected", "evaluate")
    round = strategy.report.round + 1
    clients, records = strategy.adapt(round, from_record(arrays), grid, [c for c in unseen if c in connected])
    config["server-round"] = round
    results, _ = strategy.exchange.call(grid, flower.MessageType.EVALUATE, records, config, clients)
    for client in clients:
        try:
            strategy.report.adapted[client] = evaluation_metrics(results[client])
        except ValueError as problem:
            strategy.leave_out(client, f"adapted: {problem}", "evaluate")
