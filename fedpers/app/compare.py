"""``fedpers compare``: the leaderboard of the runs in folders."""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
from pathlib import Path

from fedpers.errors import FedpersError
from fedpers.evaluation.leaderboard import leaderboard, leaderboard_rows
from fedpers.evaluation.runs import find_runs
from fedpers.evaluation.tables import check_keys, markdown, print_leaderboard, write_csv


def command(arguments: list[str]) -> int:
    """Print the leaderboard of the runs in folders."""
    parser = argparse.ArgumentParser(prog="fedpers compare", description="Leaderboard of the runs found in folders.")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="run folders, or folders above them")
    parser.add_argument("--columns", metavar="A,B", help="columns to show after the method, e.g. score,vs_local,sent")
    parser.add_argument("--sort", metavar="COLUMN", default="score", help="column to sort by, the best first")
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
        from rich.console import Console

        picture = Console(record=True, width=100, file=io.StringIO())
        print_leaderboard(groups, picture, keys, options.sort)
        try:
            picture.save_svg(str(options.svg), title="fedpers compare")
        except OSError as error:
            raise FedpersError(f"{options.svg} cannot be written ({error.strerror}).") from error
    return 0
