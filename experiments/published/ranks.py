"""Our figures beside published ones: ``python -m experiments.published.ranks FOLDER SETTING [--rounds N]``.

FOLDER holds runs of one seed, one for each method. Printed are, for each method, the published figure (best round on
the test part, pooled over samples), ours by the same rule, and the mean over clients at the round that was selected on
validation; below, Spearman's rank correlation of the methods that have all of them. With ``--json`` the scores of all
evaluated rounds are written.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from fedpers.evaluation.plots import read_rounds
from fedpers.evaluation.runs import RunRecord, find_runs
from fedpers.settings.groups import method_title

HERE = Path(__file__).parent
POOLED, MEAN, SELECTING = "test/accuracy_weighted", "test/accuracy", "validation/accuracy"
RULES = (("pooled", "best_round"), ("mean", "selected_round"))


def scores(run: RunRecord, rounds: int) -> dict[int, dict[str, float]]:
    """Accuracies of the evaluated rounds, at most `rounds`, without round 0."""
    rows = [row for row in read_rounds(run.folder).rows if MEAN in row and 0 < row["round"] <= rounds]
    return {int(row["round"]): {name: float(row[name]) for name in (POOLED, MEAN, SELECTING)} for row in rows}


def summarized(by_round: dict[int, dict[str, float]]) -> dict[str, float]:
    """The published rule's figure and ours, in percent, and the rounds they are of."""
    best = max(by_round, key=lambda round: by_round[round][POOLED])
    selected = max(by_round, key=lambda round: by_round[round][SELECTING])
    return {
        "pooled": 100 * by_round[best][POOLED],
        "best_round": best,
        "mean": 100 * by_round[selected][MEAN],
        "selected_round": selected,
        "last_round": max(by_round),
    }


def table(rows: dict[str, dict[str, float]], published: dict[str, list[float]]) -> str:
    """The table in Markdown, in the order of our pooled figures, and the rank correlations."""
    lines = [
        "| method | published | best test round, pooled | selected on validation, mean over clients | rounds |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["pooled"]):
        figure = "{:.2f} ± {:.2f}".format(*published[name]) if name in published else "-"
        ours = [f"{row[key]:.2f} (round {row[of]:.0f})" for key, of in RULES]
        lines.append(f"| {method_title(name)} | {figure} | {' | '.join(ours)} | {row['last_round']:.0f} |")
    common = [name for name in rows if name in published]
    said = []
    for key, rule in (("pooled", "by the published rule"), ("mean", "by ours")):
        found: Any = spearmanr([published[name][0] for name in common], [rows[name][key] for name in common])
        if not math.isnan(found.statistic):
            said.append(f"{found.statistic:.2f} {rule} (p = {found.pvalue:.2g})")
    return "\n".join(
        [*lines, "", f"Rank correlation with the published order, {len(common)} methods: {', '.join(said)}."]
    )


def main() -> None:
    """Read the runs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    settings = json.loads((HERE / "published.json").read_text(encoding="utf-8"))["figures"]
    parser.add_argument("folder", type=Path)
    parser.add_argument("setting", choices=settings)
    parser.add_argument("--rounds", type=int, default=10**9, help="look at rounds up to this one only")
    parser.add_argument("--json", type=Path, help="write the scores of all evaluated rounds here")
    options = parser.parse_args()
    found = find_runs([options.folder])
    runs = {run.strategy: scores(run, options.rounds) for run in found}
    if len(runs) < len(found):
        parser.error(
            f"FOLDER={options.folder}: expected one run of each method, not {len(found)} of {len(runs)} methods."
        )
    runs = {name: by_round for name, by_round in runs.items() if by_round}
    if not runs:
        parser.error(f"FOLDER={options.folder}: expected runs with evaluated rounds.")
    print(table({name: summarized(by_round) for name, by_round in runs.items()}, settings[options.setting]))
    if options.json is not None:
        options.json.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
