"""The server half of a method: a plain Flower strategy."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast

import flwr.app as flower
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import Result, Strategy
from pydantic import Field

from fedpers.client.app import CohortApp
from fedpers.client.update import LocalUpdate
from fedpers.cohort import Fold, Records, Tree, WeightedMean, entries, tree
from fedpers.custom import check_overrides
from fedpers.errors import TrainingError, check
from fedpers.failures import FirstOfEachKind, sentence_of
from fedpers.identity import INVERSE_VARIANCE, READS, check_config, check_halves, check_plain_clients, register
from fedpers.process import one_thread
from fedpers.randomness import sample_clients
from fedpers.records import ARRAYS, CONFIG, from_record, to_record
from fedpers.server.adaptation import adapt_clients, evaluate_adapted
from fedpers.server.collect import (
    NO_REPLY,
    NOT_ADDRESSED,
    Collected,
    ReplyCollector,
    ReplyRules,
    Schema,
    evaluation_metrics,
    schema_of,
    validated_reply,
)
from fedpers.server.common import is_common, measure_common
from fedpers.server.exchange import Exchange
from fedpers.server.folding import folding
from fedpers.server.postprocessors.base import Postprocessor
from fedpers.server.report import RoundReport
from fedpers.server.work import ServerWork, missing_work
from fedpers.settings import RoundsConfig, options

log = logging.getLogger(__name__)
Phase = Literal["train", "evaluate"]
"""What clients are asked to do."""
Weighting = Annotated[
    Literal["samples", "uniform", "inverse_variance"],
    Field(
        description="weight of a client in the average: its training samples, 1 for every client, or 1 / variance of "
        "the shared parameters over the second half of its steps"
    ),
]
"""Weight of a reply in the average: training samples of the client, 1, or 1 / :meth:`fedpers.cohort.Cohort.variance`.

