"""Pictures of small run folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedpers.app import _main
from fedpers.errors import ConfigError, FedpersError
from fedpers.evaluation.plots import SHARE, Rounds, _draw_headline, _figure, plot_masks, plot_run, read_rounds


def write(folder: Path, layers: list[str] | None = None, *, rounds: int = 4, headline: str = "accuracy") -> Path:
    folder.mkdir(parents=True)
    with (folder / "rounds.jsonl").open("w") as file:
        for r in range(rounds + 1):
            row: dict[str, Any] = {"round": r, "train/loss": None}
            if r % 2 == 0:  # evaluated every other round
                row |= {f"test/{headline}": 0.1 * r, f"test/{headline}_worst_decile": 0.05 * r}
                row[f"validation/{headline}"] = None if r == 0 else 0.1 * r
            if r and layers:
                row |= {SHARE: 0.2 * r, **{f"{SHARE}/{layer}": 0.2 * r for layer in layers}}
            file.write(json.dumps(row) + "\n")
    summary = {"strategy": "fedselect", "dataset": "digits", "seed": 1, "headline": headline, "selected_round": 2}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_curves_leave_out_what_was_not_measured(tmp_path: Path) -> None:
    run = read_rounds(write(tmp_path / "run", ["b.10.w", "b.9.w", "a"]))
    assert run.curve("test/accuracy") == ([0, 2, 4], [0.0, 0.2, 0.4])
    assert run.curve("validation/accuracy") == ([2, 4], [0.2, 0.4])
    assert run.layers == ["a", "b.9.w", "b.10.w"]
    assert run.curve(f"{SHARE}/a")[0] == [1, 2, 3, 4]


def test_a_run_without_summary_is_drawn_as_far_as_it_got(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", headline="hr@10")
    (folder / "summary.json").unlink()
    assert read_rounds(folder).headline == "hr@10"
    plot_run(folder, tmp_path / "a.svg")
    assert "hr@10" in (tmp_path / "a.svg").read_text()


def test_a_metric_below_zero_stays_in_the_picture(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", headline="r2")
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    rows[0]["test/r2"] = -0.5
    figure = _figure(2, 2)
    axes = figure.subplots()
    _draw_headline(axes, Rounds(folder, rows, {"headline": "r2"}))
    assert axes.get_ylim() == pytest.approx((-0.51, 1.02))


@pytest.mark.slow
@pytest.mark.parametrize("layers", [None, ["body.0.weight", "head.weight"], [f"body.{i}.weight" for i in range(12)]],
                         ids=["no masks", "lines", "map"])  # fmt: skip
def test_pictures_have_axes_names_and_the_run(layers: list[str] | None, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", layers)
    plot_run(tmp_path, tmp_path / "a.svg")  # the only run below
    text = (tmp_path / "a.svg").read_text()
    for word in ("fedselect, digits, seed 1", "accuracy, mean over clients", "worst tenth", "selected round"):
        assert word in text
    assert ("personal share" in text) == (layers is not None)
    for layer in layers or []:
        assert layer in text
    plot_run(folder, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    if layers:
        plot_masks(folder, tmp_path / "masks.svg")
        masks = (tmp_path / "masks.svg").read_text()
        assert "personal share" in masks
        assert "mean over clients" not in masks


def test_errors_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FedpersError, match="no run was found in"):
        plot_run(tmp_path, tmp_path / "a.svg")
    one = write(tmp_path / "a" / "one")
    with pytest.raises(FedpersError, match="records no masks"):
        plot_masks(one, tmp_path / "a.svg")
    with pytest.raises(ConfigError, match=r"^--out=a\.txt: expected a file that ends in one of \."):
        plot_run(one, Path("a.txt"))
    with pytest.raises(FedpersError, match="cannot be written"):
        plot_run(one, tmp_path / "missing" / "a.svg")
    write(tmp_path / "a" / "two")
    with pytest.raises(FedpersError, match="holds 2 runs; choose one of them"):
        plot_run(tmp_path / "a", tmp_path / "a.svg")
    (one / "rounds.jsonl").write_text("{")
    with pytest.raises(FedpersError, match="cannot be read"):
        plot_run(one, tmp_path / "a.svg")
    (one / "rounds.jsonl").write_text('{"round": 1}\n')
    with pytest.raises(FedpersError, match="was not evaluated in any round"):
        plot_run(one, tmp_path / "a.svg")
    assert not (tmp_path / "a.svg").exists()


@pytest.mark.slow
def test_plot_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["strategy=fedselect", "rounds=3", "partition.num_clients=4", f"output={tmp_path / 'runs'}"]
    assert _main(arguments) == 0
    assert _main(["plot", str(tmp_path / "runs"), "--out", str(tmp_path / "run.svg")]) == 0
    text = (tmp_path / "run.svg").read_text()
    assert "head.weight" in text
    assert "accuracy, mean over clients" in text
    capsys.readouterr()
    assert _main(["plot", str(tmp_path / "runs"), "--out", str(tmp_path / "run.doc")]) == 2
    assert capsys.readouterr().err.startswith("fedpers: --out=")


def test_matplotlib_is_loaded_only_to_draw() -> None:
    code = "import sys, fedpers.app, fedpers.evaluation.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
