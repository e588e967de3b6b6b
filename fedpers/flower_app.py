"""The settings of the command as a Flower app, for ``flwr run`` and SuperNodes; see ``experiments/flower_app``.

An app's own module is two lines, ``server = server_app()`` and ``client = client_app()``. Its run configuration has

- ``settings``: what is typed after ``fedpers``, e.g. ``"strategy=gpfl partition.num_clients=4 rounds=3"``;
- ``result``: a file the server writes at the end, or ``""``.

Client k is the node with ``partition-id=k``; all data are read where a client runs.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import flwr.app as flower
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedpers.app.compose import composed
from fedpers.cohort import Tree, leaves
from fedpers.errors import FedpersError, check
from fedpers.files import whole_file
from fedpers.identity import identity_of
from fedpers.records import from_record
from fedpers.run import make_halves, metrics_of, prepare_run, run_rounds
from fedpers.run.execute import progress_of
from fedpers.run.progress import exactly
from fedpers.run.rounds import gradient_budget
from fedpers.runtime.flower import FlowerGrid, await_clients
from fedpers.runtime.flower_clients import RemoteApp
from fedpers.settings import Config
from fedpers.strategies import CohortApp, RoundReport

_UNUSED = {
    "clock": "none in a Flower app, where rounds take the time they take",
    "tracker": "none in a Flower app: what is logged and `result` are what it writes",
    "checkpoint": "as by default in a Flower app, which writes no checkpoints",
}
"""Groups of settings that work with the command only, and what is allowed here."""


def server_app() -> ServerApp:
    """Make a ``ServerApp`` that runs the rounds of ``settings`` once all clients' nodes are there.

    It logs a line for each round.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: flower.Context) -> None:
        config = _config(context.run_config)
        setup = prepare_run(config)
        watched = FlowerGrid(grid, interval=0.5)
        await_clients(watched, setup.strategy, setup.data.num_clients)
        last: list[flower.ArrayRecord] = []
        left_out: dict[int, dict[int, str]] = {}

        def keep_last(report: RoundReport, arrays: flower.ArrayRecord, is_last: bool) -> None:
            last[:] = [arrays]

        headline, progress = setup.data.task.headline, progress_of(setup)

        def stops(report: RoundReport) -> bool:
            return progress.ends_by(report, metrics_of(report, headline), config.stop) is not None

        for report in run_rounds(
            setup.strategy,
            watched,
            setup.app.initial_arrays(),
            config.rounds,
            auc=config.auc,
            timeout=config.runtime.timeout,
            budget=gradient_budget(config, setup.data),
            stops=stops if config.stop.is_on else None,
            after_round=keep_last,
        ):
            metrics = metrics_of(report, headline)
            progress.take(report, metrics)
            score = metrics.get(f"test/{headline}", math.nan)
            loss = metrics.get("train/loss", math.nan)
            if failures := report.failures | report.evaluation_failures:
                left_out[report.round] = failures
            failed = f", {metrics['clients/failed']} replies left out" if metrics["clients/failed"] else ""
            print(f"round {report.round}: train loss {loss:.4f}, test {headline} {score:.4f}{failed}", flush=True)
        if result := str(context.run_config.get("result", "")):
            _write(Path(result), config, report, left_out, from_record(last[0]), setup.strategy.state)

    return app


def client_app() -> ClientApp:
    """Make a ``ClientApp`` that answers as the client of ``settings`` its node's ``partition-id`` names."""
    return RemoteApp(_client_half, identify=_identity)


def _client_half(run_config: Mapping[str, Any]) -> CohortApp:
    return prepare_run(_config(run_config)).app


def _identity(run_config: Mapping[str, Any]) -> flower.ConfigRecord:
    strategy, update = make_halves(_config(run_config))
    return identity_of(update, [p for p in strategy.postprocessors if p.encodes])


def _config(run_config: Mapping[str, Any]) -> Config:
    """Compose ``settings``; ConfigError for those that a Flower app has no use for."""
    config, default = composed(shlex.split(str(run_config.get("settings", "")))), Config()
    for group, allowed in _UNUSED.items():
        value = getattr(config, group)
        check(value == getattr(default, group), group, getattr(value, "name", value), allowed)
    check(config.runtime.name == "local", "runtime", config.runtime.name, "none: Flower runs the clients of an app")
    return config


def _write(
    path: Path,
    config: Config,
    report: RoundReport,
    left_out: Mapping[int, Mapping[int, str]],
    arrays: Tree,
    state: Mapping[str, Tree],
) -> None:
    """Write metrics of each client after the last round, the server's arrays and state, and who was left out when."""

    def numbers(values: Tree) -> dict[str, Any]:
        return {name: value.tolist() for name, value in leaves(values).items()}

    content = {
        "settings": asdict(config),
        "round": report.round,
        "clients": report.clients,
        "unseen": report.unseen,
        "adapted": report.adapted,
        "failures": left_out,
        "arrays": numbers(arrays),
        "state": {role: numbers(values) for role, values in state.items()},
    }
    try:
        with whole_file(path) as draft:
            draft.write_text(json.dumps(exactly(content), indent=1, allow_nan=False), encoding="utf-8")
    except OSError as error:
        raise FedpersError(f"{path} cannot be written ({error.strerror}); choose another file with result.") from error
