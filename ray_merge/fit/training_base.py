"""What each adapter calls the base that it was trained on, against the recipe's; from configs alone."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ray_merge.errors import AdapterError
from ray_merge.recipe import Recipe
from ray_merge.spec import Adapter


def check_bases(recipe: Recipe, adapters: Mapping[str, Adapter]) -> list[str]:
    """Compare the base that each adapter names with the recipe's; shapes were compared already."""
    accepted = {name.lower() for name in recipe.base_model_names}
    hub = re.fullmatch(r"hf://(?:models/)?([^/@]+/[^/@]+)(?:@.*)?/?", recipe.base_model)
    warnings: dict[str, str] = {}
    named: dict[str, tuple[str, str]] = {}
    for adapter in adapters.values():
        name = str(adapter.config.get("base_model_name_or_path") or "")
        if not name or name.lower() in accepted:
            continue
        is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
        if hub and is_hub_id and name.lower() != hub[1].lower():
            raise AdapterError(
                f"adapter {adapter.name} was trained on {name}, the recipe's base is {hub[1]}; if they are the same "
                f"weights, add base_model_names: [{name}]"
            )
        if is_hub_id:
            named.setdefault(name.lower(), (adapter.name, name))
        if not (hub and is_hub_id) and not _same_folder(name, hub[1] if hub else recipe.base_model):
            warnings[name] = (
                f"adapter {adapter.name} says it was trained on {name}; {recipe.base_model} has the same names and "
                f"shapes, which does not prove the same weights (base_model_names: [{name}] says that it is so)"
            )
    if len(named) > 1:
        (first, one), (second, other) = list(named.values())[:2]
        raise AdapterError(
            f"adapter {first} was trained on {one}, adapter {second} on {other}; if they are the same weights, add "
            f"base_model_names: [{one}, {other}]"
        )
    return list(warnings.values())


def _same_folder(name: str, base: str) -> bool:
    last = name.rstrip("/").rpartition("/")[2].lower()
    return last == base.rstrip("/").rpartition("/")[2].lower()
