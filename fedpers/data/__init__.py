"""Data sets, partitions and splits; knows nothing of methods."""

from fedpers.data.datasets import load_dataset
from fedpers.data.federated import PARTS, FederatedData, Part
from fedpers.data.heterogeneity import apply_heterogeneity
from fedpers.data.load import load_federated
from fedpers.data.partitions import partition_samples
from fedpers.data.ratings import RankingData
from fedpers.data.sets.base import Dataset
from fedpers.data.split import split_clients
from fedpers.settings.dataset import DatasetConfig
from fedpers.settings.heterogeneity import HeterogeneityConfig
from fedpers.settings.partition import PartitionConfig
from fedpers.settings.split import SplitConfig

__all__ = [
    "PARTS",
    "Dataset",
    "DatasetConfig",
    "FederatedData",
    "HeterogeneityConfig",
    "Part",
    "PartitionConfig",
    "RankingData",
    "SplitConfig",
    "apply_heterogeneity",
    "load_dataset",
    "load_federated",
    "partition_samples",
    "split_clients",
]
