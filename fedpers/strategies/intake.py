"""Replies of a round: read, checked and folded, wherever they are made."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flwr.app as flower
import torch
from torch import Tensor

from fedpers.cohort import Tree, entries
from fedpers.strategies.client import Outcome
from fedpers.strategies.records import ARRAYS, num_bytes, trees
from fedpers.strategies.wrappers import CLIPPED

if TYPE_CHECKING:
    from fedpers.strategies.server import PersonalizedStrategy

Form = dict[tuple[str, str], tuple[tuple[int, ...], str]]
"""Shape and dtype of each entry, by record and name; a length of -1 stands for any."""
_COUNTS = ("steps", "samples", "gradients", "train-loss")
NO_REPLY = Outcome(None, "no reply")


class Intake:
    """Replies of one round, checked and folded; intakes of several machines merge.

    Parameters
    ----------
    strategy : PersonalizedStrategy
        Says what a reply must hold, how it is unpacked, weighted and folded.

    Attributes
    ----------
    good : dict of int to dict
        Metrics of each client whose reply is in the fold.
    failures : dict of int to str
        Clients whose reply cannot be used, and why.
    bytes_up : int
        Arrays of the replies in the fold.
    """

    def __init__(self, strategy: PersonalizedStrategy) -> None:
        self.strategy = strategy
        self.fold = strategy.fold()
        self.good: dict[int, dict[str, float]] = {}
        self.failures: dict[int, str] = {}
        self.bytes_up = 0
        self.usual: Form | None = None  # what a reply holds where the method does not declare it

    def take(self, outcomes: Mapping[int, Outcome]) -> None:
        """Take in what clients answered; where no form is declared, the first call settles what replies hold."""
        declared = {client: self.strategy.reply_form(client) for client in outcomes}
        if self.usual is None and any(form is None for form in declared.values()):
            contents = [outcome.content for outcome in outcomes.values() if outcome.content is not None]
            self.usual = usual_form(contents, self.strategy.sent_arrays) if contents else None
        for client, outcome in outcomes.items():
            form = declared[client]
            try:
                records, metrics = checked(outcome, (self.usual or {}) if form is None else form)
                if self.strategy.weighting == "samples" and not 0 < metrics.get("num-examples", 0) < math.inf:
                    raise ValueError(f"num-examples is {metrics.get('num-examples')}")
                records = self.strategy.unpack(records, client)
            except ValueError as problem:
                self.failures[client] = str(problem)
                continue
            if self.strategy.privacy is not None:
                records, clipped = self.strategy.privacy.clip(
                    records, self.strategy.sent_arrays, self.strategy.clipping_norm
                )
                metrics[CLIPPED] = float(clipped)
            assert outcome.content is not None
            self.bytes_up += num_bytes(outcome.content)
            self.fold.add(records, self.strategy.weight(metrics), client)
            self.good[client] = metrics

    def merge(self, parts: Iterable[Intake]) -> None:
        """Take in what others took in; where they disagree on what a reply holds, most clients are right."""
        parts = list(parts)
        votes: Counter[Any] = Counter()
        for part in (self, *parts):
            if part.usual is not None:
                votes[frozenset(part.usual.items())] += len(part.good)
        usual: Form | None = dict(max(votes, key=lambda form: votes[form])) if votes else None
        for part in parts:
            self.failures.update(part.failures)
            if part.usual is not None and usual is not None and part.usual != usual:
                problem = _unlike(part.usual, usual)
                self.failures.update(dict.fromkeys(part.good, problem))
                continue
            self.fold.merge(part.fold)
            self.good.update(part.good)
            self.bytes_up += part.bytes_up
        self.usual = usual

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "strategy": None}  # who merges it has one


def outcome_of(reply: flower.Message | None) -> Outcome:
    """What a message from a client amounts to."""
    if reply is None:
        return NO_REPLY
    if reply.has_error():
        return Outcome(None, reply.error.reason or f"error {reply.error.code}")
    return Outcome(reply.content)


def measured(outcome: Outcome) -> dict[str, float]:
    """Metrics of an answer; ValueError says why there are none."""
    if outcome.content is None:
        raise ValueError(outcome.error)
    merged: dict[str, Any] = {}
    for record in outcome.content.metric_records.values():
        merged.update(record)
    return {name: float(value) for name, value in merged.items() if isinstance(value, int | float)}


def evaluated(outcome: Outcome) -> dict[str, float]:
    """Metrics of an answer to an evaluation; ValueError says why they cannot be used."""
    metrics = measured(outcome)
    if not metrics:
        raise ValueError("it holds no metrics")
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}")
    return metrics


def checked(outcome: Outcome, expected: Form) -> tuple[dict[str, Tree], dict[str, float]]:
    """Records and metrics of an answer; ValueError says why it cannot be used."""
    metrics = measured(outcome)
    assert outcome.content is not None
    if differing := difference(content_form(outcome.content), expected):
        raise ValueError(differing)
    for name in _COUNTS:
        if not math.isfinite(metrics.get(name, 0.0)):
            raise ValueError(f"{name} is {metrics[name]}")
    try:
        records = trees(outcome.content)
    except (ValueError, TypeError, OSError, EOFError) as problem:
        raise ValueError(f"an array cannot be read: {problem}") from problem
    floats: dict[str, Tensor] = {}
    for record, values in records.items():
        for name, value in entries(values).items():
            shape, dtype = expected[record, name]
            if len(shape) != value.dim() or any(a not in (b, -1) for a, b in zip(shape, value.shape, strict=True)):
                raise ValueError(f"'{name}' has shape {list(value.shape)}, expected {list(shape)}")
            if dtype_name(value) != dtype:
                raise ValueError(f"'{name}' has dtype {dtype_name(value)}, expected {dtype}")
            if value.is_floating_point():
                floats[f"{record}/{name}"] = value
    # One look at all sums, which waits for a GPU only once; the entries themselves only if that finds something.
    if floats and not torch.stack([v.sum().double() for v in floats.values()]).isfinite().all():
        for name, value in floats.items():
            if not torch.isfinite(value).all():
                raise ValueError(f"'{name}' holds values that are not finite")
    return records, metrics


def difference(form: Form, expected: Form) -> str:
    """Say which entry is in one of two forms only; empty if none is."""
    differing = sorted("/".join(entry) for entry in form.keys() ^ expected.keys())
    return f"'{differing[0]}' is in its reply or in those of the other clients, but not in both" if differing else ""


def _unlike(form: Form, expected: Form) -> str:
    """Say how two forms that are not equal differ."""
    if told := difference(form, expected):
        return told
    (_, name), (shape, dtype) = next(item for item in sorted(form.items()) if expected[item[0]] != item[1])
    most = expected[next(entry for entry in sorted(form) if expected[entry] != form[entry])]
    return f"'{name}' is {dtype} {list(shape)}, with most other clients {most[1]} {list(most[0])}"


def usual_form(contents: Sequence[flower.RecordDict], arrays: Tree) -> Form:
    """Entries that most replies hold, formed as the server's `arrays` or else as in most replies."""
    known = form_of(ARRAYS, entries(arrays))
    seen = Counter(frozenset(content_form(content).items()) for content in contents)
    agreeing = [form for form in seen if all(known.get(entry, kind) == kind for entry, kind in form)]
    most = dict(max(agreeing or seen, key=lambda form: seen[form]))
    return {entry: known.get(entry, kind) for entry, kind in most.items()}


def content_form(content: flower.RecordDict) -> Form:
    """Form of what a message says it holds."""
    return {
        (record, name): (tuple(array.shape), array.dtype)
        for record, values in content.array_records.items()
        for name, array in values.items()
    }


def dtype_name(value: Tensor) -> str:
    """Dtype as messages name it, e.g. ``float32``."""
    return str(value.dtype).removeprefix("torch.")


def form_of(record: str, tensors: Mapping[str, Tensor]) -> Form:
    """Form of a record that holds `tensors`, or such as have their shapes and dtypes."""
    return {(record, name): (tuple(value.shape), dtype_name(value)) for name, value in tensors.items()}
