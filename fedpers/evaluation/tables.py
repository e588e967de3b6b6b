"""Leaderboards as tables: on a terminal, in Markdown, as CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any, Literal

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fedpers.errors import ConfigError, one_of
from fedpers.evaluation.leaderboard import Group, Row
from fedpers.evaluation.pivot import Pivot
from fedpers.evaluation.statistics import Comparison
from fedpers.evaluation.wording import ranks_over_tables
from fedpers.settings.groups import method_title


@dataclass(frozen=True)
class Column:
    """One column of a leaderboard.

    Parameters
    ----------
    key : str
        What ``--columns`` and ``--sort`` call it.
    title : str
        Its heading, in which a line break is allowed.
    cell : callable
        Text of a row.
    value : callable
        Number of a row by which it is sorted; NaN comes last.
    order : {1, -1}
        1: less is better and comes first.
    """

    key: str
    title: str
    cell: Callable[[Row], str]
    value: Callable[[Row], float]
    order: Literal[1, -1] = 1


def columns(group: Group) -> list[Column]:
    """All columns of a group after the method, the most important first."""
    name = group.headline
    chosen = [Column("score", f"{_spelled(name)} %", _score, lambda row: row.score, -1)]
    chosen += [_against(reference) for reference in group.references]
    chosen += [_metric(key, label) for key, label in group.also]
    if any(not math.isnan(row.epsilon) for row in group.rows):
        chosen.append(Column("epsilon", "epsilon", lambda row: _plain(row.epsilon, "{:.3g}"), lambda row: row.epsilon))
    seeds = Column("seeds", "seeds", lambda row: str(len(row.seeds)), lambda row: len(row.seeds), -1)
    unequal = len({len(row.seeds) for row in group.rows}) > 1  # which the sentence does not say of each
    chosen += [seeds] if unequal else []
    if group.spread:
        worst = "worst\ntenth %"
        chosen.append(Column("worst", worst, lambda row: percent(row.worst_decile), lambda row: row.worst_decile, -1))
    chosen += [] if unequal else [seeds]
    if group.spread:
        chosen.append(Column("std", "std over\nclients", lambda row: percent(row.std), lambda row: row.std))
    costs = [
        Column("sent", "sent", lambda row: _amount(1e6 * row.megabytes, "B"), lambda row: row.megabytes),
        Column("gradients", "gradients", lambda row: _amount(row.gradients), lambda row: row.gradients),
        Column("time", "time", lambda row: _time(row.seconds), lambda row: row.seconds),
    ]
    if any(not math.isnan(row.simulated_seconds) for row in group.rows):
        clock = Column(
            "simulated", "simulated\ntime", lambda r: _time(r.simulated_seconds), lambda r: r.simulated_seconds
        )
        costs.insert(0, clock)
    return [
        *chosen,
        Column("last", "last\nround %", lambda row: percent(row.last), lambda row: row.last, -1),
        *costs,
    ]


def chosen_columns(group: Group, keys: Sequence[str] | None) -> list[Column]:
    """The columns with these keys, in this order; all that a group has for None.

    Keys that this group lacks are left out; :func:`check_keys` refuses those that no group has.
    """
    available = {column.key: column for column in columns(group)}
    return list(available.values()) if keys is None else [available[key] for key in keys if key in available]


def check_keys(groups: Sequence[Group], option: str, keys: Iterable[str]) -> None:
    """Refuse a key that names no column of any group.

    Raises
    ------
    ConfigError
    """
    known = {column.key for group in groups for column in columns(group)}
    for key in keys:
        if key not in known:
            raise ConfigError(option, key, one_of(known, key))


def sorted_rows(group: Group, key: str) -> list[Row]:
    """Rows in the order of a column, the best first (the least, of costs), those without a value last.

    They stay in the group's order where it lacks the column.
    """
    by_key = {column.key: column for column in columns(group)}
    if key not in by_key:
        return group.rows
    column = by_key[key]
    values = [(column.value(row), row) for row in group.rows]
    known = [(column.order * value, i) for i, (value, _) in enumerate(values) if not math.isnan(value)]
    rest = [row for value, row in values if math.isnan(value)]
    return [values[i][1] for _, i in sorted(known)] + rest


def print_leaderboard(
    groups: Sequence[Group],
    console: Console | None = None,
    keys: Sequence[str] | None = None,
    sort: str = "score",
) -> None:
    """Print one table per group of comparable runs, the sentence first.

    Parameters
    ----------
    groups : sequence of Group
    console : rich.console.Console, optional
        Where to print; standard output if not given.
    keys : sequence of str, optional
        Columns after the method. If not given, those that find room, the most important ones first.
    sort : str
        Key of the column by which rows are sorted.
    """
    console = console or Console()
    if not groups:
        console.print("No finished runs found.")
    for group in groups:
        console.print(Text(group.title, style="bold"))
        console.print(Text(group.sentence))
        shown = chosen_columns(group, keys)
        if keys is None:
            shown = _fitting(console, group, shown, sort)
        table = _table(group, shown, sort)
        _print_whole(console, table)
        hidden = [column.key for column in columns(group)[len(shown) :]] if keys is None else []
        for note in group.notes:
            console.print(Text(note, style="dim"))
        if hidden:
            console.print(Text(f"More columns (--columns): {', '.join(hidden)}.", style="dim"))
        console.print()
    if across := ranks_over_tables(groups):
        console.print(Text(across))


def _fitting(console: Console, group: Group, available: Sequence[Column], sort: str) -> list[Column]:
    """As many columns, from the first, as the terminal has room for; at least one."""
    for count in range(len(available), 1, -1):
        if _width(console, _table(group, available[:count], sort, filled=False)) <= console.width:
            return list(available[:count])
    return list(available[:1])


def _width(console: Console, table: Table) -> int:
    return Measurement.get(console, console.options.update(max_width=1000), table).minimum


def _print_whole(console: Console, table: Table) -> None:
    """Numbers that are too wide for the terminal wrap whole lines rather than losing digits."""
    needed = _width(console, table)
    if needed > console.width:
        table.width = needed
    console.print(table, crop=False)


def _table(group: Group, shown: Sequence[Column], sort: str, filled: bool = True) -> Table:
    """The table, or one without rows that is as wide."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("method", overflow="fold", min_width=16, vertical="bottom")
    rows = sorted_rows(group, sort)
    cells = [[column.cell(row) for row in rows] for column in shown]
    for column, texts in zip(shown, cells, strict=True):
        width = max(map(len, [*column.title.split("\n"), *texts]))  # rich breaks cells at their spaces otherwise
        table.add_column(Text(column.title), justify="right", no_wrap=True, min_width=width)
    for i, row in enumerate(rows if filled else ()):
        style = "bold" if row.best else "dim" if row.baseline else ""
        table.add_row(Text(name_of(row)), *(Text(texts[i]) for texts in cells), style=style)
    return table


