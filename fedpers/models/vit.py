"""Vision transformers: small ones that train from scratch, and ViT-B/16 for ImageNet weights.

Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021. Prompts enter as in the shallow variant of Jia et al.,
"Visual prompt tuning", ECCV 2022: further input tokens of the first block, between class token and patches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpers.errors import check
from fedpers.models.attention import TransformerBlock
from fedpers.models.networks import Network, check_picture

MOST_TOKENS = 64
FEWEST_TOKENS = 4
IMAGENET_SIDE = 224
# Deviation of class token and positions at the start. Our inputs and patch tokens are of that size too: with the usual
# 0.02 positions hardly count at first, and 300 digits give an accuracy of 0.7 instead of 0.95.
_INPUT_STD = 1.0


class ViT(Network):
    """Vision transformer with a class token; its body can be given prompts.

    Parameters
    ----------
    input_shape : sequence of int
        ``[channels, height, width]``.
    num_classes : int
    patch : int, optional
        Side of the square patches in pixels, a divisor of height and width. None is the smallest one >= 2 that gives at
        most 64 patches: 2 for 8x8 pictures, 4 for 28x28 and 32x32.
    dim : int
        Width D of the tokens; the number of features.
    depth : int
        Number of blocks.
    heads : int
        Attention heads; must divide `dim`.
    mlp_ratio : float
        Hidden width of a block's perceptron, in multiples of `dim`, > 0.

    Raises
    ------
    ConfigError
        If the samples are not pictures that can be cut into patches, or `heads` does not divide `dim`.
    """

    body: VisionBody

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        patch: int | None = None,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        mlp_ratio: float = 2.0,
    ) -> None:
        check_picture("vit", input_shape, smallest=4)
        channels, height, width = input_shape
        fits = [p for p in range(2, min(height, width) + 1) if height % p == 0 and width % p == 0]
        fits = [p for p in fits if height * width >= FEWEST_TOKENS * p * p]
        if patch is None:
            few = [p for p in fits if height * width <= MOST_TOKENS * p * p]
            check(bool(few), "model.patch", patch, f"a divisor of both sides of {height}x{width} pictures")
            patch = few[0]
        else:
            allowed = (
                f"a divisor of both sides of {height}x{width} pictures that gives at least {FEWEST_TOKENS} patches"
            )
            check(patch == 1 or patch in fits, "model.patch", patch, allowed)
        check(dim % heads == 0, "model.heads", heads, f"a divisor of model.dim={dim}")
        body = VisionBody((channels, height, width), patch, dim, depth, heads, mlp_ratio)
        super().__init__(body, nn.Linear(dim, num_classes))


class ViTB16(Network):
    """ViT-B/16: pictures of 224x224 pixels and 3 channels, 12 blocks of width 768.

    Other pictures are resized and a single channel is repeated, see :meth:`VisionBody.embed`.

    Parameters
    ----------
    input_shape : sequence of int
        ``[channels, height, width]`` with 1 or 3 channels.
    num_classes : int

    Raises
    ------
    ConfigError
        If the samples are not pictures with 1 or 3 channels.
    """

    body: VisionBody

    def __init__(self, input_shape: Sequence[int], num_classes: int) -> None:
        check_picture("vit_b16", input_shape, smallest=4)
        check(
            input_shape[0] in (1, 3),
            "model.name",
            "vit_b16",
            f"another model for pictures with {input_shape[0]} channels: vit_b16 takes 1 or 3",
        )
        body = VisionBody((3, IMAGENET_SIDE, IMAGENET_SIDE), 16, 768, 12, 12, 4.0)
        super().__init__(body, nn.Linear(768, num_classes))


class VisionBody(nn.Module):
    """Everything of a vision transformer but its head: pictures to the features of the class token.

    Parameters
    ----------
    input_shape : tuple of int
        ``(C, H, W)`` of the pictures that are cut into patches; others are brought to this shape first.
    patch, dim, depth, heads, mlp_ratio
        See :class:`ViT`.

    Attributes
    ----------
    tokens : int
        Number of patches T.
    cls : Tensor ``[D]``
        Class token.
    positions : Tensor ``[1 + T, D]``
        Of class token and patches.
    """

    def __init__(
        self, input_shape: tuple[int, int, int], patch: int, dim: int, depth: int, heads: int, mlp_ratio: float
    ) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.input_shape = input_shape
        self.side = patch
        self.tokens = (height // patch) * (width // patch)
        self.cls = nn.Parameter(torch.empty(dim))
        self.positions = nn.Parameter(torch.empty(1 + self.tokens, dim))
        # A linear layer over flattened patches is the convolution with this stride, and fast when mapped over clients.
        self.patch = nn.Linear(channels * patch * patch, dim)
        self.blocks = nn.Sequential(
            *(TransformerBlock(dim, heads, max(1, round(dim * mlp_ratio))) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw class token and positions anew from torch's generator; layers have methods of their own."""
        for parameter in (self.cls, self.positions):
            nn.init.trunc_normal_(parameter, std=_INPUT_STD, a=-2 * _INPUT_STD, b=2 * _INPUT_STD)

    def embed(self, x: Tensor) -> Tensor:
        """Patch tokens with their positions, without class token; prompts have no influence on them.

        Pictures of another size than the network's are resized (bilinear; with antialiasing where they shrink), and a
        single channel is repeated where the network has more.

        Parameters
        ----------
        x : Tensor ``[B, C, H, W]``

        Returns
        -------
        Tensor ``[B, T, D]``
        """
        channels, height, width = self.input_shape
        if x.shape[-2:] != (height, width):
            shrink = x.shape[-2] > height or x.shape[-1] > width
            x = F.interpolate(x, (height, width), mode="bilinear", align_corners=False, antialias=shrink)
        if x.shape[1] != channels:
            x = x.expand(-1, channels, -1, -1)
        p = self.side
        patches = x.reshape(x.shape[0], channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        tokens: Tensor = self.patch(patches.reshape(x.shape[0], self.tokens, channels * p * p))
        return tokens + self.positions[1:]

    def encode(self, tokens: Tensor, prompts: Tensor | None = None) -> Tensor:
        """Features of the class token after all blocks.

        The first block sees class token, prompts, patches, in this order; prompts have no positions.

        Parameters
        ----------
        tokens : Tensor ``[B, T, D]``
            From :meth:`embed`.
        prompts : Tensor ``[P, D]``, optional
            The same for all pictures.

        Returns
        -------
        Tensor ``[B, D]``
        """
        first = (self.cls + self.positions[0])[None]
        if prompts is not None:
            first = torch.cat([first, prompts])
        x = torch.cat([first.expand(tokens.shape[0], -1, -1), tokens], 1)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        features: Tensor = self.norm(last(x, outputs=1)[:, 0])
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[B, D]`` of pictures ``[B, C, H, W]``, without prompts."""
        return self.encode(self.embed(x))


def check_promptable(model: nn.Module) -> None:
    """Refuse a network whose body cannot be given prompts.

    Parameters
    ----------
    model : nn.Module
        Its ``body`` must have the methods ``embed`` and ``encode`` of :class:`VisionBody`.

    Raises
    ------
    ConfigError
        If it has not.
    """
    body = getattr(model, "body", None)
    good = all(callable(getattr(body, method, None)) for method in ("embed", "encode"))
    allowed = "a vision transformer with a class token: model=vit or model=vit_b16"
    check(good, "model", type(model).__name__, allowed)
