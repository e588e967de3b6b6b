"""The numerical core: K clients as one stacked computation. Knows torch, not Flower."""

from fedpers.cohort.cohort import Cohort, Reply
from fedpers.cohort.fold import ARRAYS, Collect, Fold, GroupedMean, Records, WeightedMean
from fedpers.cohort.modules import prepare
from fedpers.cohort.networks import mixed
from fedpers.cohort.prediction import View
from fedpers.cohort.state import StateStore
from fedpers.cohort.step import (
    Adjust,
    Batch,
    Given,
    Loss,
    Network,
    Step,
    proximal,
    shifted,
)
from fedpers.cohort.tree import Selection, Tree, entries, has_role, leaves, model_tree, select, set_leaf, tree
from fedpers.cohort.walk import Walk
from fedpers.settings.training import Training

__all__ = [
    "ARRAYS",
    "Adjust",
    "Batch",
    "Cohort",
    "Collect",
    "Fold",
    "Given",
    "GroupedMean",
    "Loss",
    "Network",
    "Records",
    "Reply",
    "Selection",
    "StateStore",
    "Step",
    "Training",
    "Tree",
    "View",
    "Walk",
    "WeightedMean",
    "entries",
    "has_role",
    "leaves",
    "mixed",
    "model_tree",
    "prepare",
    "proximal",
    "select",
    "set_leaf",
    "shifted",
    "tree",
]
