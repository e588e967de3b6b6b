"""What is done around the mean of a round, whatever the method: compression, privacy, robust aggregates, steps."""

from fedpers.server.postprocessors.base import Postprocessor
from fedpers.server.postprocessors.compression import TopK
from fedpers.server.postprocessors.flower_wrappers import within
from fedpers.server.postprocessors.optimizer import ServerStep
from fedpers.server.postprocessors.privacy import Privacy
from fedpers.server.postprocessors.robust import Robust
from fedpers.settings.run import Config
from fedpers.settings.server import Aggregation, CompressionConfig


def make_postprocessors(config: Config) -> tuple[Postprocessor, ...]:
    """What a run does around the mean, in its order; made anew, for they have state."""
    compression = {name: value for name, value in vars(config.compression).items() if name != "name"}
    chosen = (
        None if config.compression.name == "none" else TopK(**compression),
        None if config.privacy.name == "none" else Privacy(**vars(config.privacy)),
        Robust.of(config.aggregation),
        ServerStep.of(config.server_optimizer),
    )
    return tuple(postprocessor for postprocessor in chosen if postprocessor is not None)


__all__ = [
    "Aggregation",
    "CompressionConfig",
    "Postprocessor",
    "Privacy",
    "Robust",
    "ServerStep",
    "TopK",
    "make_postprocessors",
    "within",
]
