"""Where the metrics of a run go while it runs: always ``rounds.jsonl``, and what the config asks for."""

from fedpers.settings.run import TensorBoardConfig, TrackerConfig, WandbConfig
from fedpers.tracking.trackers import (
    ConsoleTracker,
    JsonlTracker,
    Resumed,
    TensorBoardTracker,
    Tracker,
    Trackers,
    WandbTracker,
    make_trackers,
)

__all__ = [
    "ConsoleTracker",
    "JsonlTracker",
    "Resumed",
    "TensorBoardConfig",
    "TensorBoardTracker",
    "Tracker",
    "TrackerConfig",
    "Trackers",
    "WandbConfig",
    "WandbTracker",
    "make_trackers",
]
