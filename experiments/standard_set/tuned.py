"""The sweeps that follow a tuning: ``python -m experiments.standard_set.tuned runs/standard_set/tuning``.

Of runs that differ in ``training.lr`` the rate with the best validation metric is taken for each method;
methods with the same rate become one sweep. The table that they are chosen by goes to the standard error.
"""

from __future__ import annotations

import sys
from collections import defaultdict

from fedpers.evaluation.runs import RunRecord, find_runs


def main() -> None:
    """Print one command for each rate."""
    scores: dict[str, dict[float, float]] = defaultdict(dict)
    for run in find_runs(sys.argv[1:]):
        scores[run.strategy][float(run.training["lr"])] = validation(run)
    methods: dict[float, list[str]] = defaultdict(list)
    for name, by_rate in sorted(scores.items()):
        best = max(by_rate, key=lambda rate: (by_rate[rate], -rate))
        methods[best].append(name)
        shown = "  ".join(f"{rate:g}: {100 * score:.1f}" for rate, score in sorted(by_rate.items()))
        print(f"{name:<14} {shown}  -> {best:g}", file=sys.stderr)
    for rate, names in sorted(methods.items()):
        print(
            f"fedpers -m +experiment=standard_set strategy={','.join(names)} training.lr={rate:g} seed=0,1,2,3,4 "
            "output=runs/standard_set/tuned"
        )


def validation(run: RunRecord) -> float:
    """Validation metric of the selected round."""
    return run.metric(f"validation/{run.summary['headline']}")


if __name__ == "__main__":
    main()
