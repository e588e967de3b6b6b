"""Newcomers beside clients that train: ``python -m experiments.unseen.table FOLDER... [--json FILE]``.

FOLDERs hold runs of one seed, several rates for each method. The table has each method at the rate with the best
validation accuracy (of clients that train), ordered by the accuracy of unseen clients as they come.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fedpers.evaluation.runs import RunRecord, find_runs
from fedpers.settings.groups import method_title

COLUMNS = {
    "trained": "test/accuracy",
    "worst tenth": "test/accuracy_worst_decile",
    "unseen": "unseen/accuracy",
    "after 1": "adapted/accuracy_after_1",
    "after 5": "adapted/accuracy_after_5",
    "after 20": "adapted/accuracy_after_20",
}


def row_of(run: RunRecord) -> dict[str, Any]:
    """Figures of a run in percent, and its rate."""
    measured = {**run.summary["last"], **run.summary["selected"]}  # newcomers adapt at the end of a run
    figures = {column: round(100 * measured[name], 2) if name in measured else None for column, name in COLUMNS.items()}
    return {"lr": run.training["lr"], "validation": round(100 * measured["validation/accuracy"], 2), **figures}


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--json", type=Path, help="write all rows, those that were not chosen too")
    options = parser.parse_args()
    rows: dict[str, list[dict[str, Any]]] = {}
    for run in find_runs(options.folders):
        rows.setdefault(run.strategy, []).append(row_of(run))
    chosen = {name: max(of_method, key=lambda row: row["validation"]) for name, of_method in rows.items()}
    print(f"| method | lr | {' | '.join(COLUMNS)} |")
    print("|---" * 2 + "|---:" * len(COLUMNS) + "|")
    for name, row in sorted(chosen.items(), key=lambda item: -item[1]["unseen"]):
        cells = ["-" if row[column] is None else f"{row[column]:.1f}" for column in COLUMNS]
        print(f"| {method_title(name)} | {row['lr']:g} | {' | '.join(cells)} |")
    if options.json is not None:
        options.json.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
