"""How often tables of equal methods claim that one is better than Local, and how often a true gap is seen.

Accuracies of simulated tables: clients differ in how hard they are, seeds in how lucky they are, methods in how they do
with a seed and with a client, on some test samples each. Of `k` methods none differs from Local in truth (false claims:
tables with at least one "better than Local"), or one does (power: tables that say so). The last column is the rule of
picking the best row and testing it against the others, for which a false claim is that any of them is behind.

    python -m benchmarks.false_claims [--tables 500]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from fedpers.evaluation.comparisons import compare
from fedpers.evaluation.runs import RunRecord
from fedpers.evaluation.statistics import LEVEL, MIN_SEEDS, Floats, holm, paired_bootstrap, paired_t, verdict


@dataclass(frozen=True)
class Setting:
    """What is simulated.

    Parameters
    ----------
    methods, seeds, clients : int
        Local is one method more.
    gap : float
        By which one of the methods is better, in power; accuracy between 0 and 1.
    unequal : bool
        Whether effects of seeds and clients on a method vary from method to method, by a factor of up to 16.
    by_seed : float
        Standard deviation of what a method gains or loses with a seed, for all its clients.
    by_client : float
        The same for a single client.
    samples : int
        Test samples of a client.
    """

    methods: int
    seeds: int
    clients: int = 40
    gap: float = 0.0
    unequal: bool = False
    by_seed: float = 0.005
    by_client: float = 0.03
    samples: int = 20


def simulate(setting: Setting, rng: np.random.Generator, gap: float = 0.0) -> Floats:
    """Accuracies ``[1 + methods, seeds, clients]``; Local is the first, the method with the `gap` the last."""
    rows = 1 + setting.methods
    shape = (rows, setting.seeds, setting.clients)
    scale = 4.0 ** rng.uniform(-1, 1, size=(rows, 1, 1)) if setting.unequal else np.ones((rows, 1, 1))
    chance = rng.uniform(0.45, 0.75, size=(setting.seeds, setting.clients)) + rng.normal(0, 0.02, (setting.seeds, 1))
    chance = chance + scale * rng.normal(0, setting.by_seed, (rows, setting.seeds, 1))
    chance = chance + scale * rng.normal(0, setting.by_client, shape)
    chance[-1] += gap
    return np.asarray(rng.binomial(setting.samples, np.clip(chance, 0, 1)) / setting.samples)


def over_seeds(accuracies: Floats) -> list[str]:
    """Verdicts of a leaderboard on each method against Local."""
    runs = [
        {s: RunRecord(Path(), {}, {"strategy": "local" if m == 0 else f"method{m}", "seed": s}) for s in range(seeds)}
        for m, seeds in enumerate([accuracies.shape[1]] * len(accuracies))
    ]
    scores = [dict(enumerate(map(float, row.mean(1)))) for row in accuracies]
    compared, _ = compare(runs, scores, ["local"], "accuracy")
    return [comparisons[0].verdict for comparisons in compared[1:]]


def over_clients(accuracies: Floats) -> list[str]:
    """The same where clients carry the claim."""
    differences = np.moveaxis(accuracies[1:] - accuracies[0], 0, -1)
    estimates = paired_bootstrap(list(differences), resamples=2000)
    corrected = holm([estimate.p_value for estimate in estimates])
    return [verdict(estimate.difference, float(p)) for estimate, p in zip(estimates, corrected, strict=True)]


def against_the_best(accuracies: Floats) -> bool:
    """Whether a paired t-test finds any row behind the one that happens to be best."""
    scores = accuracies.mean(2)
    best = int(np.argmax(scores.mean(1)))
    return any(paired_t(scores[best], scores[m]).p_value <= LEVEL for m in range(len(scores)) if m != best)


def rates(setting: Setting, tables: int, seed: int = 0) -> tuple[float, float, float]:
    """Shares of tables with a false claim, with the true gap seen, and with a false claim of the rule of the best."""
    rng = np.random.default_rng(seed)
    say = over_seeds if setting.seeds >= MIN_SEEDS else over_clients
    false = seen = picked = 0
    for _ in range(tables):
        equal = simulate(setting, rng)
        false += "better" in say(equal)
        picked += setting.seeds > 1 and against_the_best(equal)
        seen += bool(setting.gap) and say(simulate(setting, rng, setting.gap))[-1] == "better"
    return false / tables, seen / tables if setting.gap else math.nan, picked / tables


def settings() -> list[Setting]:
    """All that are reported."""
    many = [
        Setting(k, n, gap=gap, unequal=unequal)
        for n, gaps in ((3, (0.16, 0.25, 0.3)), (5, (0.07, 0.09, 0.1)))
        for k, gap in zip((3, 7, 11), gaps, strict=True)
        for unequal in (False, True)
    ]
    few = [
        Setting(k, n, clients, gap=gap, unequal=unequal, by_seed=0.0)
        for n, clients, gaps in ((1, 10, (0.25, 0.3)), (1, 40, (0.1, 0.12)), (2, 40, (0.08, 0.09)))
        for k, gap in zip((3, 11), gaps, strict=True)
        for unequal in (False, True)
    ]
    # where seeds matter a claim over the clients of one or two of them is none about other seeds
    return many + few + [Setting(7, n, 40, by_seed=0.02) for n in (1, 2)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.false_claims", description=__doc__)
    parser.add_argument("--tables", type=int, default=500, help="simulated tables of each row")
    tables = parser.parse_args(arguments).tables
    shown = Table(title=f"{tables} tables each")
    headings = ("over", "methods", "seeds", "clients", "spread of methods", "sd with seeds", "false claims", "true gap")
    for heading in (*headings, "power", "best row picked: false claims"):
        shown.add_column(heading, justify="right")
    for setting in settings():
        false, seen, picked = rates(setting, tables)
        shown.add_row(
            "seeds" if setting.seeds >= MIN_SEEDS else "clients",
            str(setting.methods),
            str(setting.seeds),
            str(setting.clients),
            "unequal" if setting.unequal else "equal",
            f"{100 * setting.by_seed:.1f}",
            f"{100 * false:.1f} %",
            f"{100 * setting.gap:.0f}" if setting.gap else "",
            "" if math.isnan(seen) else f"{100 * seen:.0f} %",
            f"{100 * picked:.0f} %" if setting.seeds > 1 else "",
        )
    Console(width=130).print(shown)


if __name__ == "__main__":
    main()
