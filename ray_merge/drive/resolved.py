"""The recipe of one merge with every default written out: what a reader needs to make it again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from ray_merge.drive.outputs import store_url
from ray_merge.plan import Plan
from ray_merge.plan.statistics import needs_data
from ray_merge.recipe import Calibration
from ray_merge.spec import Merge
from ray_merge.storage.commit import id_line
from ray_merge.storage.store import open_store


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
                **recipe.adapters[name].model_dump(exclude_none=True, exclude_defaults=True, mode="json"),
                **_url(plan, name),
            }
            for name in _adapters(plan, merge)
        },
        "merges": [_entry(merge)],
    }
    for key in ("tied", "base_numerics", "key_mapping"):
        value = getattr(recipe, key)
        if value != type(recipe).model_fields[key].get_default(call_default_factory=True):
            document[key] = value
    if recipe.base_model_names:
        document["base_model_names"] = list(recipe.base_model_names)
    if recipe.out_dtype is not None:
        document["out_dtype"] = recipe.out_dtype
    if recipe.diagnostics:
        document["diagnostics"] = True
    if needs_data(recipe, merge):
        document["store"] = open_store(store_url(recipe)).url
        document["calibration"] = (recipe.calibration or Calibration()).model_dump()
    return (id_line(merge_id) + yaml.safe_dump(document, sort_keys=False, allow_unicode=True)).encode()


def _adapters(plan: Plan, merge: Merge) -> list[str]:
    # A combination takes its part of a mapping that the sweep has for all adapters; the others must stay known.
    named = set(_keys([value for _, value in merge.sweep])) if merge.combined else set()
    return [name for name in plan.recipe.adapters if name in merge.adapters or name in named]


def _keys(value: Any) -> Iterator[str]:
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _keys(item)
    if isinstance(value, Mapping):
        yield from value


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def _url(plan: Plan, name: str) -> dict[str, Any]:
    path = plan.recipe.adapters[name].path
    initial = plan.recipe.adapters[name].initial
    urls: dict[str, Any] = {} if path is None else {"path": open_store(path).url}
    data = plan.recipe.adapters[name].data
    if data is not None:
        urls["data"] = {**data.model_dump(exclude_none=True), "path": _absolute(data.path)}
    labelled = plan.recipe.adapters[name].eval
    if labelled is not None:
        urls["eval"] = {**labelled.model_dump(exclude_defaults=True), "path": _absolute(labelled.path)}
    texts = plan.recipe.adapters[name].head
    if texts is not None:
        urls["head"] = {**texts.model_dump(), "path": _absolute(texts.path)}
    return urls | ({} if initial is None else {"initial": open_store(initial).url})


def _entry(merge: Merge) -> dict[str, Any]:
    # Written as the sweep, combination and preferences of one, because only an entry that expands gets such a name.
    swept = dict(merge.sweep)
    entry: dict[str, Any] = {
        "name": merge.name.split("/")[0],
        "merge_method": merge.method,
        "adapters": list(merge.adapters),
        "parameters": {key: value for key, value in merge.parameters.items() if key not in swept},
        "export": merge.export,
        "export_rank": merge.export_rank,
        "export_tolerance": merge.export_tolerance,
        "seed": merge.seed,
    }
    entry |= {key: value for key in ("export_class", "heads") if (value := getattr(merge, key)) is not None}
    if swept:
        entry["sweep"] = {key: [value] for key, value in swept.items()}
    if merge.combined:
        entry["combinations"] = {"choose": len(merge.adapters)}
    if merge.preferred:
        entry["preferences"] = [entry["parameters"].pop("preference")]
    return entry
