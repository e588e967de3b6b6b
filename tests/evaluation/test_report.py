"""The page that ``fedpers report`` writes: its structure, what it says and leaves out, and bad input."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedpers.app import _main
from fedpers.app.report import command
from fedpers.errors import ConfigError, FedpersError
from fedpers.evaluation.leaderboard import leaderboard
from fedpers.evaluation.report import page as pages
from fedpers.evaluation.report.client_figures import harmed
from fedpers.evaluation.report.contents import paired, read_methods
from fedpers.evaluation.report.latex import latex
from fedpers.evaluation.report.page import page
from fedpers.evaluation.report.svg import Axis, Frame, share_axis, spread_axis
from fedpers.evaluation.runs import find_runs
from tests.evaluation.report_runs import GAINS, write_run, write_sweep

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Outline(HTMLParser):
    """Elements of a page with their attributes and texts; fails where tags do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.opened: list[int] = []
        self.feed(text)
        self.close()
        assert not self.opened, [self.elements[i][0] for i in self.opened]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.opened.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        opened = self.elements[self.opened.pop()][0]
        assert opened == tag, f"<{opened}> is closed by </{tag}>"

    def handle_data(self, data: str) -> None:
        for place in self.opened:
            self.elements[place][2].append(data)

    def texts(self, tag: str, name: str | None = None) -> list[str]:
        return [
            " ".join("".join(texts).split())
            for kind, attributes, texts in self.elements
            if kind == tag and (name is None or name in (attributes.get("class") or "").split())
        ]

    def count(self, tag: str, name: str | None = None) -> int:
        return len(self.texts(tag, name))


def report(*folders: Path) -> str:
    runs = find_runs(folders)
    return page(leaderboard(runs), runs)


def test_structure(tmp_path: Path) -> None:
    text = report(write_sweep(tmp_path / "runs"))
    outline = Outline(text)
    (sentence,) = outline.texts("ul", "sentences")
    assert sentence == leaderboard(find_runs([tmp_path]))[0].sentence
    assert text.index('<ul class="sentences">') < text.index("<main>")
    ids = {attributes["id"] for _, attributes, _ in outline.elements if "id" in attributes}
    links = [attributes["href"] for kind, attributes, _ in outline.elements if kind == "a"]
    assert links == []  # one group needs none
    assert "group1" in ids
    rows = [name for name in outline.texts("th") if name.startswith(("FedPer", "FedRep", "Local", "FedAvg"))]
    assert rows[:4] == ["FedPer", "FedRep", "Local", "FedAvg"]
    assert outline.count("figure") == outline.count("figcaption") == outline.count("svg", "figure")
    assert outline.count("figure") >= 12
    for kind, attributes, _ in outline.elements:
        if kind == "svg" and attributes.get("class") == "figure":
            assert attributes["aria-label"]
            assert attributes["role"] == "img"
    assert all(outline.texts("figcaption"))
    assert outline.texts("h3") == ["Differences", "Training", "Clients", "Client by client", "Data of the clients",
                                   "Methods, for a paper"]  # fmt: skip


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    text = report(write_sweep(tmp_path / "runs", seeds=1))
    assert not re.search(r"https?://|@import|url\(|\bsrc=|<link|base64|fetch\(|nan[ \"L]", text)
    assert len(text) < 400_000


def test_pictures_of_what_is_recorded(tmp_path: Path) -> None:
    layers = {f"personal_share/layer{i}": 0.1 * i for i in range(3)}
    write_run(tmp_path / "a", "local")
    write_run(tmp_path / "b", "fedselect", extra={"personal_share": 0.5, **layers})
    write_run(tmp_path / "c", "fedjets", extra={f"holders_of_expert_{i}": 3.0 for i in range(12)})
    write_run(tmp_path / "d", "fedrap", extra={"sparsity": 0.5})
    titles = Outline(report(tmp_path)).texts("h4")
    assert {"FedSelect: personal share", "FedJETs: holders of expert", "FedRAP: sparsity"} < set(titles)
    assert {"Who owns what", "Test accuracy and the size of clients", "Test accuracy and unusual clients"} < set(titles)
    shutil.rmtree(tmp_path)
    write_run(tmp_path / "a", classes=0)  # of a time when labels were not recorded, and of tasks without classes
    titles = Outline(report(tmp_path)).texts("h4")
    assert not {"Who owns what", "Test accuracy and unusual clients"} & set(titles)


