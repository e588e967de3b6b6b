"""Robust aggregates: Flower's own strategies in place of the mean, so that a few clients cannot move it at will."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

import flwr.app as flower
import torch
from flwr.serverapp.exception import AggregationError, InconsistentMessageReplies
from flwr.serverapp.strategy import FedAvg, FedMedian, FedTrimmedAvg, Krum, Strategy
from pydantic import Field
from torch import Tensor

from fedpers.cohort import Collect, Tree, entries, tree
from fedpers.errors import TrainingError, check
from fedpers.records import ARRAYS, METRICS, from_record, to_record
from fedpers.server.postprocessors.base import Postprocessor, check_mean
from fedpers.settings.server import Aggregation

if TYPE_CHECKING:
    from fedpers.server.strategy import PersonalizedStrategy

_SUITABLE = "a Flower strategy that needs replies and nothing else, such as Krum"


@dataclass
class Robust(Postprocessor, group="aggregation"):
    """A Flower strategy aggregates the replies in place of the mean.

    Parameters
    ----------
    aggregator : Strategy
        E.g. ``Krum(num_malicious_nodes=1)``; it must need replies and nothing else.
    """

    role: ClassVar[str] = "robust"
    setting: ClassVar[str] = "aggregation"
    aggregator: Annotated[Strategy, Field(title=_SUITABLE)]

    @classmethod
    def of(cls, settings: Aggregation) -> Robust | None:
        """The one that settings mean; None for the mean."""
        if settings.name == "krum":
            return cls(Krum(num_malicious_nodes=settings.malicious))
        if settings.name == "trimmed_mean":
            return cls(FedTrimmedAvg(beta=settings.share))
        return cls(FedMedian()) if settings.name == "median" else None

    @property
    def label(self) -> str:
        """Name of the aggregator's class."""
        return type(self.aggregator).__name__

    def check(self, strategy: PersonalizedStrategy, arrays: Tree, sampled: int) -> None:
        """Refuse methods that average more than arrays, and aggregators that send something of their own."""
        check_mean(self, strategy, "mean")
        plain = getattr(type(self.aggregator), "configure_train", None) is FedAvg.configure_train
        check(plain, self.setting, self.label, _SUITABLE)

    def fold(self, arrays: Tree, round: int) -> KeptReplies:
        """Keep the replies until all have come."""
        return KeptReplies(self.aggregator, arrays, round)


class KeptReplies(Collect):
    """Replies of a round, kept until a Flower strategy aggregates them.

    The strategy is given each reply's weight and its changes of the server's arrays, in which distances lose no digits
    to what all have in common. Entries of integers (counts) are no directions in space: their median is taken.

    Parameters
    ----------
    aggregator : Strategy
    arrays : Tree
        The server's, before the round.
    round : int
    """

    def __init__(self, aggregator: Strategy, arrays: Tree, round: int) -> None:
        super().__init__()
        self.aggregator = aggregator
        self.arrays = arrays
        self.round = round

    def partial(self) -> Self:
        """The replies alone."""
        part = copy.copy(self)
        part.arrays = tree({})
        return part

    def result(self) -> dict[str, Tree]:
        """Return the aggregate.

        Raises
        ------
        TrainingError
            If the strategy cannot aggregate the replies, or what it makes does not have the arrays' form.
        """
        before = entries(self.arrays)
        weighted_records = [self.kept[client] for client in self.clients]
        replies = [(entries(records[ARRAYS]), weight) for records, weight in weighted_records if ARRAYS in records]
        if not replies:
            return {}
        moved = [name for name, value in before.items() if value.is_floating_point()]
        changes = self._aggregate(
            [({n: values[n] - before[n].to(values[n].device) for n in moved}, weight) for values, weight in replies]
        )
        aggregate = {}
        for name, value in before.items():
            if name not in moved:
                aggregate[name] = torch.stack([values[name] for values, _ in replies]).median(0).values
                continue
            if name not in changes or changes[name].shape != value.shape:
                kind, shape = type(self.aggregator).__name__, list(value.shape)
                raise TrainingError(f"round {self.round}: {kind} gave no '{name}' of shape {shape}.")
            aggregate[name] = value + changes[name].to(value)
        return {ARRAYS: tree(aggregate)}

    def _aggregate(self, replies: list[tuple[dict[str, Tensor], float]]) -> dict[str, Tensor]:
        if not replies[0][0]:
            return {}
        key = getattr(self.aggregator, "weighted_by_key", "num-examples")
        messages = []
        for node, (values, weight) in enumerate(replies, start=1):
            content = flower.RecordDict({ARRAYS: to_record(tree(values)), METRICS: flower.MetricRecord({key: weight})})
            messages.append(flower.Message(content, node, flower.MessageType.TRAIN))
        name = type(self.aggregator).__name__
        logger = logging.getLogger("flwr")
        level = logger.level
        logger.setLevel(max(level, logging.WARNING))  # it tells how many replies there are; so do our reports
        try:
            record, _ = self.aggregator.aggregate_train(self.round, messages)
        except (AggregationError, InconsistentMessageReplies, ValueError) as error:
            reason = " ".join(str(error).split()).removesuffix(".")
            what = f"round {self.round}: {name} cannot aggregate {len(replies)} replies: {reason}."
            raise TrainingError(what) from error
        finally:
            logger.setLevel(level)
        if record is None:
            raise TrainingError(f"round {self.round}: {name} made nothing of {len(replies)} replies.")
        return entries(from_record(record))


__all__ = ["Aggregation", "KeptReplies", "Robust"]
