"""Small federated problems made from numbers alone, for tests that need no data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from fedpers.cohort import Training
from fedpers.data import FederatedData, RankingData
from fedpers.models import Factorization, ViT
from fedpers.models.initial import drawing

SIZES = (27, 11, 46, 22, 38, 6, 31)  # batches of 8 or 16 leave no remainder too small for batch normalization


def gaussian_data(
    sizes: tuple[int, ...] = SIZES,
    *,
    classes: int = 4,
    features: tuple[int, ...] = (6,),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> FederatedData:
    """Clients of unequal `sizes` (training samples), own mixes of Gaussian classes; 5 more samples per other part."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(classes, *features))
    xs, ys, lists = [], [], {"train": [], "validation": [], "test": []}
    at = 0
    for size in sizes:
        mix = rng.dirichlet([0.5] * classes)
        for part, count in (("train", size), ("validation", 5), ("test", 5)):
            y = rng.choice(classes, count, p=mix)
            xs.append(centers[y] + rng.normal(scale=0.7, size=(count, *features)))
            ys.append(y)
            lists[part].append(torch.arange(at, at + count))
            at += count
    x = torch.from_numpy(np.concatenate(xs)).to(dtype)
    y_all = torch.from_numpy(np.concatenate(ys)).to(torch.int64)
    return FederatedData(x, y_all, lists["train"], lists["validation"], lists["test"], classes, "gaussian")


class SmallNetwork(nn.Module):
    """Two layers with batch normalization and dropout between them: all that can go wrong in a cohort."""

    def __init__(
        self, features: int = 6, classes: int = 4, *, norm: bool = True, dropout: float = 0.3, seed: int = 0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Linear(features, 8, bias=not norm),
                nn.BatchNorm1d(8) if norm else nn.Identity(),
                nn.ReLU(),
                nn.Dropout(dropout),
            )
            self.head = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(x))
        return out


@dataclass
class Problem:
    """A network and data that a method can work with, and settings that put all of its parts to work."""

    network: nn.Module
    data: FederatedData
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Training = field(default_factory=lambda: Training(lr=0.02, epochs=2, batch_size=8, momentum=0.5))


def classification(dtype: torch.dtype = torch.float32) -> Problem:
    """Classes, batch normalization, dropout."""
    return Problem(SmallNetwork().to(dtype), gaussian_data(dtype=dtype))


def scaffold(dtype: torch.dtype = torch.float32) -> Problem:
    """The same with plain SGD."""
    return Problem(
        SmallNetwork().to(dtype), gaussian_data(dtype=dtype), training=Training(lr=0.02, epochs=2, batch_size=8)
    )


def fedfomo(dtype: torch.dtype = torch.float32) -> Problem:
    """The same with halves to train on that leave no batch of one sample."""
    return replace(classification(dtype), options={"held_out": 0.5})


def fedjets(dtype: torch.dtype = torch.float32) -> Problem:
    """Three anchors, three other clients, one that never trains."""
    data = replace(gaussian_data(dtype=dtype), unseen=(6,))
    return Problem(SmallNetwork().to(dtype), data, {"experts": 3, "gate_hidden": 5, "gate_lr": 0.1})


def ranking_data(sizes: tuple[int, ...] = (9, 4, 12, 6, 10, 2, 7), items: int = 40, **settings: Any) -> RankingData:
    """Users who like some of `items` items; of each two more are held out, ranked among 12 others."""
    rng = np.random.default_rng(0)
    train, validation, test = [], [], []
    for size in sizes:
        order = rng.permutation(items)
        train.append(order[:size])
        validation.append(np.r_[order[size], order[size + 2 : size + 14]])
        test.append(np.r_[order[size + 1], order[size + 2 : size + 14]])
    return RankingData.of_items(items, train, validation, test, name="ranking", top_k=3, **settings)


