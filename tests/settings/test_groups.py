"""Every choice as Hydra composes it is what the classes say, so that runs from Python and by command are the same."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fedpers.app import _main
from fedpers.app.compose import composed
from fedpers.data.datasets import DATASETS
from fedpers.data.partitions import BY_OWNER, PARTITIONS, WITH_PARTS, WITHOUT_CLASSES
from fedpers.errors import ConfigError
from fedpers.models import MODELS
from fedpers.settings import Config, ModelConfig, TensorBoardConfig, TrackerConfig, WandbConfig
from fedpers.settings.base import choice_options, choices, options
from fedpers.settings.dataset import OWN_FILES, RATINGS, DatasetConfig
from fedpers.settings.groups import GROUPS, conf_folder, group_names, method_names
from fedpers.settings.heterogeneity import SHIFTS, Blur, HeterogeneityConfig, Rotation
from fedpers.settings.partition import PartitionConfig
from fedpers.strategies import STRATEGIES, default_options, strategy_class

NEEDED = {"dataset=ratings": ["dataset.root=a.csv"], "partition=index": ["partition.file=a.json"],
          "dataset=hf": ["dataset.path=a"]}  # fmt: skip
NEEDED |= {f"dataset={name}": ["dataset.root=a"] for name in (*OWN_FILES, "har")}
BROUGHT = {"partition": "user", "split": "leave_one_out", "model": "factorization"}
PRESETS = {"cnn_bn": ModelConfig("cnn", norm="batch"), "resnet18_bn": ModelConfig("resnet18", norm="batch"),
           "resnet18_gn": ModelConfig("resnet18")}  # fmt: skip
CHOSEN = [(group, name) for group in GROUPS for name in group_names(group)]


@cache
def together(position: int) -> Config:
    """What the choices at this position of all groups compose to, but for data, which bring choices of others along."""
    chosen = {group: group_names(group)[position:] for group in GROUPS if group != "dataset"}
    words = [f"{group}={names[0]}" for group, names in chosen.items() if names]
    return composed([*words, *(key for word in words for key in NEEDED.get(word, []))])


@pytest.mark.slow
@pytest.mark.parametrize(("group", "name"), CHOSEN)
def test_every_choice_composes_to_the_values_of_its_class(group: str, name: str) -> None:
    needed = NEEDED.get(f"{group}={name}", [])
    alone = group == "dataset"
    config = composed([f"{group}={name}", *needed]) if alone else together(group_names(group).index(name))
    given = dict(argument.removeprefix(f"{group}.").split("=") for argument in needed)
    made: Any = getattr(config, group)
    if group == "model":
        expected = PRESETS.get(name) or ModelConfig(name)
        assert (made.name, made.options()) == (expected.name, expected.options())
        return
    expected = GROUPS[group](name=name, **given)  # type: ignore[call-arg]
    for option in options(GROUPS[group]).values():
        only = option.only_for
        default = getattr(expected, option.name) if only is None else only.default(name, getattr(expected, option.name))
        assert getattr(made, option.name) == default, option.key


@pytest.mark.parametrize("name", RATINGS)
def test_ratings_bring_along_what_fits_them(name: str) -> None:
    config = composed([f"dataset={name}", *NEEDED.get(f"dataset={name}", [])])
    assert {group: getattr(config, group).name for group in BROUGHT} == BROUGHT
    assert (config.training.epochs, config.training.batch_size) == (10, 2048)
    rates = {"lastfm2k": (0.01, 100), "movielens1m": (0.5, 1000)}.get(name, (0.5, 200))
    assert config.training.groups is not None
    assert (config.training.lr, config.training.groups["body"]["lr"]) == rates


def test_the_defaults_are_those_of_the_classes() -> None:
    config, plain = composed([]), Config()
    for name in (
        "rounds",
        "fraction",
        "seed",
        "evaluate_every",
        "min_replies",
        "auc",
        "output",
        "checkpoint",
        "training",
    ):
        assert getattr(config, name) == getattr(plain, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_method_is_its_file_and_has_all_its_options(name: str) -> None:
    assert strategy_class(name).__module__ == f"fedpers.strategies.{name}"
    assert composed([f"strategy={name}"]).strategy == {"name": name, **default_options(name)}


def test_names_are_written_once_where_they_are_looked_up() -> None:
    assert {*DATASETS, *RATINGS} == set(choices(DatasetConfig))
    assert {"auto", *MODELS} == set(choices(ModelConfig))
    assert {*PARTITIONS, "label_sets", "user"} == set(choices(PartitionConfig))
    assert {*WITH_PARTS, *BY_OWNER, *WITHOUT_CLASSES} <= set(PARTITIONS)
    assert set(method_names()) == set(STRATEGIES)


def test_files_are_there_only_for_choices_that_bring_something_along() -> None:
    for path in conf_folder().rglob("*.yaml"):
        if path.parent.name in ("strategy", "dataset"):
            lines = path.read_text(encoding="utf-8").splitlines()
            assert lines[0] == "# @package _global_", path
            assert f"  - /options/{path.parent.name}@{path.parent.name}: {path.stem}" in lines, path


BOTH = TrackerConfig(wandb=WandbConfig(), tensorboard=TensorBoardConfig())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], TrackerConfig()),
        (["tracker=none"], TrackerConfig()),
        (["tracker=wandb"], TrackerConfig(wandb=WandbConfig())),
        (["tracker=tensorboard"], TrackerConfig(tensorboard=TensorBoardConfig())),
        (["tracker=[wandb]"], TrackerConfig(wandb=WandbConfig())),
        (["tracker=[wandb,tensorboard]"], BOTH),
        (["tracker=wandb", "tracker.wandb.project=other"], TrackerConfig(wandb=WandbConfig(project="other"))),
        (
            ["tracker=[wandb,tensorboard]", "tracker.tensorboard.flush_secs=3", "tracker.wandb.mode=offline"],
            TrackerConfig(wandb=WandbConfig(mode="offline"), tensorboard=TensorBoardConfig(flush_secs=3)),
        ),
    ],
)
def test_trackers_compose(overrides: list[str], expected: TrackerConfig) -> None:
    assert composed(overrides).tracker == expected


@pytest.mark.slow
def test_shifts_compose() -> None:
    def shifts(*overrides: str) -> Any:
        return composed(overrides).heterogeneity.shifts()

    each = {name: shifts(f"heterogeneity={name}") for name in SHIFTS}
    assert shifts(f"heterogeneity=[{','.join(SHIFTS)}]") == {name: each[name][name] for name in SHIFTS}
    both = shifts("heterogeneity.rotation.groups=3", "heterogeneity=[rotation, blur]", "heterogeneity.blur.strength=2")
    assert both == {"rotation": Rotation(3, 90.0), "blur": Blur(2.0)}
    assert shifts("heterogeneity=[rotation]", "heterogeneity.groups=2") == {"rotation": Rotation(2, 180.0)}
    assert shifts("heterogeneity=[]") == {}
    assert shifts("strategy=fedrap", "heterogeneity=[blur,noise]") == {
        "blur": each["blur"]["blur"],
        "noise": each["noise"]["noise"],
    }


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["heterogeneity=[rotation,blurr]"], "heterogeneity=blurr: expected one of blur, "),
        (["heterogeneity=[rotation,none]"], "heterogeneity=none: expected one of blur, "),
        (["heterogeneity=[blur,blur]"], "heterogeneity=[blur,blur]: expected each shift once."),
        (["heterogeneity=[blur],[noise]"], "heterogeneity=[blur],[noise]: expected a name, or one list of"),
        (["heterogeneity=none,[blur,noise]"], "heterogeneity=none,[blur,noise]: expected a name, or one list"),
        (["heterogeneity=[blur,noise]", "heterogeneity.strength=1"], "heterogeneity.strength=1: expected a known key"),
        (["tracker=tensorbord"], "tracker=tensorbord: expected one of none, tensorboard, wandb (did you mean"),
        (["tracker=wandb", "tracker.wandb.projekt=x"], "tracker.wandb.projekt=x: expected a known key: "),
        (["tracker=wandb", "tracker.wandb.mode=on"], "tracker.wandb.mode=on: expected one of auto, offline, online"),
        (["tracker=tensorboard", "tracker.tensorboard.flush_secs=0"], "tracker.tensorboard.flush_secs=0: expected "),
        (["runtime.cohort=3"], "runtime.cohort=3: expected runtime.clients_at_once, as it is called now."),
        (["partition=iid", "partition.alpha=1"], "partition.alpha=1: expected a known key: "),
    ],
)
def test_what_does_not_compose_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        composed(overrides)
    assert str(caught.value).startswith(sentence)


def test_help_lists_every_option_of_a_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["--help", "strategy=fedrap", "partition=dirichlet", "training", "tracker=wandb", "model"]) == 0
    text = capsys.readouterr().out
    for name, default in default_options("fedrap").items():
        assert f"strategy.{name}={'null' if default is None else default}" in text
    for line in (
        "strategy=fedrap  FedRAP: ",
        "what mu weighs  [one of inf, l1, l2, none, nuc]",
        "sets dataset=synthetic_ratings",
        "partition.alpha=0.1",
        "[a number > 0]",
        "training.steps=null",
        "tracker.wandb.mode=auto",
        "resnet18_bn",
    ):
        assert line in text
    assert _main(["--help", "strategy=fedrepp"]) == 2
    assert "did you mean 'fedrep'?" in capsys.readouterr().err
    assert _main(["--help", "strategi"]) == 2
    assert "--help=strategi: expected one of aggregation, " in capsys.readouterr().err


def test_help_says_what_is_on_and_what_must_be_given(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # a line each

    def shown(choice: str) -> list[str]:
        assert _main(["--help", choice]) == 0
        return capsys.readouterr().out.splitlines()

    for name in choices(HeterogeneityConfig):
        lines = shown(f"heterogeneity={name}")
        (start,) = (k for k, line in enumerate(lines) if line.startswith("  By keys of their own, each off unless one"))
        on = [line.split("=")[0].strip() for line in lines[1:start] if line.strip()]
        keys = [key for key in choice_options(HeterogeneityConfig, name) if key in ("strength", "groups")]
        assert on == [f"heterogeneity.{key}" for key in keys]
        off = {line.split(".")[1] for line in lines[start + 1 :] if line.strip()}
        assert off == {*SHIFTS, "drift"}
    for dataset in ("csv", "parquet", "npz", "images", "pfllib", "leaf", "ratings"):
        (line,) = (line for line in shown(f"dataset={dataset}") if line.startswith("  dataset.root="))
        assert " ".join(line.split()) == "dataset.root= needed: folder of the files, or the file [text]"
    (line,) = (line for line in shown("dataset=mnist") if line.startswith("  dataset.root="))
    assert "dataset.root=null" in line
    assert "null: $FEDPERS_CACHE/data" in line
    assert any(line.startswith("  dataset.path=  ") and "[text]" in line for line in shown("dataset=hf"))
    assert any(line.startswith("  partition.file=  ") and "[text]" in line for line in shown("partition=index"))
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, shown("dataset=mnist"))) <= 80


OWN_CONFIGURATION = """
defaults:
  - config
  - override strategy: moon
  - _self_
