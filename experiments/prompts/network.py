"""The small vision transformer of this study with the weights of another run's network, but for its head.

``model=experiments.prompts.network:pretrained_vit model.arguments.weights=FILE``, where FILE is what ``fedpers export``
writes.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from fedpers.models.vit import ViT


def pretrained_vit(input_shape: tuple[int, ...], num_classes: int, weights: str) -> ViT:
    """Patches of 4 pixels, 64 features, 4 blocks; all values but the head's from `weights`, a ``.safetensors`` file."""
    network = ViT(input_shape, num_classes, patch=4, dim=64, depth=4)
    values = load_file(Path(weights))
    head = {f"head.{name}": value for name, value in network.head.state_dict().items()}
    network.load_state_dict({**values, **head})
    return network
