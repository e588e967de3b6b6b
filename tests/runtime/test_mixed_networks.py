"""Clients with different networks: each trains as in an app of its kind alone, wherever it is computed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flwr.app as flower
import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from fedpers.app import _main
from fedpers.client.mixed import MixedApp
from fedpers.cohort import Training, entries, leaves
from fedpers.errors import ConfigError
from fedpers.flower_private import server_identity
from fedpers.models import MLP, Network
from fedpers.records import from_record
from fedpers.run.setup import deal_kinds
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import CohortApp, PersonalizedStrategy, make_strategy
from tests.problems import gaussian_data
from tests.runtime.wire import WireGrid

DATA = gaussian_data((20, 9, 13, 7, 16), dtype=torch.float64)
KIND_OF = (0, 1, 2, 1, 0)
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("local", {}),
    ("lg_fedavg", {}),
    ("fedproto", {}),
    ("fedgh", {}),
    ("fedd2s", {"cuts": (-1,)}),
]


def networks() -> list[nn.Module]:
    """Three kinds with features of width 5."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wide = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.ReLU())
        return [MLP((6,), 4, (5,)).double(), MLP((6,), 4, (9, 5)).double(), Network(wide, nn.Linear(5, 4)).double()]


def halves(method: str, options: dict[str, Any]) -> tuple[PersonalizedStrategy, MixedApp]:
    training = Training(lr=0.1, batch_size=6, epochs=2, drop_last=True)
    strategy, update = make_strategy(method, options, server={"fraction": 0.8, "seed": 3}, training=training)
    app = MixedApp([update.client_app(network, DATA, seed=3) for network in networks()], KIND_OF)
    strategy.attach(app)
    return strategy, app


def outcome(method: str, options: dict[str, Any], make: Callable[[CohortApp, int], LocalGrid]) -> dict[str, Any]:
    """Server's arrays, personal state and metrics after three rounds, by name."""
    strategy, app = halves(method, options)
    grid = make(app, DATA.num_clients)
    arrays, config = app.initial_arrays(), flower.ConfigRecord()
    strategy.begin()
    with server_identity(1):
        for r in range(1, 4):
            messages = strategy.configure_train(r, arrays, config, grid)
            new, _ = strategy.aggregate_train(r, grid.send_and_receive(messages))
            assert new is not None
            assert not strategy.report.failures
            arrays = new
        strategy.aggregate_evaluate(3, grid.send_and_receive(strategy.configure_evaluate(3, arrays, config, grid)))
    results: dict[str, Any] = dict(entries(from_record(arrays)))
    for client, metrics in strategy.report.clients.items():
        results.update(
            {f"{client}/{name}": torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}
        )
    if grid.engine is not None and not isinstance(grid, WireGrid):
        for clients, state in grid.blocks():
            for name, value in leaves(state).items():
                results.update({f"{c}/{name}": row for c, row in zip(clients.tolist(), value, strict=True)})
    grid.close()
    return results


def of_size(size: int, workers: int = 1) -> Callable[[CohortApp, int], LocalGrid]:
    return lambda app, clients: LocalGrid(app, clients, clients_at_once=size, workers=workers)


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-10, atol=1e-12, msg=name, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "options"), METHODS)
def test_cohorts_workers_and_messages_change_nothing(method: str, options: dict[str, Any]) -> None:
    alone = outcome(method, options, of_size(1))
    assert_same(alone, outcome(method, options, of_size(5)))
    assert_same(alone, outcome(method, options, of_size(2, workers=2)))
    serialised = outcome(method, options, WireGrid)
    assert_same({n: v for n, v in alone.items() if n in serialised}, serialised)


def test_a_client_trains_as_among_clients_of_its_kind() -> None:
    mixed = outcome("local", {}, of_size(5))
    training = Training(lr=0.1, batch_size=6, epochs=2, drop_last=True)
    for kind, network in enumerate(networks()):
        strategy, update = make_strategy("local", {}, server={"fraction": 0.8, "seed": 3}, training=training)
        app = update.client_app(network, DATA, seed=3)
        grid = LocalGrid(app, DATA.num_clients, clients_at_once=5, workers=1)
        strategy.begin()
        with server_identity(1):
            for r in range(1, 4):
                messages = strategy.configure_train(r, app.initial_arrays(), flower.ConfigRecord(), grid)
                strategy.aggregate_train(r, grid.send_and_receive(messages))
        for clients, state in grid.blocks():
            for name, value in leaves(state).items():
                for client, row in zip(clients.tolist(), value, strict=True):
                    if KIND_OF[client] == kind:
                        torch.testing.assert_close(mixed[f"{client}/kind{kind}/{name}"], row, rtol=1e-10, atol=1e-12)
        grid.close()


