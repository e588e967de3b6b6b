"""``fedpers compare`` as typed."""

from __future__ import annotations

import csv
import io
import json

import pytest

from fedpers.app import _main
from fedpers.evaluation.leaderboard import leaderboard
from fedpers.evaluation.pivot import pivots
from fedpers.evaluation.runs import find_runs
from fedpers.evaluation.tables import _amount, _time
from tests.evaluation.report_runs import write_run


@pytest.fixture
def table(write, tmp_path):
    """Three methods over three seeds."""
    table = {"fedrep": (0.90, 0.91, 0.92), "local": (0.80, 0.82, 0.81), "fedavg": (0.60, 0.61, 0.61)}
    sent = {"fedrep": 3_000_000, "local": 0, "fedavg": 1_500_000}
    for strategy, scores in table.items():
        for seed, score in enumerate(scores):
            write(strategy, seed, score, bytes_up=sent[strategy], bytes_down=0)
    return tmp_path


@pytest.fixture
def compare(capsys, monkeypatch):
    """Run the command on a terminal of some width, and give what it prints."""

    def compare(*arguments, width=80, code=0):
        monkeypatch.setenv("COLUMNS", str(width))
        assert _main(["compare", *map(str, arguments)]) == code
        written = capsys.readouterr()
        return written.err if code else written.out

    return compare


def test_the_sentence_comes_first_and_columns_say_what_they_mean(table, compare):
    lines = compare(table).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "digits · dirichlet(alpha=0.1) · mlp · 20 clients · 50 rounds"
    assert lines[1].startswith("On digits (dirichlet(alpha=0.1), 20 clients), FedRep beats Local and FedAvg;")
    (head,) = [line for line in lines if line.startswith(" method")]
    assert head.split() == ["method", "accuracy", "%", "vs", "Local", "vs", "FedAvg", "tenth", "%"]
    cells = [line.split() for line in lines if line.startswith((" FedRep", " Local", " FedAvg"))]
    assert cells == [
        ["FedRep", "91.0", "±2.5", "better", "+10.0", "±2.5", "better", "+30.3", "±1.4", "66.0"],
        ["Local", "81.0", "±2.5", "reference", "better", "+20.3", "±1.4", "56.0"],
        ["FedAvg", "60.7", "±1.4", "worse", "-20.3", "±1.4", "reference", "35.7"],
    ]
    assert lines[-2] == "More columns (--columns): seeds, std, last, sent, gradients, time."


