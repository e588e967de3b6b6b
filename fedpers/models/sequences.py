"""Networks for series of measurements and for tokens: convolutions over time, LSTM, a small transformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedpers.errors import check
from fedpers.models.attention import TransformerBlock
from fedpers.models.networks import Network

CNN1D_KERNEL = 9


class CNN1D(Network):
    """Two convolutions over time with ReLU and max-pooling by 2, fully connected layers and the head.

    With ``hidden=[1024, 512]`` PFLlib's network for human activity (``HARCNN``). Series of fewer than 34 steps are
    padded, so that only pooling shrinks them.

    Parameters
    ----------
    input_shape : sequence of int
        ``[channels, steps]``, at least 4 steps.
    num_classes : int
    width : int
        Channels of the first convolution; the second has twice as many.
    hidden : sequence of int
        Sizes of the fully connected layers before the head.

    Raises
    ------
    ConfigError
        If the samples are no such series.
    """

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, width: int = 32, hidden: Sequence[int] = (512,)
    ) -> None:
        fits = len(input_shape) == 2 and input_shape[1] >= 4
        allowed = f"another model for samples of shape {tuple(input_shape)}: cnn1d takes series [channels, steps >= 4]"
        check(fits, "model.name", "cnn1d", allowed)
        channels, steps = input_shape
        padding = CNN1D_KERNEL // 2 if steps < 34 else 0
        layers: list[nn.Module] = []
        for out in (width, 2 * width):
            layers += [nn.Conv1d(channels, out, CNN1D_KERNEL, padding=padding), nn.ReLU(), nn.MaxPool1d(2)]
            channels, steps = out, (steps + 2 * padding - CNN1D_KERNEL + 1) // 2
        layers.append(nn.Flatten())
        size = channels * steps
        for features in hidden:
            layers += [nn.Linear(size, features), nn.ReLU()]
            size = features
        super().__init__(nn.Sequential(*layers), nn.Linear(size, num_classes))


class LSTM(Network):
    """LSTM over tokens, embedded first, or over the steps of a series; a linear head on its last layer.

    The network of LEAF for Shakespeare (Caldas et al., "LEAF", 2018) with ``embedding=8 hidden_size=256 layers=2``. It
    is computed one client at a time: PyTorch's fused recurrence cannot be mapped over clients, and one that can takes
    four times as long on a CPU.

    Parameters
    ----------
    input_shape : sequence of int
        ``[T]`` of tokens, or ``[channels, steps]``.
    num_classes : int
    num_tokens : int
        Size of the vocabulary; 0 for series.
    per_token : bool
        Whether the head is applied at each position, ``[B, T, num_classes]``, not at the last one only.
    embedding : int
        Width of the embedding.
    hidden_size : int
        Width of the recurrent layers, the number of features.
    layers : int
        Recurrent layers.

    Raises
    ------
    ConfigError
        If the samples are neither.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        *,
        num_tokens: int = 0,
        per_token: bool = False,
        embedding: int = 32,
        hidden_size: int = 128,
        layers: int = 1,
    ) -> None:
        fits = len(input_shape) == (1 if num_tokens else 2)
        allowed = f"another model for samples of shape {tuple(input_shape)}: lstm takes tokens [T] or series [C, T]"
        check(fits, "model.name", "lstm", allowed)
        inputs = (num_tokens, embedding) if num_tokens else input_shape[0]
        super().__init__(_Recurrent(inputs, hidden_size, layers, per_token), nn.Linear(hidden_size, num_classes))


class _Recurrent(nn.Module):
    """Tokens ``[B, T]`` or series ``[B, C, T]`` to features ``[B, H]`` of the last position, or ``[B, T, H]``."""

    def __init__(self, inputs: tuple[int, int] | int, hidden: int, layers: int, every: bool) -> None:
        super().__init__()
        self.every = every
        self.embedding = nn.Embedding(*inputs) if isinstance(inputs, tuple) else None
        width = inputs[1] if isinstance(inputs, tuple) else inputs
        self.lstm = nn.LSTM(width, hidden, layers, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        steps = x.transpose(1, 2) if self.embedding is None else self.embedding(x)
        features: Tensor = self.lstm(steps)[0]
        return features if self.every else features[:, -1]


class Transformer(Network):
    """A small transformer over tokens in which each position sees itself and earlier ones.

    Parameters
    ----------
    input_shape : sequence of int
        ``[T]``.
    num_classes : int
    num_tokens : int
        Size of the vocabulary.
    per_token : bool
        Whether the head is applied at each position, ``[B, T, num_classes]``, not at the last one only.
    dim : int
        Width of the tokens, the number of features.
    depth : int
        Blocks.
    heads : int
        Of attention; must divide `dim`.
    mlp_ratio : float
        Hidden width of a block's perceptron, in multiples of `dim`, > 0.
    tied : bool
        Whether the head's weights are the embedding's (Press and Wolf, 2017), which then is personal where the head is;
        needs ``num_classes == num_tokens``.

    Raises
    ------
    ConfigError
        If the samples are no tokens, `heads` does not divide `dim`, or the weights cannot be tied.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        *,
        num_tokens: int = 0,
        per_token: bool = False,
        dim: int = 64,
        depth: int = 2,
        heads: int = 4,
        mlp_ratio: float = 2.0,
        tied: bool = False,
    ) -> None:
        allowed = f"another model for samples of shape {tuple(input_shape)}: transformer takes tokens [T]"
        check(len(input_shape) == 1 and num_tokens > 0, "model.name", "transformer", allowed)
        check(dim % heads == 0, "model.heads", heads, f"a divisor of model.dim={dim}")
        allowed = f"false where {num_classes} outputs are not the {num_tokens} tokens"
        check(not tied or num_classes == num_tokens, "model.tied", tied, allowed)
        body = _Tokens(num_tokens, input_shape[0], dim, depth, heads, max(1, round(dim * mlp_ratio)), per_token)
        head = nn.Linear(dim, num_classes, bias=not tied)
        super().__init__(body, head)
        if tied:
            head.weight = body.embedding


class _Tokens(nn.Module):
    """Tokens ``[B, T]`` to features ``[B, D]`` of the last position, or ``[B, T, D]``."""

    def __init__(
        self, num_tokens: int, length: int, dim: int, depth: int, heads: int, hidden: int, every: bool
    ) -> None:
        super().__init__()
        self.every = every
        self.embedding = nn.Parameter(torch.empty(num_tokens, dim))
        self.positions = nn.Parameter(torch.empty(length, dim))
        self.blocks = nn.Sequential(*(TransformerBlock(dim, heads, hidden, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw embedding and positions anew from torch's generator; layers have methods of their own."""
        for parameter in (self.embedding, self.positions):
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.embedding.shape[1] ** 0.5  # deviation 1 as input, yet scores of about that size where tied
        embedded = nn.functional.embedding(x, self.embedding) + self.positions[: x.shape[1]]
        features: Tensor = self.norm(self.blocks(embedded * scale))
        return features if self.every else features[:, -1]