def test_one_seed_gets_no_band_and_no_interval(tmp_path: Path) -> None:
    outline = Outline(report(write_sweep(tmp_path, seeds=1)))
    assert outline.count("path", "band") == 0
    assert "±" not in outline.texts("td")[0]
    assert any(text.startswith("One seed") for text in outline.texts("li"))
    assert Outline(report(write_sweep(tmp_path / "more", seeds=2))).count("path", "band") > 0


def test_warnings(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "fedper", 0, selected_on="test", protocol="test-selected")
    write_run(
        tmp_path / "b", "fedrep", 0, selected_on="test", protocol="test-selected", interrupted=True, rounds_done=4
    )
    (warnings,) = Outline(report(tmp_path)).texts("ul", "warnings")
    assert "No run of Local and none of FedAvg" in warnings
    assert "selected on test data (fedper, fedrep)" in warnings
    assert f"Not finished: {tmp_path}/b (4 of 10 rounds)" in warnings
    shutil.rmtree(tmp_path)
    assert not Outline(report(write_sweep(tmp_path))).texts("ul", "warnings")


EVIL = '<script>alert("x")</script>'


def test_names_are_text(tmp_path: Path) -> None:
    names = [f"{EVIL}{i}" for i in range(30)]
    evil: dict[str, Any] = {"names": names, "class_names": [f"{EVIL}{i}" for i in range(4)], "dataset": EVIL}
    for seed in range(2):
        write_run(tmp_path / f"a{seed}", "local", seed, **evil)
        for option in (EVIL, "</style>"):
            write_run(tmp_path / f"b{seed}{len(option)}", "fedper", seed, options={"note": option}, **evil)
    text = report(tmp_path)
    outline = Outline(text)
    assert outline.count("script") == 1
    assert outline.count("style") == 1
    assert "alert(" not in outline.texts("script")[0]
    assert escape(EVIL, quote=False).partition("alert")[0] in text
    assert any(EVIL in name for name in outline.texts("th"))


def test_bad_files_are_named_and_the_rest_is_drawn(tmp_path: Path) -> None:
    write_sweep(tmp_path, seeds=2)
    (tmp_path / "local_1" / "rounds.jsonl").write_text('{"round": 0}\n{"rou')
    (tmp_path / "fedper_0" / "clients.parquet").unlink()
    (tmp_path / "fedrep_0" / "clients.parquet").write_text("no parquet")
    (tmp_path / "fedavg_0" / "rounds.jsonl").write_text('{"round": 0, "test/accuracy": "high"}\n')
    (tmp_path / "fedavg_1" / "manifest.json").write_text("[")
    outline = Outline(report(tmp_path))
    notes = [text for text in outline.texts("li") if text.startswith("Not drawn")]
    assert sum(f"{tmp_path}/{name}" in note for note in notes for name in ("local_1", "fedper_0", "fedrep_0")) == 3
    assert any("the rounds of FedAvg" in note for note in notes)
    assert outline.count("svg", "figure") > 8


def test_files_of_another_make(tmp_path: Path) -> None:
    strange = {"num_clients": "many", "num_unseen": [1], "partition": None, "dataset": 3, "model": {}, "task": []}
    folder = write_run(tmp_path / "a", config={"fraction": "half", "heterogeneity": "x", "training": None}, **strange)
    (folder / "manifest.json").write_text('{"data": [], "versions": {"torch": 2}}')
    (folder / "rounds.jsonl").write_text('[["round"]]\n')
    folder = write_run(tmp_path / "b", config={"fraction": 2, "heterogeneity": {"name": None}}, partition=[2], model=1)
    (folder / "manifest.json").write_text('{"data": {"samples": {"train": "x"}}}')
    (folder / "rounds.jsonl").write_text('{"round": Infinity, "test/accuracy": 1}\n')
    outline = Outline(report(tmp_path))
    assert outline.count("section") == 2
    assert len(outline.texts("p", "paragraph")) == 2


