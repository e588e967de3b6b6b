"""Malformed replies and bad settings: ``python -m tests.fuzz [replies|configs] [--cases N] [--seed S]``.

``replies``: a round of every method over serialised messages, in which one client's reply to training or evaluation is
damaged in a way that is drawn. The round must end with that client left out and named, and with the server's arrays and
state, or the metrics, that the other clients' replies alone give. ``configs``: settings with a bad value that is drawn,
as typed. The command must end with 2, or 1 where only data or training can tell, and one sentence without a traceback.
Exit status 1 if any case does not.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import logging
import math
import struct
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import flwr.app as flower
import numpy as np
import torch
from flwr.common.serde import message_from_proto, message_to_proto
from torch import Tensor

from fedpers.app import _main
from fedpers.cohort import leaves
from fedpers.flower_private import server_identity
from fedpers.process import one_thread
from fedpers.records import from_record
from fedpers.runtime.local import LocalGrid
from fedpers.server.collect import UNBOUNDED
from fedpers.settings import Config
from fedpers.strategies import STRATEGIES, PersonalizedStrategy, make_strategy, option_types
from tests.problems import problem

Reply = flower.Message | None
Damage = Callable[[flower.Message, np.random.Generator], Reply]


# -------------------------------------------------------------------- replies


def _arrays(reply: flower.Message) -> list[tuple[flower.ArrayRecord, str]]:
    return [(record, name) for record in reply.content.array_records.values() for name in record]


def _one(reply: flower.Message, rng: np.random.Generator) -> tuple[flower.ArrayRecord, str, flower.Array] | None:
    arrays = _arrays(reply)
    if not arrays:
        return None
    record, name = arrays[rng.integers(len(arrays))]
    return record, name, record[name]


def on_an_array(change: Callable[[flower.Array, np.random.Generator], flower.Array | None]) -> Damage:
    """Damage one array; None from `change` means it has nothing to damage."""

    def damage(reply: flower.Message, rng: np.random.Generator) -> Reply:
        picked = _one(reply, rng)
        if picked is None:
            return lost(reply, rng)
        record, name, array = picked
        changed = change(array, rng)
        if changed is None:
            return lost(reply, rng)
        record[name] = changed
        return reply

    return damage


def on_metrics(change: Callable[[flower.MetricRecord, np.random.Generator], None]) -> Damage:
    def damage(reply: flower.Message, rng: np.random.Generator) -> Reply:
        change(next(iter(reply.content.metric_records.values())), rng)
        return reply

    return damage


def lost(reply: flower.Message, rng: np.random.Generator) -> Reply:
    return None


def error(reply: flower.Message, rng: np.random.Generator) -> Reply:
    reply.__dict__["_content"] = None
    reason = [None, "", "out of memory", "x" * 5000, "\x00\n{}%s"][rng.integers(5)]
    reply.__dict__["_error"] = flower.Error(int(rng.integers(0, 300)), reason)
    return reply


def empty(reply: flower.Message, rng: np.random.Generator) -> Reply:
    for name in list(reply.content):
        del reply.content[name]
    return reply


def cut(array: flower.Array, rng: np.random.Generator) -> flower.Array:
    return flower.Array(array.dtype, array.shape, array.stype, array.data[: rng.integers(len(array.data))])


def garbage(array: flower.Array, rng: np.random.Generator) -> flower.Array:
    return flower.Array(array.dtype, array.shape, array.stype, rng.bytes(int(rng.integers(0, 400))))


def _header(text: str) -> bytes:
    padded = text + " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded.encode("latin1")


def lying_header(array: flower.Array, rng: np.random.Generator) -> flower.Array:
    """The header claims more than there is, up to exabytes, or what no array has."""
    shapes = ["(10000000000000,)", "(-1,)", "(1000000, 1000000, 1000000)", "(2**70,)", "None", "(1.5,)", "((3,),)"]
    kinds = ["<f4", "<f8", "|O", "<U9", "V8", "[('a', '<f4')]", "nonsense", "<f4'], 'x': __import__('os')}#"]
    kind, shape = kinds[rng.integers(len(kinds))], shapes[rng.integers(len(shapes))]
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"
    return flower.Array(array.dtype, array.shape, array.stype, _header(text) + rng.bytes(64))


def pickled(array: flower.Array, rng: np.random.Generator) -> flower.Array:
    """An array of objects, which only a pickle can hold."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}, None], dtype=object), allow_pickle=True)
    return flower.Array(array.dtype, array.shape, array.stype, buffer.getvalue())


