"""YAML -> validated recipe -> named merges."""

from ray_merge.recipe.expand import expand, select
from ray_merge.recipe.model import AdapterSource, Recipe, load_recipe, parse_size
from ray_merge.recipe.source import Source

__all__ = ["AdapterSource", "Recipe", "Source", "expand", "load_recipe", "parse_size", "select"]
