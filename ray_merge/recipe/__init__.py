"""YAML -> validated recipe -> named merges."""

from ray_merge.recipe.expand import expand, select
from ray_merge.recipe.model import (
    AdapterSource,
    Calibration,
    DataSource,
    Recipe,
    load_recipe,
    require_merges,
)
from ray_merge.recipe.placement import SPREAD, Placement
from ray_merge.recipe.size import parse_size
from ray_merge.recipe.source import Source
from ray_merge.recipe.urls import named_urls

__all__ = [
    "SPREAD",
    "AdapterSource",
    "Calibration",
    "DataSource",
    "Placement",
    "Recipe",
    "Source",
    "expand",
    "load_recipe",
    "named_urls",
    "parse_size",
    "require_merges",
    "select",
]