def test_values_of_other_kinds_stay_initial() -> None:
    results = outcome("fedproto", {}, of_size(5))
    _, app = halves("fedproto", {})
    for name, first in leaves(app.initial_state).items():
        for client, kind in enumerate(KIND_OF):
            if f"{client}/{name}" in results and not name.startswith(f"kind{kind}/"):
                assert torch.equal(results[f"{client}/{name}"], first)


def test_kinds_are_dealt_in_equal_numbers_or_by_a_file(tmp_path: Path) -> None:
    dealt = deal_kinds(["a", "b", "c"], None, 10, seed=1)
    assert sorted(dealt.count(kind) for kind in range(3)) == [3, 3, 4]
    assert dealt != deal_kinds(["a", "b", "c"], None, 10, seed=2)
    file = tmp_path / "kinds.json"
    file.write_text(json.dumps(["b", "a", "b"]))
    assert deal_kinds(["a", "b"], str(file), 3, seed=1) == [1, 0, 1]
    for text, clients in (('["a", "z", "b"]', 3), ('["a"]', 3), ("{}", 0), ("nothing", 3)):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"model\.kind_file=.*kinds\.json: expected a"):
            deal_kinds(["a", "b"], str(file), clients, seed=1)


def test_what_does_not_mix_is_refused() -> None:
    _, update = make_strategy("fedper")
    apps = [update.client_app(network, DATA) for network in networks()]
    with pytest.raises(
        ConfigError,
        match=r"model\.kinds=\['MLP', 'MLP', 'Network'\]: expected null, one network for all: FedPerUpdate shares",
    ):
        MixedApp(apps, KIND_OF)
    for name, settings in (("fedproto", "model.features=N"), ("fedd2s", "model.features=N strategy.cuts=[-1]")):
        _, update = make_strategy(name)
        apps = [update.client_app(MLP((6,), 4, (width,)).double(), DATA) for width in (5, 6)]
        message = rf"share arrays of the same shapes \(a: .*, b: .*; use {re.escape(settings)} for one width\.$"
        with pytest.raises(ConfigError, match=message):
            MixedApp(apps, [0] * 5, ["a", "b"])
    _, update = make_strategy("fedproto")
    apps = [update.client_app(MLP((6,), 4, (5,)).double(), DATA)] * 2
    with pytest.raises(ConfigError, match=r"kind_of=\[0, 2\]: expected a number from 0 to 1 for each of 5 clients"):
        MixedApp(apps, [0, 2])


MIXED = ("model.kinds=[mlp,cnn,cnn_bn]", "model.features=16", "partition.num_clients=8", "partition=iid")
RUN = ("rounds=4", "fraction=0.5", "split.unseen=1", "training.batch_size=40", "runtime.clients_at_once=2")


def fedpers(*words: str, output: Path) -> Path:
    """Run the command; the folder of its run."""
    _main([*words, f"output={output}"])
    (summary,) = output.rglob("summary.json")
    return summary.parent


def clients_of(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "clients.parquet")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["local", "fedproto", "fedd2s strategy.cuts=[-1]"])
def test_a_run_of_the_command_resumes_to_the_same_numbers(strategy: str, tmp_path: Path) -> None:
    words = [f"strategy={strategy.split()[0]}", *strategy.split()[1:], *MIXED, *RUN]
    whole = fedpers(*words, output=tmp_path / "whole")
    assert json.loads((whole / "summary.json").read_text())["model"] == "mlp+cnn+cnn_bn"
    part = fedpers(*words, "rounds=2", output=tmp_path / "part")
    _main(["resume", str(part), "rounds=4"])
    pd.testing.assert_frame_equal(clients_of(whole), clients_of(part))


@pytest.mark.slow
@pytest.mark.parametrize(("kinds", "tokens"), [("mlp,cnn1d", False), ("lstm,transformer", True)])
def test_kinds_for_series_and_for_tokens(kinds: str, tokens: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(9, size=(120, 6)) if tokens else rng.normal(size=(120, 2, 8)).astype(np.float32)
    np.savez(tmp_path / "made.npz", x=x, y=np.arange(120) % 3)
    settings = [f"dataset.root={tmp_path / 'made.npz'}", f"dataset.tokens={tokens}", "partition.min_samples=10"]
    words = ["strategy=fedproto", "dataset=npz", "partition=iid", f"model.kinds=[{kinds}]", "model.features=8"]
    folder = fedpers(*words, *settings, "partition.num_clients=4", "rounds=1", output=tmp_path / "runs")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["model"] == kinds.replace(",", "+")
    assert summary["failures"] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("ray_machine")
def test_a_run_on_ray_gives_the_same_numbers(tmp_path: Path) -> None:
    words = ["strategy=fedd2s", "strategy.cuts=[-1]", *MIXED, *RUN]
    local = fedpers(*words, output=tmp_path / "local")
    remote = fedpers(*words, "runtime=ray", "runtime.actors=2", output=tmp_path / "ray")
    pd.testing.assert_frame_equal(clients_of(local), clients_of(remote), rtol=1e-5, atol=1e-6)
