"""The recipe of one merge with every default written out: what a reader needs to make it again."""

from __future__ import annotations

from typing import Any

import yaml

from ray_merge.plan import Plan
from ray_merge.spec import Merge
from ray_merge.storage.commit import id_line


def resolved_recipe(plan: Plan, merge: Merge, merge_id: str) -> bytes:
    """YAML of a recipe that makes this merge alone, from any working directory; its first line is the merge id."""
    recipe = plan.recipe
    document: dict[str, Any] = {
        "base_model": plan.base.url,
        "output": recipe.output,
        "dtype": recipe.dtype,
        "max_shard_size": recipe.max_shard_size,
        "adapters": {
            name: {
                **recipe.adapters[name].model_dump(exclude_none=True, mode="json"),
                "path": plan.adapters[name].url,
            }
            for name in merge.adapters
        },
        "merges": [_entry(merge)],
    }
    if recipe.base_model_names:
        document["base_model_names"] = list(recipe.base_model_names)
    if recipe.out_dtype is not None:
        document["out_dtype"] = recipe.out_dtype
    return (id_line(merge_id) + yaml.safe_dump(document, sort_keys=False, allow_unicode=True)).encode()


def _entry(merge: Merge) -> dict[str, Any]:
    # Written as the sweep and combination of one, because only an entry that expands gets such a name.
    swept = dict(merge.sweep)
    entry: dict[str, Any] = {
        "name": merge.name.split("/")[0],
        "merge_method": merge.method,
        "adapters": list(merge.adapters),
        "parameters": {key: value for key, value in merge.parameters.items() if key not in swept},
        "export": merge.export,
        "seed": merge.seed,
    }
    if swept:
        entry["sweep"] = {key: [value] for key, value in swept.items()}
    if merge.combined:
        entry["combinations"] = {"choose": len(merge.adapters)}
    return entry
