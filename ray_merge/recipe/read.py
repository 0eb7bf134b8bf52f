"""A recipe from wherever it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ray_merge.errors import RecipeError
from ray_merge.recipe.model import Recipe, load_recipe
from ray_merge.recipe.source import MAX_RECIPE_BYTES, Source
from ray_merge.storage.store import open_store

JOB_FOLDER = "/runtime_resources/working_dir_files/"
"""Part of the path of every folder that Ray unpacks a job's --working-dir into, and later throws away."""


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
    if output is not None:
        parsed = parsed.model_copy(update={"output": output})
    refuse_lost("output", parsed.output)
    refuse_lost("store", parsed.store)
    return parsed, source


def refuse_lost(what: str, url: str | None) -> None:
    """Refuse a place in the working directory of a Ray job, which is a copy that the cluster throws away.

    Args:
        what: the key of the recipe, for the message.
        url: where something would be written; None for nowhere.

    Raises:
        RecipeError: it lies there.
    """
    if url and "://" not in url and JOB_FOLDER in f"{os.path.abspath(url)}/":
        raise RecipeError(
            f"{what}: {url} would lie in the working directory of this Ray job, {os.path.abspath(url)}, which the "
            "cluster throws away; give a URL such as s3://bucket/name, or an absolute path on a shared disk"
        )
