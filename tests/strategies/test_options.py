from __future__ import annotations

import math
from typing import Any

import pytest

from fedpers.cohort import Training
from fedpers.errors import ConfigError
from fedpers.settings import options
from fedpers.strategies import STRATEGIES, default_options, make_strategy

BAD: list[tuple[str, str, Any]] = [
    *((method, "weighting", "sample") for method in STRATEGIES),
    ("fedavg_ft", "finetune_epochs", 0),
    ("group_perfl", "global_rounds", -1),
    ("self_fl", "weighting", "precision"),
    ("self_fl", "curvature", 0.0),
    ("self_fl", "inter_variance", 0.0),
    ("self_fl", "smoothing", 1.0),
    ("self_fl", "warmup_rounds", 0),
    ("fedd2s", "rate", 0),
    ("fedd2s", "beta", -0.1),
    ("fedd2s", "temperature", 0.0),
    ("fedd2s", "server_lr", 0.0),
    ("group_perfl", "group_mu", -0.1),
    ("group_perfl", "personal_rate", 0.0),
    ("fedprox", "mu", -0.1),
    ("fedprox", "mu", math.nan),
    ("scaffold", "server_lr", 0.0),
    ("feddyn", "alpha", 0.0),
    ("feddyn", "variant", "papers"),
    ("feddyn", "weighting", "samples"),
    ("fedrep", "head_epochs", -1),
    ("fedrep", "body_epochs", -1),
    ("fedbabu", "finetune_epochs", -1),
    ("fedbabu", "finetune", "heads"),
    ("fedrod", "gamma", -0.1),
    ("fedrod", "gamma", math.inf),
    ("ditto", "mu", -1.0),
    ("ditto", "personal_epochs", -1),
    ("pfedme", "lam", 0.0),
    ("pfedme", "inner_steps", 0),
    ("pfedme", "personal_lr", 0.0),
    ("pfedme", "variant", "papers"),
    ("pfedme", "beta", -0.1),
    ("perfedavg", "inner_lr", 0.0),
    ("apfl", "alpha", 1.1),
    ("apfl", "alpha", -0.1),
    ("apfl", "variant", "pflib"),
    ("moon", "mu", -0.1),
    ("moon", "mu", math.nan),
    ("moon", "temperature", 0.0),
    ("moon", "variant", "papers"),
    ("fml", "alpha", 1.1),
    ("fml", "alpha", math.nan),
    ("fml", "beta", -0.1),
    ("fml", "variant", "papers"),
    ("fedntd", "beta", -0.1),
    ("fedntd", "temperature", 0.0),
    ("fedala", "layers", 0),
    ("fedala", "share", 0.0),
    ("fedala", "share", 1.1),
    ("fedala", "weight_lr", 0.0),
    ("fedala", "variant", "papers"),
    ("feddbe", "kappa", -0.1),
    ("feddbe", "mu", 0.0),
    ("feddbe", "mu", 1.1),
    ("fedphp", "lam", 1.1),
    ("fedphp", "lam", math.nan),
    ("fedphp", "momentum", -0.1),
    ("fedphp", "ramp", 0),
    ("fedphp", "variant", "papers"),
    ("fedkd", "energy_start", 0.0),
    ("fedkd", "energy_end", 1.1),
    ("fedkd", "energy_rounds", 0),
    ("fedkd", "variant", "papers"),
    ("fedproto", "lam", -0.1),
    ("fedproto", "lam", math.nan),
    ("fedproto", "variant", "papers"),
    ("fedproto", "weighting", "samples"),
    ("fedgh", "weighting", "samples"),
    ("fedgh", "server_epochs", 0),
    ("fedgh", "server_lr", 0.0),
    ("fedgh", "server_batch_size", 0),
    ("fedpac", "lam", -0.1),
    ("fedpac", "head_epochs", -1),
    ("fedpac", "body_epochs", -1),
    ("fedpac", "variant", "papers"),
    ("cwfedavg", "lam", -0.1),
    ("cwfedavg", "class_wise", "body"),
    ("fedcac", "tau", 0.0),
    ("fedcac", "tau", 1.1),
    ("fedcac", "beta", 0),
    ("fedcac", "variant", "papers"),
    ("fedfomo", "held_out", 0.0),
    ("fedfomo", "held_out", 1.0),
    ("fedfomo", "models", 0),
    ("fedfomo", "epsilon", 1.1),
    ("fedfomo", "epsilon_decay", -0.1),
    ("fedfomo", "variant", "papers"),
    ("fedamp", "mu", -0.1),
    ("fedamp", "alpha", 0.0),
    ("fedamp", "sigma", 0.0),
    ("fedamp", "sigma", math.nan),
    ("fedamp", "variant", "papers"),
    ("knnper", "neighbours", 0),
    ("knnper", "capacity", 0.0),
    ("knnper", "capacity", 1.1),
    ("knnper", "share", -0.1),
    ("knnper", "share", 1.1),
    ("knnper", "scale", 0.0),
    ("knnper", "mixture", "scores"),
    ("knnper", "variant", "papers"),
    ("fedcp", "lam", -0.1),
    ("fedcp", "lam", math.nan),
    ("fedcp", "variant", "papers"),
    ("fedas", "align_lr", -0.1),
    ("fedas", "align_batch_size", -1),
    ("fedas", "variant", "papers"),
    ("fedas", "weighting", "samples"),
    ("pfedhn", "embedding_dim", 0),
    ("pfedhn", "hidden", 0),
    ("pfedhn", "hidden_layers", -1),
    ("pfedhn", "server_optimizer", "adamw"),
    ("pfedhn", "server_lr", 0.0),
    ("pfedhn", "embedding_lr", 0.0),
    ("pfedhn", "server_decay", -0.1),
    ("pfedhn", "server_clip", 0.0),
    ("pfedhn", "adapt_rounds", 0),
    ("clustered", "clusters", 0),
    ("clustered", "common_rounds", -1),
    ("clustered", "threshold", 0.0),
    ("clustered", "metric", "euclidean"),
    ("clustered", "linkage", "centroid"),
    ("ifca", "clusters", 0),
    ("ifca", "averaging", "changes"),
    ("gpfl", "lam", -0.1),
    ("gpfl", "lam", math.inf),
    ("gpfl", "mu", -0.1),
    ("gpfl", "mu", math.nan),
    ("gpfl", "variant", "papers"),
]


