"""``fedpers report``: the runs in folders as one page of HTML, and their leaderboard as files."""

from __future__ import annotations

import argparse
import io
import logging
from pathlib import Path

from fedpers.errors import ConfigError, FedpersError
from fedpers.evaluation.leaderboard import leaderboard
from fedpers.evaluation.runs import find_runs
from fedpers.evaluation.tables import markdown, write_csv


class _Collected(logging.Handler):
    """Keeps what is said of folders that cannot be used."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one message."""
        self.messages.append(record.getMessage())


def command(arguments: list[str]) -> int:
    """Write the report of the runs in folders."""
    parser = argparse.ArgumentParser(
        prog="fedpers report", description="One page of HTML on the runs found in folders, to be opened offline."
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="run folders, or folders above them")
    parser.add_argument("--out", metavar="FILE", type=Path, help="the page (default: report.html in the first folder)")
    parser.add_argument("--csv", metavar="DIR", type=Path, help="also write leaderboard.csv there, all rows")
    parser.add_argument("--latex", metavar="FILE", type=Path, help="also write the leaderboard as LaTeX")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="also write the leaderboard as Markdown")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    first = next((folder for folder in options.folders if Path(folder).is_dir()), options.folders[0])
    out = options.out or Path(first) / "report.html"
    if out.is_dir():
        raise ConfigError("--out", out, "a file, not a folder")
    collected = _Collected()
    reader = logging.getLogger("fedpers.evaluation.runs")
    reader.addHandler(collected)
    try:
        runs = find_runs(options.folders)
    finally:
        reader.removeHandler(collected)
    if not runs:
        raise FedpersError(f"no finished run was found in {', '.join(options.folders)}.")
    groups = leaderboard(runs)

    from fedpers.evaluation.report.latex import latex
    from fedpers.evaluation.report.page import page

    files = {out: page(groups, runs, collected.messages)}
    if options.csv is not None:
        table = io.StringIO(newline="")
        write_csv(groups, table)
        files[options.csv / "leaderboard.csv"] = table.getvalue()
    if options.latex is not None:
        files[options.latex] = latex(groups)
    if options.markdown is not None:
        files[options.markdown] = markdown(groups)
    for path, text in files.items():
        _write(path, text)
    for group in groups:
        print(group.sentence)
    print(out)
    return 0


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise FedpersError(f"{path} cannot be written ({error.strerror or error}).") from error