def test_numbers_that_are_missing_or_not_finite(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "local")
    folder = write_run(tmp_path / "b", "fedper", selected={"test/accuracy": None}, last={"test/accuracy": None})
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    rows = [{**row, "test/accuracy": None if row["round"] % 2 else float("nan")} for row in rows]
    (folder / "rounds.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "c").mkdir()
    text = report(tmp_path)
    Outline(text)
    assert "inf " not in text


@pytest.mark.parametrize(("headline", "spread", "level"), [("hr@10", False, 0.3), ("r2", True, -2.0)])
def test_other_tasks(tmp_path: Path, headline: str, spread: bool, level: float) -> None:
    write_sweep(tmp_path, headline=headline, spread=spread, level=level, classes=0, baselines=["local"])
    outline = Outline(report(tmp_path))
    titles = outline.texts("h4")
    assert f"Test {headline} over rounds" in titles
    assert ("Clients from worst to best" in titles) == spread
    assert ("FedPer against Local" in titles) == spread
    assert any("clients are not shown one by one" in text for text in outline.texts("p")) == (not spread)


@pytest.mark.slow
def test_thousands_of_clients(tmp_path: Path) -> None:
    write_sweep(tmp_path, ("local", "fedper", "fedavg"), seeds=1, clients=5000, classes=10)
    text = report(tmp_path)
    outline = Outline(text)
    assert len(text) < 1_000_000
    assert outline.count("circle") < 6000
    assert any("the first 60 of 5,000 clients" in caption for caption in outline.texts("figcaption"))
    assert any(re.fullmatch(r"\d+ of 5000 clients fare worse .*", text) for text in outline.texts("summary"))


def test_a_page_of_many_groups_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        write_run(tmp_path / f"{number}", config={"partition": {"name": "iid", "num_clients": number + 1}})
    monkeypatch.setattr(pages, "FIGURES_BYTES", 50_000)
    monkeypatch.setattr(pages, "PAGE_BYTES", 10_000_000)
    outline = Outline(report(tmp_path))
    assert outline.count("section") == 4
    assert 0 < outline.texts("h3").count("Training") < 4
    monkeypatch.setattr(pages, "PAGE_BYTES", 50_000)
    outline = Outline(report(tmp_path))
    assert outline.count("section") < 4
    (sentences,) = outline.texts("ul", "sentences")
    assert sentences.count("On digits") == 4
    assert any("of the 4 comparisons are here without pictures" in text for text in outline.texts("p"))


def test_many_methods_are_grey_but_for_the_best(tmp_path: Path) -> None:
    for number in range(30):
        write_run(tmp_path / f"{number:02d}", "fedper", options={"level": number}, level=0.3 + 0.01 * number)
    write_run(tmp_path / "local", "local")
    outline = Outline(report(tmp_path))
    (first, *_) = outline.texts("p", "legend")
    assert first.count("FedPer") == 6
    assert "Local" in first
    assert first.endswith("the others")


def test_the_methods_paragraph_says_what_was_done(tmp_path: Path) -> None:
    (text,) = Outline(report(write_sweep(tmp_path))).texts("p", "paragraph")
    for phrase in ("1,000 training, 250 validation, 333 test samples", "30 clients (partition iid)", "for 10 rounds",
                   "learning rate 0.1", "selected by mean accuracy on the clients' validation samples",
                   "3 seeds (0, 1, 2)", "paired t-tests", "Holm's correction", "PyTorch 2.13.0", "c0ffee"):  # fmt: skip
        assert phrase in text


def test_costs_are_summed_over_rounds(tmp_path: Path) -> None:
    write_sweep(tmp_path, ("fedper",), seeds=2)
    (group,) = leaderboard(runs := find_runs([tmp_path]))
    (method,), problems = read_methods(group, {str(run.folder): run for run in runs})
    assert problems == []
    assert method.curve is not None
    assert method.curve.scores.shape == (2, 11)
    assert method.curve.costs["round"].tolist() == list(range(11))
    assert method.curve.costs["gradients"].tolist() == [100 * (r + 1) for r in range(11)]
    assert method.curve.costs["megabytes"].tolist() == [float(r + 1) for r in range(11)]
    assert method.curve.costs["seconds"][-1] == 5.5


def test_clients_are_compared_with_themselves_in_the_same_seed(tmp_path: Path) -> None:
    write_sweep(tmp_path, ("local", "fedavg"), seeds=2, names=[f"anna {i}" for i in range(30)])
    (group,) = leaderboard(runs := find_runs([tmp_path]))
    methods, _ = read_methods(group, {str(run.folder): run for run in runs})
    local, fedavg = methods
    worse = harmed(fedavg, local)
    losses = [harm.method - harm.reference for harm in worse]
    assert losses == sorted(losses)
    expected = [fedavg.clients[s].score - local.clients[s].score for s in (0, 1)]
    assert len(worse) == int((np.concatenate(expected) < 0).sum()) == 60
    assert losses[0] == pytest.approx(min(e.min() for e in expected))
    assert re.fullmatch(r"client anna \d+, seed [01]", worse[0].client)
    assert harmed(local, local) == []
    seed = fedavg.clients[0]
    fewer = seed.among(set(seed.names) - {"anna 3"})  # one client has no score with one method
    (_, few, others), _ = paired(replace(fedavg, clients=fedavg.clients | {0: fewer}), local)
    assert len(few.names) == 29
    assert few.names == others.names
    assert others.score.tolist() == np.delete(local.clients[0].score, local.clients[0].names.index("anna 3")).tolist()


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (Axis(0, 1, "", percent=True), ["0 %", "20 %", "40 %", "60 %", "80 %", "100 %"]),
        (Axis(0, 60, ""), ["0", "20", "40", "60"]),
        (Axis(2, 3000, "", log=True), ["10", "100", "1k"]),
        (Axis(-0.31, 0.12, "", percent=True), ["-30 %", "-20 %", "-10 %", "0 %", "10 %"]),
    ],
)
def test_ticks(axis: Axis, expected: list[str]) -> None:
    assert [text for _, text in axis.ticks()] == expected


