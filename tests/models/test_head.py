"""Networks whose last layer has another name than `head`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpers.cohort import prepare, select
from fedpers.errors import ConfigError
from fedpers.models import CNN, ModelConfig, Network, build_model, with_head

X = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Pictures(nn.Module):
    """Laid out as torchvision's networks are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU())
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.layer1(torch.relu(self.bn1(self.conv1(x)))).mean((2, 3)))
        return out


class LogProbabilities(Pictures):
    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(super().forward(x), 1)


class Asking(Pictures):
    """Asks its last layer for more than its output."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(len(x), self.fc.out_features)


class Twice(nn.Module):
    """Applies one layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.flat, self.fc = nn.Flatten(), nn.Linear(192, 192)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(torch.relu(self.fc(self.flat(x))))
        return out


class Aliased(Pictures):
    def __init__(self) -> None:
        super().__init__()
        self.head = self.fc


class Nested(nn.Module):
    """A classifier of several layers, in a module that wraps a whole network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        inner = nn.Module()
        inner.features = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        inner.classifier = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.ReLU(), nn.Linear(5, 4))
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner.classifier(self.inner.features(x))  # type: ignore[operator,union-attr]
        return out


def sequential() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(192, 6), nn.ReLU()), nn.Linear(6, 4))


CASES = {
    "fc": (Pictures(), "fc", ("head.weight", "head.bias"), "body.layer1.0.weight"),
    "sequential": (sequential(), "2", ("head.weight", "head.bias"), "body.1.0.weight"),
    "nested": (Nested(), "inner.classifier.3", ("head.weight", "head.bias"), "body.inner.classifier.0.weight"),
    "several layers": (
        Nested(), "inner.classifier", ("head.0.weight", "head.0.bias", "head.3.weight", "head.3.bias"),
        "body.inner.features.0.weight",
    ),
    "alias": (Aliased(), "fc", ("head.weight", "head.bias"), "body.conv1.weight"),
    "other alias": (Aliased(), "head", ("head.weight", "head.bias"), "body.conv1.weight"),
    "ours": (CNN((3, 8, 8), 4, width=2, hidden=(5,)), "head", ("head.weight", "head.bias"), "body.0.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_named_layer_becomes_the_head(case: str) -> None:
    model, name, head, inside = CASES[case]
    before = copy.deepcopy(model.state_dict())
    network = with_head(model, name, X)
    assert [part for part, _ in network.named_children()] == ["body", "head"]
    assert select(network, "head") == head
    assert inside in select(network, "body")
    assert len(select(network, "all")) == len(select(model, "all"))
    assert all(layer.training for layer in network.modules())
    assert all(layer.training for layer in model.modules())
    torch.testing.assert_close(network.eval()(X), copy.deepcopy(model).eval()(X))
    torch.testing.assert_close(network.head(network.body(X)), network(X))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(1.0)
    assert all(torch.equal(value, before[entry]) for entry, value in model.state_dict().items())
    assert list(prepare(network).state_dict()) == list(network.state_dict())


def test_modes_and_frozen_parameters_stay() -> None:
    model = Pictures()
    model.bn1.eval()
    model.conv1.requires_grad_(False)
    network = with_head(model, "fc", X)
    assert network.training
    assert {name for name, layer in network.named_modules() if not layer.training} == {"body.bn1"}
    assert {name for name, p in network.named_parameters() if not p.requires_grad} == {
        "body.conv1.weight", "body.conv1.bias",
    }  # fmt: skip
    assert not with_head(model.eval(), "fc", X).training


@pytest.mark.parametrize(
    ("model", "name", "sentence"),
    [
        (Pictures(), "cf", r"model\.head=cf: expected one of .*\(did you mean 'fc'\?\)\.$"),
        (Pictures(), "", r"model\.head=: expected one of"),
        (Pictures(), "layer1", r"model\.head=layer1: expected the layer that is applied last"),
        (LogProbabilities(), "fc", r"model\.head=fc: expected the layer that is applied last"),
        (Asking(), "fc", r"model\.head=fc: expected the layer that is applied last"),
        (Twice(), "fc", r"model\.head=fc: expected the layer that is applied last"),
        (nn.Sequential(*sequential(), nn.Softmax(1)), "3", r"model\.head=3: expected a layer that has parameters"),
        (nn.Sequential(*sequential(), nn.Softmax(1)), "2", r"model\.head=2: expected the layer that is applied last"),
        (nn.Sequential(nn.Linear(7, 4)), "0", r"model=Sequential: expected .* samples of shape \[3, 8, 8\]"),
    ],
)
def test_other_layers_are_refused(model: nn.Module, name: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        with_head(model, name, X)


def test_tied_frozen_parameters_stay_tied() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 192), nn.ReLU(), nn.Linear(192, 192))
    model[3].weight = model[1].weight
    model[1].weight.requires_grad_(False)
    network = with_head(model, "3", X)
    assert network.head.weight is network.body[1].weight  # type: ignore[index]
    assert select(network, "head") == ("head.bias",)


def test_the_head_of_a_built_model_may_be_named() -> None:
    plain = build_model(ModelConfig("mlp"), (3, 8, 8), 4, seed=1)
    same = build_model(ModelConfig("mlp", head="head"), (3, 8, 8), 4, seed=1)
    assert type(same) is type(plain)
    assert list(same.state_dict()) == list(plain.state_dict())
    assert torch.equal(same(X), plain(X))
    ranking = build_model(ModelConfig("factorization", dim=3, head="head"), (), 1, seed=1, num_items=1)
    assert isinstance(ranking, Network)
    assert "head" not in ModelConfig("mlp", head="head").options()
    with pytest.raises(ConfigError, match=r"model\.head=body\.1: expected the layer that is applied last"):
        build_model(ModelConfig("mlp", head="body.1"), (3, 8, 8), 4, seed=1)
    with pytest.raises(ConfigError, match=r"model\.head=haed: .*did you mean 'head'"):
        build_model(ModelConfig("factorization", head="haed"), (), 1, seed=1, num_items=5)
    with pytest.raises(ConfigError, match=r"model\.head=: expected the dotted name of a layer, or null"):
        ModelConfig(head="")


def test_the_accuracy_of_pretraining_is_kept() -> None:
    model = build_model(ModelConfig("mlp"), (3, 8, 8), 4, seed=1)
    model.pretrained_accuracy = 0.5
    assert with_head(model, "head", X).pretrained_accuracy == 0.5
    wrapped = nn.Sequential(model)
    assert with_head(wrapped, "0.head", X).pretrained_accuracy is None
