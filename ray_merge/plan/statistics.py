"""What a merge by moments needs of its tasks: data, and labels where it is told to use them; what diagnostics take."""

from __future__ import annotations

from collections.abc import Iterable

from ray_merge.methods.registry import get
from ray_merge.plan.moments import WATCHED_LAYOUTS, tasks_with_data
from ray_merge.recipe import Calibration, Recipe
from ray_merge.spec import Merge, Site

FLOAT64 = 8

SQUARE_COPIES = 3
"""W^T W, a Gram matrix and its packed triangle, and what goes by (measured: 2.9 of (3072, 3072))."""


def needs_data(recipe: Recipe, merge: Merge) -> bool:
    """Whether a merge, or what is said about it, depends on its tasks' data."""
    method = get(merge.method)
    return recipe.diagnostics or bool(method.statistics or method.learned)


def check_data(recipe: Recipe, merge: Merge) -> None:
    """Refuse a merge by moments, or one that learns, whose tasks have no data.

    Raises:
        RecipeError: the first task without data.
    """
    if get(merge.method).statistics or get(merge.method).learned:
        tasks_with_data(recipe, merge.adapters, f"merge {merge.name!r} by {merge.method}")
    elif recipe.diagnostics:
        tasks_with_data(recipe, merge.adapters, "diagnostics: true")


def diagnosis_bytes(recipe: Recipe, sites: Iterable[Site]) -> int:
    """Memory that `diagnostics: true` takes at the worst site, beside what merges take there (work/diagnostics.py).

    For sketches, and where inputs are rows, the weight is kept.
    """
    if not recipe.diagnostics:
        return 0
    calibration = recipe.calibration or Calibration()
    return max(
        (_look_bytes(site, calibration) for site in sites if site.layout in WATCHED_LAYOUTS), default=0
    )


def _look_bytes(site: Site, calibration: Calibration) -> int:
    inputs = site.shape[0 if site.layout == "conv1d" else 1]
    weight = FLOAT64 // 2 * site.shape[0] * site.shape[1]
    square = FLOAT64 * inputs * inputs
    if calibration.precision == "sketch" and inputs > 2 * calibration.sketch_rows:
        return weight + FLOAT64 * 2 * calibration.sketch_rows * inputs
    return SQUARE_COPIES * square + (2 * weight if site.layout == "conv1d" else 0)
