"""A recipe from wherever it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray_merge.errors import RecipeError
from ray_merge.recipe.model import Recipe, load_recipe
from ray_merge.recipe.source import MAX_RECIPE_BYTES, Source
from ray_merge.storage.store import open_store


def read_recipe(recipe: str | Path | dict[str, Any], output: str | None = None) -> tuple[Recipe, Source]:
    """A recipe from a local path, a URL or a mapping.

    Args:
        recipe: which.
        output: takes the place of the recipe's own.
    """
    if isinstance(recipe, str) and "://" in recipe:
        folder, _, name = recipe.rpartition("/")
        store = open_store(folder)
        info = store.info(name)
        if info is None:
            raise RecipeError(f"recipe {recipe} does not exist")
        if info.n_bytes > MAX_RECIPE_BYTES:  # a checkpoint given by mistake is not read whole
            raise RecipeError(
                f"recipe {recipe} is {info.n_bytes} bytes long, more than {MAX_RECIPE_BYTES}: not a recipe"
            )
        parsed, source = load_recipe(recipe, store.read(name).decode("utf-8", "replace"))
    else:
        parsed, source = load_recipe(recipe)
    return (parsed if output is None else parsed.model_copy(update={"output": output})), source
