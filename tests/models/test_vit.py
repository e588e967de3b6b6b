"""Vision transformers: prompts, mapping over clients, and weights from elsewhere."""

from __future__ import annotations

import urllib.error

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

from fedpers.cohort.modules import prepare
from fedpers.data.torchvision_shim import import_torchvision
from fedpers.errors import ConfigError, DataError
from fedpers.models import ModelConfig, Network, VisionBody, build_model, check_promptable
from fedpers.models.weights import load_weights

SMALL = ModelConfig("vit", dim=16, depth=2, heads=2)


def small(seed=0):
    return build_model(SMALL, (1, 8, 8), 5, seed).double()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("sides", "tokens"), [((8, 8), 16), ((28, 28), 49), ((32, 32), 64), ((64, 64), 64), ((8, 16), 32), ((4, 4), 4)]
)
def test_patches_are_chosen_by_the_size_of_pictures(sides, tokens):
    body = build_model(SMALL, (3, *sides), 5, 0).body
    assert body.tokens == tokens
    assert body.embed(torch.randn(2, 3, *sides)).shape == (2, tokens, 16)


def test_patches_are_those_of_a_convolution():
    body = build_model(ModelConfig("vit", dim=8, patch=4), (3, 8, 16), 5, 0).body
    x = torch.randn(2, 3, 8, 16)
    kernel = body.patch.weight.view(8, 3, 4, 4)
    expected = nn.functional.conv2d(x, kernel, body.patch.bias, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(body.embed(x), expected + body.positions[1:])


def test_forward_is_encode_of_embed():
    model, x = small(), torch.randn(3, 1, 8, 8, dtype=torch.float64)
    tokens = model.body.embed(x)
    assert torch.equal(model.body(x), model.body.encode(tokens))
    assert torch.equal(model.body(x), model.body.encode(tokens, torch.empty(0, 16, dtype=torch.float64)))
    prompts = torch.randn(4, 16, dtype=torch.float64)
    features = model.body.encode(tokens, prompts)
    assert features.shape == (3, 16)
    assert (features - model.body(x)).abs().min() > 1e-6
    assert torch.equal(model.body.embed(x), tokens)


def test_the_last_block_computes_the_class_token_alone():
    model, tokens = small(), torch.randn(3, 16, 16, dtype=torch.float64)
    first = (model.body.cls + model.body.positions[0]).expand(3, 1, -1)
    every_token = model.body.blocks(torch.cat([first, tokens], 1))
    torch.testing.assert_close(model.body.encode(tokens), model.body.norm(every_token)[:, 0])


def test_prompts_stand_between_class_token_and_patches_and_have_no_positions():
    body, seen = small().body, []
    body.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tokens, prompts = torch.randn(2, 16, 16, dtype=torch.float64), torch.randn(3, 16, dtype=torch.float64)
    features = body.encode(tokens, prompts)
    assert torch.equal(seen[0][1, 0], body.cls + body.positions[0])
    assert torch.equal(seen[0][1, 1:4], prompts)
    assert torch.equal(seen[0][1, 4:], tokens[1])
    torch.testing.assert_close(body.encode(tokens, prompts.flip(0)), features)  # order means nothing without positions


def test_positions_matter():
    body, x = small().body, torch.randn(1, 1, 8, 8, dtype=torch.float64)
    assert not torch.allclose(body(x), body(x.roll(2, dims=3)))


def test_clients_under_vmap_equal_one_by_one():
    models = [small(seed) for seed in range(3)]
    base = prepare(small(9))
    params, _ = stack_module_state(models)
    x, y = torch.randn(3, 4, 1, 8, 8, dtype=torch.float64), torch.randint(0, 5, (3, 4))

    def loss(params, x, y):
        return nn.functional.cross_entropy(functional_call(base, params, x), y)

    scores = vmap(lambda p, x: functional_call(base, p, x))(params, x)
    grads = vmap(grad(loss))(params, x, y)
    for k, model in enumerate(models):
        torch.testing.assert_close(scores[k], model(x[k]), rtol=0, atol=1e-10)
        nn.functional.cross_entropy(model(x[k]), y[k]).backward()
        for name, value in model.named_parameters():
            torch.testing.assert_close(grads[name][k], value.grad, rtol=0, atol=1e-10)


def test_gradients_of_prompts_and_head_alone_over_one_frozen_body():
    model = small().requires_grad_(False)
    tokens = model.body.embed(torch.randn(3, 4, 8, 8, dtype=torch.float64).view(12, 1, 8, 8)).view(3, 4, 16, 16)
    y = torch.randint(0, 5, (3, 4))
    mine = {
        "prompts": torch.randn(3, 2, 16, dtype=torch.float64),
        "weight": torch.randn(3, 5, 16, dtype=torch.float64),
    }

    def loss(mine, tokens, y):
        features = model.body.encode(tokens, mine["prompts"])
        return nn.functional.cross_entropy(features @ mine["weight"].T, y)

    grads = vmap(grad(loss))(mine, tokens, y)
    for k in range(3):
        one = grad(loss)({name: value[k] for name, value in mine.items()}, tokens[k], y[k])
        for name, value in one.items():
            assert value.abs().max() > 1e-6
            torch.testing.assert_close(grads[name][k], value, rtol=0, atol=1e-10)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_can_be_differentiated_twice():
    model, x = small(), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    (first,) = torch.autograd.grad(model(x).square().sum(), model.body.cls, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), model.body.patch.weight)
    assert second.abs().max() > 0


def test_only_networks_with_tokens_can_be_given_prompts():
    check_promptable(small())
    check_promptable(prepare(small()))
    for model in (build_model(ModelConfig(), (4,), 2, 0), nn.Linear(2, 2)):
        with pytest.raises(ConfigError, match=r"expected a vision transformer with a class token: model=vit or model="):
            check_promptable(model)


