"""From settings to a grid: the one place that knows all runtimes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.serverapp import Grid

from fedpers.flower_private import server_identity
from fedpers.runtime.grid import RUN_ID
from fedpers.runtime.local import LocalGrid
from fedpers.settings import RuntimeConfig
from fedpers.strategies import CohortApp

if TYPE_CHECKING:
    from fedpers.runtime.ray import RayGrid


def launch(
    config: RuntimeConfig,
    app: CohortApp,
    main: Callable[[Grid], None],
    *,
    sampled: int,
    folder: Path | None = None,
    make_app: Callable[[], CohortApp] | None = None,
) -> None:
    """Call `main` with a grid whose nodes are all clients of `app`, and end the grid afterwards.

    Parameters
    ----------
    config : RuntimeConfig
    app : CohortApp
    main : callable
        What a server does.
    sampled : int
        Clients that train in a round, by which cohort sizes are chosen.
    folder : Path, optional
        Where files of personal state that is too large for the memory are made; gone afterwards.
    make_app : callable, optional
        Makes `app` once more in a client process; needed by ``flower``.
    """
    if config.name == "flower":
        from fedpers.runtime.flower_simulation import flower_simulation

        if make_app is None:
            raise ValueError("the flower runtime needs make_app")
        cpus, gpus = config.cpus_per_actor, config.gpus_per_actor
        flower_simulation(make_app, app.data.num_clients, main, app=app, cpus_per_actor=cpus, gpus_per_actor=gpus)
        return
    memory = None if config.state_memory == "auto" else float(config.state_memory) * 1e9
    grid: LocalGrid | RayGrid
    if config.name == "ray":
        from fedpers.runtime.ray import RayGrid

        grid = RayGrid(
            app,
            address=config.address,
            actors=config.actors,
            cpus_per_actor=config.cpus_per_actor,
            gpus_per_actor=config.gpus_per_actor,
            clients_at_once=config.clients_at_once,
            memory=memory,
        )
    else:
        grid = LocalGrid(
            app,
            app.data.num_clients,
            clients_at_once=config.clients_at_once,
            workers=config.workers,
            memory=memory,
            folder=folder,
        )
    try:
        grid.choose(sampled)
        with server_identity(RUN_ID):
            main(grid)
    finally:
        grid.close()
