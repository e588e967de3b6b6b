"""Networks, each with a named ``body`` and ``head``."""

from fedpers.models.build import MODELS, ModelConfig, build_model
from fedpers.models.networks import CNN, MLP, Network, ResNet18

__all__ = ["CNN", "MLP", "MODELS", "ModelConfig", "Network", "ResNet18", "build_model"]
