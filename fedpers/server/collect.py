"""Replies of a round: checked against what they must hold and folded, wherever they are made.

What a reply holds is declared before the round (:data:`Schema`), never guessed from other replies, so that neither
cohort size nor runtime decides who is left out. Replies of a cohort stay stacked; those that come over a wire are read
one by one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import flwr.app as flower
import torch
from torch import Tensor

from fedpers.client.results import ClientResult, CohortResult
from fedpers.client.update import EXTRA
from fedpers.cohort import Fold, Records, Tree, entries
from fedpers.records import ARRAYS, array_records, trees
from fedpers.server.postprocessors.base import Postprocessor


class Entry(NamedTuple):
    """What one array of a reply looks like.

    Attributes
    ----------
    shape : tuple of int
        Without the client axis; -1 is any length.
    dtype : str
        As messages name it, e.g. ``float32``.
    optional : bool
        Whether a reply may lack it.
    """

    shape: tuple[int, ...]
    dtype: str
    optional: bool = False


Schema = dict[tuple[str, str], Entry]
"""What a reply holds: entries by record and name."""
log = logging.getLogger(__name__)
UNBOUNDED = ("loss", "mse", "perplexity")
"""Endings of metrics that are infinite where a client's network has diverged; no other may be."""
_WEIGHT_METRICS = {"samples": "num-examples", "inverse_variance": f"{EXTRA}inverse_variance"}
_FINITE_METRICS = ("steps", "samples", "gradients", "train-loss")
NOT_ADDRESSED = "it could not be addressed"
"""Why a client is left out that a method's ``prepare`` has left out without a word."""
NO_REPLY = ClientResult(None, "no reply")
"""Result of a client whose reply did not come."""


def dtype_name(value: Tensor) -> str:
    """Dtype as messages name it, e.g. ``float32``."""
    return str(value.dtype).removeprefix("torch.")


def schema_of(record: str, tensors: Mapping[str, Tensor]) -> Schema:
    """Schema of a record that holds arrays of the shapes and dtypes of `tensors`."""
    return {(record, name): Entry(tuple(value.shape), dtype_name(value)) for name, value in tensors.items()}


@dataclass
class ReplyRules:
    """All that is needed to check and fold replies, here or on another machine.

    Attributes
    ----------
    arrays : Tree
        The server's arrays before the round, batch size [].
    schema : Schema
        What a reply holds on the wire.
    fold : Fold
        Empty aggregator (:class:`Fold`) that receives the replies.
    postprocessors : sequence of Postprocessor
        Those that change replies (:meth:`Postprocessor.reply`); the state of others stays on the server.
    weighting : {"samples", "uniform", "inverse_variance"}
        See :func:`reply_weight`.
    by_client : dict of int to Schema
        What the replies of some clients hold instead.
    """

    arrays: Tree
    schema: Schema
    fold: Fold
    postprocessors: Sequence[Postprocessor] = ()
    weighting: str = "samples"
    by_client: dict[int, Schema] = field(default_factory=dict)

    def schema_for(self, client: int) -> Schema:
        """What a client's reply holds."""
        return self.by_client.get(client, self.schema)


@dataclass
class Collected:
    """What became of replies.

    Attributes
    ----------
    fold : Fold
    metrics : dict of int to dict
        Metrics of each client whose reply was folded, by client number.
    failures : dict of int to str
        Clients whose reply cannot be used, and why.
    bytes_up : int
        Arrays of the replies in the fold, as they travel.
    """

    fold: Fold
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    bytes_up: int = 0

    def merge(self, parts: Iterable[Collected]) -> None:
        """Add what became of other clients' replies."""
        for part in parts:
            self.fold.merge(part.fold)
            self.metrics.update(part.metrics)
            self.failures.update(part.failures)
            self.bytes_up += part.bytes_up