def other_serializer(array: flower.Array, rng: np.random.Generator) -> flower.Array:
    return flower.Array(array.dtype, array.shape, "somebody.else", array.data)


def not_finite(array: flower.Array, rng: np.random.Generator) -> flower.Array | None:
    values = array.numpy().copy()
    if not np.issubdtype(values.dtype, np.floating) or not values.size:
        return None
    values.reshape(-1)[rng.integers(values.size)] = [np.nan, np.inf, -np.inf][rng.integers(3)]
    return flower.Array(values)


def other_shape(array: flower.Array, rng: np.random.Generator) -> flower.Array:
    values = array.numpy()
    new = [values[None], np.zeros((0, 3, 1), values.dtype), np.zeros((2, *values.shape, 2), values.dtype)]
    return flower.Array(new[rng.integers(len(new))])


def other_dtype(array: flower.Array, rng: np.random.Generator) -> flower.Array:
    kinds = [k for k in ("bool", "int16", "float16", "complex128", "uint64", "datetime64[s]") if k != array.dtype]
    return flower.Array(array.numpy().astype(kinds[rng.integers(len(kinds))]))


def false_label(array: flower.Array, rng: np.random.Generator) -> flower.Array:
    """What the message says of an array is not what is in it."""
    values = np.zeros((7, 2, 1, 1, 1), np.int16)
    return flower.Array(array.dtype, array.shape, array.stype, flower.Array(values).data)


def renamed(reply: flower.Message, rng: np.random.Generator) -> Reply:
    picked = _one(reply, rng)
    if picked is None:
        return lost(reply, rng)
    record, name, array = picked
    del record[name]
    record[["", name + ".", name.upper() + "_", "__class__", "../" + name][rng.integers(5)]] = array
    return reply


def left_out(reply: flower.Message, rng: np.random.Generator) -> Reply:
    picked = _one(reply, rng)
    if picked is None:
        return lost(reply, rng)
    del picked[0][picked[1]]
    return reply


def added(reply: flower.Message, rng: np.random.Generator) -> Reply:
    reply.content["more"] = flower.ArrayRecord({"x": flower.Array(np.zeros(3, np.float32))})
    return reply


def bad_number(metrics: flower.MetricRecord, rng: np.random.Generator) -> None:
    name = ["steps", "samples", "gradients", "train-loss"][rng.integers(4)]
    metrics[name] = [math.nan, math.inf, -math.inf][rng.integers(3)]


def bad_metric(metrics: flower.MetricRecord, rng: np.random.Generator) -> None:
    names = list(metrics)
    name = names[rng.integers(len(names))]
    damage = [math.nan, -math.inf] if name.endswith(UNBOUNDED) else [math.nan, math.inf, -math.inf]
    metrics[name] = damage[rng.integers(len(damage))]


DAMAGES: dict[str, Damage] = {
    "lost": lost,
    "error": error,
    "empty": empty,
    "cut short": on_an_array(cut),
    "garbage": on_an_array(garbage),
    "lying header": on_an_array(lying_header),
    "pickled": on_an_array(pickled),
    "other serializer": on_an_array(other_serializer),
    "not finite": on_an_array(not_finite),
    "other shape": on_an_array(other_shape),
    "other dtype": on_an_array(other_dtype),
    "false label": on_an_array(false_label),
    "renamed": renamed,
    "left out": left_out,
    "added": added,
    "bad number": on_metrics(bad_number),
}
EVALUATION_DAMAGES: dict[str, Damage] = {
    "lost": lost,
    "error": error,
    "empty": empty,
    "bad metric": on_metrics(bad_metric),
}


@dataclass
class Prepared:
    """A method after its clients' replies have come, before they are aggregated."""

    strategy: PersonalizedStrategy
    replies: dict[int, flower.Message]
    evaluations: dict[int, flower.Message]

    def aggregate(self, replies: list[flower.Message]) -> tuple[dict[str, Tensor], PersonalizedStrategy]:
        """Arrays and state of the server for some replies."""
        strategy = copy.deepcopy(self.strategy)
        new, _ = strategy.aggregate_train(2, replies)
        assert new is not None
        outcome = {f"arrays/{n}": v for n, v in leaves(from_record(new)).items()}
        for role, values in strategy.state.items():
            outcome.update({f"{role}/{n}": v for n, v in leaves(values).items()})
        return outcome, strategy

    def evaluate(self, replies: list[flower.Message]) -> tuple[dict[str, Tensor], PersonalizedStrategy]:
        """Metrics of an evaluation for some replies."""
        strategy = copy.deepcopy(self.strategy)
        strategy._evaluating_clients = sorted(strategy.exchange.node_of)
        strategy.aggregate_evaluate(2, replies)
        rows = {**strategy.report.clients, **strategy.report.unseen}
        return {f"{c}/{name}": torch.tensor(v) for c, metrics in rows.items() for name, v in metrics.items()}, strategy


