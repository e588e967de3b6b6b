"""What can be set: one dataclass for each group, each option written once. Imports neither torch nor Flower."""

from fedpers.settings.base import Option, Settings, build, options
from fedpers.settings.dataset import DatasetConfig
from fedpers.settings.heterogeneity import HeterogeneityConfig
from fedpers.settings.model import ModelConfig
from fedpers.settings.partition import PartitionConfig
from fedpers.settings.run import (
    CheckpointConfig,
    Config,
    RoundsConfig,
    RuntimeConfig,
    StopConfig,
    TensorBoardConfig,
    TrackerConfig,
    WandbConfig,
)
from fedpers.settings.server import Aggregation, CompressionConfig, PrivacyConfig, ServerOptimizerConfig, TopKConfig
from fedpers.settings.split import SplitConfig
from fedpers.settings.training import Training

__all__ = [
    "Aggregation",
    "CheckpointConfig",
    "CompressionConfig",
    "Config",
    "DatasetConfig",
    "HeterogeneityConfig",
    "ModelConfig",
    "Option",
    "PartitionConfig",
    "PrivacyConfig",
    "RoundsConfig",
    "RuntimeConfig",
    "ServerOptimizerConfig",
    "Settings",
    "SplitConfig",
    "StopConfig",
    "TensorBoardConfig",
    "TopKConfig",
    "TrackerConfig",
    "Training",
    "WandbConfig",
    "build",
    "options",
]
