"""One app under Flower's own simulation and under this package's."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from flwr.supercore.task_identity import TaskIdentity

import fedpers
from tests import flower_app


def all_three() -> FedAvg:
    """Flower's engine asks the strategy while nodes still register."""
    return FedAvg(min_train_nodes=3, min_evaluate_nodes=3, min_available_nodes=3)


@pytest.mark.slow
def test_an_app_gives_what_it_gives_under_flowers_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):  # which run_simulation does not restore
        monkeypatch.setattr(TaskIdentity, name, getattr(TaskIdentity, name))
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    results: list[dict[str, Any]] = [{}, {}]
    alone = partial(run_simulation, backend_config={"init_args": {"address": "local"}})  # not on some other Ray cluster
    for run, result in zip((fedpers.simulate, alone), results, strict=True):
        server = flower_app.server_app(result, all_three, rounds=2)
        run(server, flower_app.client_app(), num_supernodes=3)
    ours, theirs = results
    for name, value in theirs["arrays"].items():
        np.testing.assert_allclose(ours["arrays"][name], value, rtol=1e-9)
    for part in ("train", "evaluate"):
        assert list(ours[part]) == list(theirs[part]) == [1, 2]
        for r, metrics in theirs[part].items():
            assert ours[part][r] == pytest.approx(metrics, rel=1e-9)
