"""Which kinds of layers run stacked, or one client at a time, or are refused: ``python -m tests.layers`` says it."""

# ruff: noqa: E501, NPY002 (the table below has a line for each kind; one draws from NumPy as users do)

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpers.cohort import Training
from fedpers.data import FederatedData
from fedpers.errors import ConfigError
from fedpers.runtime.probe import probe
from fedpers.strategies import CohortApp, FedAvgUpdate

STACKED, ONE, REFUSED = "stacked", "one client at a time", "refused"
CLIENTS, SIZE, HELD = 3, 12, 4


def data(shape: tuple[int, ...], *, tokens: int = 0, dtype: torch.dtype = torch.float64) -> FederatedData:
    """Three clients with inputs of a shape: noise in which the class shifts the mean, or tokens below a number."""
    rng = np.random.default_rng(0)
    total = CLIENTS * (SIZE + 2 * HELD)
    y = torch.from_numpy(rng.integers(0, 3, total))
    if tokens:
        x = torch.from_numpy(rng.integers(0, tokens, (total, *shape)))
    else:
        x = torch.from_numpy(rng.normal(size=(total, *shape))).to(dtype) + y.view(-1, *([1] * len(shape))) * 0.5
    parts = torch.arange(total).view(CLIENTS, -1)
    lists = (list(parts[:, :SIZE]), list(parts[:, SIZE : SIZE + HELD]), list(parts[:, SIZE + HELD :]))
    return FederatedData(x, y, *lists, 3)


class Through(nn.Module):
    """A body, what is done to its output, and a linear head of three classes."""

    def __init__(
        self, body: nn.Module, width: int, reduce: Callable[[Any], Tensor] = lambda out: out.flatten(1)
    ) -> None:
        super().__init__()
        self.body, self.reduce, self.head = body, reduce, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.reduce(self.body(x)))


class Attention(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=dropout, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.embedding.weight
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.out(self.embedding(x)).mean(1))


class TwoInputs(nn.Module):
    """Takes its two inputs as columns of one tensor, as data hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.split(4, dim=1)
        return self.head(torch.tanh(self.left(left)) * torch.tanh(self.right(right)))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        return self.head(features.relu() if features.mean() > 0 else features.tanh())


class ReturnsFeatures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return self.head(features), features


class Fourier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(5, dtype=torch.cfloat)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=8))


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + 0.1 * torch.randn_like(x) if self.training else x)


class Counting(nn.Module):
    """Assigns a buffer anew at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps = self.steps + 1.0
        return self.head(x)


class OwnNorm(nn.Module):
    """Centers features on the batch in training, in an evaluation on a running mean, which it assigns or changes."""

    def __init__(self, assigns: bool) -> None:
        super().__init__()
        self.body, self.head, self.assigns = nn.Linear(8, 8), nn.Linear(8, 3), assigns
        self.register_buffer("center", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        if not self.training:
            return self.head(features - self.center)
        center = features.mean(0)
        if self.assigns:
            self.center = 0.9 * self.center + 0.1 * center.detach()
        else:
            self.center.mul_(0.9).add_(0.1 * center.detach())
        return self.head(features - center)


class DrawsElsewhere(nn.Module):
    """Draws from NumPy or Python."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.head, self.draw = nn.Linear(8, 3), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * self.draw() if self.training else x)


class CentersOnBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x - x.mean(0))


class ChangesInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x -= 1
        return self.head(x)


class Counts(nn.Module):
    """Counts its calls, in a buffer: a persistent one, or not."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()), persistent=persistent)
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1.0)
        return self.head(x) + 0.1 * self.calls


