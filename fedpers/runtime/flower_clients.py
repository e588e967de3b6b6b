"""What Flower's client processes run.

Flower pickles a ``ClientApp`` anew for every message. What travels is therefore a light one (:class:`RemoteApp`) that
holds only how to make the method's app; each client process makes it once. Personal state lives in the clients'
contexts, where Flower keeps it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flwr.app as flower
from flwr.clientapp import ClientApp

from fedpers.client.app import IDENTIFY, STATE, CohortApp
from fedpers.errors import ConfigError
from fedpers.failures import with_traceback
from fedpers.records import CONFIG, METRICS
from fedpers.runtime.grid import error_reply

log = logging.getLogger(__name__)
EXCHANGE_STATE = "query._state"
"""Type of a message by which the server of a simulation reads a client's personal state or replaces it; no method can
have a question of that name."""
_MARK = "fedpers.run"
_apps: dict[str, CohortApp] = {}
"""The app of this process, by what it was made from."""


class RemoteApp(ClientApp):
    """A ``ClientApp`` that is light to send: it holds how to make the app of a method, not the app.

    The first message in a process makes the app, later ones find it; which client a node holds is answered without it.
    What the app raises becomes the client's answer, in one sentence. Personal state of another run that Flower kept in
    a context is dropped.

    Parameters
    ----------
    make : callable
        Takes the run configuration and returns the :class:`CohortApp`; can be pickled.
    key : str
        Tells apps with equal run configurations apart.
    simulated : bool
        Whether the server may read and replace the personal state that clients keep, for its checkpoints.
    identify : callable, optional
        Takes the run configuration and returns what the app says of itself (:mod:`fedpers.identity`), without data;
        can be pickled. Without it clients give their number only.
    """

    def __init__(
        self,
        make: Callable[[Mapping[str, Any]], CohortApp],
        key: str = "",
        *,
        simulated: bool = False,
        identify: Callable[[Mapping[str, Any]], flower.ConfigRecord] | None = None,
    ) -> None:
        super().__init__()
        self.make = make
        self.key = key
        self.simulated = simulated
        self.identify = identify

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(RemoteApp, simulated=self.simulated, identify=self.identify), (self.make, self.key)

    def __call__(self, message: flower.Message, context: flower.Context) -> flower.Message:
        """Answer a message; see Flower's ``ClientApp``."""
        try:
            if message.metadata.message_type == IDENTIFY:
                number = context.node_config.get("partition-id")
                if not isinstance(number, int):
                    raise ConfigError("partition-id", number, "the number of a client")
                content = flower.RecordDict({METRICS: flower.MetricRecord({"partition-id": number})})
                if self.identify is not None:
                    content[CONFIG] = self.identify(context.run_config)
                return flower.Message(content, reply_to=message)
            key = f"{self.key} {sorted(context.run_config.items())!r}"
            mark = flower.ConfigRecord({"run": f"{context.run_id} {self.key}"})
            if context.state.get(_MARK) != mark:
                context.state.clear()
                context.state[_MARK] = mark
            if message.metadata.message_type == EXCHANGE_STATE and self.simulated:
                return _exchange_state(message, context)
            if key not in _apps:
                _apps.clear()
                _apps[key] = self.make(context.run_config)
            return _apps[key](message, context)
        except Exception as error:  # whatever a client's code raises becomes its answer
            return error_reply(message, with_traceback(error))


def _exchange_state(message: flower.Message, context: flower.Context) -> flower.Message:
    """Answer with the personal state; of a message with a configuration, which replaces it, with nothing."""
    if CONFIG in message.content.config_records:  # else it is only read
        context.state.pop(STATE, None)
        if STATE in message.content.array_records:
            context.state[STATE] = message.content.array_records[STATE]
        return flower.Message(flower.RecordDict(), reply_to=message)
    records = {STATE: context.state[STATE]} if STATE in context.state.array_records else {}
    return flower.Message(flower.RecordDict(records), reply_to=message)
