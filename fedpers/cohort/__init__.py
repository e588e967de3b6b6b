"""The numerical core: K clients as one stacked computation. Knows torch, not Flower."""

from fedpers.cohort.cohort import Cohort, Reply, View, mixed
from fedpers.cohort.evaluation import measure
from fedpers.cohort.fold import Fold, WeightedMean
from fedpers.cohort.modules import prepare
from fedpers.cohort.state import StateStore
from fedpers.cohort.step import (
    Adjust,
    Batch,
    Loss,
    Network,
    Step,
    proximal,
    sample_losses,
    shifted,
    small_change,
)
from fedpers.cohort.training import Training
from fedpers.cohort.tree import Selection, Tree, entries, leaves, model_tree, select, tree

__all__ = [
    "Adjust",
    "Batch",
    "Cohort",
    "Fold",
    "Loss",
    "Network",
    "Reply",
    "Selection",
    "StateStore",
    "Step",
    "Training",
    "Tree",
    "View",
    "WeightedMean",
    "entries",
    "leaves",
    "measure",
    "mixed",
    "model_tree",
    "prepare",
    "proximal",
    "sample_losses",
    "select",
    "shifted",
    "small_change",
    "tree",
]
