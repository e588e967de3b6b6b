"""The server half of a method: a plain Flower strategy."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self, cast, runtime_checkable

import flwr.app as flower
import torch
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import Result, Strategy

from fedpers.cohort import Fold, Tree, WeightedMean, entries, tree
from fedpers.errors import TrainingError, check, one_of
from fedpers.randomness import sample_clients
from fedpers.strategies.client import EXTRA, LocalUpdate
from fedpers.strategies.intake import (
    NO_REPLY,
    Form,
    Intake,
    checked,
    dtype_name,
    evaluated,
    form_of,
    outcome_of,
    usual_form,
)
from fedpers.strategies.nodes import Nodes
from fedpers.strategies.records import ARRAYS, CONFIG, from_record, num_bytes, to_record
from fedpers.strategies.wrappers import CLIENT_SIDE, CLIPPED, Aggregated, Privacy, flowers_wrapper
from fedpers.threads import one_thread

log = logging.getLogger(__name__)
WEIGHTINGS = ("samples", "uniform")
PRIVACY = "privacy"
"""Role of the clipping norm in a server's state."""
_NO_MEAN = "whose aggregate is more than a mean of the server's arrays"
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


@runtime_checkable
class FoldingGrid(Protocol):
    """A grid that takes replies in where they are made, so that they need not travel."""

    def send_and_fold(
        self, messages: Iterable[flower.Message], intake: Intake, *, timeout: float | None = None
    ) -> None:
        """Run messages and take all replies into `intake`; those that do not come in time are missing there."""


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
    aggregator : Strategy, optional
        A Flower strategy that aggregates the replies in place of the mean, e.g. ``Krum(num_malicious_nodes=1)``; see
        :class:`~fedpers.strategies.wrappers.Aggregated`.
    privacy : Privacy, optional
        Clipping and noise.

    Raises
    ------
    ConfigError
        If a value is out of its range, or `aggregator` or `privacy` does not go with the method.
    """

    update: ClassVar[type[LocalUpdate]] = LocalUpdate
    more_than_arrays: ClassVar[bool] = False
    """Whether replies to training hold records beside the model's arrays."""
    fraction: float = 1.0
    seed: int = 0
    weighting: str = "samples"
    evaluate_every: int = 1
    min_replies: int = 1
    unseen: tuple[int, ...] = ()
    aggregator: Strategy | None = None
    privacy: Privacy | None = None

    def __post_init__(self) -> None:
        check(0 < self.fraction <= 1, "fraction", self.fraction, "a number > 0 and <= 1")
        check(
            self.weighting in WEIGHTINGS, "strategy.weighting", self.weighting, one_of(WEIGHTINGS, str(self.weighting))
        )
        check(self.evaluate_every >= 1, "evaluate_every", self.evaluate_every, "a whole number >= 1")
        check(self.min_replies >= 1, "min_replies", self.min_replies, "a whole number >= 1")
        self._check_additions()
        super().__init__(fraction_train=self.fraction, arrayrecord_key=ARRAYS, configrecord_key=CONFIG)
        self.state: dict[str, Tree] = {}
        self.report = RoundReport(0)
        self._nodes: dict[int, int] = {}  # client -> node
        self._clients: dict[int, int] = {}  # node -> client
        self._directory = Nodes()
        self._arrays: Tree | None = None
        self._intake: Intake | None = None  # replies that were folded where they were made
        self._training: list[flower.Message] = []  # what this round's clients were sent
        self._addressed: list[int] = []  # who was asked for an evaluation
        self.timeout: float | None = None
        self._started = 0.0
        self.clipping_norm = math.inf  # of this round

    def _check_additions(self) -> None:
        """Refuse an aggregator or privacy that the method cannot work with."""
        name = type(self).__name__
        if self.aggregator is not None:
            given = type(self.aggregator).__name__
            check(self.plain_mean(), "aggregation", given, f"mean for {name}, {_NO_MEAN}")
            own = getattr(type(self.aggregator), "configure_train", None) is not FlowerFedAvg.configure_train
            check(not own, "aggregation", given, "a Flower strategy that needs replies and nothing else, such as Krum")
        if self.privacy is not None:
            check(self.plain_mean(), "privacy", self.privacy.name, f"none for {name}, {_NO_MEAN}")
            self._check_share()

    def _check_share(self) -> None:
        """Refuse for privacy what lets one client count for more than its share."""
        allowed = "uniform with privacy, whose noise is sized for clients of equal weight"
        check(self.weighting == "uniform", "strategy.weighting", self.weighting, allowed)
        given = type(self.aggregator).__name__
        check(self.aggregator is None, "aggregation", given, "mean with privacy, whose noise is sized for a mean")

    @classmethod
    def plain_mean(cls) -> bool:
        """Whether clients answer with the server's arrays and nothing else, of which the server takes the mean."""
        plain = PersonalizedStrategy
        hooks = ((cls.unpack, plain.unpack), (cls.reply_form, plain.reply_form), (cls.fold, plain.fold))
        own = any(hook is not given for hook, given in hooks) or cls.update.pack is not LocalUpdate.pack
        return not (own or cls.more_than_arrays)

    def check_arrays(self, arrays: Tree, sampled: int) -> None:
        """Refuse arrays, or a number of `sampled` clients, that clipping and noise cannot work with.

        Raises
        ------
        ConfigError
        """
        if self.privacy is not None:
            self.privacy.noises(sampled)
            _check_floats(arrays, self.privacy.name)

    def _check_wrapped(self, arrays: Tree) -> None:
        """Refuse what one of Flower's privacy wrappers around this strategy would get wrong."""
        wrapper = flowers_wrapper(self)
        if wrapper is None:
            return
        given, name = type(wrapper).__name__, type(self).__name__
        check(self.plain_mean(), "wrapper", given, f"none around {name}, {_NO_MEAN}")
        check(self.privacy is None, "wrapper", given, f"none around a {name} that has privacy of its own")
        self._check_share()
        check(bool(entries(arrays)), "wrapper", given, f"none around {name}, whose clients send nothing")
        more = isinstance(wrapper, CLIENT_SIDE) and type(self).send is not PersonalizedStrategy.send
        allowed = f"a ServerSide one around {name}, which sends its clients more than its arrays"
        check(not more, "wrapper", given, allowed)
        _check_floats(arrays, given)
        for entry, value in entries(arrays).items():
            allowed = f"none around arrays like '{entry}', a single number, which it does not clip"
            check(value.dim() > 0, "wrapper", given, allowed)

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
        self.timeout = timeout
        grid = self.folding(grid)
        return super().start(grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn)

    def restore(self, report: RoundReport, state: Mapping[str, Tree]) -> None:
        """Go on after a round that ran elsewhere: what was in :attr:`report` and :attr:`state` after it."""
        self.report, self.state = report, dict(state)
        self._started = time.perf_counter() - report.seconds

    def folding(self, grid: Grid) -> Grid:
        """View of `grid` that folds the replies to training where they are made, if it can.

        For whoever calls :meth:`configure_train` and :meth:`aggregate_train` itself and does not look at the replies
        in between.
        """
        can = isinstance(grid, FoldingGrid) and self.aggregator is None  # which needs all replies at once
        return cast(Grid, _Folding(self, cast(FoldingGrid, grid))) if can else grid

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
        if self.privacy is None and self.aggregator is None:
            return None
        return form_of(ARRAYS, entries(self.sent_arrays))

    def fold(self) -> Fold:
        """Empty aggregate for a round's replies."""
        if self.aggregator is not None:
            return Aggregated(self.aggregator, self.sent_arrays, self.report.round)
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
        """Node id of each client, by client number; see :class:`~fedpers.strategies.nodes.Nodes`."""
        self._clients = self._directory.clients(grid)
        self._nodes = {client: node for node, client in sorted(self._clients.items(), key=lambda pair: pair[1])}
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
        answered = self._by_client(grid.send_and_receive(messages, timeout=self.timeout))
        found = {}
        for client in clients:
            reply = answered.get(client)
            try:
                found[client] = checked(outcome_of(reply), form)
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
        self._check_wrapped(self._arrays)
        self.check_arrays(self._arrays, len(sampled))
        if self.privacy is not None:
            self.clipping_norm = float(self.state[PRIVACY]["norm"]) if PRIVACY in self.state else self.privacy.norm
        config["server-round"] = server_round
        self.report = RoundReport(server_round, sampled)
        self._intake = None
        clients = self.prepare(server_round, self._arrays, sampled, grid, "train")
        sent = self.send(server_round, self._arrays, clients)
        self._training, size = self._messages(flower.MessageType.TRAIN, sent, config, clients)
        self.report.bytes_down += size
        return self._training

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
        intake, self._intake = self._intake, None
        if intake is None:  # the grid left it to us
            intake = Intake(self)
            answered = self._by_client(replies)
            asked = [client for client in self.report.sampled if client not in self.report.failures]
            intake.take({client: outcome_of(answered.get(client)) for client in asked})
        return self._conclude(server_round, intake)

    def _conclude(self, server_round: int, intake: Intake) -> tuple[flower.ArrayRecord, flower.MetricRecord]:
        """Make the server's next arrays of a round's replies."""
        report = self.report
        for client in report.sampled:
            if client not in intake.good and client not in report.failures:
                self.leave_out(client, intake.failures.get(client, NO_REPLY.error), "train")
        good = sorted(intake.good)
        if report.failures:
            log.warning("round %d: %s", server_round, _told(report.failures, len(report.sampled)))
        if len(good) < self.min_replies:
            reasons = "".join(f"; {reason}" for reason in sorted(set(report.failures.values()))[:3])
            raise TrainingError(
                f"round {server_round}: {len(good)} of {len(report.sampled)} sampled clients sent a usable reply, "
                f"{self.min_replies} needed{reasons}."
            )
        report.bytes_up += intake.bytes_up
        losses = 0.0
        extra: dict[str, list[float]] = {}
        for metrics in (intake.good[client] for client in good):
            report.steps += int(metrics.get("steps", 0))
            report.gradients += int(metrics.get("gradients", 0))
            report.samples += int(metrics.get("samples", 0))
            losses += metrics.get("train-loss", math.nan) * metrics.get("samples", 0)
            for name, value in metrics.items():
                if name.startswith(EXTRA):
                    extra.setdefault(name.removeprefix(EXTRA), []).append(value)
        report.train_loss = losses / report.samples if report.samples else math.nan
        report.extra.update({name: sum(values) / len(values) for name, values in extra.items()})
        means = {record: _beside(values, self.sent_arrays) for record, values in intake.fold.result().items()}
        if self.privacy is not None:
            means = self._private(self.privacy, means, intake)
        arrays = self.combine(self.sent_arrays, means, good)
        report.train_seconds = report.seconds = time.perf_counter() - self._started
        metrics_out = {"train-loss": report.train_loss, "steps": report.steps, "samples": report.samples}
        return to_record(arrays), flower.MetricRecord({**metrics_out, "failures": len(report.failures)})

    def _private(self, privacy: Privacy, means: dict[str, Tree], intake: Intake) -> dict[str, Tree]:
        """Add the noise of this round; an adaptive norm moves on."""
        round, norm = self.report.round, self.clipping_norm
        counts = len(self.report.sampled), len(intake.good)
        if privacy.adaptive:
            clipped = sum(metrics[CLIPPED] for metrics in intake.good.values())
            following = privacy.next_norm(norm, clipped, *counts, self.seed, round)
            self.state[PRIVACY] = tree({"norm": torch.tensor(following, dtype=torch.float64)})
            self.report.extra["clipping_norm"] = norm
        return privacy.blur(means, norm, *counts, self.seed, round)

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

    @property
    def sent_arrays(self) -> Tree:
        """The server's arrays before this round."""
        assert self._arrays is not None
        return self._arrays

    def to_fold_elsewhere(self) -> Self:
        """Copy that checks and folds replies of the present round on another machine.

        It knows the server's arrays and what :meth:`prepare` settled, but neither nodes nor :attr:`state`; a method
        whose fold reads more overrides this.
        """
        own = copy.copy(self)
        own.state, own.report = {}, RoundReport(self.report.round)
        own._directory, own._nodes, own._clients = Nodes(), {}, {}
        own._training, own._addressed, own._intake = [], [], None
        return own

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
                metrics = evaluated(outcome_of(answered.get(client)))
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
        answered = self._by_client(grid.send_and_receive(messages, timeout=self.timeout))
        outcomes = {client: outcome_of(answered.get(client)) for client in able}
        contents = [outcome.content for outcome in outcomes.values() if outcome.content is not None]
        usual = usual_form(contents, arrays) if contents else {}
        adapted: list[int] = []
        records: list[Records] = []
        for client, before in zip(able, each, strict=True):
            try:
                declared = self.reply_form(client)
                found, _ = checked(outcomes[client], usual if declared is None else declared)
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
        answered = self._by_client(grid.send_and_receive(messages, timeout=self.timeout))
        for client in clients:
            try:
                self.report.adapted[client] = evaluated(outcome_of(answered.get(client)))
            except ValueError as problem:
                self.leave_out(client, f"adapted: {problem}", "evaluate")