@pytest.mark.parametrize(("method", "option", "value"), BAD, ids=str)
def test_a_value_out_of_range_is_named(method: str, option: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        make_strategy(method, {option: value})
    assert str(caught.value).startswith(f"strategy.{option}={value}: expected ")


@pytest.mark.parametrize("method", STRATEGIES)
@pytest.mark.parametrize(
    ("option", "value"),
    [("fraction", 0.0), ("fraction", 1.01), ("fraction", math.nan), ("evaluate_every", 0), ("min_replies", 0)],
)
def test_server_settings_out_of_range(method: str, option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^{option}={value}: expected "):
        make_strategy(method, server={option: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [("optimizer", "adam"), ("momentum", 0.9), ("weight_decay", 0.1), ("schedule", "cosine"), ("clip", 1.0),
     ("groups", {"head": {"lr": 0.1}})],
)  # fmt: skip
def test_scaffold_names_the_setting_it_cannot_use(option: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        make_strategy("scaffold", training=Training(**{option: value}))
    assert str(caught.value).startswith(f"training.{option}={value}: expected ")
    make_strategy("scaffold", training=Training(lr=0.3, lr_decay=0.9, epochs=3))


@pytest.mark.parametrize("method", ["fedrep", "fedpac"])
def test_steps_beside_passes_of_the_methods_own_are_refused(method: str) -> None:
    training = Training(steps=3)
    allowed = r"expected null, or strategy\.head_epochs=null and strategy\.body_epochs=null, whose passes take its"
    with pytest.raises(ConfigError, match=rf"^training\.steps=3: {allowed}"):
        make_strategy(method, training=training)
    make_strategy(method, {"head_epochs": None, "body_epochs": None}, training=training)


def test_epochs_that_have_no_part_in_a_method_are_named(caplog: pytest.LogCaptureFixture) -> None:
    make_strategy("fedrep", {"head_epochs": None}, training=Training(epochs=7))
    assert not caplog.records
    make_strategy("fedrep", training=Training(epochs=7))
    assert "training.epochs=7 has no part in this method, which goes by strategy.head_epochs=10" in caplog.text


def test_proximal_is_refused_where_updates_are_a_methods_own() -> None:
    for method in ("fedmf", "fedrap"):
        with pytest.raises(ConfigError, match=r"^training\.proximal=2.0: expected 0.0 for this method"):
            make_strategy(method, training=Training(proximal=2.0))


def test_perfedavg_needs_batches_to_halve() -> None:
    with pytest.raises(ConfigError, match=r"training\.batch_size=0"):
        make_strategy("perfedavg", training=Training(batch_size=0))


def test_unknown_names_are_refused_with_the_nearest() -> None:
    for call in (lambda: make_strategy("fedrepp"), lambda: default_options("fedrepp")):
        with pytest.raises(ConfigError, match=r"strategy=fedrepp: .*did you mean 'fedrep'"):
            call()
    with pytest.raises(ConfigError, match=r"strategy\.head_epoch=2: .*of fedrep.*did you mean 'head_epochs'"):
        make_strategy("fedrep", {"head_epoch": 2})


@pytest.mark.parametrize("method", STRATEGIES)
def test_no_option_stands_in_both_halves(method: str) -> None:
    server = STRATEGIES[method]
    assert not options(server).keys() & options(server.update).keys()
    assert set(server.common_options) <= options(server.update).keys()


def test_settings_go_to_the_half_that_has_them() -> None:
    server, client = make_strategy("pfedme", {"beta": 0.5, "lam": 3.0}, server={"seed": 4}, training=Training(lr=0.7))
    assert (server.beta, server.seed, client.lam, client.training.lr) == (0.5, 4, 3.0, 0.7)  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", STRATEGIES)
def test_defaults_are_valid_options(method: str) -> None:
    options = default_options(method)
    assert "training" not in options
    assert "fraction" not in options
    server, client = make_strategy(method, options)
    for name, value in options.items():
        assert getattr(server if hasattr(server, name) else client, name) == value