def prepared(method: str) -> Prepared:
    """The second round of a method on its small problem."""
    given = problem(method)
    strategy, update = make_strategy(
        method, given.options, server={"unseen": given.data.unseen, "seed": 1}, training=given.training
    )
    app = update.client_app(given.network, given.data, seed=1)
    strategy.attach(app)
    grid = LocalGrid(app, given.data.num_clients, clients_at_once=100, workers=1)
    arrays, config = app.initial_arrays(), flower.ConfigRecord()
    strategy.begin()
    new, _ = strategy.aggregate_train(1, grid.send_and_receive(strategy.configure_train(1, arrays, config, grid)))
    assert new is not None
    evaluations = list(grid.send_and_receive(strategy.configure_evaluate(2, new, config, grid)))
    replies = list(grid.send_and_receive(strategy.configure_train(2, new, config, grid)))
    grid.close()
    client_of = strategy.exchange.client_of
    by_client = [{client_of[r.metadata.src_node_id]: r for r in lot} for lot in (replies, evaluations)]
    return Prepared(strategy, *by_client)


def travelled(message: flower.Message) -> flower.Message:
    """The message as it comes from a wire."""
    return message_from_proto(message_to_proto(message))


def reply_case(given: Prepared, kind: str, rng: np.random.Generator) -> str:
    """Damage one reply; say what went wrong, nothing if it ended as defined."""
    training = kind in DAMAGES
    replies = given.replies if training else given.evaluations
    aggregate = given.aggregate if training else given.evaluate
    damage = DAMAGES[kind] if training else EVALUATION_DAMAGES[kind.removeprefix("evaluation: ")]
    clients = sorted(replies)
    client = clients[rng.integers(len(clients))]
    others = [travelled(replies[c]) for c in clients if c != client]
    damaged = damage(travelled(replies[client]), rng)
    expected, _ = aggregate(others)
    at = int(rng.integers(len(others) + 1))
    sent = list(others) if damaged is None else [*others[:at], damaged, *others[at:]]
    try:
        actual, strategy = aggregate(sent)
    except Exception as problem:
        return f"raised {type(problem).__name__}: {problem}"
    failures = strategy.report.failures if training else strategy.report.evaluation_failures
    if list(failures) != [client]:
        return f"left out {failures}, expected client {client}"
    if not failures[client]:
        return "left out without a reason"
    if actual.keys() != expected.keys() or any(not torch.equal(actual[n], v) for n, v in expected.items()):
        return "aggregated something else than the other replies"
    return ""


def fuzz_replies(cases: int, seed: int) -> int:
    """Damage replies of all methods; print what came of it."""
    rng = np.random.default_rng(seed)
    known: dict[str, Prepared] = {}
    done, wrong = Counter[str](), []
    with server_identity(1):
        kinds = [*DAMAGES, *(f"evaluation: {kind}" for kind in EVALUATION_DAMAGES)]
        pairs = itertools.cycle(itertools.product(kinds, STRATEGIES))
        for kind, method in itertools.islice(pairs, cases):
            if method not in known:
                known[method] = prepared(method)
            if trouble := reply_case(known[method], kind, rng):
                wrong.append(f"{method}, {kind}: {trouble}")
            done[kind] += 1
    for kind, count in done.items():
        print(f"{kind:<24}{count:6}")
    for line in wrong[:40]:
        print(line)
    print(f"{sum(done.values())} malformed replies to {len(known)} methods, {len(wrong)} not handled as defined")
    return 1 if wrong else 0


# -------------------------------------------------------------------- configs

SMALL = [
    "rounds=1",
    "partition.num_clients=4",
    "partition.alpha=10.0",
    "runtime.clients_at_once=4",
    "runtime.workers=1",
]
GROUPS = ("strategy", "dataset", "partition", "heterogeneity", "split", "model", "runtime", "tracker")
WRONG_TYPE: dict[type, list[str]] = {
    int: ["abc", "1.5", "[1,2]", "{a:1}", "nan", "true", "''"],
    float: ["abc", "[1.0]", "{a:1}", "nan", "true", "''"],
    bool: ["maybe", "2", "[true]", "''"],
    str: ["[a,b]", "{a:1}", "no_such_thing_at_all"],
}
OUT_OF_RANGE: dict[type, list[str]] = {int: ["-5"], float: ["-3.5", "-.inf"]}
FREE_TEXT = {"output", "dataset.root", "tracker.wandb.project", "tracker.wandb.name", "tracker.wandb.group"}
"""Text of which any is good, or which names what is looked up later."""


