"""Scores of a recipe's models on labelled data."""

from ray_merge.evaluate.run import Evaluation, evaluate, unsuccessful

__all__ = ["Evaluation", "evaluate", "unsuccessful"]
