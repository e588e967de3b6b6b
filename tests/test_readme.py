"""What README and documentation say works as it stands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from flwr.serverapp import ServerApp
from nbclient import NotebookClient

import fedpers
from fedpers.app import _main
from fedpers.strategies import STRATEGIES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def page(name: str) -> str:
    """Text of a page of the documentation."""
    return (ROOT / "docs" / f"{name}.md").read_text()


def test_results_name_no_folder_of_a_machine() -> None:
    files = sorted((ROOT / "experiments").rglob("*.json"))
    assert len(files) > 10
    assert not [(file.name, path) for file in files for path in re.findall(r'"(/[^"]+)"', file.read_text())]


def python_blocks(text: str) -> list[str]:
    """Code in a text."""
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_a_strategy_in_ones_own_flower_app(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(python_blocks(page("flower"))[0], "flower.md", "exec"), {})
    accuracy = float(capsys.readouterr().out.strip())
    assert 0.5 < accuracy <= 1


@pytest.mark.slow
def test_flowers_tools_around_the_two_halves(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(compile("\n".join(python_blocks(page("flower"))), "page.md", "exec"), names)
    assert names["client_app"].mods
    for strategy, clients in (("robust", "client_app"), ("private", "client_app"), ("small", "small_app")):
        app = ServerApp()

        @app.main()
        def main(grid: Any, context: Any, strategy: Any = names[strategy], clients: Any = names[clients]) -> None:
            result = strategy.start(grid, clients.initial_arrays(), num_rounds=1)
            print(result.evaluate_metrics_clientapp[1]["test-accuracy"])

        fedpers.simulate(app, names[clients], num_supernodes=10)
    printed = [float(line) for line in capsys.readouterr().out.split()]
    assert len(printed) == 4
    assert all(0 < accuracy <= 1 for accuracy in printed)


@pytest.mark.slow
def test_a_new_method_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "mine.py").write_text(python_blocks(page("new_method"))[0])
    commands = re.findall(
        r"^fedpers (strategy(?:\.name)?=mine:.*?)\s*(?:#.*)?$", page("new_method"), flags=re.MULTILINE
    )
    assert len(commands) == 2
    clients, small = [], ["rounds=2", "partition.num_clients=5"]
    for number, command in enumerate(commands):
        runs = tmp_path / str(number)
        assert _main([*command.split(), *small, f"output={runs}"]) == 0
        (summary,) = runs.rglob("summary.json")
        assert json.loads(summary.read_text())["rounds_done"] == 2
        clients.append(summary.with_name("clients.parquet").read_bytes())
    assert clients[0] == clients[1]
    del sys.modules["mine"]


def test_own_data_in_a_call() -> None:
    names: dict[str, Any] = {}
    exec(compile(python_blocks(page("data"))[0], "page.md", "exec"), names)
    assert names["data"].client_names == ("Kiel", "Ulm")


@pytest.mark.slow
def test_own_data_and_network_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "hospitals.py").write_text(python_blocks(page("data"))[1])
    (command,) = re.findall(r"^fedpers (dataset=hospitals:.*?)$", page("data"), flags=re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-m", "fedpers", *command.split(), "rounds=2", f"output={tmp_path / 'runs'}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (clients,) = (tmp_path / "runs").rglob("clients.parquet")
    assert list(pd.read_parquet(clients)["name"]) == ["Kiel", "Ulm", "Bonn"]


def test_every_method_stands_in_the_table() -> None:
    assert set(re.findall(r"^\| `(\w+)`(?: \(.*?\))? \|", page("methods"), flags=re.MULTILINE)) == set(STRATEGIES)


def test_every_link_to_a_file_leads_somewhere() -> None:
    for path in PAGES:
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", path.read_text()):
            linked = path.parent / target if target else path
            assert linked.exists(), (path.name, target)
            if anchor:
                titles = re.findall(r"^#+ (.*)$", linked.read_text(), flags=re.MULTILINE)
                anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
                assert anchor in anchors, (path.name, target, anchor)


def test_the_readme_shows_the_app_of_the_documentation() -> None:
    assert python_blocks((ROOT / "README.md").read_text()) == python_blocks(page("flower"))[:1]


SMALLER = {
    "seed=0,1,2": "seed=0,1",
    "rounds=10": "rounds=4 runtime.clients_at_once=10",
    "rounds=12": "rounds=3 runtime.clients_at_once=20",
    "num_clients=40": "num_clients=20",
}
"""Sizes of runs in notebooks, and those with which they are tested; no cohort size is sought."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("quickstart", ["vs FedAvg", "image/png"]),
        ("own_data", ["vs FedAvg", "Kiel"]),
        ("own_method", ["strategy.mu", "vs FedAvg", "mu=1.0"]),
        ("flower_app", ["FedPer", "image/png"]),
        ("paper_figures", ["vs FedAvg", "image/png", "tabular"]),
    ],
)
def test_a_notebook_runs(name: str, shown: list[str], tmp_path: Path) -> None:
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        for size, smaller in SMALLER.items():
            cell.source = cell.source.replace(size, smaller)
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    for words in shown:
        assert words in text
    assert "Traceback" not in text


def test_the_notebook_on_own_data_has_the_code_of_the_readme() -> None:
    notebook = nbformat.read(ROOT / "notebooks" / "own_data.ipynb", as_version=4)
    code = [str(cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    assert f"%%writefile hospitals.py\n{python_blocks(page('data'))[1].strip()}" in code
    (settings,) = re.findall(r"^fedpers (dataset=hospitals:.*) strategy=\w+$", page("data"), flags=re.MULTILINE)
    assert any(settings in cell for cell in code)


def test_the_notebook_on_a_method_has_the_code_of_the_documentation() -> None:
    notebook = nbformat.read(ROOT / "notebooks" / "own_method.ipynb", as_version=4)
    code = [str(cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    assert "%%writefile mine.py\n" + python_blocks(page("new_method"))[0].strip() in code


@pytest.mark.slow
def test_the_documentation_is_built_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "docs", ".", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert "Reading results" in (tmp_path / "docs" / "index.html").read_text()


@pytest.mark.slow
def test_a_wheel_brings_its_configuration(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(tmp_path / "site")], check=True)
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import fedpers.settings.groups as c;"
        "print(c.conf_folder()); from fedpers.app import main; main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site"), "rounds=1", f"output={tmp_path / 'runs'}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(tmp_path / "site" / "fedpers" / "conf")
    assert list((tmp_path / "runs").rglob("summary.json"))