def test_axes() -> None:
    assert Axis(1, 100, "", log=True).place([1, 10, 100]).tolist() == pytest.approx([0, 0.5, 1])
    assert Axis(-1, 1, "").place([0]).tolist() == [0.5]
    assert spread_axis([1, 9], "").log is False
    assert spread_axis([0, 1, 11], "").log is True
    assert share_axis([0.5, 1.0], "").high == 1.0
    assert share_axis([-500.0, 0.5], "").low > -1.2
    assert share_axis([], "").low == 0.0
    frame = Frame(Axis(0, 1, ""), Axis(0, 1, ""))
    assert "nan" not in frame.line([0, 0.5, 1], [0, float("nan"), 1], "s1")


def run_command(*arguments: object) -> int:
    return command(list(map(str, arguments)))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = write_sweep(tmp_path / "runs")
    (runs / "going_on").mkdir()
    (runs / "going_on" / "manifest.json").write_text("{}")
    files = {"--csv": tmp_path / "tables", "--latex": tmp_path / "a" / "table.tex", "--markdown": tmp_path / "t.md"}
    assert run_command(runs, *(part for pair in files.items() for part in pair)) == 0
    sentence, path = capsys.readouterr().out.splitlines()
    assert sentence.startswith("On digits")
    assert path == str(runs / "report.html")
    outline = Outline((runs / "report.html").read_text())
    assert any("going_on" in text for text in outline.texts("li"))
    with (tmp_path / "tables" / "leaderboard.csv").open() as file:
        assert [row["strategy"] for row in csv.DictReader(file)] == ["fedper", "fedrep", "local", "fedavg"]
    assert sentence in (tmp_path / "t.md").read_text().replace("\\", "")
    written = (tmp_path / "a" / "table.tex").read_text()
    assert written.count(r" \\") == 1 + len(GAINS)
    assert run_command(runs, "--out", tmp_path / "new" / "page.html") == 0
    assert (tmp_path / "new" / "page.html").exists()


def test_pictures_compare_with_the_row_that_the_table_compares_with(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path / f"local{seed}", "local", seed)
        write_run(tmp_path / f"fedper{seed}", "fedper", seed)
    write_run(tmp_path / "best", "local", 7, level=0.9, config={"training": {"lr": 0.9}})
    text = report(tmp_path)
    assert "Local has 2 rows; the others are compared with the best of those that have at least 3 seeds" in text
    assert "FedPer against Local" in text  # of seeds in common


def test_two_seeds_have_no_intervals_to_speak_of(tmp_path: Path) -> None:
    assert "confidence intervals" not in report(write_sweep(tmp_path / "two", seeds=2))
    assert "confidence intervals" in report(write_sweep(tmp_path / "three", seeds=3))


def test_latex_names_what_was_interrupted(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "fedper", interrupted=True)
    write_run(tmp_path / "b", "fedavg")
    assert "FedPer (interrupted)" in latex(leaderboard(find_runs([tmp_path])))


def test_latex_escapes(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "fedper", options={"note": "50%_&{}"})
    write_run(tmp_path / "b", "fedper", options={"note": "a\\b"})
    text = latex(leaderboard(find_runs([tmp_path])))
    assert r"note=50\%\_\&\{\}" in text
    assert r"note=a\textbackslash{}b" in text
    first, _, tables = text.partition("\n")
    assert first == r"% needs \usepackage{booktabs}"
    assert not re.search(r"(?<!\\)[%&#_](?![^\n]*\\\\$)", tables.replace(" & ", " "))


