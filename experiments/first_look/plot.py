"""Draw test accuracy over rounds, mean and range over seeds: ``python plot.py OUT.svg TITLE=RUNS...``.

RUNS is a folder of runs; of a method that was run with several learning rates the one with the better validation
accuracy (at the selected rounds, mean over seeds) is drawn.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from fedpers.evaluation.runs import find_runs


def curves(folder: str) -> dict[str, np.ndarray]:
    """Test accuracy ``[seeds, rounds]`` of each method."""
    runs: dict[str, dict[str, list[tuple[float, list[float]]]]] = defaultdict(lambda: defaultdict(list))
    for run in find_runs([folder]):
        lines = [json.loads(line) for line in (run.folder / "rounds.jsonl").read_text().splitlines()]
        curve = [line["test/accuracy"] for line in lines if "test/accuracy" in line]
        runs[run.strategy][str(run.training)].append((run.metric("validation/accuracy"), curve))
    best = {
        name: max(by_training.values(), key=lambda seeds: np.mean([s for s, _ in seeds]))
        for name, by_training in runs.items()
    }
    return {name: np.array([curve for _, curve in seeds]) for name, seeds in best.items()}


def main(target: str, *parts: str) -> None:
    """Draw one panel for each folder."""
    figure, axes = plt.subplots(1, len(parts), figsize=(5 * len(parts), 3.6), layout="constrained")
    for axis, part in zip(np.atleast_1d(axes), parts, strict=True):
        title, _, folder = part.partition("=")
        accuracies = curves(folder)
        for name, values in sorted(accuracies.items(), key=lambda item: -item[1][:, -1].mean()):
            style = {"linestyle": "--"} if name in ("local", "fedavg", "pretrained") else {}
            (line,) = axis.plot(100 * values.mean(0), label=name, **style)
            low, high = 100 * values.min(0), 100 * values.max(0)
            axis.fill_between(np.arange(len(low)), low, high, alpha=0.15, color=line.get_color(), lw=0)
        axis.set(title=title, xlabel="round", ylabel="test accuracy, mean over clients (%)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(Path(target))


if __name__ == "__main__":
    main(*sys.argv[1:])