def test_columns_and_their_order_are_chosen(table, compare):
    text = compare(table, "--columns", "sent,score", "--sort", "sent")
    rows = [line.split() for line in text.splitlines() if line.startswith((" FedRep", " Local", " FedAvg"))]
    assert rows == [
        ["Local", "0", "B", "81.0", "±2.5"],
        ["FedAvg", "1.50", "MB", "60.7", "±1.4"],
        ["FedRep", "3.00", "MB", "91.0", "±2.5"],
    ]
    assert "More columns" not in text
    by_difference = compare(table, "--sort=vs_local").splitlines()
    assert [line.split()[0] for line in by_difference if line.startswith((" FedRep", " Local", " FedAvg"))] == [
        "FedRep", "FedAvg", "Local",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--columns", "score,worse"], "--columns=worse: expected one of"),
        (["--columns", ""], "--columns=: expected one of"),
        (["--sort", "tine"], "(did you mean 'time'?)"),
        (["--pivot", "partition.alpha", "--json"], "--json cannot be combined with --pivot=partition.alpha"),
        (["--pivot", "partition.alpha", "--sort", "time"], "--sort cannot be combined"),
        (["--json", "--columns", "score"], "--columns cannot be combined with --json, which has all columns."),
        (["--csv", "--sort", "time"], "--sort cannot be combined with --csv, which has all columns."),
        (["--pivot", "partition.beta"], "--pivot=partition.beta: expected"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_sentence(table, compare, arguments, sentence):
    error = compare(table, *arguments, code=2)
    assert sentence in error
    assert error.startswith("fedpers: ")
    assert error.count("\n") == 1


def test_markdown(table, compare):
    lines = compare(table, "--markdown", "--columns", "score,vs_local").splitlines()
    assert lines[0] == "**digits · dirichlet(alpha=0.1) · mlp · 20 clients · 50 rounds**"
    assert "| method | accuracy % | vs Local |" in lines
    assert "|---|---:|---:|" in lines
    assert "| FedRep | 91.0 ±2.5 | better +10.0 ±2.5 |" in lines


def test_markup_in_names_stays_text(write, tmp_path, compare):
    names = ["[red]x|y", "<b>*z*</b>"]
    for name in names:
        write("ditto", 0, 0.9, options={"groups": name}, dataset="[bold]|data")
    text = compare(tmp_path, width=120)
    for name in names:
        assert f"Ditto groups={name}" in text
    assert "[bold]|data" in text
    marked = compare(tmp_path, "--markdown")
    assert "| Ditto groups=\\[red\\]x\\|y |" in marked
    assert "\\<b\\>\\*z\\*\\</b\\>" in marked


def test_csv_and_json_have_all_numbers(table, compare):
    rows = list(csv.DictReader(io.StringIO(compare(table, "--csv"))))
    assert [row["method"] for row in rows] == ["fedrep", "local", "fedavg"]
    assert float(rows[0]["vs_local_difference"]) == pytest.approx(0.1)
    assert rows[0]["vs_local_verdict"] == "better"
    assert rows[1]["vs_local_difference"] == ""
    assert rows[0]["seeds"] == "0 1 2"
    assert float(rows[0]["gradients"]) == 34_500
    parsed = json.loads(compare(table, "--json"))
    assert parsed[0]["comparisons"][0]["p_value"] == pytest.approx(float(rows[0]["vs_local_p_value"]))


def test_csv_has_the_mean_over_samples_too(tmp_path, compare):
    write_run(tmp_path / "run")
    (row,) = csv.DictReader(io.StringIO(compare(tmp_path, "--csv")))
    metrics = json.loads((tmp_path / "run" / "summary.json").read_text())["selected"]
    assert float(row["weighted"]) == metrics["test/accuracy_weighted"] != float(row["score"])


def test_svg(table, tmp_path, compare):
    compare(table, "--svg", tmp_path / "table.svg")
    assert "FedRep" in (tmp_path / "table.svg").read_text()
    compare(table, "--svg", tmp_path / "new" / "table.svg")
    assert (tmp_path / "new" / "table.svg").exists()
    (tmp_path / "file").write_text("")
    assert "cannot be written" in compare(table, "--svg", tmp_path / "file" / "table.svg", code=2)
    assert "c.png cannot be written: expected a file that ends in .svg." in compare(table, "--svg", "c.png", code=2)


def test_runs_of_other_data_stand_in_tables_of_their_own(write, tmp_path, compare):
    def of_data(checksum: str, *runs: tuple[str, int, float]) -> None:
        for strategy, seed, score in runs:
            folder = write(strategy, seed, score, config={"dataset": {"name": "mine:load"}})
            (folder / "manifest.json").write_text(json.dumps({"data": {"checksum": f"{checksum}{seed}"}}))

    of_data("aaaa", ("local", 0, 0.5), ("local", 1, 0.5), ("fedavg", 0, 0.6), ("fedavg", 1, 0.6))
    of_data("bbbb", ("fedper", 0, 0.9), ("fedper", 1, 0.9))
    text = compare(tmp_path, "--markdown")
    titles = [line for line in text.splitlines() if " · data " in line and "clients" in line]
    assert [title.rpartition(" · data ")[2].strip("* ") for title in titles] == ["aaaa0", "bbbb0"]
    assert text.count("Runs of the same settings and seed saw other data") == 2
    assert "FedPer beats" not in text


def test_tables_of_different_data_or_splits_are_named_by_what_differs(write, tmp_path, compare):
    for share in (0.1, 0.2):
        write("fedrep", 0, 0.9, config={"split": {"name": "fractions", "test": share}})
    titles = [line for line in compare(tmp_path).splitlines() if line.startswith("digits")]
    assert [title.rpartition(" · ")[2] for title in titles] == ["split.test=0.1", "split.test=0.2"]


def sweep(write):
    for alpha in (10, 0.1, 1):
        for strategy, scores in (
            ("fedrep", (0.90, 0.91, 0.92)), ("local", (0.80, 0.82, 0.81)), ("fedavg", (0.70, 0.71, 0.71)),
        ):  # fmt: skip
            for seed, score in enumerate(scores):
                if (strategy, alpha) != ("fedavg", 10):
                    config = {"partition": {"name": "dirichlet", "alpha": alpha}}
                    found = f"dirichlet(alpha={alpha})"
                    write(strategy, seed, score - alpha / 50, config=config, partition=found)


def test_a_sweep_is_one_table(write, tmp_path, compare):
    sweep(write)
    text = compare(tmp_path, "--pivot", "partition.alpha")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "digits · dirichlet · mlp · 20 clients · 50 rounds: accuracy % by partition.alpha"
    table = [line.split() for line in lines if line.startswith((" method", " FedRep", " Local", " FedAvg"))]
    assert table == [
        ["method", "0.1", "1", "10"],
        ["FedRep", "90.8", "±2.5", "89.0", "±2.5", "71.0", "±2.5"],
        ["Local", "80.8", "±2.5", "79.0", "±2.5", "61.0", "±2.5"],
        ["FedAvg", "70.5", "±1.4", "68.7", "±1.4", "-"],
    ]
    assert "\n0.1: FedRep beats Local and FedAvg; Local beats FedAvg (3 seeds).\n" in text
    marked = compare(tmp_path, "--pivot", "partition.alpha", "--markdown")
    assert "| FedRep | 90.8 ±2.5 | 89.0 ±2.5 | 71.0 ±2.5 |" in marked
    narrow = compare(tmp_path, "--pivot", "partition.alpha", width=42)
    assert narrow.count(" method ") > 1  # columns that find no room follow below
    for cell in ("90.8 ±2.5", "89.0 ±2.5", "71.0 ±2.5"):
        assert cell in narrow


def test_a_pivot_over_a_group_names_its_choices(write, tmp_path):
    for values in ({"name": "dirichlet", "alpha": 0.1}, {"name": "dirichlet", "alpha": 1.0}, {"name": "iid"}):
        write("fedrep", 0, 0.9, config={"partition": values}, partition=values["name"])
    (pivot,) = pivots(find_runs([tmp_path]), "partition")
    assert list(pivot.groups) == ["dirichlet alpha=0.1", "dirichlet alpha=1.0", "iid"]
    assert pivot.title == "digits · mlp · 20 clients · 50 rounds"
    assert list(pivot.rows) == ["FedRep"]


def test_a_pivot_over_an_option_of_one_method(write, tmp_path):
    for mu in (1.0, 0.1):
        write("ditto", 0, 0.9 - mu / 10, options={"mu": mu})
    write("fedavg", 0, 0.5)
    (pivot,) = pivots(find_runs([tmp_path]), "strategy.mu")
    scores = {label: {value: row.score for value, row in rows.items()} for label, rows in pivot.rows.items()}
    assert scores == {"Ditto": {"0.1": pytest.approx(0.89), "1.0": 0.8}, "FedAvg": {"not set": 0.5}}


def test_other_settings_that_differ_part_pivots(write, tmp_path):
    for rounds, alpha in ((5, 0.1), (5, 1.0), (9, 0.1)):
        config = {"partition": {"name": "dirichlet", "alpha": alpha}, "rounds": rounds}
        write("fedrep", 0, 0.9, config=config)
    made = pivots(find_runs([tmp_path]), "partition.alpha")
    assert [list(pivot.groups) for pivot in made] == [["0.1", "1.0"], ["0.1"]]
    assert [pivot.title.rpartition(" · ")[2] for pivot in made] == ["rounds=5", "rounds=9"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (34_500, "34.5 k"), (999_499, "999 k"), (999_700, "1.00 M")],
)
def test_amounts(value, text):
    assert _amount(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.34, "0.3 s"), (12, "12 s"), (100, "2 min"), (86_400, "24.0 h")])
def test_times(seconds, text):
    assert _time(seconds) == text


@pytest.mark.slow
def test_ten_thousand_runs_are_grouped_in_seconds(write, tmp_path):
    import dataclasses
    import time

    write("fedrep", 0, 0.9)
    (run,) = find_runs([tmp_path])
    runs = []
    for i in range(10_000):
        table, rest = divmod(i, 100)
        strategy, seed = divmod(rest, 5)
        name = ("local", "fedavg", *(f"m{j}" for j in range(18)))[strategy]
        config = run.config | {"split": {"name": "fractions", "test": 0.1 + table / 1000}, "strategy": {"name": name}}
        summary = run.summary | {
            "strategy": name, "seed": seed, "selected": {"test/accuracy": (i * 7919 % 1000) / 1000},
        }  # fmt: skip
        runs.append(dataclasses.replace(run, config=config, summary=summary))
    start = time.process_time()
    groups = leaderboard(runs)
    assert time.process_time() - start < 20
    assert [len(group.rows) for group in groups] == [20] * 100
    assert len({group.title for group in groups}) == 100
