"""Leaderboards as tables on a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fedpers.evaluation.leaderboard import Row, leaderboard, one_seed
from fedpers.evaluation.runs import RunRecord


def print_leaderboard(runs: Sequence[RunRecord], console: Console | None = None) -> None:
    """Print one table per group of comparable runs, best method first.

    Parameters
    ----------
    runs : sequence of RunRecord
    console : rich.console.Console, optional
        Where to print; standard output if not given.
    """
    console = console or Console()
    if not runs:
        console.print("No finished runs found.")
    for group in leaderboard(runs):
        console.print(Text(group.title, style="bold"))
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("method", overflow="fold", min_width=16)
        table.add_column("")
        further = [label for _, label in group.also]
        spread = ("std", "worst") if group.spread else ()
        for name in (f"{group.headline} %", *further, *spread, "last", "MB", "kgrad", "s", "n"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in group.rows:
            interval = "" if math.isnan(row.interval) else f" ±{100 * row.interval:.1f}"
            table.add_row(
                Text(f"{row.method} (baseline)" if row.baseline else row.method),
                _marks(row, one_seed(group.rows)),
                f"{_percent(row.score)}{interval}",
                *(_percent(_shown(row, key)) for key, _ in group.also),
                *(_percent(value) for value in (row.std, row.worst_decile) if group.spread),
                _percent(row.last),
                _short(row.megabytes),
                _short(row.gradients / 1000),
                _short(row.seconds),
                str(len(row.seeds)),
                style="bold" if row.best else "dim" if row.baseline else "",
            )
        # a terminal too narrow for the numbers wraps whole lines rather than losing names and digits
        needed = Measurement.get(console, console.options.update(max_width=1000), table).minimum
        if needed > console.width:
            table.width = needed
        console.print(table, crop=False)
        for note in group.notes:
            console.print(Text(note, style="dim"))
        console.print()


def _shown(row: Row, key: str) -> float:
    """A further metric at the selected round; adaptation is measured at the end only, whichever round was selected."""
    return (row.at_end if key.startswith("adapted/") else row.selected).get(key, math.nan)


def _marks(row: Row, single: bool) -> str:
    """Give the marks that the notes explain; with a `single` seed in all rows one note says what `?` would."""
    untested = row.significant is None and not row.best and not single
    return ("~" if row.significant is False else "?" if untested else "") + ("!" if row.interrupted else "")


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def _short(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}" if value < 100 else f"{value:,.0f}"
