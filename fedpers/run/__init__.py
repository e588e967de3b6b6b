"""One run: from settings to a folder of results."""

from fedpers.run.execute import resume, run
from fedpers.run.rounds import TIMES, metrics_of, run_rounds
from fedpers.run.setup import Setup, make_halves, prepare_run

__all__ = ["TIMES", "Setup", "make_halves", "metrics_of", "prepare_run", "resume", "run", "run_rounds"]
