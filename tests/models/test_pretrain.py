"""Pretraining on a public share, its cache, and fresh copies."""

from __future__ import annotations

import logging

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from fedpers.data.cache import cache_root
from fedpers.errors import ConfigError
from fedpers.models import ModelConfig, build_model, fresh
from fedpers.models import pretrain as module


@pytest.fixture(scope="module")
def digits():
    bunch = load_digits()
    x = torch.from_numpy(bunch.images).float()[:350, None]
    return (x - x.mean()) / x.std(), torch.from_numpy(bunch.target).long()[:350]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPERS_CACHE", str(tmp_path / "cache"))
    return cache_root() / "pretrained"


@pytest.fixture
def trainings(monkeypatch):
    """Count how often a network is really trained."""
    done, train = [], module._train

    def counted(*arguments):
        done.append(1)
        result = train(*arguments)
        done[-1] = result[0]
        return result

    monkeypatch.setattr(module, "_train", counted)
    return done


def config(name="mlp", **options):
    return ModelConfig(name, pretrained="public", **{"pretrain_epochs": 2, **options})


def build(config, public, seed=0):
    return build_model(config, (1, 8, 8), 10, seed, public=public)


def same(one, other):
    states = one.state_dict(), other.state_dict()
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.slow
def test_a_small_vit_learns_digits_in_seconds(digits, caplog):
    with caplog.at_level(logging.INFO, "fedpers.models.pretrain"):
        model = build(ModelConfig("vit", pretrained="public"), digits)
    assert model.pretrained_accuracy > 0.85
    assert model.training
    (line,) = caplog.messages
    assert line.startswith(
        f"Pretrained on 350 public samples: held-out accuracy {model.pretrained_accuracy:.3f} (20 pa"
    )


def test_numbers_are_no_labels_to_pretrain_on(digits):
    x, y = digits
    with pytest.raises(ConfigError, match=r"model\.pretrained=public: expected null, because pretraining needs class"):
        build(config(), (x, y.float()))


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_same_values_from_training_and_from_cache(norm, digits, trainings, cache):
    settings = config("cnn", width=4, hidden=(16,), norm=norm)
    torch.manual_seed(1)
    first = build(settings, digits)
    torch.manual_seed(2)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    second = build(settings, digits)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert len(trainings) == 1
    assert same(first, second)
    assert first.pretrained_accuracy == second.pretrained_accuracy > 0
    (file,) = cache.iterdir()
    file.unlink()
    third = build(settings, digits)
    assert len(trainings) == 2
    assert same(first, third)
    assert all(p.grad is None and p.requires_grad for p in third.parameters())


def test_everything_that_matters_is_part_of_the_key(digits, trainings):
    x, y = digits
    build(config(), digits)
    build(config(hidden=(32,)), digits)
    build(config(pretrain_lr=0.002), digits)
    build(config(), digits, seed=1)
    build(config(), (x[:300], y[:300]))
    build(config(), (x, y.flip(0)))
    assert len(trainings) == 6
    build(config(), digits)
    assert len(trainings) == 6


@pytest.mark.parametrize("damage", ["cut", "flipped", "other", "text"])
def test_a_damaged_file_is_trained_again_with_a_warning(damage, digits, trainings, caplog, cache):
    first = build(config(), digits)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    if damage == "other":
        build(config(hidden=(8,)), digits)
        (other,) = (path for path in file.parent.iterdir() if path != file)
        file.write_bytes(other.read_bytes())
        other.unlink()
        trainings.pop()
    else:
        flipped = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
        file.write_bytes({"cut": whole[:-50], "flipped": flipped, "text": b"no network"}[damage])
    second = build(config(), digits)
    assert len(trainings) == 2
    assert same(first, second)
    assert sum("is damaged" in message for message in caplog.messages) == 1
    assert same(first, build(config(), digits))
    assert len(trainings) == 2
    assert list(file.parent.iterdir()) == [file]


def test_a_cache_that_cannot_be_written_does_no_harm(digits, cache):
    cache.parent.mkdir()
    cache.write_text("a file where a folder should be")
    assert build(config(), digits).pretrained_accuracy is not None


def test_stops_at_the_accuracy_asked_for(digits, trainings, caplog):
    early = build(config(pretrain_epochs=50, pretrain_accuracy=0.5), digits)
    assert early.pretrained_accuracy >= 0.5
    assert trainings[-1] < 25
    assert not any("did not reach" in message for message in caplog.messages)
    build(config(pretrain_epochs=1, pretrain_lr=1e-5, pretrain_accuracy=0.99), digits)
    assert any("did not reach model.pretrain_accuracy=0.99" in message for message in caplog.messages)


def test_without_pretraining_the_public_share_has_no_influence(digits):
    plain = build_model(ModelConfig(), (1, 8, 8), 10, 0)
    assert plain.pretrained_accuracy is None
    assert same(plain, build(ModelConfig(), digits))


def test_bad_shares_and_rates_are_refused(digits, cache):
    x, y = digits
    with pytest.raises(ConfigError, match=r"model\.pretrained=public: .* at least 2 samples, not 1"):
        build(config(), (x[:1], y[:1]))
    with pytest.raises(ConfigError, match=r"model\.pretrain_lr=1e\+30: expected a smaller rate"):
        build(config(pretrain_lr=1e30), digits)
    assert not cache.exists()
    build(config(), (x[:2], y[:2]))


# --- fresh ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        ModelConfig("mlp", hidden=(256,)),
        ModelConfig("cnn", norm="batch"),
        ModelConfig("resnet18", width=16),
        ModelConfig("resnet18", width=16, features=64),
        ModelConfig("vit"),
        ModelConfig("factorization", bias=False),
    ],
    ids=lambda settings: settings.name,
)
def test_fresh_copies_are_as_newly_built(settings):
    where = ((), {"num_items": 500}) if settings.name == "factorization" else ((1, 8, 8), {})
    new = build_model(settings, where[0], 10, 0, **where[1])
    used = build_model(settings, where[0], 10, 1, **where[1])
    with torch.no_grad():
        for value in used.state_dict().values():
            value.fill_(7)
    used.pretrained_accuracy = 0.5
    state = torch.get_rng_state()
    one, two, again = fresh(used, 3, 0), fresh(used, 3, 1), fresh(used, 3, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(one, again)
    assert one.pretrained_accuracy is None
    assert used.pretrained_accuracy == 0.5
    assert all((value == 7).all() for value in used.state_dict().values())
    for name, value in new.state_dict().items():
        drawn = one.state_dict()[name]
        if value.numel() > 1 and value.std() > 0:
            assert not torch.equal(drawn, two.state_dict()[name])
        else:
            torch.testing.assert_close(drawn, value)  # norms and counters
        if value.numel() >= 1000:
            assert abs(float(drawn.std() / value.std()) - 1) < 0.15, name
            assert abs(float(drawn.abs().max() / value.abs().max()) - 1) < 0.4, name


def test_fresh_keeps_what_is_frozen_and_refuses_what_it_does_not_know():
    model = build_model(ModelConfig(), (4,), 2, 0).eval()
    model.body.requires_grad_(False)
    copy = fresh(model, 0)
    assert not copy.training
    assert [p.requires_grad for p in copy.parameters()] == [p.requires_grad for p in model.parameters()]

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    with pytest.raises(ConfigError, match=r"model=Own at '1': expected a layer with a method reset_parameters"):
        fresh(nn.Sequential(nn.Linear(2, 2), Own()), 0)