def _settings(kind: type, prefix: str) -> Iterator[tuple[str, Any]]:
    """All settings of a dataclass of settings, with their types."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        key, hint = prefix + field.name, hints[field.name]
        options = [o for o in getattr(hint, "__args__", (hint,)) if isinstance(o, type)] or [hint]
        nested = [o for o in options if is_dataclass(o)]
        if nested:
            yield from _settings(nested[0], f"{key}.")
        elif key != "strategy":
            yield key, options


def bad_settings(rng: np.random.Generator) -> Iterator[list[str]]:
    """Command lines with one bad setting, in a drawn order."""
    lines: list[list[str]] = [[f"{group}=no_such_{group}"] for group in GROUPS]
    unknown = ["no_such_key=1", "training.no_such_key=1", "strategy.no_such_key=1", "rounds", "rounds=", "=3"]
    lines += [[line] for line in unknown]
    for key, options in _settings(Config, ""):
        if key.startswith("tracker.") or key in FREE_TEXT:
            continue
        kinds = [str] if str in options else [kind for kind in (float, int, bool) if kind in options][:1]
        lines += [[f"{key}={value}"] for kind in kinds for value in WRONG_TYPE[kind]]
        for option in (int, float):
            if option in options:
                lines += [[f"{key}={value}"] for value in OUT_OF_RANGE[option]]
    for method in STRATEGIES:
        for name, hint in option_types(method).items():
            options = [o for o in getattr(hint, "__args__", (hint,)) if isinstance(o, type)] or [hint]
            kinds = [k for k in (bool, int, float, str) if k in options]
            for kind in kinds[-1:]:
                lines += [[f"strategy={method}", f"strategy.{name}={value}"] for value in WRONG_TYPE[kind]]
    for place in rng.permutation(len(lines)):
        yield lines[place]


def config_case(line: list[str], folder: Path) -> str:
    """Type one bad setting; say what went wrong, nothing if it ended as defined."""
    given = [setting for setting in SMALL if not any(setting.split("=")[0] == a.split("=")[0] for a in line)]
    if any(
        line[0] == f"strategy={method}" for method in ("fedrap", "fedmf", "fedncf", "pfedrec", "no_learning")
    ):  # of ratings
        given = [setting for setting in given if not setting.startswith("partition")]
    out, err = io.StringIO(), io.StringIO()
    handlers = list(logging.getLogger().handlers)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = _main([*line, *given, f"output={folder}"])
    except BaseException:
        return f"raised\n{traceback.format_exc()}"
    finally:
        for handler in set(logging.getLogger().handlers) - set(handlers):
            logging.getLogger().removeHandler(handler)
            handler.close()
    sentences = [text for text in err.getvalue().splitlines() if text.startswith("fedpers: ")]
    if "Traceback" in err.getvalue() + out.getvalue():
        return f"exit {code} with a traceback: {err.getvalue()[-600:]}"
    if code == 0:
        return "accepted"
    if code not in (1, 2) or len(sentences) != 1:
        return f"exit {code}, sentences: {sentences}"
    return ""


def fuzz_configs(cases: int, seed: int) -> int:
    """Type bad settings; print what came of them."""
    rng = np.random.default_rng(seed)
    wrong, count = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for line in itertools.islice(bad_settings(rng), cases):
            count += 1
            if trouble := config_case(line, Path(folder)):
                wrong.append(f"{' '.join(line)}: {trouble}")
    for text in wrong[:60]:
        print(text)
    print(f"{count} bad settings, {len(wrong)} not handled as defined")
    return 1 if wrong else 0


def main(arguments: list[str] | None = None) -> int:
    """Run one kind of cases, or both."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("what", nargs="?", choices=["replies", "configs"])
    parser.add_argument("--cases", type=int, help="default: 1000 replies, 300 settings")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    logging.getLogger("fedpers").setLevel(logging.ERROR)
    status = 0
    with one_thread():
        if options.what != "configs":
            status |= fuzz_replies(options.cases or 1000, options.seed)
        if options.what != "replies":
            status |= fuzz_configs(options.cases or 300, options.seed)
    return status


if __name__ == "__main__":
    sys.exit(main())
