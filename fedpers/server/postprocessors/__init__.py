"""What is done around the mean of a round, whatever the method: compression, privacy, robust aggregates."""

from fedpers.server.postprocessors.base import Postprocessor
from fedpers.server.postprocessors.compression import CompressionConfig, TopK
from fedpers.server.postprocessors.flower_wrappers import within
from fedpers.server.postprocessors.privacy import Privacy
from fedpers.server.postprocessors.robust import Aggregation, Robust

__all__ = ["Aggregation", "CompressionConfig", "Postprocessor", "Privacy", "Robust", "TopK", "within"]