class ReplyCollector:
    """Checks and folds replies.

    Parameters
    ----------
    rules : ReplyRules
        Whose fold is filled.

    Attributes
    ----------
    collected : Collected
    """

    def __init__(self, rules: ReplyRules) -> None:
        self.rules = rules
        self.collected = Collected(rules.fold)

    def take_cohort(self, result: CohortResult) -> None:
        """Take in what K clients answered, stacked unless each reply takes a form of its own."""
        if result.encode is not None:
            self.take(dict(zip(result.clients, result.rows(), strict=True)))
            return
        failures = {client: result.errors[client] for client in result.clients if client in result.errors}
        problems: dict[int, str] = {}  # by the identity of a schema, which most clients share
        for k, client in enumerate(result.clients):
            if client in failures:
                continue
            schema = self.rules.schema_for(client)
            if id(schema) not in problems:
                problems[id(schema)] = _stack_problem(result.records, schema)
            if problem := problems[id(schema)] or self._weight_problem(result.metrics[k]):
                failures[client] = problem
        self.collected.failures.update(failures)
        rows = [k for k, client in enumerate(result.clients) if client not in failures]
        if not rows:
            return
        records = {r: t for r, t in result.records.items() if entries(t)}
        if self.rules.postprocessors or not self.rules.fold.any_layout:
            records = {r: t.contiguous() for r, t in records.items()}
        if len(rows) < len(result.clients):
            records = {r: t[torch.tensor(rows)] for r, t in records.items()}
        size = sum(value[0].nbytes for values in records.values() for value in entries(values).values())
        metrics = [dict(result.metrics[k]) for k in rows]
        clients = [result.clients[k] for k in rows]
        # a stack is folded at once only where the fold can; else reply by reply, and a refused reply fails alone
        if type(self.rules.fold).add_stack is not Fold.add_stack:
            try:
                prepared, metrics = self._postprocessed(records, metrics)
            except ValueError:  # one reply is unusable; adding them one by one shows whose
                log.debug("replies of %s are looked at one by one", clients, exc_info=True)
            else:
                self._add(prepared, clients, metrics, size * len(rows))
                return
        for k, (client, row) in enumerate(zip(clients, metrics, strict=True)):
            self._take_one({record: values[k : k + 1] for record, values in records.items()}, client, row, size)

    def take(self, results: Mapping[int, ClientResult]) -> None:
        """Take in what clients answered over a wire, or in a form that differs from reply to reply."""
        for client, result in results.items():
            try:
                records, metrics = validated_reply(result, self.rules.schema_for(client))
                if problem := self._weight_problem(metrics):
                    raise ValueError(problem)
                records = self.rules.fold.decode(records, client)
            except ValueError as error:
                self.collected.failures[client] = str(error)
                continue
            self._take_one(
                {r: t.unsqueeze(0) for r, t in records.items() if entries(t)}, client, metrics, result.num_bytes
            )

    def _take_one(self, records: dict[str, Tree], client: int, metrics: dict[str, float], size: int) -> None:
        """Take in one client's records, batch size [1]."""
        try:
            records, (row,) = self._postprocessed(records, [metrics])
            self.rules.fold.add({record: values[0] for record, values in records.items()}, self._weight(row), client)
        except ValueError as error:
            self.collected.failures[client] = str(error)
            return
        self._book([client], [row], size)

    def _postprocessed(
        self, records: dict[str, Tree], metrics: Sequence[Mapping[str, float]]
    ) -> tuple[dict[str, Tree], list[dict[str, float]]]:
        """Records ``[K]`` and metrics ``[K]`` after all postprocessors; ValueError says why one cannot be used."""
        rows = [dict(row) for row in metrics]
        for postprocessor in self.rules.postprocessors:
            records, further = postprocessor.reply(records, self.rules.arrays)
            for name, column in further.items():
                for row, value in zip(rows, column.tolist(), strict=True):
                    row[name] = float(value)
        return records, rows

    def _add(self, records: Records, clients: list[int], metrics: list[dict[str, float]], size: int) -> None:
        weights = torch.tensor([self._weight(row) for row in metrics], dtype=torch.float64)
        self.rules.fold.add_stack(records, weights, clients)
        self._book(clients, metrics, size)

    def _book(self, clients: Sequence[int], metrics: Sequence[dict[str, float]], size: int) -> None:
        self.collected.metrics.update(zip(clients, metrics, strict=True))
        self.collected.bytes_up += size

    def _weight(self, metrics: Mapping[str, float]) -> float:
        return reply_weight(self.rules.weighting, metrics)

    def _weight_problem(self, metrics: Mapping[str, float]) -> str:
        name = _WEIGHT_METRICS.get(self.rules.weighting)
        value = metrics.get(name) if name else 1.0
        if value is not None and 0 < value < math.inf:
            return ""
        missing = "; cohort.reply adds it, else declare weighting: SampleWeighting" if value is None else ""
        return f"it has no weight by strategy.weighting={self.rules.weighting}: its {name} is {value}{missing}"

    def partial(self) -> Collected:
        """Copy for :meth:`Collected.merge` on another machine, without what that machine already has.

        It is shallow: tensors and dicts are shared with :attr:`collected`.
        """
        collected = self.collected
        return Collected(collected.fold.partial(), collected.metrics, collected.failures, collected.bytes_up)


def reply_weight(weighting: str, metrics: Mapping[str, float]) -> float:
    """Weight of a reply in an average: its training samples, ``train/inverse_variance``, or 1 (``uniform``)."""
    name = _WEIGHT_METRICS.get(weighting)
    return 1.0 if name is None else float(metrics[name])


