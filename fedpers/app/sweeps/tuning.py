"""The choice of settings: every combination with one seed, then those that are best on validation with all seeds."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra.core.override_parser.types import Override

from fedpers.app.sweeps.names import Naming, count_of, values_of
from fedpers.app.sweeps.record import Choice
from fedpers.errors import FedpersError

log = logging.getLogger(__name__)
_CHOSEN = ("strategy.", "training.", "server_optimizer")
"""Beginnings of keys that may differ between methods that are compared, and so are chosen for each."""


class Tuning:
    """What is chosen, and from what.

    Parameters
    ----------
    naming : Naming
    varied : mapping of str to Override
        What the command varies. Of it the method's and the training's settings are chosen; for each method, and each
        value of whatever else there is.
    seed : str, optional
        That of the candidates; the first of those given if None.

    Attributes
    ----------
    chosen, cases : list of str
        Keys that are chosen, and those for each of whose values (with the method) there is a choice.
    seeds : list of str
        Of the final runs.
    seed : str
        Of the candidates.
    total : int or None
        Runs in all, those that are taken over from the candidates too; None where it is not known.

    Raises
    ------
    FedpersError
        If nothing is varied that could be chosen.
    """

    def __init__(self, naming: Naming, varied: Mapping[str, Override], seed: str | None) -> None:
        self._naming = naming
        self.chosen = [key for key in varied if key.startswith(_CHOSEN) and key != "strategy.name"]
        if not self.chosen:
            raise FedpersError(
                "fedpers tune has nothing to choose from: give several values of settings of the training or of the "
                "method, as in training.lr=0.05,0.1,0.2."
            )
        self.cases = [key for key in varied if key not in self.chosen and key != "seed"]
        swept_seeds = list(varied["seed"].sweep_string_iterator()) if "seed" in varied else []
        self.seeds = swept_seeds or [naming.usual["seed"]]
        self.seed = self.seeds[0] if seed is None else seed
        cases = count_of({key: varied[key] for key in self.cases})
        candidates = count_of({key: varied[key] for key in self.chosen})
        self._numbers = {} if candidates is None else _numbers({key: varied[key] for key in self.chosen})
        self.total = None if cases is None or candidates is None else cases * (candidates + len(self.seeds))

    def candidates(self, combinations: Sequence[Sequence[str]]) -> list[list[str]]:
        """All combinations, with the seed by which they are compared."""
        return list({tuple(one): one for one in (self._with_seed(c, self.seed) for c in combinations)}.values())

    def choose(
        self, candidates: Sequence[list[str]], scores: Sequence[float | None], before: Sequence[Choice]
    ) -> list[Choice]:
        """For each case the candidate with the highest score, the first of equals; none where all have failed.

        `scores` are in the order of `candidates`, None of runs that failed. What was chosen `before`, by the same
        command, stays.
        """
        choices = {choice.case: choice for choice in before}
        best: dict[str, tuple[float, Choice]] = {}
        for overrides, score in zip(candidates, scores, strict=True):
            case = self._case(overrides)
            unseeded = _without_seed(overrides)
            _, choice = best.setdefault(case, (-math.inf, Choice(case, [], {})))
            choice.scores[self._naming.settings(overrides, self.chosen)] = score
            if score is not None and score > best[case][0]:
                choice.overrides = unseeded
                best[case] = (score, choice)
        for case, (_, choice) in best.items():
            former = choices.get(case, choice)
            if former.overrides != choice.overrides and None in former.scores.values():
                log.warning(
                    "fedpers: a run had failed when settings were chosen for %s; all scores speak for %s: tune anew in "
                    "another folder.", case, self._naming.settings(choice.overrides, self.chosen),
                )  # fmt: skip
        return [choices.get(case, choice) for case, (_, choice) in best.items() if choice.overrides or case in choices]

    def without_choice(self, candidates: Sequence[list[str]], choices: Sequence[Choice]) -> list[str]:
        """Cases of which no candidate has a score."""
        chosen = {choice.case for choice in choices}
        return list(dict.fromkeys(case for case in map(self._case, candidates) if case not in chosen))

    def final(self, choices: Sequence[Choice]) -> list[list[str]]:
        """The runs with what was chosen."""
        return [self._with_seed(choice.overrides, seed) for choice in choices for seed in self.seeds]

    def print_choices(self, choices: Sequence[Choice]) -> None:
        """Print what was chosen, and by which validation scores."""
        width = max((len(choice.case) for choice in choices), default=0)
        print("chosen by validation:")
        for choice in choices:
            scores = "  ".join(f"{name}: {_percent(score)}" for name, score in choice.scores.items())
            settings = self._naming.settings(choice.overrides, self.chosen)
            print(f"  {choice.case:<{width}}  {scores}  -> {settings}", flush=True)
        for key, numbers in self._numbers.items():
            ends = (min(numbers), max(numbers))
            at_end = [choice.case for choice in choices if float(values_of(choice.overrides)[key]) in ends]
            if at_end:
                low, high = ends
                print(f"best at an end of {key} ({low:g} to {high:g}), so beyond it may be better: {', '.join(at_end)}")

    def copy(self, candidate: Path, final: Path) -> None:
        """Take the run of a candidate over, which is the same as one of the final runs."""
        if candidate.is_dir() and not final.exists():
            draft = final.with_name(f".{final.name}.tmp")
            shutil.rmtree(draft, ignore_errors=True)
            shutil.copytree(candidate, draft)
            draft.rename(final)

    def _with_seed(self, overrides: Sequence[str], seed: str) -> list[str]:
        return [*_without_seed(overrides), f"seed={seed}"]

    def _case(self, overrides: Sequence[str]) -> str:
        values = values_of(overrides)
        others = [key for key in self.cases if key not in ("strategy", "strategy.name", "dataset")]
        parts = [values.get("strategy.name", values.get("strategy", self._naming.usual["strategy"]))]
        parts += [values["dataset"]] if "dataset" in self.cases else []
        named = " ".join(filter(None, [*parts, self._naming.settings(overrides, others)]))
        return named.replace("\\:", ":")  # Hydra's way to write module:Class


def _numbers(varied: Mapping[str, Override]) -> dict[str, list[float]]:
    """Values of keys that take three numbers or more."""
    numbers: dict[str, list[float]] = {}
    for key, override in varied.items():
        try:
            values = [float(text) for text in override.sweep_string_iterator()]
        except ValueError:
            continue
        if len(set(values)) > 2:
            numbers[key] = values
    return numbers


def _without_seed(overrides: Sequence[str]) -> list[str]:
    """Overrides but for ``seed=``, ``+seed=`` and ``++seed=``."""
    return [text for text in overrides if text.lstrip("+").partition("=")[0] != "seed"]


def _percent(score: float | None) -> str:
    return "failed" if score is None else f"{100 * score:.1f}"
