"""What clients answer: one by one as messages carry it, or K at once as it was computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import flwr.app as flower

from fedpers.cohort import Tree
from fedpers.flower_private import metric_record
from fedpers.records import METRICS, num_bytes, row, to_record

Encode = Callable[[dict[str, Tree]], dict[str, Tree]]
"""Turns one client's records (trees of batch size []) into those that are sent; see ``LocalUpdate.encode``."""


@dataclass(frozen=True)
class ClientResult:
    """What one client answers: records and metrics, or the reason why it has none."""

    content: flower.RecordDict | None
    error: str = ""

    @property
    def num_bytes(self) -> int:
        """Bytes of its arrays as they are sent, without metrics and names."""
        return 0 if self.content is None else num_bytes(self.content)


@dataclass
class CohortResult:
    """What K clients answer, still stacked.

    Attributes
    ----------
    clients : list of int ``[K]``
        Their numbers; metrics and records are in this order.
    metrics : list of dict ``[K]``
        Of each client; without meaning for those in `errors`.
    records : dict of name to Tree ``[K]``
        Rows of clients in `errors` have no meaning.
    errors : dict of int to str
        Numbers of clients without an answer, and why.
    encode : callable, optional
        What one client's records go through before they travel; None leaves them as they are.
    """

    clients: list[int]
    metrics: Sequence[Mapping[str, float]]
    records: dict[str, Tree] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    encode: Encode | None = None

    def rows(self) -> list[ClientResult]:
        """One result for each client, in their order."""
        results = []
        for k, client in enumerate(self.clients):
            if client in self.errors:
                results.append(ClientResult(None, self.errors[client]))
                continue
            records = {name: row(stacked, k) for name, stacked in self.records.items()}
            content = flower.RecordDict()
            for name, values in (records if self.encode is None else self.encode(records)).items():
                content[name] = to_record(values)
            content[METRICS] = metric_record(self.metrics[k])
            results.append(ClientResult(content))
        return results
