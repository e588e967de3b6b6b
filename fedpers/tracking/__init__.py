"""Where the metrics of a run go while it runs: always ``rounds.jsonl``, and what the settings ask for."""

from fedpers.settings.run import TensorBoardConfig, TrackerConfig, WandbConfig
from fedpers.tracking.base import Resumed, Tracker
from fedpers.tracking.console import ConsoleTracker
from fedpers.tracking.jsonl import JsonlTracker
from fedpers.tracking.tensorboard import TensorBoardTracker
from fedpers.tracking.trackers import Trackers, make_trackers
from fedpers.tracking.weights_and_biases import WandbTracker

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
