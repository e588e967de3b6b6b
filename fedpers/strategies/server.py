"""The server half of a method: a plain Flower strategy."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import flwr.app as flower
import torch
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import Result
from torch import Tensor

from fedpers.cohort import Fold, Tree, WeightedMean, entries, tree
from fedpers.errors import TrainingError, check, one_of
from fedpers.randomness import sample_clients
from fedpers.strategies.client import EXTRA, IDENTIFY, LocalUpdate
from fedpers.strategies.records import ARRAYS, CONFIG, METRICS, from_record, num_bytes, to_record, trees
from fedpers.threads import one_thread

log = logging.getLogger(__name__)
WEIGHTINGS = ("samples", "uniform")
Form = dict[tuple[str, str], tuple[tuple[int, ...], str]]
"""Shape and dtype of each entry, by record and name; a length of -1 stands for any."""
Records = Mapping[str, Tree]
"""What a message carries: trees of batch size [] by record."""


@dataclass
class RoundReport:
    """What happened in a round.

    Attributes
    ----------
    round : int
    sampled : list of int
        Clients asked to train, ascending.
    failures : dict of int to str
        Those whose reply was left out, and why.
    bytes_down, bytes_up : int
        Arrays sent to the clients asked to train, and those of their usable replies; evaluation is measurement and
        no part of a method.
    steps, samples, gradients : int
        Optimizer steps, samples and gradient computations (of one client on one batch) of all replies.
    train_loss : float
        Mean over samples of the losses met while training; NaN without replies.
    extra : dict of str to float
        The method's own metrics: means over the replies of :attr:`fedpers.cohort.Reply.metrics`, and what its server
        half adds.
    clients : dict of int to dict
        Metrics of each evaluated client, see :meth:`LocalUpdate.evaluate`; empty in rounds without evaluation.
    unseen, adapted : dict of int to dict
        Metrics of clients that never train, as they come, and (at the end of a run) after adapting locally.
    evaluation_failures : dict of int to str
    seconds : float
        From the start of training to the end of evaluation.
    train_seconds : float
        Training and aggregation only.
    """

    round: int
    sampled: list[int] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    steps: int = 0
    samples: int = 0
    gradients: int = 0
    train_loss: float = math.nan
    extra: dict[str, float] = field(default_factory=dict)
    clients: dict[int, dict[str, float]] = field(default_factory=dict)
    unseen: dict[int, dict[str, float]] = field(default_factory=dict)
    adapted: dict[int, dict[str, float]] = field(default_factory=dict)
    evaluation_failures: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    train_seconds: float = 0.0


@dataclass(kw_only=True)
class PersonalizedStrategy(FlowerFedAvg):
    """Sampling, checking, weighting and averaging, written once; a method says what is combined how.

    Works in any ``ServerApp`` and on any Flower engine. Clients are told apart by their partition id, so that sampling
    and per-client state do not depend on node ids.

    Parameters
    ----------
    fraction : float
        Share of the clients that train in a round, in (0, 1].
    seed : int
        The run's seed; the sampled clients follow from it alone.
    weighting : {"samples", "uniform"}
        Weight of a reply in the average: training samples of the client, or 1.
    evaluate_every : int
        All clients are evaluated after every so many rounds, >= 1.
    min_replies : int
        Usable replies a round needs, >= 1.
    unseen : tuple of int
        Clients that are never asked to train (``FederatedData.unseen``).

    Raises
    ------
    ConfigError
        If a value is out of its range.
    """

    update: ClassVar[type[LocalUpdate]] = LocalUpdate
    fraction: float = 1.0
    seed: int = 0
    weighting: str = "samples"
    evaluate_every: int = 1
    min_replies: int = 1
    unseen: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check(0 < self.fraction <= 1, "fraction", self.fraction, "a number > 0 and <= 1")
        check(
            self.weighting in WEIGHTINGS, "strategy.weighting", self.weighting, one_of(WEIGHTINGS, str(self.weighting))
        )
        check(self.evaluate_every >= 1, "evaluate_every", self.evaluate_every, "a whole number >= 1")
        check(self.min_replies >= 1, "min_replies", self.min_replies, "a whole number >= 1")
        super().__init__(fraction_train=self.fraction, arrayrecord_key=ARRAYS, configrecord_key=CONFIG)
        self.state: dict[str, Tree] = {}
        self.report = RoundReport(0)
        self._nodes: dict[int, int] = {}  # client -> node
        self._clients: dict[int, int] = {}  # node -> client
        self._arrays: Tree | None = None
        self._addressed: list[int] = []  # who was asked for an evaluation
        self._timeout: float | None = None
        self._started = 0.0

    def start(
        self,
        grid: Grid,
        initial_arrays: flower.ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: flower.ConfigRecord | None = None,
        evaluate_config: flower.ConfigRecord | None = None,
        evaluate_fn: Callable[[int, flower.ArrayRecord], flower.MetricRecord | None] | None = None,
    ) -> Result:
        """Run Flower's rounds from the beginning; see Flower's ``Strategy.start``.

        What the server knows beside the arrays it returns (:attr:`state`, e.g. a generator, control variates) starts
        anew, and is there afterwards. `timeout` holds for every exchange, those before a round too.
        """
        self.state = {}
        self._timeout = timeout
        return super().start(grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn)

    # -------------------------------------------------- what a method overrides

    def prepare(self, round: int, arrays: Tree, clients: list[int], grid: Grid, kind: str) -> list[int]:
        """Find out from the clients what must be known before they are sent anything (:meth:`ask`).

        Parameters
        ----------
        round : int
        arrays : Tree
        clients : list of int
            Who is about to be addressed.
        grid : Grid
        kind : {"train", "evaluate"}
            What for.

        Returns
        -------
        list of int
            Who of them still is; the others are booked as failures.
        """
        return clients

    def send(self, round: int, arrays: Tree, clients: list[int]) -> Records | Sequence[Records]:
        """Records for `clients`: one mapping for all of them, or one for each in their order.

        The default sends the model's arrays to everybody.
        """
        return {ARRAYS: arrays}

    def unpack(self, records: dict[str, Tree], client: int) -> dict[str, Tree]:
        """Undo :meth:`LocalUpdate.pack`; a ValueError says why a reply cannot be used."""
        return records

    def reply_form(self, client: int) -> Form | None:
        """Entries a client's reply to training must hold; None asks for what most replies hold."""
        return None

    def fold(self) -> Fold:
        """Empty aggregate for a round's replies."""
        return WeightedMean()

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """Make the server's next arrays.

        Parameters
        ----------
        arrays : Tree
            Before the round.
        means : mapping of record to Tree
            Result of the fold.
        clients : list of int
            Whose replies are in it.
        """
        return means.get(ARRAYS, arrays)

    # ------------------------------------------------------------------ clients

    def nodes(self, grid: Grid) -> dict[int, int]:
        """Node id of each client, by client number; asked anew when nodes come or go.

        Nodes whose app does not know the question (any other Flower app) are numbered in order of their ids.
        """
        ids = sorted(grid.get_node_ids())
        if set(ids) != set(self._clients):
            replies = grid.send_and_receive(
                [flower.Message(flower.RecordDict(), node, IDENTIFY) for node in ids], timeout=60.0
            )
            known = {
                reply.metadata.src_node_id: int(reply.content.metric_records[METRICS]["partition-id"])  # type: ignore[arg-type]
                for reply in replies
                if reply.has_content() and METRICS in reply.content.metric_records
            }
            if len(set(known.values())) < len(known):
                raise TrainingError("two nodes hold the same partition-id.")
            if known:
                for silent in sorted(set(ids) - set(known)):
                    log.warning("node %d does not say which client it holds and is left out", silent)
                self._clients = known
            else:
                self._clients = dict(zip(ids, range(len(ids)), strict=True))
            self._nodes = {client: node for node, client in self._clients.items()}
        return self._nodes

    @property
    def seen(self) -> list[int]:
        """Clients known to the server that may train, ascending."""
        return sorted(set(self._nodes) - set(self.unseen))

    @property
    def num_clients(self) -> int:
        """Number of clients that may train."""
        return len(self.seen)

    def sample(self, round: int) -> list[int]:
        """Clients that train in a round, ascending: the same for every method under one seed."""
        known = self.seen
        return [known[place] for place in sample_clients(self.seed, round, len(known), self.fraction)]

    def ask(
        self, grid: Grid, question: str, round: int, clients: list[int], records: Records, kind: str, form: Form
    ) -> dict[int, tuple[dict[str, Tree], dict[str, float]]]:
        """Put a question to clients, which the client half answers with its method ``query_{question}``.

        Parameters
        ----------
        grid : Grid
        question : str
        round : int
        clients : list of int
        records : mapping of record to Tree
            Sent to all of them.
        kind : {"train", "evaluate"}
            What the answers are for: those for training count in the round's bytes.
        form : Form
            Entries an answer must hold.

        Returns
        -------
        dict of int to (records, metrics)
            Of clients with a usable answer; the others are booked as failures.
        """
        config = flower.ConfigRecord({"server-round": round})
        content = _content(records, config)
        messages = [flower.Message(content, self._nodes[c], f"query.{question}") for c in clients]
        answered = self._by_client(grid.send_and_receive(messages, timeout=self._timeout))
        found = {}
        for client in clients:
            reply = answered.get(client)
            try:
                found[client] = self._checked(reply, form)
            except ValueError as problem:
                self.leave_out(client, str(problem), kind)
                continue
            if kind == "train" and reply is not None:
                self.report.bytes_up += num_bytes(reply.content)
        if kind == "train":
            self.report.bytes_down += num_bytes(content) * len(clients)
        return found

    def leave_out(self, client: int, reason: str, kind: str) -> None:
        """Book a client as failed in this round's training or evaluation."""
        failures = self.report.failures if kind == "train" else self.report.evaluation_failures
        failures[client] = reason
        log.info("round %d: client %d left out: %s", self.report.round, client, reason)

    def _messages(
        self, kind: str, sent: Records | Sequence[Records], config: flower.ConfigRecord, clients: list[int]
    ) -> tuple[list[flower.Message], int]:
        """Messages to `clients`, which share one content where all are sent the same, and their bytes."""
        if isinstance(sent, Mapping):
            content = _content(sent, config)
            contents = [content] * len(clients)
            size = num_bytes(content) * len(clients)
        else:
            made = {id(own): _content(own, config) for own in sent}  # records that several are sent are made once
            sizes = {key: num_bytes(content) for key, content in made.items()}
            contents = [made[id(own)] for own in sent]
            size = sum(sizes[id(own)] for own in sent)
        pairs = zip(clients, contents, strict=True)
        return [flower.Message(content, self._nodes[client], kind) for client, content in pairs], size

    # ----------------------------------------------------------------- training

    def summary(self) -> None:
        """Log the settings."""
        log.info(
            "%s: fraction %g, weighting %s, seed %d", type(self).__name__, self.fraction, self.weighting, self.seed
        )

    def configure_train(
        self, server_round: int, arrays: flower.ArrayRecord, config: flower.ConfigRecord, grid: Grid
    ) -> Iterable[flower.Message]:
        """Address the sampled clients."""
        self._started = time.perf_counter()
        if not self.nodes(grid):
            raise TrainingError(f"round {server_round}: no client is connected.")
        sampled = self.sample(server_round)
        self._arrays = from_record(arrays)
        config["server-round"] = server_round
        self.report = RoundReport(server_round, sampled)
        clients = self.prepare(server_round, self._arrays, sampled, grid, "train")
        sent = self.send(server_round, self._arrays, clients)
        messages, size = self._messages(flower.MessageType.TRAIN, sent, config, clients)
        self.report.bytes_down += size
        return messages

    @one_thread()
    def aggregate_train(
        self, server_round: int, replies: Iterable[flower.Message]
    ) -> tuple[flower.ArrayRecord | None, flower.MetricRecord | None]:
        """Fold the usable replies; the others are counted and named in :attr:`report`.

        Raises
        ------
        TrainingError
            If fewer than `min_replies` are usable.
        """
        assert self._arrays is not None
        report = self.report
        answered = self._by_client(replies)
        usual = self._expected([answered[client] for client in report.sampled if client in answered])
        fold = self.fold()
        good: list[int] = []
        losses = 0.0
        extra: dict[str, list[float]] = {}
        for client in report.sampled:  # in a fixed order, whatever the order of arrival
            if client in report.failures:  # it did not get as far as training
                continue
            reply = answered.get(client)
            try:
                declared = self.reply_form(client)
                records, metrics = self._checked(reply, usual if declared is None else declared)
                records = self.unpack(records, client)
            except ValueError as problem:
                self.leave_out(client, str(problem), "train")
                continue
            report.bytes_up += num_bytes(reply.content) if reply is not None else 0
            fold.add(records, self.weight(metrics), client)
            good.append(client)
            report.steps += int(metrics.get("steps", 0))
            report.gradients += int(metrics.get("gradients", 0))
            report.samples += int(metrics.get("samples", 0))
            losses += metrics.get("train-loss", math.nan) * metrics.get("samples", 0)
            for name, value in metrics.items():
                if name.startswith(EXTRA):
                    extra.setdefault(name.removeprefix(EXTRA), []).append(value)
        if report.failures:
            log.warning("round %d: %s", server_round, _told(report.failures, len(report.sampled)))
        if len(good) < self.min_replies:
            reasons = "".join(f"; {reason}" for reason in sorted(set(report.failures.values()))[:3])
            raise TrainingError(
                f"round {server_round}: {len(good)} of {len(report.sampled)} sampled clients sent a usable reply, "
                f"{self.min_replies} needed{reasons}."
            )
        report.train_loss = losses / report.samples if report.samples else math.nan
        report.extra.update({name: sum(values) / len(values) for name, values in extra.items()})
        means = {record: _beside(values, self._arrays) for record, values in fold.result().items()}
        arrays = self.combine(self._arrays, means, good)
        report.train_seconds = report.seconds = time.perf_counter() - self._started
        metrics_out = {"train-loss": report.train_loss, "steps": report.steps, "samples": report.samples}
        return to_record(arrays), flower.MetricRecord({**metrics_out, "failures": len(report.failures)})

    def _by_client(self, replies: Iterable[flower.Message]) -> dict[int, flower.Message]:
        """Replies by client; one from a node that was not asked is no reply."""
        found = {}
        for reply in replies:
            client = self._clients.get(reply.metadata.src_node_id)
            if client is None:
                log.warning("a reply from node %d, which holds no client, is left out", reply.metadata.src_node_id)
            else:
                found[client] = reply
        return found

    def weight(self, metrics: Mapping[str, float]) -> float:
        """Weight of a reply in the average."""
        return 1.0 if self.weighting == "uniform" else float(metrics["num-examples"])

    def _expected(self, replies: list[flower.Message]) -> Form:
        """Entries that most replies hold, formed as the server's arrays or else as in most replies."""
        assert self._arrays is not None
        known = form_of(ARRAYS, entries(self._arrays))
        seen = Counter(frozenset(_form(reply).items()) for reply in replies if reply.has_content())
        if not seen:
            return {}

        agreeing = [form for form in seen if all(known.get(entry, kind) == kind for entry, kind in form)]
        most = dict(max(agreeing or seen, key=lambda form: seen[form]))
        return {entry: known.get(entry, kind) for entry, kind in most.items()}

    def _checked(self, reply: flower.Message | None, expected: Form) -> tuple[dict[str, Tree], dict[str, float]]:
        """Records and metrics of a reply; ValueError says why it cannot be used."""
        metrics = self._measured(reply)
        assert reply is not None
        if differing := sorted("/".join(entry) for entry in _form(reply).keys() ^ expected.keys()):
            raise ValueError(f"'{differing[0]}' is in its reply or in those of the other clients, but not in both")
        for name in ("steps", "samples", "gradients", "train-loss"):
            if not math.isfinite(metrics.get(name, 0.0)):
                raise ValueError(f"{name} is {metrics[name]}")
        if self.weighting == "samples" and not 0 < metrics.get("num-examples", 0) < math.inf:
            raise ValueError(f"num-examples is {metrics.get('num-examples')}")
        records = _trees(reply)
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

    # --------------------------------------------------------------- evaluation

    def configure_evaluate(
        self, server_round: int, arrays: flower.ArrayRecord, config: flower.ConfigRecord, grid: Grid
    ) -> Iterable[flower.Message]:
        """Address all clients, also those that were not sampled, every `evaluate_every` rounds."""
        if server_round % self.evaluate_every:
            return []
        return self.evaluation_messages(server_round, arrays, config, grid)

    def evaluation_messages(
        self, server_round: int, arrays: flower.ArrayRecord, config: flower.ConfigRecord, grid: Grid
    ) -> list[flower.Message]:
        """Address all clients now, also the unseen; without a training before it, this is where a round starts."""
        if self.report.round != server_round or not self.report.sampled:
            self.report = RoundReport(server_round)
            self._started = time.perf_counter()
        config["server-round"] = server_round
        tensors = from_record(arrays)
        clients = self.prepare(server_round, tensors, list(self.nodes(grid)), grid, "evaluate")
        self._addressed = clients
        sent = self.send(server_round, tensors, clients)
        return self._messages(flower.MessageType.EVALUATE, sent, config, clients)[0]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[flower.Message]) -> flower.MetricRecord | None:
        """Collect the clients' metrics in :attr:`report`; return their means over clients."""
        report = self.report
        answered = self._by_client(replies)
        for client in self._addressed:
            try:
                metrics = self._measured(answered.get(client))
            except ValueError as problem:
                self.leave_out(client, str(problem), "evaluate")
                continue
            (report.unseen if client in self.unseen else report.clients)[client] = metrics
        if report.evaluation_failures:
            total = len(report.clients) + len(report.unseen) + len(report.evaluation_failures)
            log.warning("evaluation of round %d: %s", server_round, _told(report.evaluation_failures, total))
        report.clients = dict(sorted(report.clients.items()))
        report.unseen = dict(sorted(report.unseen.items()))
        report.seconds = time.perf_counter() - self._started
        if not report.clients:
            return None
        names = sorted({name for metrics in report.clients.values() for name in metrics if name != "num-examples"})
        values = {name: [m[name] for m in report.clients.values() if name in m] for name in names}
        return flower.MetricRecord({name: sum(own) / len(own) for name, own in values.items()})

    def adapt(self, round: int, arrays: Tree, grid: Grid, clients: list[int]) -> tuple[list[int], list[Records]]:
        """Let clients that never trained adapt: they train once, and nothing of it reaches the server.

        Returns
        -------
        list of int
            Who adapted; the others are booked as failures.
        list of mapping of record to Tree
            What each of them is evaluated with: what it was sent, its own arrays in place of the server's.
        """
        self._arrays = arrays
        able = self.prepare(round, arrays, clients, grid, "evaluate")
        sent = self.send(round, arrays, able)
        each = [sent] * len(able) if isinstance(sent, Mapping) else sent
        config = flower.ConfigRecord({"server-round": round})
        messages, _ = self._messages(flower.MessageType.TRAIN, sent, config, able)
        answered = self._by_client(grid.send_and_receive(messages, timeout=self._timeout))
        usual = self._expected([answered[client] for client in able if client in answered])
        adapted: list[int] = []
        records: list[Records] = []
        for client, before in zip(able, each, strict=True):
            try:
                declared = self.reply_form(client)
                found, _ = self._checked(answered.get(client), usual if declared is None else declared)
                own = self.unpack(found, client)
            except ValueError as problem:
                self.leave_out(client, f"it did not adapt: {problem}", "evaluate")
                continue
            adapted.append(client)
            records.append({**before, **({ARRAYS: own[ARRAYS]} if ARRAYS in own else {})})
        return adapted, records

    def evaluate_adapted(self, arrays: flower.ArrayRecord, config: flower.ConfigRecord, grid: Grid) -> None:
        """Let the unseen clients adapt and measure them, into ``report.adapted``; for the end of a run."""
        connected = self.nodes(grid)
        for client in sorted(set(self.unseen) - set(connected)):
            self.leave_out(client, "it is not connected", "evaluate")
        round = self.report.round + 1
        clients, records = self.adapt(
            round, from_record(arrays), grid, [client for client in sorted(self.unseen) if client in connected]
        )
        config["server-round"] = round
        messages, _ = self._messages(flower.MessageType.EVALUATE, records, config, clients)
        answered = self._by_client(grid.send_and_receive(messages, timeout=self._timeout))
        for client in clients:
            try:
                self.report.adapted[client] = self._measured(answered.get(client))
            except ValueError as problem:
                self.leave_out(client, f"adapted: {problem}", "evaluate")

    def _measured(self, reply: flower.Message | None) -> dict[str, float]:
        """Metrics of a reply; ValueError says why there are none."""
        if reply is None:
            raise ValueError("no reply")
        if reply.has_error():
            raise ValueError(reply.error.reason or f"error {reply.error.code}")
        return _metrics_of(reply)


