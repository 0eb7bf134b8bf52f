"""What a merge by moments needs of its tasks: data, and labels where it is told to use them."""

from __future__ import annotations

from ray_merge.methods.registry import get
from ray_merge.plan.moments import tasks_with_data
from ray_merge.recipe import Recipe
from ray_merge.spec import Merge


def check_data(recipe: Recipe, merge: Merge) -> None:
    """Refuse a merge by moments whose tasks have no data.

    Raises:
        RecipeError: the first task without data.
    """
    if get(merge.method).statistics:
        tasks_with_data(recipe, merge.adapters, f"merge {merge.name!r} by {merge.method}")
    elif recipe.diagnostics:
        tasks_with_data(recipe, merge.adapters, "diagnostics: true")