rounds: 1
partition:
  num_clients: 4
"""


@pytest.mark.slow
def test_a_configuration_of_ones_own_may_choose_any_method(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "own.yaml").write_text(OWN_CONFIGURATION)
    folder = f"--config-dir={tmp_path / 'conf'}"
    assert _main([folder, "--config-name=own", f"output={tmp_path / 'runs'}"]) == 0
    (summary,) = tmp_path.rglob("summary.json")
    assert '"strategy": "moon"' in summary.read_text()


MINE = """
from dataclasses import dataclass
from fedpers.strategies import LocalUpdate, PersonalizedStrategy


@dataclass(kw_only=True)
class MineUpdate(LocalUpdate):
    mu: float = 0.25


@dataclass(kw_only=True)
class Mine(PersonalizedStrategy):
    update = MineUpdate
"""


def test_a_method_of_ones_own_is_a_choice_like_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_method.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    assert composed(["strategy=own_method:Mine", "strategy.mu=3"]).strategy == {
        "name": "own_method:Mine",
        "weighting": "samples",
        "personal_layers": None,
        "finetune_epochs": 0,
        "mu": 3,
    }
    assert _main(["--help", "strategy=own_method:Mine"]) == 0
    assert "strategy.mu=0.25" in capsys.readouterr().out
    assert _main(["strategy=own_method:Nobody"]) == 2
    assert "expected module:Name, but module own_method has no Nobody" in capsys.readouterr().err
