"""Clients that never train: they adapt on their own at the end of a run and are measured once more."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import flwr.app as flower
from flwr.serverapp import Grid

from fedpers.cohort import Records, Tree, entries
from fedpers.identity import ADAPTING, MAX_STEPS, PHASE_STEPS
from fedpers.records import ARRAYS, from_record
from fedpers.server.collect import NOT_ADDRESSED, evaluation_metrics, validated_reply

if TYPE_CHECKING:
    from fedpers.server.strategy import PersonalizedStrategy

log = logging.getLogger(__name__)


def adapt_clients(
    strategy: PersonalizedStrategy,
    round: int,
    arrays: Tree,
    grid: Grid,
    clients: list[int],
) -> tuple[list[int], list[Records]]:
    """Let clients train once on what the server sends, and put their arrays in the place of the server's.

    Parameters and results are those of ``PersonalizedStrategy.adapt``.
    """
    strategy.sent_arrays = arrays
    able = _prepared(strategy, round, arrays, clients, grid)
    sent = strategy.send(round, arrays, able)
    each = [sent] * len(able) if isinstance(sent, Mapping) else list(sent)
    adapted, records, _ = _train(strategy, round, each, able, grid)
    return adapted, records


def _prepared(strategy: PersonalizedStrategy, round: int, arrays: Tree, clients: list[int], grid: Grid) -> list[int]:
    """Clients that the method can address; the others are booked as failures."""
    able = strategy.prepare(round, arrays, clients, grid, "evaluate")
    for client in sorted(set(clients) - {*able, *strategy.report.evaluation_failures}):
        strategy.leave_out(client, NOT_ADDRESSED, "evaluate")
    return able


def _train(
    strategy: PersonalizedStrategy,
    round: int,
    sent: list[Records],
    clients: list[int],
    grid: Grid,
    max_steps: int | None = None,
) -> tuple[list[int], list[Records], list[int]]:
    """Let clients train from what they are sent: who did, with what they are evaluated, steps of the longest phase."""
    config = flower.ConfigRecord({"server-round": round, ADAPTING: True})
    if max_steps is not None:
        config[MAX_STEPS] = max_steps
    results, _ = strategy.exchange.call(grid, flower.MessageType.TRAIN, sent, config, clients)
    declared, server_arrays = strategy.reply_schema(clients), strategy.sent_arrays
    schemas = [declared] * len(clients) if isinstance(declared, dict) else declared
    adapted: list[int] = []
    records: list[Records] = []
    steps: list[int] = []
    for client, before, schema in zip(clients, sent, schemas, strict=True):
        try:
            reply, metrics = validated_reply(results[client], schema)[:2]
            # a reply may be a change of what this client was sent, which after a first local round is its network
            strategy.sent_arrays = _in_place_of(server_arrays, before.get(ARRAYS))
            trained = strategy.fold().decode(reply, client)
        except ValueError as problem:
            strategy.leave_out(client, f"it did not adapt: {problem}", "evaluate")
            continue
        finally:
            strategy.sent_arrays = server_arrays
        adapted.append(client)
        records.append(strategy.adapted_records(before, trained))
        steps.append(int(metrics.get(PHASE_STEPS, 0)))
    return adapted, records, steps


def _in_place_of(server_arrays: Tree, sent: Tree | None) -> Tree:
    """What a client was sent, if it is all that the server's arrays are; else these."""
    same = sent is not None and entries(sent).keys() == entries(server_arrays).keys()
    return sent if sent is not None and same else server_arrays


@dataclass
class _Adapting:
    """A client between two measurements: what it has, and the number of its next local round."""

    records: Records
    next_round: int


def _adapt_by(strategy: PersonalizedStrategy, adapting: dict[int, _Adapting], grid: Grid, steps: int) -> None:
    """Let clients train for `steps` local steps, in as many local rounds as that takes; those that fail are removed."""
    left = dict.fromkeys(adapting, steps)
    while any(left.values()):
        groups: dict[tuple[int, int], list[int]] = {}
        for client, limit in left.items():
            if limit:
                groups.setdefault((limit, adapting[client].next_round), []).append(client)
        for (limit, round), clients in groups.items():
            sent = [adapting[client].records for client in clients]
            able, records, taken = _train(strategy, round, sent, clients, grid, limit)
            for client in set(clients) - set(able):
                del adapting[client], left[client]
            for client, trained, n in zip(able, records, taken, strict=True):
                adapting[client] = _Adapting(trained, round + 1)
                left[client] = max(0, limit - n) if n else 0  # a method that trains nothing is through


def evaluate_adapted(
    strategy: PersonalizedStrategy, arrays: flower.ArrayRecord, config: flower.ConfigRecord, grid: Grid
) -> None:
    """Let the unseen clients adapt and measure them, into ``report.adapted``.

    With ``strategy.adapt_steps`` they are measured after so many local steps each, in every phase of the method's local
    training; metrics then end in ``-after-STEPS``. Each client's local rounds follow one another from the next round
    on: learning rates decay and batches are drawn by them. A method with a rule of its own for newcomers follows that
    instead.
    """
    connected = strategy.nodes(grid)
    unseen = sorted(strategy.unseen)
    for client in unseen:
        if client not in connected:
            strategy.leave_out(client, "it is not connected", "evaluate")
    round = strategy.report.round + 1
    clients, server_arrays = [c for c in unseen if c in connected], from_record(arrays)
    if not clients:
        return
    if not strategy.adapt_steps or not strategy.adapts_by_training():
        if strategy.adapt_steps:
            given, name = list(strategy.adapt_steps), type(strategy).__name__
            log.warning(
                "split.adapt_steps=%s has no part in %s: its newcomers adapt by a rule of their own", given, name
            )
        clients, records = strategy.adapt(round, server_arrays, grid, clients)
        _measure(strategy, round, dict(zip(clients, records, strict=True)), config, grid, "")
        return
    strategy.sent_arrays = server_arrays
    able = _prepared(strategy, round, server_arrays, clients, grid)
    sent = strategy.send(round, server_arrays, able)
    each = [sent] * len(able) if isinstance(sent, Mapping) else sent
    adapting = {client: _Adapting(records, round) for client, records in zip(able, each, strict=True)}
    done = 0
    for steps in strategy.adapt_steps:
        _adapt_by(strategy, adapting, grid, steps - done)
        by_round: dict[int, dict[int, Records]] = {}  # a client is measured in the round it trained in last
        for client, now in adapting.items():
            by_round.setdefault(now.next_round - 1, {})[client] = now.records
        for last, records_of in by_round.items():
            _measure(strategy, last, records_of, config, grid, f"-after-{steps}")
        done = steps


def _measure(
    strategy: PersonalizedStrategy,
    round: int,
    sent: Mapping[int, Records],
    config: flower.ConfigRecord,
    grid: Grid,
    ending: str,
) -> None:
    """Evaluate clients with what each of them has, into ``report.adapted``; names of metrics get an ending."""
    config["server-round"] = round
    results, _ = strategy.exchange.call(grid, flower.MessageType.EVALUATE, list(sent.values()), config, list(sent))
    for client in sent:
        try:
            measured = evaluation_metrics(results[client])
        except ValueError as problem:
            strategy.leave_out(client, f"adapted: {problem}", "evaluate")
            continue
        counts = {name: value for name, value in measured.items() if name.endswith("examples")}
        named = {f"{name}{ending}": value for name, value in measured.items() if name not in counts}
        strategy.report.adapted.setdefault(client, {}).update(named | counts)
