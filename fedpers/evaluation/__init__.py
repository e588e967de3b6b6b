"""Metrics of clients, distributions over clients, and comparisons of runs."""

from fedpers.evaluation.compare import (
    Group,
    Row,
    RunRecord,
    find_runs,
    leaderboard,
    leaderboard_rows,
    print_leaderboard,
)
from fedpers.evaluation.metrics import auc, balanced_accuracy, distribution

__all__ = [
    "Group",
    "Row",
    "RunRecord",
    "auc",
    "balanced_accuracy",
    "distribution",
    "find_runs",
    "leaderboard",
    "leaderboard_rows",
    "print_leaderboard",
]
