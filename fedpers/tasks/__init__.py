"""What is learned and how it is measured. A new task is one file here, and data that carry it."""

from fedpers.tasks.base import Task
from fedpers.tasks.classification import CLASSIFICATION, Classification, class_losses
from fedpers.tasks.next_token import NextToken
from fedpers.tasks.ranking import Ranking
from fedpers.tasks.regression import Regression

__all__ = ["CLASSIFICATION", "Classification", "NextToken", "Ranking", "Regression", "Task", "class_losses"]
