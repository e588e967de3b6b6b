"""``fedpers compare``: the leaderboard of the runs in folders."""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedpers.errors import FedpersError
from fedpers.evaluation.leaderboard import leaderboard, leaderboard_rows
from fedpers.evaluation.pivot import pivots
from fedpers.evaluation.runs import RunRecord, find_runs
from fedpers.evaluation.tables import (
    check_keys,
    markdown,
    pivot_markdown,
    print_leaderboard,
    print_pivots,
    write_csv,
)

if TYPE_CHECKING:
    from rich.console import Console


def command(arguments: list[str]) -> int:
    """Print the leaderboard of the runs in folders."""
    parser = argparse.ArgumentParser(prog="fedpers compare", description="Leaderboard of the runs found in folders.")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="run folders, or folders above them")
    parser.add_argument("--columns", metavar="A,B", help="columns to show after the method, e.g. score,vs_local,sent")
    parser.add_argument("--sort", metavar="COLUMN", default="score", help="column to sort by, the best first")
    parser.add_argument("--pivot", metavar="KEY", help="methods by the values of a swept setting, as partition.alpha")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    form.add_argument("--csv", action="store_true", help="print all rows and numbers as CSV")
    form.add_argument("--json", action="store_true", help="print all rows and numbers as JSON")
    parser.add_argument("--svg", metavar="FILE", type=Path, help="also draw the tables into a picture")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    runs = find_runs(options.folders)
    if not runs:
        raise FedpersError(f"no finished run was found in {', '.join(options.folders)}.")
    if options.pivot:
        return _pivot(options, runs)
    shown_only = {"--columns": options.columns is not None, "--sort": options.sort != "score"}
    for name in [name for name, used in shown_only.items() if used and (options.csv or options.json)]:
        raise FedpersError(
            f"{name} cannot be combined with --{'csv' if options.csv else 'json'}, which has all columns."
        )
    groups = leaderboard(runs)
    keys = None if options.columns is None else [key.strip() for key in options.columns.split(",")]
    check_keys(groups, "--columns", keys or ())
    check_keys(groups, "--sort", (options.sort,))
    if options.json:
        print(json.dumps(leaderboard_rows(groups), indent=1))
    elif options.csv:
        write_csv(groups, sys.stdout)
    elif options.markdown:
        print(markdown(groups, keys, options.sort), end="")
    else:
        print_leaderboard(groups, keys=keys, sort=options.sort)
    if options.svg:
        _draw(options.svg, lambda console: print_leaderboard(groups, console, keys, options.sort))
    return 0


def _pivot(options: argparse.Namespace, runs: Sequence[RunRecord]) -> int:
    """Print methods by the values of a setting."""
    given = {"--columns": options.columns is not None, "--sort": options.sort != "score"}
    for name, used in (given | {"--csv": options.csv, "--json": options.json}).items():
        if used:
            raise FedpersError(f"{name} cannot be combined with --pivot={options.pivot}, which has columns of its own.")
    tables = pivots(runs, options.pivot)
    if options.markdown:
        print(pivot_markdown(tables), end="")
    else:
        print_pivots(tables)
    if options.svg:
        _draw(options.svg, lambda console: print_pivots(tables, console))
    return 0


def _draw(path: Path, show: Callable[[Console], None]) -> None:
    """Write what is shown on a terminal as a picture."""
    from rich.console import Console

    if path.suffix.lower() != ".svg":
        raise FedpersError(f"{path} cannot be written: expected a file that ends in .svg.")
    picture = Console(record=True, width=100, file=io.StringIO())
    show(picture)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save_svg(str(path), title="fedpers compare")
    except OSError as error:
        raise FedpersError(f"{path} cannot be written ({error.strerror}).") from error