def ranking(dtype: torch.dtype = torch.float32) -> Problem:
    """Users with one to four batches a pass, some of whom stop early."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Factorization(40, 5).to(dtype)
    return Problem(
        network,
        ranking_data(),
        {"tolerance": 0.02, "lam": 0.01},
        Training(lr=0.3, epochs=6, batch_size=16, weight_decay=1e-3, lr_decay=0.97, groups={"body": {"lr": 4.0}}),
    )


def plain_ranking(dtype: torch.dtype = torch.float32) -> Problem:
    """The same for methods without FedRAP's settings."""
    given = ranking(dtype)
    return Problem(given.network, given.data, {}, given.training)


def fedncf(dtype: torch.dtype = torch.float32) -> Problem:
    """The same with Adam, as in the paper."""
    given = ranking(dtype)
    return Problem(given.network, given.data, {}, Training(optimizer="adam", lr=0.01, epochs=2, batch_size=16))


def pfedrec(dtype: torch.dtype = torch.float32) -> Problem:
    """The same with one rate, from which that of the items follows."""
    given = ranking(dtype)
    return Problem(given.network, given.data, {"item_rate": 0.5}, Training(lr=0.2, epochs=2, batch_size=16))


def small_vit(dtype: torch.dtype = torch.float32) -> ViT:
    """Two blocks of width 8 over the four patches of 4x4 pictures."""
    with drawing(0, "small vit"):
        return ViT((1, 4, 4), 4, patch=2, dim=8, depth=2, heads=2).to(dtype)


def prompted(dtype: torch.dtype = torch.float32) -> Problem:
    """Pictures for a vision transformer, and a client that never trains."""
    data = replace(gaussian_data(features=(1, 4, 4), dtype=dtype), unseen=(3,))
    return Problem(small_vit(dtype), data, {"prompts": 3})


def generated(dtype: torch.dtype = torch.float32) -> Problem:
    """The same with a server that moves fast."""
    given = prompted(dtype)
    return Problem(given.network, given.data, {**given.options, "server_optimizer": "sgd", "server_lr": 0.5})


def grouped(dtype: torch.dtype = torch.float32) -> Problem:
    """Clients in three groups, one round for all of them, then rounds within groups."""
    given = classification(dtype)
    groups = tuple(client % 3 for client in range(given.data.num_clients))
    return replace(given, options={"global_rounds": 1, "groups": groups})


def hypernetwork(dtype: torch.dtype = torch.float32) -> Problem:
    """A small hypernetwork that moves fast, and a client that never trains."""
    given = classification(dtype)
    options = {"hidden": 7, "hidden_layers": 1, "server_lr": 0.5, "adapt_rounds": 2}
    return replace(given, data=replace(given.data, unseen=(3,)), options=options)


def clustered(dtype: torch.dtype = torch.float32) -> Problem:
    """One round for all clients, then rounds within clusters."""
    return replace(classification(dtype), options={"common_rounds": 1, "clusters": 2})


SPECIAL: dict[str, Callable[[torch.dtype], Problem]] = {
    "scaffold": scaffold,
    "fedfomo": fedfomo,
    "fedjets": fedjets,
    "fedrap": ranking,
    "fedmf": plain_ranking,
    "no_learning": plain_ranking,
    "fedncf": fedncf,
    "pfedrec": pfedrec,
    "fedvpt": prompted,
    "pfedpg": generated,
    "group_perfl": grouped,
    "clustered": clustered,
    "pfedhn": hypernetwork,
}
"""Methods that need something else than :func:`classification`."""


VARIATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "fedavg": {
        "adam": {
            "training.optimizer": "adam",
            "training.momentum": 0.0,
            "training.weight_decay": 0.01,
            "training.clip": 0.5,
        },
        "steps": {
            "training.steps": 5,
            "training.schedule": "cosine",
            "training.drop_last": True,
            "weighting": "uniform",
        },
        "inverse variance": {"weighting": "inverse_variance"},
    },
    "fedavg_ft": {"finetune_epochs=2": {"finetune_epochs": 2}},
    "scaffold": {"server_lr=0.5": {"server_lr": 0.5}},
    "feddyn": {"pfllib": {"variant": "pfllib", "alpha": 0.1}, "alpha=0.3": {"alpha": 0.3}},
    "fedrep": {"epochs 1, 3": {"head_epochs": 1, "body_epochs": 3, "weighting": "inverse_variance"}},
    "fedbabu": {"head": {"finetune": "head", "finetune_epochs": 2}, "none": {"finetune_epochs": 0}},
    "fedrod": {"gamma=0": {"gamma": 0.0}, "gamma=0.5": {"gamma": 0.5}},
    "ditto": {"personal_epochs=1": {"personal_epochs": 1, "mu": 1.0}},
    "pfedme": {"pfllib": {"variant": "pfllib", "beta": 0.5}},
    "perfedavg": {"hessian": {"hessian": True, "inner_lr": 0.05}},
    "moon": {"pfllib": {"variant": "pfllib"}, "mu=3": {"mu": 3.0, "temperature": 1.0}},
    "fml": {"pfllib": {"variant": "pfllib"}, "alpha=0.2": {"alpha": 0.2, "beta": 0.9, "weighting": "samples"}},
    "fedntd": {"beta=0.5": {"beta": 0.5, "temperature": 2.0}},
    "fedala": {"pfllib": {"variant": "pfllib", "layers": 2}, "half": {"share": 0.5, "layers": 2, "weight_lr": 5.0}},
    "feddbe": {"mu=0.3": {"mu": 0.3, "kappa": 3.0}, "kappa=0": {"kappa": 0.0}},
    "fedphp": {"pfllib": {"variant": "pfllib", "ramp": 2}, "lam=0.5": {"lam": 0.5, "momentum": 0.5, "ramp": 2}},
    "fedkd": {
        "pfllib": {"variant": "pfllib", "energy_start": 0.6, "energy_end": 0.9},
        "low rank": {"energy_start": 0.5, "energy_end": 0.8, "energy_rounds": 3, "weighting": "samples"},
    },
    "fedproto": {"pfllib": {"variant": "pfllib"}, "lam=1": {"lam": 1.0}},
    "fedamp": {"pfllib": {"variant": "pfllib"}, "alpha=0.5": {"alpha": 0.5, "sigma": 3.0, "mu": 1.0}},
    "fedgh": {"batches": {"server_batch_size": 5, "server_epochs": 2, "server_lr": 0.1}},
    "fedpac": {"pfllib": {"variant": "pfllib"}, "lam=0.1": {"lam": 0.1, "head_epochs": 2, "body_epochs": 1}},
    "knnper": {
        "official": {"variant": "official", "scale": 0.3},
        "half": {"capacity": 0.5, "neighbours": 3, "share": 0.7},
        "logits": {"mixture": "logits", "scale": 2.0},
    },
    "fedcp": {"pfllib": {"variant": "pfllib"}, "lam=0": {"lam": 0.0}},
    "fedas": {
        "pfllib": {"variant": "pfllib"},
        "one batch": {"align_batch_size": 0, "align_lr": 0.5},
        "no alignment": {"align_lr": 0.0},
    },
    "cwfedavg": {"head": {"class_wise": "head", "lam": 1.0, "weighting": "uniform"}},
    "fedcac": {"pfllib": {"variant": "pfllib"}, "strict": {"tau": 0.2, "beta": 3, "weighting": "uniform"}},
    "fedfomo": {"pfllib": {"variant": "pfllib", "models": 2}, "greedy": {"models": 2, "epsilon": 0.0}},
    "apfl": {"pfllib": {"variant": "pfllib"}, "fixed alpha": {"adaptive": False, "alpha": 0.3}},
    "fedrap": {
        "paper": {"variant": "paper", "lam": 1e-4, "mu": 1e-3, "tolerance": 1e-4},
        "tables=personal": {"tables": "personal"},
        "tables=common": {"tables": "common", "weighting": "samples"},
        "threshold": {"threshold": 0.05, "mu": 3.0},
        "nuc": {"regularizer": "nuc", "mu": 0.01},
        "drop_last": {"training.drop_last": True, "tolerance": 0.0},
        "one batch": {"training.batch_size": 0, "tolerance": 0.02},
    },
    "fedmf": {"threshold": {"threshold": 0.05}},
    "fedncf": {
        "uniform": {"weighting": "uniform", "training.optimizer": "sgd", "training.lr": 0.3},
        "drop_last": {"training.drop_last": True, "training.weight_decay": 0.01},
    },
    "gpfl": {
        "paper": {"variant": "paper"},
        "in order": {"training.shuffle": False, "training.drop_last": True},
    },
    "fedselect": {
        "paper": {"variant": "paper", "interval": 2},
        "fixed": {"batchnorm": "fixed", "weighting": "samples"},
        "interval=2": {"interval": 2, "rate": 0.5},
    },
    "fedjets": {
        "unnormalized": {"mixture": "unnormalized", "init": "common"},
        "logits": {"mixture": "logits", "evaluate_mixture": True},
        "top_k=M": {"top_k": 3, "weighting": "uniform"},
        "no anchors": {"anchor_share": 0.0, "top_k": 1},
    },
    "clustered": {
        "threshold": {"threshold": 0.1, "metric": "cosine", "linkage": "average"},
        "no common rounds": {"common_rounds": 0, "metric": "l1", "linkage": "complete", "weighting": "uniform"},
    },
    "ifca": {"gradients": {"clusters": 3, "averaging": "gradients", "weighting": "samples"}},
    "ensemble": {"three": {"members": 3, "init": "random", "weighting": "uniform"}},
    "fedvpt": {"uniform": {"prompts": 1, "weighting": "uniform"}},
    "fedd2s": {
        "moving": {"rate": 1, "server_batch_size": 20},
        "parameters": {"variant": "parameters", "rate": 1},
    },
    "self_fl": {
        "closed form": {
            "step_rule": "quadratic",
            "curvature": 2.0,
            "intra": "gradients",
            "min_ratio": 0.5,
            "weighting": "uniform",
        },
        "empirical": {"inter": "empirical", "start_from": "global", "weighting": "samples", "smoothing": 0.0},
        "fixed": {"step_rule": "fixed", "inter_variance": 0.01, "warmup_rounds": 2},
    },
    "group_perfl": {
        "penalties": {"group_mu": 0.3, "personal_mu": 0.2, "group_rate": 0.5, "personal_rate": 0.1, "keep_best": False},
        "no common start": {"global_rounds": 0, "personal_epochs": 0},
    },
    "pfedhn": {
        "momentum": {
            "server_optimizer": "momentum",
            "embedding_lr": 0.2,
            "server_decay": 0.01,
            "server_clip": 0.05,
            "local_head": True,
        },
        "adam": {"server_optimizer": "adam", "server_lr": 0.01, "embedding_dim": 4, "weighting": "samples"},
    },
    "pfedpg": {
        "adam": {"server_optimizer": "adam", "server_lr": 0.01},
        "one token": {"descriptor_tokens": 1, "inner": 5},
        "no generator": {"generator": "none"},
        "sum": {"reduction": "sum", "weighting": "samples", "server_lr": 0.1},
    },
}
"""Further settings of a method by label, as typed: ``training.`` begins a training setting, the others are its own."""


def problem(method: str, dtype: torch.dtype = torch.float32) -> Problem:
    """The small problem on which `method` is tested together with all others."""
    return SPECIAL.get(method, classification)(dtype)


def problems(method: str, dtype: torch.dtype = torch.float32) -> dict[str, Problem]:
    """The problem of `method` in several settings: ``default`` is :func:`problem`, the others :data:`VARIATIONS`."""
    given = problem(method, dtype)
    variants = {"default": given}
    for label, settings in VARIATIONS.get(method, {}).items():
        options = {name: value for name, value in settings.items() if not name.startswith("training.")}
        training = {name.removeprefix("training."): settings[name] for name in settings if name not in options}
        variants[label] = replace(
            given, options={**given.options, **options}, training=replace(given.training, **training)
        )
    return variants
