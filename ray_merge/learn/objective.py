"""Psi: one number from the tasks' values, and how much each task's gradient counts in its gradient.

Formulas in algebra/objectives.py: smooth Tchebycheff (TARA), a weighted sum (AdaMerging), the plain mean (NSC).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ray_merge.algebra.objectives import linear, tchebycheff
from ray_merge.plan.learn import Learning


def scalarise(learning: Learning, values: Sequence[float], anchors: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Psi, and its derivative with respect to each task's value, float64.

    Args:
        learning: the merge.
        values: f_i of each task, in order.
        anchors: z_i of each task; zeros where there are none.
    """
    parameters = learning.merge.parameters
    values_T = torch.tensor(values, dtype=torch.float64)
    preference_T = torch.tensor(preferences(learning), dtype=torch.float64)
    anchors_T = torch.tensor(anchors, dtype=torch.float64)
    if parameters.get("scalarisation") == "tchebycheff":
        return tchebycheff(
            values_T,
            preference_T,
            anchors_T,
            alpha=float(parameters["alpha"]),
            absolute=bool(parameters["absolute"]),
        )
    return linear(values_T, preference_T, anchors_T)


def preferences(learning: Learning) -> list[float]:
    """Rho of each task, summing up to 1; equal ones for nsc."""
    names, given = learning.tasks, learning.merge.parameters.get("preference")
    if not isinstance(given, Mapping):
        return [1 / len(names)] * len(names)
    largest = max(given[name] for name in names)  # first, so that no sum overflows
    total = sum(given[name] / largest for name in names)
    return [given[name] / largest / total for name in names]
