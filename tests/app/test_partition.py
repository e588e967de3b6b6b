"""``fedpers partition`` and ``fedpers list`` as typed."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from fedpers.app import _main
from fedpers.app.compose import composed
from fedpers.app.listing import describe_method
from fedpers.app.partition import data_of
from fedpers.data import PartitionConfig
from fedpers.settings.dataset import OWN_FILES
from fedpers.settings.groups import GROUPS, choices, method_names
from fedpers.settings.sources import SOURCES
from tests.app.test_cli import error_of


def test_clients_are_shown_without_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv, picture = tmp_path / "clients.csv", tmp_path / "clients.png"
    settings = ["partition=pathological", "partition.num_clients=40", "partition.min_samples=8", "split.unseen=2"]
    assert _main(["partition", *settings, "--csv", str(csv), "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "... and 10 more clients" in shown
    assert "digits, partition=pathological: 40 clients, " in shown
    assert "fewer than 10 test samples" in shown
    rows = pd.read_csv(csv)
    assert len(rows) == 40
    assert rows.unseen.sum() == 2
    classes = rows[[column for column in rows if column.startswith("class ")]]
    assert classes.shape == (40, 10)
    assert (classes.gt(0).sum(1) <= 2).all()
    assert (classes.sum(1) == rows.train + rows.validation + rows.test).all()
    shares = classes.div(classes.sum(1), axis=0)
    whole = classes.sum() / classes.sum().sum()
    assert rows.divergence.tolist() == pytest.approx((shares - whole).abs().sum(1) / 2)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["shards", "inner_dirichlet", "power_law", "disjoint_classes"])
def test_the_built_in_digits_are_divided_by_classes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["partition", "dataset=digits", f"partition={name}"]) == 0
    shown = capsys.readouterr().out
    assert f"digits, partition={name}: {PartitionConfig(name).num_clients} clients, " in shown


def test_help_names_options_and_source_of_a_partition(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["--help", "partition=shards", "partition=domains", "partition"]) == 0
    shown = capsys.readouterr().out
    for text in ("arXiv 1602.05629", "partition.shards_per_client=2", "partition.within=iid", "(FedBN)", "power_law"):
        assert text in shown, text


def test_of_ratings_what_a_user_rated_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["dataset=synthetic_ratings", "dataset.num_users=30", "dataset.num_items=300"]
    assert _main(["partition", *settings, "--csv", str(tmp_path / "users.csv")]) == 0
    rows = pd.read_csv(tmp_path / "users.csv")
    data = data_of(composed(settings))
    assert rows.train.tolist() == [len(items) for items in data.train]
    assert set(rows.validation) == set(rows.test) == {1}  # not the items it is ranked among
    shown = capsys.readouterr().out
    assert f"30 clients, {rows[['train', 'validation', 'test']].sum().sum()} rated items; rated items of a" in shown
    assert "test samples" not in shown


def test_settings_that_cannot_be_used_are_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error_line(*arguments: str) -> str:
        assert _main(list(arguments)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "partition=dirichlett: expected one of" in error_line("partition", "partition=dirichlett")
    assert "cannot be written" in error_line("partition", "--plot", str(tmp_path / "a.xyz"))
    assert "there are no classes to draw" in error_line("partition", "dataset=synthetic_ratings", "--plot", "a.png")


@pytest.mark.parametrize(("typed", "hint"), [([], ""), (["dataset"], " (did you mean 'datasets'?)")])
def test_list_names_the_kinds(typed: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["list", *typed]) == 2
    kinds = "datasets, heterogeneity, methods, models, partitions, strategies, tasks"
    expected = f"fedpers: fedpers list {''.join(typed) or 'KIND'}: expected one of {kinds}{hint}.\n"
    assert capsys.readouterr().err == expected


def test_the_picture_that_was_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["partition", "partition.num_clients=4", "--plot", str(tmp_path / "a.svg")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "a.svg")


@pytest.mark.parametrize("kind", ["datasets", "partitions", "heterogeneity", "models", "strategies", "tasks"])
def test_what_there_is_to_choose_from(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["list", kind]) == 0
    shown = capsys.readouterr().out
    group = {"strategies": "strategy"}.get(kind, kind.removesuffix("s"))
    names = method_names() if kind == "strategies" else list(choices(GROUPS[group])) if group in GROUPS else []
    more = {"tasks": ["classification", "ranking", "regression"], "models": ["cnn_bn", "resnet18_gn"]}
    for name in [*names, *more.get(kind, [])]:
        assert any(line.split() and line.split()[0] == name for line in shown.splitlines()), name


def test_every_method_says_what_clients_share_and_keep(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert _main(["list", "strategies"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "2019. Shared: the body, its BatchNorm statistics averaged with it. Personal: the head." in lines
    sent = "K * D numbers go down and K * D come up"
    assert f"2023. Shared: nothing is averaged; {sent}. Personal: the head, and the adapted prompts P~_n." in lines
    baselines = {"head_only", "local", "no_learning", "pretrained"}
    for name in method_names():
        described = describe_method(name)
        assert described.summary
        assert bool(described.year) == (name not in baselines), name
        assert min(len(described.shared), len(described.personal)) > 1, name


def test_every_data_set_says_where_it_comes_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    names = set(choices(GROUPS["dataset"]))
    assert names - set(SOURCES) == {*OWN_FILES, "ratings"}
    assert set(SOURCES) <= names
    assert _main(["list", "datasets"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for source in SOURCES.values():
        assert f"{source.publication}, {source.url}; licence: {source.licence}; files: {source.files}" in shown


def test_a_mistyped_shift_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = f"output={tmp_path}"
    line = error_of(capsys, "heterogeneity.rotation.angel=3", "rounds=1", output)
    assert "heterogeneity.rotation.angel=3: expected a known key: one of angle, groups (did you mean 'angle'?)" in line
    line = error_of(capsys, "heterogeneity.blur.strength=-1", "rounds=1", output)
    assert "heterogeneity.blur.strength=-1.0: expected a number >= 0" in line