# --- weights from elsewhere -----------------------------------------------------------------------------------------


class Tiny(Network):
    """The structure of ViT-B/16 in small."""

    def __init__(self, side=32):
        super().__init__(VisionBody((3, side, side), 16, 12, 2, 2, 4.0), nn.Linear(12, 4))


def torchvisions():
    import_torchvision()
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=12, mlp_dim=48, num_classes=7
    ).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def features(model, x):
    tokens = torch.cat([model.class_token.expand(len(x), -1, -1), model._process_input(x)], 1)
    return model.encoder(tokens)[:, 0]


TIMM = {
    "class_token": "cls_token",
    "encoder.pos_embedding": "pos_embed",
    "conv_proj": "patch_embed.proj",
    "encoder.layers.encoder_layer_": "blocks.",
    "ln_": "norm",
    "self_attention.in_proj_": "attn.qkv.",
    "self_attention.out_proj": "attn.proj",
    "mlp.0": "mlp.fc1",
    "mlp.3": "mlp.fc2",
    "encoder.ln": "norm",
    "heads.head": "head",
}


def with_names(state, table):
    renamed = {}
    for name, value in state.items():
        for old, new in table.items():
            name = name.replace(old, new)
        renamed[name] = value
    return renamed


@pytest.mark.parametrize("layout", ["torchvision", "published", "timm", "own"])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_weights_of_every_layout_give_the_same_features(layout, ending, tmp_path):
    source, path = torchvisions(), tmp_path / f"weights.{ending}"
    state = {name: value.clone() for name, value in source.state_dict().items()}
    if layout == "published":  # the file torchvision offers has the names of its first version
        state = with_names(state, {"mlp.0": "mlp.linear_1", "mlp.3": "mlp.linear_2"})
    elif layout == "timm":
        state = with_names(state, TIMM)
    elif layout == "own":
        first = Tiny()
        save_file(state, tmp_path / "first.safetensors")
        load_weights(first, str(tmp_path / "first.safetensors"))
        state = first.state_dict()
    if ending == "pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    model, x = Tiny(), torch.randn(3, 3, 32, 32)
    head = model.head.weight.clone()
    load_weights(model, str(path))
    torch.testing.assert_close(model.body(x), features(source, x), rtol=1e-5, atol=1e-5)
    assert torch.equal(model.head.weight, head)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_pictures_are_brought_to_the_size_of_the_network():
    body, x = Tiny().body, torch.randn(2, 1, 8, 8)
    large = nn.functional.interpolate(x, (32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(body(x), body(large.repeat(1, 3, 1, 1)))
    torch.testing.assert_close(vmap(body)(x[:, None])[:, 0], body(x))
    assert body(torch.randn(2, 3, 50, 40)).shape == (2, 12)


def test_files_that_hold_no_weights_of_this_network_are_refused(tmp_path):
    def refused(path, sentence):
        with pytest.raises(ConfigError, match=sentence):
            load_weights(Tiny(), str(path))

    refused(tmp_path / "none.pth", r"none\.pth: expected imagenet, random, timm:NAME or the path")
    for name in ("damaged.pth", "damaged.safetensors"):
        (tmp_path / name).write_bytes(b"no weights")
        refused(tmp_path / name, r"expected a readable file of weights \(")
    torch.save([1, 2], tmp_path / "list.pth")
    refused(tmp_path / "list.pth", "expected a file that holds a state dict")
    state = Tiny().state_dict()
    save_file({name: value for name, value in state.items() if name != "body.cls"}, tmp_path / "less.safetensors")
    refused(tmp_path / "less.safetensors", r"\(body\.cls is missing\)")
    save_file(state | {"fc_norm.weight": torch.ones(12)}, tmp_path / "more.safetensors")
    refused(tmp_path / "more.safetensors", r"\(fc_norm\.weight is unknown\)")
    save_file(Tiny(48).state_dict(), tmp_path / "other.safetensors")
    refused(tmp_path / "other.safetensors", r"\(body\.positions has shape \(10, 12\) instead of \(5, 12\)\)")
    transposed = {name: value.T.contiguous() if "fc1.weight" in name else value for name, value in state.items()}
    save_file(transposed, tmp_path / "transposed.safetensors")
    refused(tmp_path / "transposed.safetensors", r"fc1\.weight has shape \(12, 48\) instead of \(48, 12\)")


def test_imagenet_weights_come_from_torchs_cache_or_the_net(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def unreachable(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    with pytest.raises(DataError, match=r"vit_b16: the weights are not in .*no network.*; set model\.weights to"):
        load_weights(Tiny(), "imagenet")
    cached = tmp_path / "hub" / "checkpoints" / "vit_b_16-c867db91.pth"
    cached.parent.mkdir(parents=True, exist_ok=True)
    source, model, x = torchvisions(), Tiny(), torch.randn(1, 3, 32, 32)
    torch.save(source.state_dict(), cached)
    load_weights(model, "imagenet")
    torch.testing.assert_close(model.body(x), features(source, x), rtol=1e-5, atol=1e-5)
    cached.write_bytes(b"damaged")
    with pytest.raises(DataError, match="vit_b16: the weights"):
        load_weights(Tiny(), "imagenet")


def test_timm_is_optional(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ConfigError, match=r"model\.weights=timm:vit_base_patch16_224: expected .* timm is not inst"):
        load_weights(Tiny(), "timm:vit_base_patch16_224")


def test_size_of_vit_b16():
    with torch.device("meta"):
        from fedpers.models import ViTB16

        model = ViTB16((1, 28, 28), 1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == 86_567_656  # torchvision's count