def result_of(reply: flower.Message | None) -> ClientResult:
    """Content or error of a reply; :data:`NO_REPLY` for None."""
    if reply is None:
        return NO_REPLY
    if reply.has_error():
        return ClientResult(None, reply.error.reason or f"error {reply.error.code}")
    return ClientResult(reply.content)


def metrics_of(result: ClientResult) -> dict[str, float]:
    """Return the metrics of a reply, those of all its metric records in one.

    Raises
    ------
    ValueError
        If it has no content; the message is its error.
    """
    if result.content is None:
        raise ValueError(result.error)
    merged: dict[str, Any] = {}
    for record in result.content.metric_records.values():
        merged.update(record)
    return {name: float(value) for name, value in merged.items() if isinstance(value, int | float)}


def evaluation_metrics(result: ClientResult) -> dict[str, float]:
    """Return the metrics of a reply to an evaluation.

    A network that has diverged is measured like any other: its predictions are wrong, its loss is infinite.

    Raises
    ------
    ValueError
        If it has no content or no metrics, or a value is not finite (a loss may be infinite).
    """
    metrics = metrics_of(result)
    if not metrics:
        raise ValueError("it holds no metrics")
    for name, value in metrics.items():
        if not (math.isfinite(value) or (value == math.inf and name.endswith(UNBOUNDED))):
            raise ValueError(f"{name} is {value}")
    return metrics


def validated_reply(result: ClientResult, schema: Schema) -> tuple[dict[str, Tree], dict[str, float]]:
    """Return the records and metrics of a reply that is as declared.

    Parameters
    ----------
    result : ClientResult
    schema : Schema
        What it must hold.

    Returns
    -------
    dict of record to Tree
        Batch size [].
    dict of str to float

    Raises
    ------
    ValueError
        If it has no content, differs from the schema, cannot be read, or holds values that are not finite.
    """
    metrics = metrics_of(result)
    assert result.content is not None
    names = {(r, n) for r, values in array_records(result.content).items() for n in values}
    if problem := _name_problem(names, schema):
        raise ValueError(problem)
    for name in _FINITE_METRICS:
        if not math.isfinite(metrics.get(name, 0.0)):
            raise ValueError(f"{name} is {metrics[name]}")
    try:
        records = trees(result.content)
    except (ValueError, TypeError, OSError, EOFError) as error:
        raise ValueError(f"an array cannot be read: {error}") from error
    floats: dict[str, Tensor] = {}
    for record, values in records.items():
        for name, value in entries(values).items():
            if problem := _array_problem(name, value.shape, value, schema[record, name]):
                raise ValueError(problem)
            if value.is_floating_point():
                floats[f"{record}/{name}"] = value
    # One look at all sums, which waits for a GPU only once; the entries themselves only if that finds something.
    if floats and not torch.stack([v.sum().double() for v in floats.values()]).isfinite().all():
        for name, value in floats.items():
            if not torch.isfinite(value).all():
                raise ValueError(f"'{name}' holds values that are not finite")
    return records, metrics


def _stack_problem(records: Mapping[str, Tree], schema: Schema) -> str:
    """Why stacked replies are not as declared; empty if they are."""
    if problem := _name_problem({(r, n) for r, values in records.items() for n in entries(values)}, schema):
        return problem
    for record, values in records.items():
        for name, value in entries(values).items():
            if problem := _array_problem(name, value.shape[1:], value, schema[record, name]):
                return problem
    return ""


def _name_problem(names: set[tuple[str, str]], schema: Schema) -> str:
    if unknown := sorted(names - schema.keys()):
        return f"'{'/'.join(unknown[0])}' is in its reply, but the method declares no such entry"
    missing = sorted(key for key, entry in schema.items() if key not in names and not entry.optional)
    if not missing:
        return ""
    begins = "; a server begins with what clients share, client_app.initial_arrays()" if missing[0][0] == ARRAYS else ""
    return f"'{'/'.join(missing[0])}' is missing in its reply{begins}"


def _array_problem(name: str, shape: Sequence[int], value: Tensor, entry: Entry) -> str:
    if len(shape) != len(entry.shape) or any(a not in (b, -1) for a, b in zip(entry.shape, shape, strict=True)):
        return f"'{name}' has shape {list(shape)}, expected {list(entry.shape)}"
    if dtype_name(value) != entry.dtype:
        return f"'{name}' has dtype {dtype_name(value)}, expected {entry.dtype}"
    return ""


__all__ = [
    "NOT_ADDRESSED",
    "NO_REPLY",
    "Collected",
    "Entry",
    "ReplyCollector",
    "ReplyRules",
    "Schema",
    "dtype_name",
    "evaluation_metrics",
    "metrics_of",
    "reply_weight",
    "result_of",
    "schema_of",
    "validated_reply",
]