class MakesTable(nn.Module):
    """Keeps a table of constants in a buffer that is not persistent, and makes it when it is first needed."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.register_buffer("table", None, persistent=False)
        self.table: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0, 1, 8, dtype=x.dtype)
        return self.head(x + self.table)


class NoHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def _half_frozen() -> nn.Module:
    network = Through(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), 8)
    network.body.requires_grad_(False)
    return network


def _last(out: Any) -> Tensor:
    return (out[0] if isinstance(out, tuple) else out)[:, -1]


def _mean(out: Tensor) -> Tensor:
    return out.mean(1)


@dataclass(frozen=True)
class Kind:
    """A kind of network, the data it takes, and how it is expected to run."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    expected: str = STACKED
    tokens: int = 0
    dtype: torch.dtype = torch.float64

    def data(self) -> FederatedData:
        return data(self.shape, tokens=self.tokens, dtype=self.dtype)

    def network(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = self.make()
        return network.double() if self.dtype == torch.float64 else network

    def app(self) -> CohortApp:
        training = Training(lr=0.1, batch_size=5, shuffle=False, epochs=2)
        return FedAvgUpdate(training=training).client_app(self.network(), self.data(), seed=1)


SERIES, VECTOR, PICTURE, TOKENS = (6, 8), (8,), (2, 8, 8), (6,)
KINDS = [
    Kind("linear", lambda: Through(nn.Linear(8, 8), 8), VECTOR),
    Kind("convolution, 1-d", lambda: Through(nn.Conv1d(6, 4, 3), 24), SERIES),
    Kind("convolution, 2-d, with pooling", lambda: Through(nn.Sequential(nn.Conv2d(2, 4, 3), nn.MaxPool2d(2)), 36), PICTURE),
    Kind("convolution, 3-d", lambda: Through(nn.Conv3d(2, 3, 3), 3 * 1 * 2 * 3), (2, 3, 4, 5)),
    Kind("transposed convolution", lambda: Through(nn.ConvTranspose2d(2, 2, 2, stride=2), 512), PICTURE),
    Kind("RNN", lambda: Through(nn.RNN(8, 8, batch_first=True), 8, _last), SERIES, ONE),
    Kind("LSTM", lambda: Through(nn.LSTM(8, 8, batch_first=True), 8, _last), SERIES, ONE),
    Kind("LSTM, two layers with dropout", lambda: Through(nn.LSTM(8, 8, 2, dropout=0.3, batch_first=True), 8, _last), SERIES, ONE),
    Kind("GRU, both directions", lambda: Through(nn.GRU(8, 4, batch_first=True, bidirectional=True), 8, _last), SERIES, ONE),
    Kind("attention", lambda: Through(Attention(), 8, _mean), SERIES),
    Kind("attention with dropout", lambda: Through(Attention(0.2), 8, _mean), SERIES, ONE),
    Kind("transformer encoder, default dropout", lambda: Through(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 8, _mean), SERIES, ONE),
    Kind("transformer encoder, no dropout", lambda: Through(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 8, _mean), SERIES),
    Kind("embedding", lambda: Through(nn.Embedding(20, 8), 8, _mean), TOKENS, tokens=20),
    Kind("embedding bag", lambda: Through(nn.EmbeddingBag(20, 8), 8), TOKENS, tokens=20),
    Kind("embedding tied to an output layer", TiedLanguageModel, TOKENS, tokens=20),
    Kind("batch norm", lambda: Through(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), 8), VECTOR),
    Kind("layer norm", lambda: Through(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), 8), VECTOR),
    Kind("group norm", lambda: Through(nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)), 144), PICTURE),
    Kind("instance norm", lambda: Through(nn.Sequential(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True)), 144), PICTURE),
    Kind("spectral norm", lambda: Through(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), 8), VECTOR, ONE),
    Kind("weight norm", lambda: Through(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), 8), VECTOR),
    Kind("dropout layers", lambda: Through(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3)), 8), VECTOR),
    Kind("alpha dropout", lambda: Through(nn.Sequential(nn.Linear(8, 8), nn.AlphaDropout(0.3)), 8), VECTOR, ONE),
    Kind("noise drawn in forward", Noisy, VECTOR, ONE),
    Kind("control flow on data", Branching, VECTOR, ONE),
    Kind("several inputs, as columns of one", TwoInputs, VECTOR),
    Kind("a buffer assigned anew", Counting, VECTOR),
    Kind("batch normalization of one's own, assigned", lambda: OwnNorm(True), VECTOR, ONE),
    Kind("batch normalization of one's own, in place", lambda: OwnNorm(False), VECTOR, ONE),
    Kind("draws from NumPy", lambda: DrawsElsewhere(lambda: np.random.rand()), VECTOR, REFUSED),
    Kind("draws from random", lambda: DrawsElsewhere(random.random), VECTOR, REFUSED),
    Kind("centered on the batch", CentersOnBatch, VECTOR, REFUSED),
    Kind("changes its inputs", ChangesInputs, VECTOR, REFUSED),
    Kind("counts in an evaluation", lambda: Counts(True), VECTOR, REFUSED),
    Kind("a running mean that is not persistent", lambda: Counts(False), VECTOR, REFUSED),
    Kind("a table that is made when it is needed", MakesTable, VECTOR),
    Kind("embedding with a largest norm", lambda: Through(nn.Embedding(20, 8, max_norm=0.5), 8, _mean), TOKENS, REFUSED, tokens=20),
    Kind("embedding with sparse gradients", lambda: Through(nn.Embedding(20, 8, sparse=True), 8, _mean), TOKENS, REFUSED, tokens=20),
    Kind("weight norm of old", lambda: Through(nn.utils.weight_norm(nn.Linear(8, 8)), 8), VECTOR, REFUSED),
    Kind("frozen parts", _half_frozen, VECTOR),
    Kind("no head", NoHead, VECTOR),
    Kind("returns scores and features", ReturnsFeatures, VECTOR, REFUSED),
    Kind("complex parameters", Fourier, VECTOR, REFUSED, dtype=torch.float32),
    Kind("bfloat16", lambda: Through(nn.Linear(8, 8), 8).bfloat16(), VECTOR, REFUSED, dtype=torch.bfloat16),
    Kind("names with a slash", lambda: Through(nn.ModuleDict({"a/b": nn.Linear(8, 8)}), 8), VECTOR, REFUSED),
    Kind("lazy layers", lambda: Through(nn.LazyLinear(8), 8), VECTOR, REFUSED, dtype=torch.float32),
    Kind("synchronized batch norm", lambda: Through(nn.Sequential(nn.Linear(8, 8), nn.SyncBatchNorm(8)), 8), VECTOR, REFUSED),
]  # fmt: skip


def how_it_runs(kind: Kind) -> tuple[str, str]:
    """How a kind of network runs, and the sentence if it is refused."""
    try:
        app = kind.app()
    except ConfigError as error:
        return REFUSED, str(error)
    choice = probe(app, CLIENTS, CLIENTS, 1)
    return (ONE if choice.how == "one at a time" else STACKED), ""


def main() -> None:
    for kind in KINDS:
        mode, sentence = how_it_runs(kind)
        print(f"{kind.name:40}  {mode}{f': {sentence}' if sentence else ''}", flush=True)


if __name__ == "__main__":
    main()
