"""TensorBoard events of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedpers.settings.run import TensorBoardConfig
from fedpers.tracking.base import Resumed


class TensorBoardTracker:
    """Writes TensorBoard events to ``tensorboard/`` in the run folder.

    Parameters
    ----------
    config : TensorBoardConfig
    folder : Path
        The run folder.
    run_config : mapping
        Shown under *Text*.
    resumed : Resumed, optional
        Events of its round and later ones are no longer shown.
    """

    def __init__(
        self, config: TensorBoardConfig, folder: Path, run_config: Mapping[str, Any], resumed: Resumed | None = None
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(
            str(Path(folder) / "tensorboard"),
            flush_secs=config.flush_secs,
            purge_step=None if resumed is None else resumed.round,
        )
        self._last = 0 if resumed is None else resumed.round  # finals of a former end are purged with later rounds
        # four spaces make it a code block in TensorBoard's markdown
        text = json.dumps(dict(run_config), indent=2, default=str)
        self._writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()))

    def log(self, round: int, metrics: Mapping[str, float]) -> None:
        """Add one scalar per metric."""
        self._last = round
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), round)

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Add one scalar per metric, named ``summary/...``."""
        for name, value in metrics.items():
            self._writer.add_scalar(f"summary/{name}", float(value), self._last)

    def clients(self, values: Mapping[str, Sequence[float]]) -> None:
        """Add one histogram over clients per metric, named ``clients/...``."""
        for name, column in values.items():
            self._writer.add_histogram(f"clients/{name}", np.asarray(column, dtype=float), self._last)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()