The variance is the one that Self-FL (arXiv:2111.11204) sees in a client's network, without that between clients, which
it adds. Clients whose training has come to rest count most. A network that still moves scatters the more, the more
steps it takes, so that with ``training.epochs`` clients with few samples count more than others; with
``training.steps`` all take equally many.
"""
SampleWeighting = Annotated[
    Literal["samples", "uniform"],
    Field(description="weight of a client in the average: its training samples, or 1 for every client"),
]
"""Of methods whose clients do not send parameters that :meth:`Cohort.fit` or :meth:`Cohort.walk` trained."""
_RUN_LEVEL_FIELDS = (*options(RoundsConfig), "unseen", "adapt_steps", "postprocessors", "client_update")
"""Fields that no method has as an option of its own."""


@dataclass(kw_only=True)
class PersonalizedStrategy(RoundsConfig, FlowerFedAvg, group="strategy"):
    """Sampling, checking, weighting and averaging, written once; a method says what is combined how.

    Works in any ``ServerApp`` and on any Flower engine. Clients are told apart by their partition id, so that sampling
    and per-client state do not depend on node ids.

    Parameters
    ----------
    fraction, min_replies, evaluate_every, seed
        Who is sampled, how many replies are needed, how often is evaluated: :class:`~fedpers.settings.RoundsConfig`.
    weighting : {"samples", "uniform", "inverse_variance"}
        Weight of a reply in the average, see :data:`Weighting`.
    unseen : tuple of int
        Clients that are never asked to train (``FederatedData.unseen``).
    adapt_steps : tuple of int
        After so many local steps each these are measured at the end of a run, ascending; empty: after one local round.
    postprocessors : sequence of Postprocessor
        What is done to replies and their mean, in this order: compression, privacy, robust aggregation
        (:mod:`fedpers.server.postprocessors`).
    client_update : LocalUpdate, optional
        The client half, of which a server half reads options that it needs too; default ``update()``.

    Attributes
    ----------
    update : type
        The client half's class.
    published_selection : {"test", "validation"}
        Part on which the method's authors choose the round they report; followed where the protocol of the data is
        ``official``.
    common_options : tuple of str
        Options of the client half that the server half reads: clients with another value are refused.
    state : dict of str to Tree
        What the server knows beside its arrays, by role; checkpoints hold it.
    report : RoundReport
        Of the present round.
    sent_arrays : Tree
        The server's arrays before the present round; empty before the first.
    exchange : Exchange
        Messages to clients by their number; a new one for each run.
    wrapper : flwr.serverapp.strategy.Strategy or None
        One of Flower's strategies around this one, see :func:`fedpers.server.within`.
    training_clients : list of int
        Clients that were sent this round's training, ascending.
    reply_metrics : mapping of int to mapping of str to float
        Metrics of each client whose reply :meth:`combine` has in its means; a method's own begin with ``train/``.

    Raises
    ------
    ConfigError
        If a value is out of its range.
    """

    update: ClassVar[type[LocalUpdate]] = LocalUpdate
    published_selection: ClassVar[Literal["test", "validation"]] = "test"
    common_options: ClassVar[tuple[str, ...]] = ()
    weighting: Weighting = "samples"
    unseen: tuple[int, ...] = ()
    adapt_steps: tuple[int, ...] = ()
    postprocessors: Sequence[Postprocessor] = ()
    client_update: LocalUpdate | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        check_overrides(cls, PersonalizedStrategy)
        if "update" in cls.__dict__:
            register(cls.update)

    @classmethod
    def key(cls, name: str) -> str:
        """Configuration key of a field: fields in :data:`_RUN_LEVEL_FIELDS` keep their name.

        Any other field NAME is ``strategy.NAME``.
        """
        return name if name in _RUN_LEVEL_FIELDS else super().key(name)

    def __post_init__(self) -> None:
        super().__post_init__()
        update = type(self).update
        if self.client_update is None:
            self.client_update = update()
        half = type(self.client_update).__name__
        allowed = f"an object of {update.__name__}, the client half of {type(self).__name__}"
        check(isinstance(self.client_update, update), "client_update", half, allowed)
        FlowerFedAvg.__init__(self, fraction_train=self.fraction, arrayrecord_key=ARRAYS, configrecord_key=CONFIG)
        self.postprocessors = tuple(self.postprocessors)
        self.state: dict[str, Tree] = {}
        self.report = RoundReport(0)
        self.exchange = Exchange()
        self.wrapper: Strategy | None = None
        self._begun = False
        self._failures = FirstOfEachKind(log)
        self._identities_checked = 0
        self._work: ServerWork | None = None
        self.sent_arrays = tree({})
        self._collector: ReplyCollector | None = None  # of replies that are folded where they are made
        self._training: list[flower.Message] = []  # what this round's clients were sent
        self.training_clients: list[int] = []
        self.reply_metrics: Mapping[int, Mapping[str, float]] = {}
        self._evaluating_clients: list[int] = []  # who was sent this round's evaluation
        self._started = 0.0
        self._last_round: int | None = None  # where `start` knows it

    # ------------------------------------------------------------------ a run

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
        anew, and is there afterwards. `timeout` holds for every exchange, those before a round too. Evaluated are the
        rounds that `evaluate_every` divides, and the last one.

        Raises
        ------
        ConfigError
            If the clients are those of another method or do not read a key of a configuration, or postprocessors or a
            wrapper do not go with the method.
        TrainingError
            If no client is connected, two nodes hold the same client, fewer than `min_replies` replies of a round are
            usable, a postprocessor cannot aggregate them, or the method needs :meth:`attach` first.
        """
        self.begin(timeout)
        self._last_round = num_rounds
        folding_grid = self.folding(grid)
        try:
            return super().start(
                folding_grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn
            )
        finally:
            self._begun = False

    def begin(self, timeout: float | None = None) -> None:
        """Get ready for the first round; for whoever calls :meth:`configure_train` in a loop of their own.

        Parameters
        ----------
        timeout : float, optional
            Seconds that each exchange with clients may take; None waits for as long as they take.
        """
        self.state, self.sent_arrays, self._failures = {}, tree({}), FirstOfEachKind(log)
        for postprocessor in self.postprocessors:
            postprocessor.reset()
        self.exchange, self._identities_checked = Exchange(), 0  # whoever was there before may be somebody else now
        self.exchange.timeout = timeout
        self._last_round = None
        self._begun = True

    def restore(self, report: RoundReport, state: Mapping[str, Tree], timeout: float | None = None) -> None:
        """Go on after a round that ran elsewhere: what was in :attr:`report` and :attr:`state` after it."""
        self.begin(timeout)
        self.report, self.state = report, dict(state)
        for postprocessor in self.postprocessors:
            if postprocessor.role in state:
                postprocessor.state = dict(entries(state[postprocessor.role]))
        self._started = time.perf_counter() - report.seconds

    def attach(self, app: CohortApp) -> None:
        """Give the server the clients' app, from which :attr:`work` has network, task and cohorts.

        Clients that are unseen in its data are so for the server.

        Raises
        ------
        ConfigError
            If it belongs to another method.
        """
        self._work = ServerWork(self, app)
        self.unseen = tuple(sorted({*self.unseen, *app.data.unseen}))

    @property
    def work(self) -> ServerWork:
        """Network, task and cohorts for computation on the server (:class:`ServerWork`).

        Raises
        ------
        TrainingError
            If :meth:`attach` was not called.
        """
        if self._work is None:
            raise missing_work(type(self).__name__)
        return self._work

    def folding(self, grid: Grid) -> Grid:
        """View of `grid` that folds the replies to training where they are made, if it can.

        For whoever calls :meth:`configure_train` and :meth:`aggregate_train` itself and does not look at the replies
        in between.
        """
        return folding(self, grid)

    # -------------------------------------------------- what a method overrides

    def prepare(self, round: int, arrays: Tree, clients: list[int], grid: Grid, phase: Phase) -> list[int]:
        """Find out from the clients what must be known before they are sent anything (:meth:`query_clients`).

        Parameters
        ----------
        round : int
        arrays : Tree
        clients : list of int
            Who is about to be addressed.
        grid : Grid
        phase : {"train", "evaluate"}
            What they will be asked to do.

        Returns
        -------
        list of int
            Who of them still is; the others are booked as failures.
        """
        return clients

    def send(self, round: int, arrays: Tree, clients: list[int]) -> Records | Sequence[Records]:
        """Records for `clients`: one mapping for all of them, or one for each in their order.

        The default sends the model's arrays to everybody.

        Parameters
        ----------
        round : int
        arrays : Tree
            The server's, batch size [].
        clients : list of int ``[n]``
            Those that :meth:`prepare` returned.

        Returns
        -------
        mapping of record to Tree, or sequence ``[n]`` of such
            Trees of batch size [].
        """
        return {ARRAYS: arrays}

    def reply_schema(self, clients: list[int]) -> Schema | Sequence[Schema]:
        """What replies to training hold: one schema for all of `clients`, or one for each in their order.

        The default is the server's arrays. A method whose clients send more adds its records
        (:func:`fedpers.server.collect.schema_of`); an entry that not every reply holds is ``optional``.

        Returns
        -------
        Schema or sequence of Schema
            Shapes of one client's arrays (batch size []).
        """
        return schema_of(ARRAYS, entries(self.sent_arrays))

    def fold(self) -> Fold:
        """Empty streaming aggregator (:class:`Fold`) for a round's replies; sent to wherever replies are computed.

        Returns
        -------
        Fold
            It takes records of batch size [] (one client) or [K]; :meth:`combine` gets its result, batch size [] of a
            mean, [n] of :class:`GroupedMean` and :class:`Collect`.
        """
        return WeightedMean()

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """Make the server's next arrays.

        Parameters
        ----------
        arrays : Tree
            Before the round.
        means : mapping of record to Tree
            Result of the fold after all postprocessors.
        clients : list of int
            Whose replies are in it.

        Returns
        -------
        Tree
            Batch size [].
        """
        return means.get(ARRAYS, arrays)

    def adapt(self, round: int, arrays: Tree, grid: Grid, clients: list[int]) -> tuple[list[int], list[Records]]:
        """Let clients that never trained adapt: they train once, and nothing of it reaches the server.

        Returns
        -------
        list of int
            Who adapted; the others are booked as failures.
        list of mapping of record to Tree
            What each of them is evaluated with: what it was sent, its own arrays in place of the server's.
        """
        return adapt_clients(self, round, arrays, grid, clients)

    def adapted_records(self, sent: Records, reply: Mapping[str, Tree]) -> Records:
        """What a client that adapted is evaluated with, or adapts further from.

        Parameters
        ----------
        sent : mapping of record to Tree
            What it was sent.
        reply : mapping of record to Tree
            What it answered, decoded.
        """
        arrays = reply.get(ARRAYS)
        return {**sent, ARRAYS: arrays} if arrays is not None and entries(arrays) else sent

    @classmethod
    def adapts_by_training(cls) -> bool:
        """Whether clients that never trained adapt by local training, not by a rule of the method's own."""
        return cls.adapt is PersonalizedStrategy.adapt

    @classmethod
    def plain_mean(cls) -> bool:
        """Whether clients answer with the server's arrays and nothing else, of which the server takes the mean."""
        plain = PersonalizedStrategy
        hooks = ((cls.reply_schema, plain.reply_schema), (cls.fold, plain.fold))
        return all(hook is default for hook, default in hooks) and cls.update.encode is LocalUpdate.encode

    # ------------------------------------------------------------------ clients

    def nodes(self, grid: Grid) -> dict[int, int]:
        """Node id of each client, by client number; see :class:`~fedpers.server.nodes.Nodes`.

        Raises
        ------
        ConfigError
            If clients belong to another method, or to none, and this one has a client half of its own.
        """
        connected = self.exchange.connect(grid)
        identities = self.exchange.identities
        while self._identities_checked < len(identities):
            check_halves(self, identities[self._identities_checked])
            self._identities_checked += 1
        if self.exchange.anonymous:
            check_plain_clients(self)
        return connected

    @property
    def trainable_clients(self) -> list[int]:
        """Clients known to the server that may train, ascending."""
        return sorted(set(self.exchange.node_of) - set(self.unseen))

    @property
    def num_trainable(self) -> int:
        """Number of clients that may train."""
        return len(self.trainable_clients)

    def sample(self, round: int) -> list[int]:
        """Clients that train in a round, ascending: the same for every method under one seed."""
        clients = self.trainable_clients
        return [clients[i] for i in sample_clients(self.seed, round, len(clients), self.fraction)]

    def most_sampled(self, trainable: int) -> int:
        """How many of so many clients that may train are sampled in a round, at most."""
        return len(sample_clients(self.seed, 1, trainable, self.fraction))

    def query_clients(
        self, grid: Grid, question: str, round: int, clients: list[int], records: Records, phase: Phase, schema: Schema
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
        phase : {"train", "evaluate"}
            What the answers are for: those for training count in the round's bytes.
        schema : Schema
            What an answer must hold.

        Returns
        -------
        dict of int to (records, metrics)
            Of clients with a usable answer; the others are booked as failures.
        """
        config = flower.ConfigRecord({"server-round": round})
        results, size = self.exchange.call(grid, f"query.{question}", records, config, clients)
        usable = {}
        for client, result in results.items():
            try:
                usable[client] = validated_reply(result, schema)
            except ValueError as problem:
                self.leave_out(client, str(problem), phase)
                continue
            if phase == "train":
                self.report.bytes_up += result.num_bytes
        if phase == "train":
            self.report.bytes_down += size
        return usable

    def leave_out(self, client: int, reason: str, phase: Phase) -> None:
        """Book a client as failed in this round's training or evaluation."""
        failures = self.report.failures if phase == "train" else self.report.evaluation_failures
        self._failures.note(f"round {self.report.round}, client {client}", reason)
        failures[client] = reason = sentence_of(reason)
        log.info("round %d: client %d left out: %s", self.report.round, client, reason)

    # ----------------------------------------------------------------- training

    def summary(self) -> None:
        """Log the settings."""
        log.info(
            "%s: fraction %g, weighting %s, seed %d", type(self).__name__, self.fraction, self.weighting, self.seed
        )

    def check_arrays(self, arrays: Tree, sampled: int) -> None:
        """Refuse postprocessors that do not go with the method, its arrays, or the number of sampled clients.

        Raises
        ------
        ConfigError
        """
        for postprocessor in self.postprocessors:
            postprocessor.check(self, arrays, sampled)
        roles = [postprocessor.role for postprocessor in self.postprocessors]
        allowed = "roles that are not empty and differ from each other"
        check(all(roles) and len(set(roles)) == len(roles), "postprocessors", roles, allowed)
        if self.wrapper is not None:
            from fedpers.server.postprocessors.flower_wrappers import check_wrapped

            check_wrapped(self, self.wrapper, arrays)

    @one_thread()  # what a method computes here is small, and threads of one operation wait for other programs
    def configure_train(
        self, server_round: int, arrays: flower.ArrayRecord, config: flower.ConfigRecord, grid: Grid
    ) -> Iterable[flower.Message]:
        """Address the sampled clients.

        Raises
        ------
        ConfigError
            If the clients are those of another method or do not read a key of `config`, or postprocessors or a wrapper
            do not go with the method.
        TrainingError
            If neither :meth:`start` nor :meth:`begin` was called, no client is connected, or two nodes hold the same
            client.
        """
        self._started = time.perf_counter()
        if self.wrapper is not None and server_round == 1:  # a wrapper's `start` never calls ours: round 1 begins a run
            self.begin(self.exchange.timeout)
        if not self._begun:
            raise TrainingError(
                f"{type(self).__name__}.configure_train was called without start or begin: wrap it in another "
                "strategy with fedpers.server.within, or call begin before a loop of your own."
            )
        if not self.nodes(grid):
            silent = len(list(grid.get_node_ids()))
            reason = f"none of {silent} nodes says which client it holds" if silent else "no client is connected"
            raise TrainingError(f"round {server_round}: {reason}.")
        self._check_config(config)
        sampled = self.sample(server_round)
        self.sent_arrays = from_record(arrays)
        self.check_arrays(self.sent_arrays, len(sampled))
        config["server-round"] = server_round
        if self._weighting == "inverse_variance":
            config[INVERSE_VARIANCE] = True
        self.report = RoundReport(server_round, sampled)
        self._collector = None
        clients = self.training_clients = self.prepare(server_round, self.sent_arrays, sampled, grid, "train")
        sent = self.send(server_round, self.sent_arrays, clients)
        self._check_sent(sent)
        self._training, size = self.exchange.messages(flower.MessageType.TRAIN, sent, config, clients)
        self.report.bytes_down += size
        return self._training

    @property
    def _weighting(self) -> str:
        """Weights of replies in this round: where the server has no arrays, there is no variance to weight by."""
        without = self.weighting == "inverse_variance" and not entries(self.sent_arrays)
        return "uniform" if without else self.weighting

    def _check_sent(self, sent: Records | Sequence[Records]) -> None:
        """Refuse postprocessors, which go by the server's arrays, where clients are sent others."""
        same = isinstance(sent, Mapping) and sent.get(ARRAYS) is self.sent_arrays
        setting_names = [postprocessor.setting for postprocessor in self.postprocessors]
        allowed = f"none for {type(self).__name__}, which sends clients other arrays than the server's"
        check(same or not setting_names, "postprocessors", setting_names, allowed)

    def _check_config(self, config: Mapping[str, Any]) -> None:
        """Refuse a configuration that the clients would not read."""
        for identity in self.exchange.identities:
            check_config(config, cast(list[str], identity[READS]), type(self).update.__name__)

    def collector_for(self, messages: Iterable[flower.Message]) -> ReplyCollector | None:
        """Collector for a grid that folds replies where they are made; None for all but this round's training."""
        if messages is not self._training:
            return None
        self._collector = ReplyCollector(self.reply_rules(self.training_clients))
        return self._collector

    def reply_rules(self, clients: list[int]) -> ReplyRules:
        """All that is needed to check and fold the replies of a round's clients, wherever that happens."""
        declared = self.reply_schema(clients)
        common: Schema = declared if isinstance(declared, dict) else {}
        by_client = {} if isinstance(declared, dict) else dict(zip(clients, declared, strict=True))
        for postprocessor in self.postprocessors:
            common = postprocessor.schema(common)
        folds = (p.fold(self.sent_arrays, self.report.round) for p in self.postprocessors)
        fold = next((fold for fold in folds if fold is not None), None)
        return ReplyRules(
            self.sent_arrays,
            common,
            self.fold() if fold is None else fold,
            [p for p in self.postprocessors if type(p).reply is not Postprocessor.reply],
            self._weighting,
            by_client,
        )

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
        collector, self._collector = self._collector, None
        if collector is None:  # the grid has not folded them
            collector = ReplyCollector(self.reply_rules(self.training_clients))
            collector.take(self.exchange.answers(replies, self.training_clients))
        arrays = self._conclude(server_round, collector.collected)
        report = self.report
        metrics = {"train-loss": report.train_loss, "steps": report.steps, "samples": report.samples}
        return to_record(arrays), flower.MetricRecord({**metrics, "failures": len(report.failures)})

    def _conclude(self, server_round: int, collected: Collected) -> Tree:
        """Make the server's next arrays of a round's replies."""
        report, self._training = self.report, []
        for client in report.sampled:
            if client not in collected.metrics and client not in report.failures:
                silent = NO_REPLY.error if client in self.training_clients else NOT_ADDRESSED
                self.leave_out(client, collected.failures.get(client, silent), "train")
        good = sorted(collected.metrics)
        if report.failures:
            log.warning("round %d: %s", server_round, _summed_up(report.failures, len(report.sampled)))
        if len(good) < self.min_replies:
            reasons = "".join(f"; {reason.rstrip('.')}" for reason in sorted(set(report.failures.values()))[:3])
            raise TrainingError(
                f"round {server_round}: {len(good)} of {len(report.sampled)} sampled clients sent a usable reply, "
                f"{self.min_replies} needed{reasons}."
            )
        report.book(collected.metrics, collected.bytes_up)
        self.reply_metrics = collected.metrics
        means = {record: _on_device_of(self.sent_arrays, t) for record, t in collected.fold.result().items()}
        for postprocessor in self.postprocessors:
            means = postprocessor.aggregate(self, means, collected.metrics)
            if postprocessor.state:
                self.state[postprocessor.role] = tree(postprocessor.state)
        arrays = self.combine(self.sent_arrays, means, good)
        report.train_seconds = report.seconds = time.perf_counter() - self._started
        return arrays

    # --------------------------------------------------------------- evaluation

    def configure_evaluate(
        self, server_round: int, arrays: flower.ArrayRecord, config: flower.ConfigRecord, grid: Grid
    ) -> Iterable[flower.Message]:
        """Address all clients, also those that were not sampled, every `evaluate_every` rounds and after the last."""
        if server_round % self.evaluate_every and server_round != self._last_round:
            self._evaluating_clients = []  # Flower's loop asks for the aggregate of no replies all the same
            return []
        return self.evaluation_messages(server_round, arrays, config, grid)

    @one_thread()
    def evaluation_messages(
        self, server_round: int, arrays: flower.ArrayRecord, config: flower.ConfigRecord, grid: Grid
    ) -> list[flower.Message]:
        """Address all clients now, also the unseen; without a training before it, this is where a round starts."""
        if self.report.round != server_round or not self.report.sampled:
            self.report = RoundReport(server_round)
            self._started = time.perf_counter()
        connected = list(self.nodes(grid))
        self._check_config(config)
        config["server-round"] = server_round
        tensors = from_record(arrays)
        self._evaluating_clients = self.prepare(server_round, tensors, connected, grid, "evaluate")
        for client in sorted(set(connected) - {*self._evaluating_clients, *self.report.evaluation_failures}):
            self.leave_out(client, NOT_ADDRESSED, "evaluate")
        sent = self.send(server_round, tensors, self._evaluating_clients)
        app = None if self._work is None else self._work.app
        if app is not None and app.data.global_test is not None and is_common(app, tensors, sent):
            self.report.common = measure_common(app, tensors, server_round, auc=bool(config.get("auc")))
        return self.exchange.messages(flower.MessageType.EVALUATE, sent, config, self._evaluating_clients)[0]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[flower.Message]) -> flower.MetricRecord | None:
        """Collect the clients' metrics in :attr:`report`; return their means over clients."""
        report = self.report
        for client, result in self.exchange.answers(replies, self._evaluating_clients).items():
            try:
                metrics = evaluation_metrics(result)
            except ValueError as problem:
                self.leave_out(client, str(problem), "evaluate")
                continue
            (report.unseen if client in self.unseen else report.clients)[client] = metrics
        if report.evaluation_failures:
            total = len(report.clients) + len(report.unseen) + len(report.evaluation_failures)
            log.warning("evaluation of round %d: %s", server_round, _summed_up(report.evaluation_failures, total))
        report.clients = dict(sorted(report.clients.items()))
        report.unseen = dict(sorted(report.unseen.items()))
        report.seconds = time.perf_counter() - self._started
        if not report.clients:
            return None
        names = sorted({n for metrics in report.clients.values() for n in metrics if not n.endswith("examples")})
        values = {name: [m[name] for m in report.clients.values() if name in m] for name in names}
        return flower.MetricRecord({name: sum(column) / len(column) for name, column in values.items()})

    def evaluate_adapted(self, arrays: flower.ArrayRecord, config: flower.ConfigRecord, grid: Grid) -> None:
        """Let the unseen clients adapt and measure them, into ``report.adapted``; for the end of a run."""
        evaluate_adapted(self, arrays, config, grid)


def _summed_up(failures: Mapping[int, str], total: int) -> str:
    """One line for all clients left out."""
    client, reason = next(iter(failures.items()))
    return f"{len(failures)} of {total} clients left out, e.g. client {client}: {reason}"


def _on_device_of(arrays: Tree, values: Tree) -> Tree:
    """`values` on the device of the server's arrays: replies from a wire come on the CPU."""
    device = next((value.device for value in entries(arrays).values()), None)
    return values if device is None else tree({n: v.to(device) for n, v in entries(values).items()})
