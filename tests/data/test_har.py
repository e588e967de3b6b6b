"""The folder "UCI HAR Dataset", made up in its official form, and what is wrong with a damaged one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedpers.data import DatasetConfig, PartitionConfig, SplitConfig
from fedpers.data.datasets import load_dataset
from fedpers.data.load import load_federated
from fedpers.data.sets.har import SIGNALS
from fedpers.errors import ConfigError, DataError

ACTIVITIES = ("WALKING", "WALKING_UPSTAIRS", "WALKING_DOWNSTAIRS", "SITTING", "STANDING", "LAYING")
SUBJECTS = {"train": [1, 1, 1, 3, 3, 3, 3], "test": [2, 2, 2]}
LABELS = {"train": [5, 5, 1, 6, 2, 2, 1], "test": [1, 4, 6]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven windows of two people for training, three of another for testing; nobody stands in both parts."""
    root = tmp_path / "UCI HAR Dataset"
    root.mkdir()
    lines = [f"{number} {name}" for number, name in enumerate(ACTIVITIES, start=1)]
    (root / "activity_labels.txt").write_text("\n".join(lines) + "\n")
    draws = np.random.default_rng(0)
    for part, labels in LABELS.items():
        signals = root / part / "Inertial Signals"
        signals.mkdir(parents=True)
        np.savetxt(root / part / f"y_{part}.txt", labels, fmt="%d")
        np.savetxt(root / part / f"subject_{part}.txt", SUBJECTS[part], fmt="%d")
        for signal in SIGNALS:
            np.savetxt(signals / f"{signal}_{part}.txt", draws.normal(size=(len(labels), 128)), fmt=" %.7e")
    return root


def test_signals_are_channels_and_people_are_clients(folder: Path) -> None:
    for root in (folder, folder.parent):
        data = load_dataset(DatasetConfig("har", root=str(root)))
        assert (data.name, data.num_classes, data.class_names) == ("har", 6, ACTIVITIES)
        assert data.x.shape == (10, 9, 128)
        assert data.x.dtype == torch.float32
        assert data.y.tolist() == [label - 1 for part in ("train", "test") for label in LABELS[part]]
        assert data.owner is not None
        assert data.owner.tolist() == [0, 0, 0, 2, 2, 2, 2, 1, 1, 1]
        assert data.owner_names == ("1", "2", "3")
        assert data.train_size is None
        for channel in (0, 5, 8):
            file = folder / "test" / "Inertial Signals" / f"{SIGNALS[channel]}_test.txt"
            np.testing.assert_array_equal(data.x[7:, channel].numpy(), np.loadtxt(file, dtype=np.float32))
    assert SIGNALS[3] == "body_gyro_x"


def test_clients_are_people(folder: Path) -> None:
    config = DatasetConfig("har", root=str(folder))
    data = load_federated(config, PartitionConfig("natural", min_samples=3), SplitConfig(), 0)
    assert data.client_names == ("1", "2", "3")
    assert data.class_names == ACTIVITIES
    with pytest.raises(ConfigError, match=r"split=official: expected fractions, because har has no official"):
        load_federated(config, PartitionConfig("iid", 2), SplitConfig("official"), 0)


def spoil(root: Path, how: str) -> None:
    signal = root / "train" / "Inertial Signals" / "body_acc_y_train.txt"
    lines = signal.read_text().splitlines()
    if how == "a line missing":
        signal.write_text("\n".join(lines[:-1]))
    elif how == "a value missing":
        signal.write_text("\n".join([*lines[:2], lines[2].rsplit(maxsplit=1)[0], *lines[3:]]))
    elif how == "half a value in all lines":
        signal.write_text("\n".join(line.rsplit(maxsplit=1)[0] for line in lines))
    elif how == "text":
        signal.write_text("\n".join([*lines[:-1], lines[-1].rsplit(maxsplit=1)[0] + " so"]))
    elif how == "not a number":
        signal.write_text("\n".join([*lines[:-1], lines[-1].rsplit(maxsplit=1)[0] + " nan"]))
    elif how == "empty":
        signal.write_text("")
    elif how == "bytes":
        signal.write_bytes(b"\xff\xfe\x00\x01")
    elif how == "a file missing":
        signal.unlink()
    elif how == "subjects":
        (root / "test" / "subject_test.txt").write_text("2\n2\n")
    elif how == "half a subject":
        (root / "test" / "subject_test.txt").write_text("2\n2\n2.5\n")
    elif how == "an unknown label":
        (root / "test" / "y_test.txt").write_text("1\n4\n7\n")
    elif how == "names":
        (root / "activity_labels.txt").write_text("WALKING\n")
    elif how == "no folder":
        (root / "activity_labels.txt").unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("a line missing", r"body_acc_y_train\.txt has 6 lines, but there are 7 labels\."),
        ("a value missing", r"body_acc_y_train\.txt is damaged \(.*\)\."),
        ("half a value in all lines", r"body_acc_y_train\.txt holds \[7, 127\], expected numbers \[n, 128\]\."),
        ("text", r"body_acc_y_train\.txt is damaged \(.*\)\."),
        ("not a number", r"Inertial Signals is not finite \(nan or infinite\) in 1 of 10 samples\."),
        ("empty", r"body_acc_y_train\.txt holds nothing, expected numbers \[n, 128\]\."),
        ("bytes", r"body_acc_y_train\.txt is damaged \(.*\)\."),
        ("a file missing", r"body_acc_y_train\.txt is missing; it is to be had from https://archive\.ics\.uci\.edu/"),
        ("subjects", r"subject_test\.txt has 2 lines, but there are 3 labels\."),
        ("half a subject", r"subject_test\.txt is damaged \(.*\)\."),
        ("an unknown label", r"has the label 7, which activity_labels\.txt does not name\."),
        ("names", r"activity_labels\.txt is damaged \(.*\); a line is a number and a name\."),
        (
            "no folder",
            r"is missing or not the folder UCI HAR Dataset, it is to be had from .*CC BY 4\.0 .*no commercial use",
        ),
    ],
)
def test_a_damaged_folder_is_a_sentence(folder: Path, how: str, message: str) -> None:
    spoil(folder, how)
    with pytest.raises(DataError, match=message) as error:
        load_dataset(DatasetConfig("har", root=str(folder)))
    assert "\n" not in str(error.value)


def test_nothing_is_downloaded() -> None:
    wanted = r"dataset\.root=None: expected the path of the folder UCI HAR Dataset, from https://archive.*CC BY 4\.0"
    with pytest.raises(ConfigError, match=wanted):
        DatasetConfig("har")
