"""What the command says when a run has ended."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def print_result(summary: Mapping[str, Any], folder: Path) -> float | None:
    """Print a run's result in one line; return the validation score of the selected round."""
    selected, headline = summary["selected"], summary["headline"]
    chosen = "validation" if summary["protocol"] == "validation-selected" else "test, as published"
    print(
        f"{summary['strategy']} on {summary['dataset']}, seed {summary['seed']}: test {headline} "
        f"{_percent(selected.get(f'test/{headline}'))} at round {summary['selected_round']} (chosen on {chosen}), "
        f"{_percent(summary['last'].get(f'test/{headline}'))} at round {summary['last_round']}"
        f"{_unseen(summary['last'], headline)}; "
        f"{summary['seconds']:.1f} s; {_shown(folder)}{_left_out(summary['failures'])}"
    )
    score: float | None = selected.get(f"validation/{headline}")
    return score


def _unseen(last: Mapping[str, float | None], headline: str) -> str:
    if f"unseen/{headline}" not in last:
        return ""
    adapted = last.get(f"adapted/{headline}")
    return f", unseen clients {_percent(last[f'unseen/{headline}'])}, {_percent(adapted)} after adapting"


def _left_out(failures: int) -> str:
    return f"; {failures} client replies were unusable and left out (see run.log)" if failures else ""


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _shown(folder: Path) -> Path:
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