class _Folding:
    """A grid whose replies to a round's training go straight into an intake."""

    def __init__(self, strategy: PersonalizedStrategy, grid: FoldingGrid) -> None:
        self._strategy = strategy
        self._grid = grid

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also what copying and pickling look for before there is a grid
            raise AttributeError(name)
        return getattr(self._grid, name)

    def send_and_receive(
        self, messages: Iterable[flower.Message], *, timeout: float | None = None
    ) -> Iterable[flower.Message]:
        """As the grid does; training is folded, and no reply is returned for it."""
        if messages is not self._strategy._training:
            found: Iterable[flower.Message] = cast(Grid, self._grid).send_and_receive(messages, timeout=timeout)
            return found
        intake = Intake(self._strategy)
        self._grid.send_and_fold(messages, intake, timeout=timeout)
        self._strategy._intake = intake
        return []


def _content(records: Records, config: flower.ConfigRecord) -> flower.RecordDict:
    content = flower.RecordDict({name: to_record(values) for name, values in records.items()})
    content[CONFIG] = config
    return content


def _check_floats(arrays: Tree, given: str) -> None:
    """Refuse counts among the arrays: they would make up most of a change's norm, and noise makes nonsense of them."""
    for name, value in entries(arrays).items():
        allowed = "a network whose shared entries are no batch statistics: another one, or strategy=fedbn"
        check(value.is_floating_point(), "privacy", f"{given} with '{name}' of {dtype_name(value)}", allowed)


def _told(failures: Mapping[int, str], total: int) -> str:
    """One line for all clients left out."""
    client, reason = next(iter(failures.items()))
    return f"{len(failures)} of {total} clients left out, e.g. client {client}: {reason}"


def _beside(values: Tree, arrays: Tree) -> Tree:
    """Return `values` on the device of the server's arrays: replies from a wire come on the CPU."""
    device = next((value.device for value in entries(arrays).values()), None)
    return values if device is None else tree({n: v.to(device) for n, v in entries(values).items()})
