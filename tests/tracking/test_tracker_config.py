"""The tracker group composes: none, one by name, several as a list, and settings of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import OmegaConf

from fedpers.tracking import TensorBoardConfig, TrackerConfig, WandbConfig

CONF = Path(__file__).parents[2] / "conf"


@dataclass
class Schema:
    """Only what the test needs of a run's config."""

    seed: int = 0
    tracker: TrackerConfig = field(default_factory=TrackerConfig)


@pytest.fixture
def load(tmp_path):
    ConfigStore.instance().store("tracker_test_schema", Schema)
    (tmp_path / "main.yaml").write_text(
        "defaults:\n  - tracker_test_schema\n  - tracker: none\n  - _self_\n"
        f"hydra:\n  searchpath:\n    - file://{CONF}\n"
    )
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "both.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /tracker: [tensorboard, wandb]\nseed: 5\n"
    )

    def load(*overrides):
        with initialize_config_dir(str(tmp_path), version_base="1.3"):
            return OmegaConf.to_object(compose("main", list(overrides)).tracker)

    return load


BOTH = TrackerConfig(wandb=WandbConfig(), tensorboard=TensorBoardConfig())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], TrackerConfig()),
        (["tracker=none"], TrackerConfig()),
        (["tracker=wandb"], TrackerConfig(wandb=WandbConfig())),
        (["tracker=tensorboard"], TrackerConfig(tensorboard=TensorBoardConfig())),
        (["tracker=[wandb]"], TrackerConfig(wandb=WandbConfig())),
        (["tracker=[wandb,tensorboard]"], BOTH),
        (["+experiment=both"], BOTH),
        (["tracker=wandb", "tracker.wandb.project=other"], TrackerConfig(wandb=WandbConfig(project="other"))),
        (
            ["tracker=[wandb,tensorboard]", "tracker.tensorboard.flush_secs=3", "tracker.wandb.mode=offline"],
            TrackerConfig(wandb=WandbConfig(mode="offline"), tensorboard=TensorBoardConfig(flush_secs=3)),
        ),
    ],
)
def test_tracker_group_composes(load, overrides, expected):
    assert load(*overrides) == expected


def test_unknown_trackers_and_settings_are_refused(load):
    with pytest.raises(MissingConfigException, match="tensorboard"):
        load("tracker=tensorbord")
    with pytest.raises(ConfigCompositionException, match=r"tracker\.wandb\.projekt"):
        load("tracker=wandb", "tracker.wandb.projekt=x")
