"""From settings to a grid: the one place that knows all runtimes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from flwr.serverapp import Grid

from fedpers.config import RuntimeConfig
from fedpers.runtime.flower_private import server_identity
from fedpers.runtime.grid import RUN_ID
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import CohortApp


def launch(
    config: RuntimeConfig, app: CohortApp, main: Callable[[Grid], None], *, sampled: int, folder: Path | None = None
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
    """
    grid = LocalGrid(
        app,
        app.data.num_clients,
        cohort=config.cohort,
        workers=config.workers,
        memory=state_memory(config, app.device),
        folder=folder,
    )
    try:
        grid.choose(sampled)
        with server_identity(RUN_ID):
            main(grid)
    finally:
        grid.close()


def state_memory(config: RuntimeConfig, device: torch.device) -> float | None:
    """Bytes of memory that personal state may take; ``auto`` is half of what the machine or GPU has."""
    if config.state_memory != "auto":
        return float(config.state_memory) * 1e9
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
