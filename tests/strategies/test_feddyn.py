"""FedDyn as its paper has it, against plain loops over clients and batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedpers.errors import TrainingError
from fedpers.flower_private import server_identity
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import FedDyn
from fedpers.strategies.feddyn import FedDynUpdate
from tests.cohort.helpers import assert_same
from tests.strategies.helpers import (
    DATA,
    NETWORK,
    Values,
    average,
    copied,
    drawn,
    initial,
    passes,
    run,
    sgd,
    weights_of,
)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_feddyn_as_written(fraction: float) -> None:
    alpha, rounds, names = 0.3, 3, weights_of()
    server, drift = initial(), {n: torch.zeros_like(initial()[n]) for n in names}
    gradients = {client: copied(drift) for client in range(4)}
    for round in range(1, rounds + 1):
        sent = {}
        for client in drawn(round, fraction):
            network, gradient = copied(server), gradients[client]

            def tilt(n: str, v: Tensor, w: Values = server, g: Values = gradient) -> Tensor:
                return alpha * (v - w[n]) - g[n]

            sgd(network, passes(client, 2, round), add=tilt)
            sent[client] = network
            gradients[client] = {n: gradient[n] - alpha * (network[n] - server[n]) for n in names}
        for n in names:
            drift[n] = drift[n] - alpha / 4 * sum(network[n] - server[n] for network in sent.values())
        mean = average(list(sent.values()), [1.0] * len(sent))
        server = {n: mean[n] - drift[n] / alpha if n in names else mean[n] for n in mean}
    result = run("feddyn", {"alpha": alpha}, rounds=rounds, fraction=fraction)
    assert_same(result.arrays, server)
    assert_same(dict(result.strategy.state["drift"].items()), drift)
    for client, gradient in gradients.items():
        state = result.state(client)
        assert_same({n: state[f"gradient/{n}"] for n in names}, gradient)


def test_feddyn_needs_to_know_which_entries_are_parameters() -> None:
    app, strategy = FedDynUpdate().client_app(NETWORK, DATA), FedDyn()
    grid = LocalGrid(app, 4, clients_at_once=4, workers=1)
    with server_identity(1), pytest.raises(TrainingError, match=r"^FedDyn computes on the server: call attach\("):
        strategy.start(grid, app.initial_arrays(), num_rounds=1)
    grid.close()