def test_latex_marks_the_best_score_and_writes_minus_signs(tmp_path: Path) -> None:
    text = latex(leaderboard(find_runs([write_sweep(tmp_path / "runs", ("local", "fedavg", "fedrep"), seeds=3)])))
    (best,) = [line for line in text.splitlines() if "textbf" in line]
    cells = best.split(" & ")
    assert [r"\textbf" in cell for cell in cells] == [True, True, *[False] * (len(cells) - 2)]
    assert re.search(r"(worse|undecided) \$-\$\d", text)
    assert not re.search(r" -\d", text)


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    runs = write_sweep(tmp_path / "runs", ("local",), seeds=1)
    with pytest.raises(ConfigError, match=r"--out.*a file, not a folder"):
        run_command(runs, "--out", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FedpersError, match=r"file/page\.html cannot be written"):
        run_command(runs, "--out", tmp_path / "file" / "page.html")
    with pytest.raises(FedpersError, match=r"leaderboard\.csv cannot be written"):
        run_command(runs, "--csv", tmp_path / "file")
    assert _main(["report", str(runs), f"--out={tmp_path}"]) == 2


def test_folders_without_runs(tmp_path: Path) -> None:
    with pytest.raises(FedpersError, match="no finished run was found"):
        run_command(tmp_path)
    with pytest.raises(FedpersError, match="no finished run was found"):
        run_command(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


CHECK = """
<script>
addEventListener("load", () => {
  const frame = document.querySelector("iframe"), inside = frame.contentDocument;
  const rows = () => [...inside.querySelectorAll("table.board tbody tr")];
  const column = place => rows().map(row => row.cells[place].dataset.value);
  const buttons = inside.querySelectorAll("table.board thead button");
  const before = column(1);
  buttons[1].click();
  const after = column(1);
  buttons[0].click();
  document.title = JSON.stringify({
    overflow: inside.documentElement.scrollWidth - inside.documentElement.clientWidth,
    before, after, names: column(0), small: [...inside.querySelectorAll("svg.figure text")].map(
      text => text.getBoundingClientRect().height).filter(height => height < 9).length,
  });
});
</script>
"""


@pytest.mark.slow
def test_in_a_browser(tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:  # none of the packages brings one; what the page holds is tested above without
        pytest.skip("no chromium is installed")
    text = report(write_sweep(tmp_path / "runs", seeds=2))
    check = tmp_path / "check.html"
    frame = f'<iframe style="width: 390px; height: 800px; border: 0" srcdoc="{escape(text)}"></iframe>'
    check.write_text(f"<!DOCTYPE html><title>none</title>{frame}{CHECK}")
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
                 f"--user-data-dir={tmp_path}/profile",
                                 "--virtual-time-budget=10000", "--dump-dom", check.as_uri()]  # fmt: skip
    done = subprocess.run([browser, *arguments], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title is not None
    seen = json.loads(title[1].replace("&amp;", "&"))
    assert seen["overflow"] == 0
    assert seen["before"] == seen["after"][::-1]
    assert len(seen["before"]) == len(GAINS)
    assert seen["names"] == sorted(seen["names"])
    assert seen["small"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "titles", "absent"),
    [
        (["strategy=fedper"], ["Who owns what", "Clients from worst to best", "Test accuracy and unusual clients"], []),
        (["strategy=fedmf"], ["Test hr@10 over rounds"], ["Who owns what", "Clients from worst to best"]),
    ],
)
def test_real_runs(tmp_path: Path, settings: list[str], titles: list[str], absent: list[str]) -> None:
    assert _main([*settings, "rounds=2", "runtime.workers=1", f"output={tmp_path}"]) == 0
    (clients,) = tmp_path.rglob("clients.parquet")
    rows = pd.read_parquet(clients)
    labels = [column for column in rows if column.startswith("class ")]
    if labels:
        assert (rows[labels].sum(axis=1) == rows[["train_size", "validation_size", "test_size"]].sum(axis=1)).all()
        assert rows["divergence"].between(0, 1).all()
    assert run_command(tmp_path) == 0
    shown = Outline((tmp_path / "report.html").read_text()).texts("h4")
    assert set(titles) <= set(shown)
    assert not set(absent) & set(shown)


@pytest.mark.slow
def test_help_stays_light(tmp_path: Path) -> None:
    code = "import sys; from fedpers.app import _main; _main(['--help']); sys.exit('jinja2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "fedpers report FOLDER" in done.stdout
