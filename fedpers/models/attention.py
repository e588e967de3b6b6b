"""A block of a transformer, of pictures as of text."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TransformerBlock(nn.Module):
    """Attention and perceptron, each behind a normalization and beside a shortcut.

    Vaswani et al., "Attention is all you need", NeurIPS 2017, with the normalization first.

    Parameters
    ----------
    dim : int
        Width D of the tokens.
    heads : int
        Attention heads; must divide `dim`.
    hidden : int
        Width of the perceptron.
    causal : bool
        Whether a token attends to itself and earlier ones only.
    """

    def __init__(self, dim: int, heads: int, hidden: int, *, causal: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, outputs: int | None = None) -> Tensor:
        """Tokens ``[B, L, D]`` after the block; or the first `outputs` of them alone, which attend to all."""
        dim = x.shape[-1]
        normalized = self.norm1(x)
        if outputs is None:
            query, key, value = self.qkv(normalized).chunk(3, -1)
        else:
            query = F.linear(normalized[:, :outputs], self.qkv.weight[:dim], self.qkv.bias[:dim])
            key, value = F.linear(normalized, self.qkv.weight[dim:], self.qkv.bias[dim:]).chunk(2, -1)
            x = x[:, :outputs]
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        # Not F.scaled_dot_product_attention: on a CPU it cannot be mapped over clients, nor differentiated twice.
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        if self.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        x = x + self.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        perceptron: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + perceptron
