"""Who is ahead at which number of samples: ``python -m experiments.when.figure OUT.svg TITLE=FOLDER[,FOLDER]...``.

Each FOLDER holds runs that differ in ``split.max_train``, method and seed. A panel for each title shows test accuracy
(mean over clients and seeds) over the training samples of a client; behind it, who is ahead there by more than noise:
a personal method if one is better than both Local and FedAvg, else whichever of these is better than the other. Better
is what ``fedpers compare`` calls so. The same is printed as a table, and with ``--json`` written as data.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from fedpers.evaluation.leaderboard import Group, Row, leaderboard_rows
from fedpers.evaluation.pivot import UNSET, Pivot, pivots
from fedpers.evaluation.runs import find_runs

KEY = "split.max_train"
REFERENCES = ("local", "fedavg")
COLOURS = {
    "a personal method": "#b7e0c2",
    "Local": "#bcd3f2",
    "FedAvg": "#f6d9a8",
    "too close to call": "#ededed",
}
MARKERS = "os^Dv<>P*X"


def verdict(row: Row, reference: str) -> str:
    """What the comparison of a method with a reference says; "untested" if there is none."""
    return next((c.verdict for c in row.comparisons if c.reference == reference), "untested")


def winners(group: Group) -> list[Row]:
    """Methods that are better than both references, best first."""
    return [row for row in group.rows if all(verdict(row, reference) == "better" for reference in REFERENCES)]


def ahead(group: Group) -> str:
    """A key of :data:`COLOURS`."""
    if winners(group):
        return "a personal method"
    local = next(row for row in group.rows if row.strategy == "local")
    return {"better": "Local", "worse": "FedAvg"}.get(verdict(local, "fedavg"), "too close to call")


def cell(group: Group) -> str:
    """Who is ahead, and by how much."""
    local, fedavg = (next(100 * row.score for row in group.rows if row.strategy == name) for name in REFERENCES)
    best = winners(group)
    if best:
        others = f"Local {local:.1f}, FedAvg {fedavg:.1f}; {len(best)} beat both"
        return f"**{best[0].label} {100 * best[0].score:.1f}** ({others})"
    return f"{ahead(group)} (Local {local:.1f}, FedAvg {fedavg:.1f})"


def panel(axes: Axes, title: str, pivot: Pivot, styles: dict[str, int]) -> None:
    """Lines of all methods over the samples of a client, and who is ahead."""
    numbers = [int(value) for value in pivot.groups]
    edges = [
        numbers[0] / 1.8,
        *(math.sqrt(a * b) for a, b in itertools.pairwise(numbers)),
        numbers[-1] * 1.8,
    ]
    for i, group in enumerate(pivot.groups.values()):
        axes.axvspan(edges[i], edges[i + 1], color=COLOURS[ahead(group)], lw=0)
    for label, rows in pivot.rows.items():
        strategy = next(iter(rows.values())).strategy
        line = {"color": "black", "lw": 2.2, "ls": "-" if strategy == "local" else "--"}
        if strategy not in REFERENCES:
            number = styles.setdefault(strategy, len(styles))
            line = {"color": f"C{number}", "lw": 1.1, "marker": MARKERS[number % len(MARKERS)], "ms": 4}
        points = sorted((int(value), 100 * row.score) for value, row in rows.items())
        axes.plot(*zip(*points, strict=True), label=label, **line)
    axes.set(title=title, xscale="log", xlim=(edges[0], edges[-1]), xlabel="training samples of a client")
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.minorticks_off()


def main() -> None:
    """Read the runs, draw, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="OUT.svg")
    parser.add_argument("panels", nargs="+", metavar="TITLE=FOLDER[,FOLDER]")
    parser.add_argument("--json", type=Path, help="write all rows here")
    options = parser.parse_args()
    shown: dict[str, Pivot] = {}
    for text in options.panels:
        title, _, folders = text.partition("=")
        found = pivots(find_runs(folders.split(",")), KEY)
        names = {row.strategy for pivot in found for group in pivot.groups.values() for row in group.rows}
        if not names.issuperset(REFERENCES) or UNSET in found[0].groups:
            parser.error(f"{text}: expected runs of {' and '.join(REFERENCES)}, and {KEY} in all of them.")
        if len(found) != 1:
            parser.error(
                f"{text}: expected runs that differ in {KEY}, method and seed, not {len(found)} kinds of runs."
            )
        shown[title] = found[0]
    figure, grid = plt.subplots(
        1, len(shown), figsize=(4 * len(shown), 4.4), layout="constrained", sharey=True, squeeze=False
    )
    styles: dict[str, int] = {}
    for axes, (title, pivot) in zip(grid[0], shown.items(), strict=True):
        panel(axes, title, pivot, styles)
    grid[0, 0].set_ylabel("test accuracy, mean over clients (%)")
    lines = {label: line for axes in grid[0] for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    backgrounds = [
        Patch(color=colour, label=f"ahead: {name}" if name in list(COLOURS)[:3] else name)
        for name, colour in COLOURS.items()
    ]
    figure.legend(handles=[*lines.values(), *backgrounds], loc="outside lower center", ncols=7, fontsize=8)
    figure.savefig(options.file)
    values = list(dict.fromkeys(value for pivot in shown.values() for value in pivot.groups))
    print("| how clients differ | " + " | ".join(values) + " |\n|---|" + "---|" * len(values))
    for title, pivot in shown.items():
        cells = [cell(pivot.groups[value]) if value in pivot.groups else "-" for value in values]
        print(f"| {title} | " + " | ".join(cells) + " |")
    if options.json is not None:
        data: dict[str, Any] = {
            title: {value: leaderboard_rows([group]) for value, group in pivot.groups.items()}
            for title, pivot in shown.items()
        }
        kept = (
            "strategy",
            "label",
            "options",
            "seeds",
            "score",
            "interval",
            "worst_decile",
            "megabytes",
            "gradients",
            "comparisons",
        )
        slim = {
            title: {value: [{key: row[key] for key in kept} for row in rows] for value, rows in groups.items()}
            for title, groups in data.items()
        }
        options.json.write_text(json.dumps(slim, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
