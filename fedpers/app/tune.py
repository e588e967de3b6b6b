"""``fedpers tune``: choose each method's settings on validation with one seed, then run all seeds with them."""

from __future__ import annotations

import argparse

from fedpers.app.run import execute
from fedpers.app.sweeps.record import Record


def command(arguments: list[str]) -> int:
    """Choose settings, then run."""
    parser = argparse.ArgumentParser(
        prog="fedpers tune",
        usage="fedpers tune [--seed N] key=value,value ... [seed=0,1,2]",
        description="Runs every combination with one seed, chooses for each method the settings of the training and of "
        "the method that are best on validation, then runs all seeds with them. Folders: tuning, tuned.",
        allow_abbrev=False,
    )
    parser.add_argument("--seed", metavar="N", type=int, help="seed to choose by; the first of seed= if not given")
    options, settings = parser.parse_known_args(arguments)
    seed = None if options.seed is None else str(options.seed)
    return execute(["-m", *settings], Record(settings, tunes=True, tuning_seed=seed))
