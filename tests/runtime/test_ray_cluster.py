"""Ray clusters of several nodes, each with a raylet of its own on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpers.flower_private import server_identity
from fedpers.runtime.ray import RayGrid
from tests.runtime.faulty import app_of, assert_same, rounds, undisturbed
from tests.runtimes import cluster


@pytest.fixture(autouse=True)
def _server() -> Iterator[None]:
    with server_identity(1):
        yield


@pytest.mark.slow
def test_a_node_that_leaves_changes_nothing() -> None:
    app = app_of()
    with cluster() as made, RayGrid(app, actors=2, clients_at_once=2) as grid:

        def leave(round: int) -> None:
            if round == 2:
                made.remove_node(made.list_all_nodes()[-1])

        actual, strategy = rounds(grid, app, after=leave)
        assert len({id(shard.actor) for shard in grid.shards}) == 1  # one actor computes both shards now
    assert strategy.report.failures == {}
    assert_same(actual, undisturbed())


WORKING_FOLDER = """
    import os, sys
    sys.path.insert(0, {tests!r})
    from fedpers.runtime.ray import RayGrid
    from fedpers.flower_private import server_identity
    from mine import Mine, MineUpdate
    from tests.problems import SmallNetwork, gaussian_data
    app = MineUpdate().client_app(SmallNetwork(), gaussian_data((20, 9, 13)))
    with server_identity(1), RayGrid(app, actors=1, clients_at_once=2) as grid:
        strategy = Mine()
        strategy.begin()
        import flwr.app as flower
        folding = strategy.folding(grid)
        messages = strategy.configure_train(1, app.initial_arrays(), flower.ConfigRecord(), folding)
        strategy.aggregate_train(1, folding.send_and_receive(messages))
        print("failures", strategy.report.failures)
        print("extra", strategy.report.extra)
    sys.stdout.flush()
    os._exit(0)  # as Ray's own processes end: its threads outlive ray.shutdown, and once one crashed in a destructor
"""


@pytest.mark.slow
def test_a_method_from_the_working_folder_needs_no_import_on_actors(tmp_path: Path, ray_address: str) -> None:
    (tmp_path / "helper.py").write_text("def scale():\n    return 3.0\n")
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        from dataclasses import dataclass
        import torch
        from fedpers.strategies import FedAvg, FedAvgUpdate
        import helper

        class MineUpdate(FedAvgUpdate):
            def train(self, cohort, received, config):
                reply = super().train(cohort, received, config)
                reply.metrics["scale"] = torch.full((cohort.size,), helper.scale())
                return reply

        class Mine(FedAvg):
            update = MineUpdate
        """)
    )
    tests = str(Path(__file__).parents[2])
    (tmp_path / "main.py").write_text(textwrap.dedent(WORKING_FOLDER.format(tests=tests)))
    done = subprocess.run(  # the raylet was started here, not in that folder
        [sys.executable, "main.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "RAY_ADDRESS": ray_address, "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "failures {}" in done.stdout
    assert "extra {'scale': 3.0}" in done.stdout
