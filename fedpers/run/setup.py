"""From settings to everything a run consists of; whatever cannot be used is refused here, before training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedpers.client.mixed import MixedApp
from fedpers.client.update import LocalUpdate
from fedpers.data import FederatedData, apply_heterogeneity, load_federated
from fedpers.data.outline import WithoutSamples
from fedpers.errors import ConfigError, check
from fedpers.models import ModelConfig, Network, build_model
from fedpers.process import reproducible_convolutions
from fedpers.randomness import generator
from fedpers.records import from_record
from fedpers.run.checkpoint import network_checksum
from fedpers.server.postprocessors import make_postprocessors
from fedpers.settings import Config, build
from fedpers.strategies import CohortApp, PersonalizedStrategy, make_strategy


@dataclass
class Setup:
    """Everything a run consists of, made from its settings; `network` is the digest of the initial network."""

    data: FederatedData
    strategy: PersonalizedStrategy
    app: CohortApp
    network: str
    model: ModelConfig
    pretrained_accuracy: float | None = None


def prepare_run(config: Config, outline: FederatedData | None = None) -> Setup:
    """Load data and make network, strategy and client app; all settings are checked here, before training.

    Parameters
    ----------
    config : Config
    outline : FederatedData, optional
        In place of the data, see :mod:`fedpers.data.outline`.

    Raises
    ------
    ConfigError, DataError
        If settings or data cannot be used.
    """
    device = config.runtime.torch_device()
    reproducible_convolutions(device)
    strategy, update = make_halves(config)
    data = _load(config) if outline is None else outline
    allowed = f"at most rounds={config.rounds}, so that there is a round after the drift"
    check(data.drift_round <= config.rounds, "heterogeneity.drift.round", data.drift_round, allowed)
    allowed = "empty, because no client is unseen (split.unseen)"
    check(bool(data.unseen) or not config.split.adapt_steps, "split.adapt_steps", config.split.adapt_steps, allowed)
    check_stop(config, data)
    strategy.unseen, strategy.adapt_steps = data.unseen, config.split.adapt_steps
    sampled = strategy.most_sampled(data.num_clients - len(data.unseen))
    check(
        config.min_replies <= sampled,
        "min_replies",
        config.min_replies,
        f"at most {sampled}, the clients sampled in a round",
    )
    strategy.min_replies = max(config.min_replies, config.aggregation.replies(sampled))
    model = config.model.for_samples(data.x.shape[1:], data.num_tokens)
    kinds = model.of_kinds() or {model.name: model}
    models = [initial_network(kind, config.seed, data, device) for kind in kinds.values()]
    apps = [
        update.client_app(network, data, seed=config.seed, device=device, postprocessors=strategy.postprocessors)
        for network in models
    ]
    app = apps[0]
    if model.kinds is not None:
        app = MixedApp(apps, deal_kinds(list(kinds), model.kind_file, data.num_clients, config.seed), list(kinds))
    strategy.attach(app)
    strategy.check_arrays(from_record(app.initial_arrays()), sampled)
    initial = nn.ModuleList(models) if len(models) > 1 else models[0]
    return Setup(data, strategy, app, network_checksum(initial), model, getattr(models[0], "pretrained_accuracy", None))


def check_stop(config: Config, data: FederatedData) -> None:
    """Refuse to end a run, or keep its best round, by a score that no part of the data gives.

    Raises
    ------
    ConfigError
    """
    measured = isinstance(data, WithoutSamples) or any(len(positions) for positions in data.part(data.task.selected_on))
    allowed = f"null, for no client has samples for {data.task.selected_on}"
    for key in ("patience", "target"):
        value = getattr(config.stop, key)
        check(value is None or measured, f"stop.{key}", value, allowed)
    best, allowed = config.checkpoint.best, allowed.replace("null", "false", 1)
    check(not best or measured, "checkpoint.best", best, allowed)


def _load(config: Config) -> FederatedData:
    """Data with their shifts."""
    data = load_federated(config.dataset, config.partition, config.split, config.seed)
    shift_seed = config.seed if config.partition.seed is None else config.partition.seed
    return apply_heterogeneity(data, config.heterogeneity, shift_seed)


def initial_network(config: ModelConfig, seed: int, data: FederatedData, device: torch.device) -> Network:
    """Build a network for the data."""
    public = None if data.public is None else (data.x[data.public], data.y[data.public])
    shape, items = tuple(data.x.shape[1:]), data.num_items or None
    try:
        return build_model(
            config,
            shape,
            data.num_classes,
            seed,
            num_items=items,
            num_tokens=data.num_tokens,
            per_token=data.task.per_token,
            fields=data.fields,
            public=public,
            device=device,
        )
    except (RuntimeError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else "out of memory"
        raise ConfigError("model", config.name, f"a network that can be built here ({reason})") from error


def deal_kinds(kinds: Sequence[str], file: str | None, num_clients: int, seed: int) -> list[int]:
    """Kind of each client, a position in `kinds`: in equal numbers at random, or as a file says.

    Raises
    ------
    ConfigError
        If the file does not name one of the kinds for each client.
    """
    if file is None:
        return [int(place) % len(kinds) for place in generator(seed, "kinds").permutation(num_clients)]
    try:
        names = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError("model.kind_file", file, f"a readable .json file ({error})") from error
    fits = isinstance(names, list) and len(names) == num_clients and all(name in kinds for name in names)
    check(fits, "model.kind_file", file, f"a list with one of {', '.join(kinds)} for each of {num_clients} clients")
    return [list(kinds).index(name) for name in names]


def make_halves(config: Config) -> tuple[PersonalizedStrategy, LocalUpdate]:
    """Make both halves of a run's method, without data.

    Raises
    ------
    ConfigError
        If a setting of the method cannot be used.
    """
    name = str(config.strategy["name"])
    options = {key: value for key, value in config.strategy.items() if key != "name"}
    server = {
        "fraction": config.fraction,
        "seed": config.seed,
        "evaluate_every": config.evaluate_every,
        "min_replies": config.min_replies,
        "postprocessors": make_postprocessors(config),
    }
    return make_strategy(name, options, server=server, training=config.training)


def client_half(settings: Mapping[str, Any]) -> CohortApp:
    """Make the client app of a run in another process, from ``asdict`` of its :class:`Config`."""
    return prepare_run(build(Config, settings)).app
