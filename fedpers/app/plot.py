"""``fedpers plot``: pictures of one run."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedpers.evaluation.plots import plot_run


def command(arguments: list[str]) -> int:
    """Draw one run."""
    parser = argparse.ArgumentParser(prog="fedpers plot", description="Curves of one run, and growth of its masks.")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="run folder, or a folder above a single run")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="picture to write: .svg, .png, .pdf")
    options = parser.parse_args(arguments)
    plot_run(options.folder, options.out)
    print(options.out)
    return 0
