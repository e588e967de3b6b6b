"""Networks: shapes, names, initial values, and training of stacked clients under vmap."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

from fedpers.errors import ConfigError
from fedpers.models import ModelConfig, build_model

RESNET = {"name": "resnet18", "width": 4}
CASES = [
    (ModelConfig("mlp"), (1, 8, 8)),
    (ModelConfig("mlp", hidden=(16, 8)), (20,)),
    (ModelConfig("cnn", width=4, hidden=(16,)), (1, 8, 8)),
    (ModelConfig("cnn", width=4, hidden=(16,)), (1, 28, 28)),
    (ModelConfig("cnn", width=4, hidden=(16,)), (3, 32, 32)),
    (ModelConfig("cnn", width=4, hidden=(16,), norm="batch"), (1, 28, 28)),
    (ModelConfig(**RESNET, norm="group"), (3, 32, 32)),
    (ModelConfig(**RESNET, norm="batch"), (3, 32, 32)),
    (ModelConfig(**RESNET, norm="batch"), (1, 8, 8)),
    (ModelConfig("vit", dim=16, depth=2), (1, 8, 8)),
    (ModelConfig("vit", dim=8, depth=1, heads=2, patch=8), (3, 32, 16)),
]
IDS = [f"{config.name}-{config.norm or ''}{shape}" for config, shape in CASES]
CONF = Path(__file__).parents[2] / "conf" / "model"


@pytest.fixture(autouse=True)
def _seeded_and_single_threaded():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny operations only lose by waiting for other threads
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("config", "shape"), CASES, ids=IDS)
def test_body_gives_features_and_head_classifies_them(config, shape):
    model = build_model(config, shape, 7, seed=0)
    x = torch.randn(5, *shape)
    features = model.body(x)
    assert [name for name, _ in model.named_children()] == ["body", "head"]
    assert isinstance(model.head, nn.Linear)
    assert features.shape == (5, model.head.in_features)
    model.eval()
    torch.testing.assert_close(model(x), model.head(model.body(x)))
    assert model(x).shape == (5, 7)
    assert {name.split(".")[0] for name in model.state_dict()} == {"body", "head"}
    assert not any(getattr(module, "inplace", False) for module in model.modules())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("config", "shape"), CASES, ids=IDS)
def test_stacked_clients_equal_one_after_another(config, shape, training):
    models = [build_model(config, shape, 5, seed=seed).train(training) for seed in range(3)]
    base = build_model(config, shape, 5, seed=9).train(training)
    params, buffers = stack_module_state(models)
    x, y = torch.randn(3, 6, *shape), torch.randint(0, 5, (3, 6))
    before = {name: value.clone() for name, value in buffers.items()}

    def loss(params, buffers, x, y):
        return nn.functional.cross_entropy(functional_call(base, (params, buffers), x), y)

    grads = vmap(grad(loss))(params, buffers, x, y)
    for k, model in enumerate(models):
        nn.functional.cross_entropy(model(x[k]), y[k]).backward()
        for name, value in model.named_parameters():
            # relative to the largest entry: convolutions sum in another order when stacked
            scale = value.grad.abs().max() + 1e-6
            torch.testing.assert_close(grads[name][k] / scale, value.grad / scale, rtol=0, atol=2e-4)
        for name, value in model.named_buffers():
            torch.testing.assert_close(buffers[name][k], value, rtol=1e-4, atol=1e-5)
    moved = {name for name, value in buffers.items() if not torch.equal(value, before[name])}
    assert moved == (set(buffers) if training else set())
    if moved:
        means = buffers["body.1.running_mean"]
        assert not torch.equal(means[0], means[1])


@pytest.mark.parametrize(
    ("name", "shape", "classes", "parameters"),
    [
        ("mlp", (1, 8, 8), 10, 64 * 64 + 64 + 64 * 10 + 10),
        ("cnn", (1, 28, 28), 10, 582_026),  # the size PFLlib's and Flower's network has on MNIST
        ("cnn", (3, 32, 32), 10, 878_538),
        ("resnet18", (3, 32, 32), 10, 11_173_962),  # the usual count of ResNet-18 with a 3x3 stem
        ("vit", (1, 28, 28), 10, 139_018),
    ],
)
def test_default_sizes(name, shape, classes, parameters):
    model = build_model(ModelConfig(name), shape, classes, seed=0)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_initial_values_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = build_model(ModelConfig(), (4,), 3, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = build_model(ModelConfig(), (4,), 3, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    other = build_model(ModelConfig(), (4,), 3, seed=6)
    assert torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_norm_decides_the_buffers():
    group = build_model(ModelConfig(**RESNET, norm="group"), (3, 32, 32), 2, seed=0)
    batch = build_model(ModelConfig(**RESNET, norm="batch"), (3, 32, 32), 2, seed=0)
    assert not list(group.buffers())
    assert len(list(batch.buffers())) == 20 * 3  # stem, 8 x 2, 3 shortcuts


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"name": "resnet"}, r"model=resnet: expected one of .*did you mean 'resnet18'"),
        ({"hidden": ()}, r"model\.hidden=\(\)"),
        ({"hidden": (64, 0)}, r"model\.hidden=\(64, 0\): expected .* >= 1"),
        ({"hidden": 64}, r"model\.hidden=64"),
        ({"width": 8}, r"model\.width=8: expected no value: auto has the options hidden"),
        ({"name": "cnn", "width": 0}, r"model\.width=0: expected a whole number >= 1"),
        ({"name": "resnet18", "norm": "layer"}, r"model\.norm=layer: expected one of batch, group"),
        ({"name": "resnet18", "norm": "batch", "groups": 4}, r"model\.groups=4: expected no value"),
        ({"name": "vit", "depth": 0}, r"model\.depth=0: expected a whole number >= 1"),
        ({"name": "vit", "mlp_ratio": 0.0}, r"model\.mlp_ratio=0\.0: expected a number > 0"),
        ({"name": "vit", "weights": "imagenet"}, r"model\.weights=imagenet: expected no value: vit has"),
        ({"name": "vit_b16", "weights": ""}, r"model\.weights=: expected imagenet, random"),
        ({"name": "factorization", "bias": 1}, r"model\.bias=1: expected true or false"),
        (
            {"name": "factorization", "pretrained": "public"},
            r"model\.pretrained=public: expected no value: ",
        ),
        ({"pretrained": "private"}, r"model\.pretrained=private: expected public, or null"),
        ({"pretrain_epochs": 5}, r"model\.pretrain_epochs=5: expected 20 unless model\.pretrained=public"),
        ({"pretrain_accuracy": 0.9}, r"model\.pretrain_accuracy=0\.9: expected null unless"),
        ({"pretrained": "public", "pretrain_epochs": 0}, r"model\.pretrain_epochs=0: expected a whole number >= 1"),
        ({"pretrained": "public", "pretrain_lr": 0.0}, r"model\.pretrain_lr=0\.0: expected a number > 0"),
        ({"pretrained": "public", "pretrain_accuracy": 1.5}, r"model\.pretrain_accuracy=1\.5: expected .* <= 1"),
    ],
)
def test_bad_options_are_refused(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ModelConfig(**options)


@pytest.mark.parametrize(
    ("config", "shape", "sentence"),
    [
        (ModelConfig("cnn"), (64,), r"model\.name=cnn: .*shape \(64,\).*at least 4x4"),
        (ModelConfig("cnn"), (1, 3, 8), "at least 4x4"),
        (ModelConfig("resnet18"), (3, 4, 4), "at least 8x8"),
        (ModelConfig("resnet18", groups=3), (3, 32, 32), r"model\.groups=3: expected a divisor of model\.width=64"),
        (ModelConfig("vit"), (64,), r"model\.name=vit: .*at least 4x4"),
        (ModelConfig("vit"), (1, 29, 31), r"model\.patch=None: expected a divisor of both sides of 29x31 pictures"),
        (ModelConfig("vit", patch=3), (1, 8, 8), r"model\.patch=3: expected a divisor of both sides of 8x8"),
        (ModelConfig("vit", patch=8), (1, 8, 8), r"model\.patch=8: .* at least 4 patches"),
        (ModelConfig("vit", heads=5), (1, 8, 8), r"model\.heads=5: expected a divisor of model\.dim=64"),
        (ModelConfig("vit_b16", weights="random"), (4, 32, 32), r"model\.name=vit_b16: .*4 channels"),
        (ModelConfig("mlp"), (), r"model\.name=mlp: expected factorization for item ids"),
        (ModelConfig("factorization"), (1, 8, 8), r"model\.name=factorization: expected another model for samples"),
        (ModelConfig(pretrained="public"), (1, 8, 8), r"model\.pretrained=public: expected .*split\.public"),
    ],
)
def test_models_that_cannot_be_built_are_refused(config, shape, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build_model(config, shape, 10, seed=0)


@pytest.mark.parametrize(
    ("shape", "name"),
    [((1, 28, 28), "cnn"), ((3, 64, 64), "cnn"), ((1, 8, 8), "mlp"), ((3, 224, 224), "mlp"), ((3, 28, 20), "mlp"),
     ((28,), "mlp"), ((9, 128), "cnn1d")],
)  # fmt: skip
def test_auto_is_the_network_for_the_shape_of_a_sample(shape: tuple[int, ...], name: str) -> None:
    assert ModelConfig().for_samples(shape).name == name
    assert ModelConfig("mlp").for_samples(shape).name == "mlp"
