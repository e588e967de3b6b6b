"""The one network that all clients of a method are sent whole, where it has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fedpers.cohort import Network, Records, Tree, View, entries
from fedpers.cohort.prediction import predictions
from fedpers.records import ARRAYS

if TYPE_CHECKING:
    from fedpers.client.app import CohortApp
    from fedpers.client.update import LocalUpdate


def is_common(app: CohortApp, arrays: Tree, sent: Records | Sequence[Records]) -> bool:
    """Whether the server's arrays are a whole network, and are what all clients are sent.

    Parameters
    ----------
    app : CohortApp
    arrays : Tree
        The server's, batch size [].
    sent : mapping of record to Tree, or sequence of such
        What ``PersonalizedStrategy.send`` made of them.
    """
    shapes = {name: value.shape for name, value in entries(app.template).items()}
    whole = {name: value.shape for name, value in entries(arrays).items()} == shapes
    to_all = isinstance(sent, Mapping) and sent.get(ARRAYS) is arrays
    return whole and to_all and type(app.module).forward is not nn.Module.forward


def measure_common(app: CohortApp, arrays: Tree, round: int, *, auc: bool = False) -> dict[str, float]:
    """Metrics of a common network on the data's global test set (``FederatedData.global_test``), without ``examples``.

    Parameters
    ----------
    app : CohortApp
    arrays : Tree
        A whole network, batch size [].
    round : int
        That of the evaluation: samples of clients that have drifted by then are as these have them.
    auc : bool
    """
    data = app.data
    assert data.global_test is not None
    positions = data.global_test
    if data.drifted is not None and round >= data.drift_round:
        positions = data.drifted[positions]
    app.module.eval()
    view = View(dict(entries(arrays)), frozenset())
    outputs = predictions(app.module, data, view, [positions], partial(_common_scores, app.update))
    labels = [data.y[positions.to(data.device)]]
    columns = data.task.measure(outputs, labels, data.num_classes, auc=auc)
    return {name: float(column[0]) for name, column in columns.items() if name != "examples"}


def _common_scores(update: LocalUpdate, network: Network, x: Tensor) -> Tensor:
    """As the method predicts; with the network alone where that needs what only clients have (``network.given``)."""
    try:
        return update.predict(network, x)
    except KeyError:
        return network(x)
