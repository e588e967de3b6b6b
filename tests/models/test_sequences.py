"""Networks for series and tokens: shapes, causality, tied weights, and which one the data's shape asks for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedpers.errors import ConfigError
from fedpers.models import ModelConfig, build_model


@pytest.mark.parametrize("steps", [4, 20, 33, 34, 128])
def test_series_of_any_length_are_convolved(steps: int) -> None:
    model = build_model(ModelConfig("cnn1d", width=2, hidden=(8,)), (3, steps), 5, 0)
    assert model(torch.randn(2, 3, steps)).shape == (2, 5)


def test_the_network_for_human_activity_is_that_of_pfllib() -> None:
    """Its HARCNN: two convolutions of width 9 and max-pooling by 2, 26 steps left of 128, then 1024 and 512."""
    model = build_model(ModelConfig("cnn1d", hidden=(1024, 512)), (9, 128), 6, 0)
    sizes = [tuple(p.shape) for p in model.parameters() if p.dim() > 1]
    assert sizes == [(32, 9, 9), (64, 32, 9), (1024, 64 * 26), (512, 1024), (6, 512)]


@pytest.mark.parametrize("name", ["lstm", "transformer"])
@pytest.mark.parametrize("per_token", [True, False])
def test_each_position_knows_only_what_came_before(name: str, per_token: bool) -> None:
    model = build_model(ModelConfig(name), (6,), 4, 0, num_tokens=9, per_token=per_token).eval()
    x = torch.randint(9, (2, 6), generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 9
    before, after = model(x), model(changed)
    assert before.shape == ((2, 6, 4) if per_token else (2, 4))
    if per_token:
        torch.testing.assert_close(before[:, :4], after[:, :4])
        assert not torch.allclose(before[:, 4], after[:, 4])
        assert not torch.allclose(before[:, 5], after[:, 5])
    else:
        assert not torch.allclose(before, after)


def test_scores_at_the_start_are_small() -> None:
    for tied in (False, True):
        model = build_model(ModelConfig("transformer", tied=tied), (20,), 50, 0, num_tokens=50, per_token=True)
        scores = model(torch.randint(50, (4, 20)))
        assert 0.2 < float(scores.std()) < 2


def test_tied_weights_are_one_parameter() -> None:
    model = build_model(ModelConfig("transformer", tied=True), (6,), 9, 0, num_tokens=9, per_token=True)
    assert model.head.weight is model.body.embedding
    assert "head.weight" not in dict(model.named_parameters())
    with pytest.raises(ConfigError, match=r"model\.tied=True: expected false where 4 outputs are not the 9 tokens"):
        build_model(ModelConfig("transformer", tied=True), (6,), 4, 0, num_tokens=9)


@pytest.mark.parametrize("name", ["lstm", "transformer"])
@pytest.mark.parametrize("per_token", [True, False])
def test_features_may_have_a_width_that_other_kinds_have_too(name: str, per_token: bool) -> None:
    model = build_model(ModelConfig(name, features=5), (6,), 4, 0, num_tokens=9, per_token=per_token)
    assert model.head.weight.shape == (4, 5)
    assert model(torch.zeros(2, 6, dtype=torch.int64)).shape == ((2, 6, 4) if per_token else (2, 4))


def test_no_projection_between_tied_weights() -> None:
    with pytest.raises(ConfigError, match=r"model\.tied=True: expected false with model\.features=5, after which"):
        ModelConfig("transformer", tied=True, features=5)


@pytest.mark.parametrize(
    ("shape", "num_tokens", "kind"),
    [((7,), 9, "LSTM"), ((9, 128), 0, "CNN1D"), ((4, 3), 0, "MLP"), ((1, 8, 8), 0, "MLP"), ((5,), 0, "MLP")],
)
def test_the_shape_of_a_sample_chooses_the_network(shape: tuple[int, ...], num_tokens: int, kind: str) -> None:
    model = build_model(ModelConfig(), shape, 3, 0, num_tokens=num_tokens)
    assert type(model).__name__ == kind


@pytest.mark.parametrize(
    ("config", "shape", "num_tokens", "message"),
    [
        (ModelConfig("mlp"), (7,), 9, "model.name=mlp: expected one of lstm, transformer for tokens"),
        (ModelConfig("cnn"), (7,), 9, "model.name=cnn"),
        (ModelConfig("transformer"), (3, 8), 0, "transformer takes tokens"),
        (ModelConfig("lstm"), (1, 8, 8), 0, r"lstm takes tokens \[T\] or series \[C, T\]"),
        (ModelConfig("cnn1d"), (8,), 0, r"cnn1d takes series \[channels, steps >= 4\]"),
        (ModelConfig("cnn1d"), (8, 3), 0, "cnn1d takes series"),
        (ModelConfig("transformer", dim=6, heads=4), (7,), 9, "model.heads=4: expected a divisor of model.dim=6"),
        (ModelConfig(hidden=(4,)), (7,), 9, "model.hidden=.*: expected no value: lstm has the options"),
    ],
)
def test_networks_that_do_not_fit_are_refused(
    config: ModelConfig, shape: tuple[int, ...], num_tokens: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(config, shape, 3, 0, num_tokens=num_tokens)


def test_a_network_of_ones_own_is_told_of_the_tokens() -> None:
    model = build_model(ModelConfig("tests.models.test_sequences:Bag"), (7,), 3, 0, num_tokens=9)
    assert model(torch.zeros(2, 7, dtype=torch.int64)).shape == (2, 3)


class Bag(nn.Module):
    def __init__(self, num_tokens: int, num_classes: int) -> None:
        super().__init__()
        self.body = nn.EmbeddingBag(num_tokens, 4)
        self.head = nn.Linear(4, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(x))
        return out
