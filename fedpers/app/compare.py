"""``fedpers compare``: the leaderboard of the runs in folders."""

from __future__ import annotations

import argparse
import io
import json
import logging
from pathlib import Path

from fedpers.errors import FedpersError
from fedpers.evaluation.leaderboard import leaderboard_rows
from fedpers.evaluation.runs import find_runs
from fedpers.evaluation.tables import print_leaderboard


def command(arguments: list[str]) -> int:
    """Print the leaderboard of the runs in folders."""
    parser = argparse.ArgumentParser(prog="fedpers compare", description="Leaderboard of the runs found in folders.")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="run folders, or folders above them")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--svg", metavar="FILE", type=Path, help="also draw the tables into a picture")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    runs = find_runs(options.folders)
    if not runs:
        raise FedpersError(f"no finished run was found in {', '.join(options.folders)}.")
    if options.json:
        print(json.dumps(leaderboard_rows(runs), indent=1))
    else:
        print_leaderboard(runs)
    if options.svg:
        from rich.console import Console

        picture = Console(record=True, width=100, file=io.StringIO())
        print_leaderboard(runs, picture)
        try:
            picture.save_svg(str(options.svg), title="fedpers compare")
        except OSError as error:
            raise FedpersError(f"{options.svg} cannot be written ({error.strerror}).") from error
    return 0
