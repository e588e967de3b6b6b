"""Networks, each with a named ``body`` and ``head``."""

from fedpers.models.build import MODELS, build_model
from fedpers.models.factorization import Factorization, ItemTable
from fedpers.models.head import with_head
from fedpers.models.initial import fresh
from fedpers.models.networks import CNN, MLP, Network, ResNet18
from fedpers.models.sequences import CNN1D, LSTM, Transformer
from fedpers.models.vit import VisionBody, ViT, ViTB16, check_promptable
from fedpers.settings.model import ModelConfig

__all__ = [
    "CNN",
    "CNN1D",
    "LSTM",
    "MLP",
    "MODELS",
    "Factorization",
    "ItemTable",
    "ModelConfig",
    "Network",
    "ResNet18",
    "Transformer",
    "ViT",
    "ViTB16",
    "VisionBody",
    "build_model",
    "check_promptable",
    "fresh",
    "with_head",
]
