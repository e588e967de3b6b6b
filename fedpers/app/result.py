"""What the command says when a run has ended."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpers.errors import FedpersError, TrainingError
from fedpers.failures import described, frames_of_user

log = logging.getLogger(__name__)


def print_result(summary: Mapping[str, Any], folder: Path) -> float | None:
    """Print a run's result in one line, and what a reader must know of it; return the score of the selected round."""
    headline, selected, last = summary["headline"], summary["selected"], summary["last"]
    measured, clients = f"test/{headline}", summary["num_clients"] - summary["num_unseen"]
    at_end = f"{_percent(last.get(measured))} at round {summary['last_round']}{_over(summary, clients)}"
    if summary["last_round"] is None:
        result = f"no round could be selected: no client could be measured in any of {summary['rounds_done']} rounds"
    elif summary["selected_on"] == "nothing":
        result = f"test {headline} {at_end} (no part for validation, so that no round is selected)"
    elif summary["selected_round"] is None:
        result = f"no round could be selected; test {headline} {at_end}"
    else:
        chosen = f"{summary['selected_on']}{', as published' * (summary['protocol'] == 'official')}"
        at_best = f"{_percent(selected.get(measured))} at round {summary['selected_round']} (chosen on {chosen})"
        is_last = summary["selected_round"] == summary["last_round"]
        result = f"test {headline} " + (f"{at_end} (chosen on {chosen})" if is_last else f"{at_best}, {at_end}")
    print(
        f"{summary['strategy']} on {summary['dataset']}, seed {summary['seed']}: {result}{_unseen(last, headline)}"
        f"{_common(last, headline)}; "
        f"{summary['seconds']:.1f} s; {shown(folder)}{_left_out(summary['failures'])}"
    )
    if str(summary["ended_by"]).startswith("stop."):
        print(f"The run ended after round {summary['rounds_done']} of {summary['rounds']} by {summary['ended_by']}.")
    if summary["global_samples"] and f"global/{headline}" not in last:
        print(
            f"There is no global/{headline}: clients of {summary['strategy']} are not all sent one whole network that "
            f"could be tested on the {summary['global_samples']} samples of split.global_test."
        )
    if diverged := summary["last_diverged"]:
        print(
            f"The network diverged: at round {summary['last_round']} the loss of {diverged} of {clients} clients is "
            "infinite; a smaller training.lr or a training.clip may help."
        )
    score: float | None = selected.get(f"validation/{headline}")
    return score


def print_error(error: Exception) -> int:
    """Print why a run ended, in one sentence; return the exit status. A fault of this package is raised on.

    For a mistake in a method of the user's the sentence names the place, and ``run.log`` has the whole traceback.
    """
    if not isinstance(error, FedpersError):
        if not frames_of_user(error):
            raise error
        log.info("the run ended:", exc_info=error)
    print(f"fedpers: {described(error).removesuffix('.')}.", file=sys.stderr)
    return 2 if isinstance(error, FedpersError) and not isinstance(error, TrainingError) else 1


def exit_code(summary: Mapping[str, Any]) -> int:
    """0, or 3 if no round of the run could be selected."""
    return 3 if summary["selected_round"] is None else 0


def _over(summary: Mapping[str, Any], clients: int) -> str:
    left_out = summary["last_left_out"]
    return f" (mean over {clients - left_out} of {clients} clients)" if left_out else ""


def _unseen(last: Mapping[str, float | None], headline: str) -> str:
    if f"unseen/{headline}" not in last:
        return ""
    come = f", unseen clients {_percent(last[f'unseen/{headline}'])}"
    ending = f"adapted/{headline}_after_"
    by_steps = {int(key.removeprefix(ending)): last[key] for key in last if key.removeprefix(ending).isdigit()}
    if by_steps:
        return come + "".join(f", {_percent(by_steps[n])} after {n} step{'s' * (n > 1)}" for n in sorted(by_steps))
    return f"{come}, {_percent(last.get(f'adapted/{headline}'))} after adapting"


def _common(last: Mapping[str, float | None], headline: str) -> str:
    shared = f"global/{headline}"
    return f", the common network {_percent(last[shared])} on the global test set" if shared in last else ""


def _left_out(failures: int) -> str:
    return f"; {failures} client replies were unusable and left out (see run.log)" if failures else ""


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def shown(folder: Path) -> Path:
    """A folder as it is printed: from the current one, where it lies below that."""
    folder = folder.resolve()
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