def print_pivots(pivots: Sequence[Pivot], console: Console | None = None) -> None:
    """Print one table per pivot: methods by values, mean ± 95 % interval over seeds; what each leaderboard says below.

    Parameters
    ----------
    pivots : sequence of Pivot
    console : rich.console.Console, optional
        Where to print; standard output if not given. Columns that find no room stand in further tables.
    """
    console = console or Console()
    for pivot in pivots:
        console.print(Text(_pivot_title(pivot), style="bold"))
        values = list(pivot.groups)
        while values:
            count = len(values)
            while count > 1 and _width(console, _pivot_table(pivot, values[:count])) > console.width:
                count -= 1
            _print_whole(console, _pivot_table(pivot, values[:count]))
            del values[:count]
        for name, group in pivot.groups.items():
            console.print(Text(f"{name}: {group.claim}"))
        console.print()


def _pivot_title(pivot: Pivot) -> str:
    metrics = dict.fromkeys(f"{_spelled(group.headline)} %" for group in pivot.groups.values())
    return f"{pivot.title}: {', '.join(metrics)} by {pivot.key}"


def _pivot_cell(pivot: Pivot, label: str, value: str) -> str:
    row = pivot.rows[label].get(value)
    return "-" if row is None else _score(row)


def _pivot_table(pivot: Pivot, values: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("method", overflow="fold", min_width=16, vertical="bottom")
    for value in values:
        width = max(len(_pivot_cell(pivot, label, value)) for label in pivot.rows)
        table.add_column(Text(value), justify="right", overflow="fold", min_width=max(width, min(len(value), 12)))
    for label, rows in pivot.rows.items():
        cells = []
        for value in values:
            row = rows.get(value)
            cells.append(Text(_pivot_cell(pivot, label, value), style="bold" if row is not None and row.best else ""))
        table.add_row(Text(label), *cells)
    return table


def pivot_markdown(pivots: Sequence[Pivot]) -> str:
    """The same tables in Markdown."""
    parts = []
    for pivot in pivots:
        lines = [["method", *pivot.groups]]
        lines += [[label, *(_pivot_cell(pivot, label, value) for value in pivot.groups)] for label in pivot.rows]
        sentences = [f"- {_escaped(f'{name}: {group.claim}')}" for name, group in pivot.groups.items()]
        parts += [f"**{_escaped(_pivot_title(pivot))}**", _markdown_table(lines), "\n".join(sentences)]
    return "\n\n".join(parts) + "\n"


def _markdown_table(lines: Sequence[Sequence[str]]) -> str:
    head, *body = ("| " + " | ".join(map(_escaped, line)) + " |" for line in lines)
    return "\n".join([head, "|---|" + "---:|" * (len(lines[0]) - 1), *body])


def markdown(groups: Sequence[Group], keys: Sequence[str] | None = None, sort: str = "score") -> str:
    """The same tables with all columns, or the chosen ones, in Markdown."""
    parts = []
    for group in groups:
        shown = chosen_columns(group, keys)
        lines = [["method", *(column.title.replace("\n", " ") for column in shown)]]
        lines += [[name_of(row), *(column.cell(row) for column in shown)] for row in sorted_rows(group, sort)]
        notes = "\n".join(f"- {_escaped(note)}" for note in group.notes)
        parts += [f"**{_escaped(group.title)}**", _escaped(group.sentence), _markdown_table(lines), notes]
    return "\n\n".join(parts) + "\n"


def write_csv(groups: Sequence[Group], file: IO[str]) -> None:
    """Write one line per row of all tables: shares and differences as numbers (0.5 is 50 %), empty where unknown."""
    lines = [line for group in groups for line in _flat(group)]
    names = list(dict.fromkeys(name for line in lines for name in line))
    writer = csv.DictWriter(file, names, restval="")
    writer.writeheader()
    writer.writerows(lines)


def _flat(group: Group) -> list[dict[str, Any]]:
    lines = []
    for row in group.rows:
        line: dict[str, Any] = {"table": group.title, "method": row.method, "strategy": row.strategy}
        line |= {"seeds": " ".join(map(str, row.seeds)), "metric": group.headline, "score": row.score}
        line |= {"interval": row.interval, "weighted": row.selected.get(f"test/{group.headline}_weighted", "")}
        line |= {"worst_decile": row.worst_decile, "std": row.std, "last": row.last}
        for c in row.comparisons:
            line |= {f"vs_{c.reference}_{key}": value for key, value in asdict(c).items() if key != "reference"}
        line |= {key: _shown(row, key) for key, _ in group.also}
        line |= {"megabytes": row.megabytes, "gradients": row.gradients, "seconds": row.seconds}
        line |= {"simulated_seconds": row.simulated_seconds, "epsilon": row.epsilon}
        line |= {"interrupted": row.interrupted}
        lines.append({k: "" if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()})
    return lines


def _against(reference: str) -> Column:
    """Differences from one reference, and what the test says of them."""

    def find(row: Row) -> Comparison | None:
        return next((c for c in row.comparisons if c.reference == reference), None)

    def cell(row: Row) -> str:
        c = find(row)
        if c is None:
            return "reference" if row.strategy == reference else "-"
        difference = "" if math.isnan(c.difference) else f" {100 * c.difference:+z.1f}"
        return c.verdict + difference + ("" if math.isnan(c.low) else f" ±{50 * (c.high - c.low):.1f}")

    def value(row: Row) -> float:
        c = find(row)
        return math.nan if c is None else c.difference

    return Column(f"vs_{reference}", f"vs {method_title(reference)}", cell, value, -1)


def _metric(key: str, label: str) -> Column:
    title = label if label.endswith("%") else f"{label} %"
    name = label.removesuffix(" %").replace(" ", "_")
    return Column(name, _spelled(title), lambda row: percent(_shown(row, key)), lambda row: _shown(row, key), -1)


def _shown(row: Row, key: str) -> float:
    """A further metric at the selected round; adaptation is measured at the end only, whichever round was selected."""
    return (row.at_end if key.startswith("adapted/") else row.selected).get(key, math.nan)


def name_of(row: Row) -> str:
    """A row's label, and whether it was interrupted."""
    return f"{row.label} (interrupted)" if row.interrupted else row.label


def _score(row: Row) -> str:
    return percent(row.score) + ("" if math.isnan(row.interval) else f" ±{100 * row.interval:.1f}")


def _spelled(name: str) -> str:
    return name.replace("_", " ")


def percent(value: float) -> str:
    """A share as percent with one digit; ``-`` for NaN."""
    return _plain(100 * value, "{:.1f}")


def _plain(value: float, form: str) -> str:
    return "-" if math.isnan(value) else form.format(value)


def _amount(value: float, unit: str = "") -> str:
    """Three digits and a prefix: ``12.3 M``."""
    if math.isnan(value):
        return "-"
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * factor:
            return f"{_three(value / factor)} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _time(seconds: float) -> str:
    """Seconds, or minutes and hours in words."""
    if math.isnan(seconds):
        return "-"
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"


def _escaped(text: str) -> str:
    """Text in which Markdown finds nothing to mark up, nor the end of a cell."""
    for character in "\\`*_[]<>|":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
