"""The networks: a ``body`` that turns samples into features and a linear ``head`` that classifies them.

They run under ``torch.func.vmap`` with one set of parameters and buffers per client, so nothing in them
works in place on activations and nothing draws random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fedpers.errors import check


class Network(nn.Module):
    """A network in two named parts; parameter names start with ``body.`` or ``head.``.

    Parameters
    ----------
    body : nn.Module
        Maps samples ``[B, ...]`` to features, ``[B, F]`` in the networks of this module.
    head : nn.Module
        Maps features to outputs; here a linear layer, to scores ``[B, num_classes]``.

    Attributes
    ----------
    pretrained_accuracy : float or None
        Accuracy on the held-out tenth of a public share after :func:`fedpers.models.pretrain.pretrain`; None if the
        network was not trained there.
    """

    pretrained_accuracy: float | None = None

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the head, such as unnormalized class scores ``[B, num_classes]``, for samples `x` ``[B, ...]``."""
        scores: Tensor = self.head(self.body(x))
        return scores


class MLP(Network):
    """Fully connected layers with ReLU over flattened samples of any shape.

    Parameters
    ----------
    input_shape : sequence of int
        Shape of one sample, without the batch axis.
    num_classes : int
    hidden : sequence of int
        Sizes of the hidden layers, each > 0; the last one is the number of features.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, hidden: Sequence[int] = (64,)) -> None:
        size = 1
        for length in input_shape:
            size *= length
        layers: list[nn.Module] = [nn.Flatten()]
        for width in hidden:
            layers += [nn.Linear(size, width), nn.ReLU()]
            size = width
        super().__init__(nn.Sequential(*layers), nn.Linear(size, num_classes))


class CNN(Network):
    """Two 5x5 convolutions with ReLU and 2x2 max-pooling, then one fully connected layer and the head.

    The network of PFLlib and of Flower's examples: 28x28 pictures give 1,024 and 32x32 pictures 1,600
    inputs to the fully connected layer, as there. Without padding the second convolution needs 16 pixels;
    where a side is shorter (the 8x8 digits), both convolutions are padded by 2 so that only pooling shrinks.

    Parameters
    ----------
    input_shape : sequence of int
        ``[channels, height, width]``, height and width >= 4.
    num_classes : int
    width : int
        Channels of the first convolution; the second has twice as many.
    hidden : sequence of int
        Sizes of the fully connected layers before the head.
    norm : {"none", "batch"}
        Batch normalization after each convolution, or none.

    Raises
    ------
    ConfigError
        If the samples are not pictures of at least 4x4 pixels.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        width: int = 32,
        hidden: Sequence[int] = (512,),
        norm: str = "none",
    ) -> None:
        check_picture("cnn", input_shape, smallest=4)
        channels, *sides = input_shape
        padding = 2 if min(sides) < 16 else 0
        layers: list[nn.Module] = []
        for out in (width, 2 * width):
            layers.append(nn.Conv2d(channels, out, 5, padding=padding, bias=norm != "batch"))
            layers += [nn.BatchNorm2d(out)] if norm == "batch" else []
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
            channels = out
            sides = [(side + 2 * padding - 4) // 2 for side in sides]
        layers.append(nn.Flatten())
        size = channels * sides[0] * sides[1]
        for features in hidden:
            layers += [nn.Linear(size, features), nn.ReLU()]
            size = features
        super().__init__(nn.Sequential(*layers), nn.Linear(size, num_classes))


class ResNet18(Network):
    """ResNet-18 for 32x32 pictures: a 3x3 stem without max-pooling, 8 residual blocks, average pooling.

    Parameters
    ----------
    input_shape : sequence of int
        ``[channels, height, width]``, height and width >= 8.
    num_classes : int
    norm : {"group", "batch"}
        Batch normalization carries running statistics as buffers; group normalization has none, which
        is the usual choice where clients differ in their labels.
    groups : int
        Groups of each group normalization; must divide `width`.
    width : int
        Channels of the first stage; the later ones have 2, 4 and 8 times as many.

    Raises
    ------
    ConfigError
        If the samples are not pictures of at least 8x8 pixels, or `groups` does not divide `width`.
    """

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, norm: str = "group", groups: int = 2, width: int = 64
    ) -> None:
        check_picture("resnet18", input_shape, smallest=8)
        check(norm in ("group", "batch"), "model.norm", norm, "one of batch, group")
        if norm == "group":
            check(width % groups == 0, "model.groups", groups, f"a divisor of model.width={width}")

        def normalize(channels: int) -> nn.Module:
            return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(groups, channels)

        layers: list[nn.Module] = [_conv(input_shape[0], width), normalize(width), nn.ReLU()]
        channels = width
        for stage in range(4):
            out = width * 2**stage
            for stride in (1 if stage == 0 else 2, 1):
                layers.append(_Block(channels, out, stride, normalize))
                channels = out
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(nn.Sequential(*layers), nn.Linear(channels, num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the convolutions anew from torch's generator; other layers have methods of their own."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class _Block(nn.Module):
    """Two 3x3 convolutions around a shortcut, which is projected where the shape changes."""

    def __init__(self, channels: int, out: int, stride: int, normalize: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            _conv(channels, out, stride), normalize(out), nn.ReLU(), _conv(out, out), normalize(out)
        )
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Sequential(_conv(channels, out, stride, 1), normalize(out))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.residual(x) + self.shortcut(x))
        return out


def _conv(channels: int, out: int, stride: int = 1, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=False)


def check_picture(name: str, shape: Sequence[int], smallest: int) -> None:
    """Refuse samples that are not pictures ``[channels, height, width]`` of at least `smallest` pixels a side."""
    check(
        len(shape) == 3 and min(shape[1:]) >= smallest,
        "model.name",
        name,
        f"another model for samples of shape {tuple(shape)}: "
        f"{name} takes pictures [channels, height, width] of at least {smallest}x{smallest} pixels",
    )