def _content(records: Records, config: flower.ConfigRecord) -> flower.RecordDict:
    content = flower.RecordDict({name: to_record(values) for name, values in records.items()})
    content[CONFIG] = config
    return content


def _trees(reply: flower.Message) -> dict[str, Tree]:
    """Records of a reply; ValueError says why they cannot be read."""
    try:
        return trees(reply.content)
    except (TypeError, OSError, EOFError) as problem:
        raise ValueError(f"an array cannot be read: {problem}") from problem


def _form(reply: flower.Message) -> Form:
    return {
        (record, name): (tuple(array.shape), array.dtype)
        for record, values in reply.content.array_records.items()
        for name, array in values.items()
    }


def _told(failures: Mapping[int, str], total: int) -> str:
    """One line for all clients left out."""
    client, reason = next(iter(failures.items()))
    return f"{len(failures)} of {total} clients left out, e.g. client {client}: {reason}"


def dtype_name(value: Tensor) -> str:
    """Dtype as messages name it, e.g. ``float32``."""
    return str(value.dtype).removeprefix("torch.")


def form_of(record: str, tensors: Mapping[str, Tensor]) -> Form:
    """Form of a record that holds `tensors`, or such as have their shapes and dtypes."""
    return {(record, name): (tuple(value.shape), dtype_name(value)) for name, value in tensors.items()}


def _beside(values: Tree, arrays: Tree) -> Tree:
    """Return `values` on the device of the server's arrays: replies from a wire come on the CPU."""
    device = next((value.device for value in entries(arrays).values()), None)
    return values if device is None else tree({n: v.to(device) for n, v in entries(values).items()})


def _metrics_of(reply: flower.Message) -> dict[str, float]:
    merged: dict[str, Any] = {}
    for record in reply.content.metric_records.values():
        merged.update(record)
    return {name: float(value) for name, value in merged.items() if isinstance(value, int | float)}
