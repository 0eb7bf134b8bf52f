"""What is scored: the base, each single adapter, and every merge that is complete.

Reads headers and manifests only. A merge is known by its id, as a run knows it: a folder that holds another merge is
refused, one that is not complete is named and left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_merge.drive.identify import merge_id, merge_inputs, read_inputs_identity
from ray_merge.drive.outputs import Target, look, output_root, today
from ray_merge.errors import RecipeError
from ray_merge.fit import fit_adapters
from ray_merge.plan import Plan
from ray_merge.plan.export_class import leading
from ray_merge.plan.statistics import needs_data
from ray_merge.recipe import AdapterSource
from ray_merge.recipe.names import BASE, SINGLE
from ray_merge.spec import Adapter, Merge
from ray_merge.storage.adapter import read_adapter
from ray_merge.storage.checkpoint import Checkpoint, read_checkpoint
from ray_merge.storage.commit import read_manifest
from ray_merge.storage.digest import DigestCache
from ray_merge.storage.store import Stores, join
from ray_merge.work.evaluate_job import ScoredModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The merges of a recipe as they lie there.

    Args:
        complete: in recipe order, with where they are.
        missing: names of those that are not complete.
        root: folder that the result goes to.
    """

    complete: tuple[tuple[Merge, Target], ...]
    missing: tuple[str, ...]
    root: str


def find_merges(plan: Plan, cache: Path, date: str | None, stores: Stores) -> Found:
    """Look for every merge of a plan.

    Args:
        plan: of the recipe.
        cache: node-local folder, for digests.
        date: UTC day for `{date}` in `output`; today by default.
        stores: opens the output.

    Raises:
        OutputConflict: a folder holds something else.
    """
    day, output = date or today(), plan.recipe.output
    recorded = _recorded_data(plan, output, day, stores)
    inputs = read_inputs_identity(plan, DigestCache(cache / "digests"), stores, recorded)
    targets = []
    for merge in plan.merges:
        document = merge_inputs(plan, merge, inputs)
        targets.append(look(output, merge.name, merge_id(document), document, day, stores))
    pairs = list(zip(plan.merges, targets, strict=True))
    return Found(
        complete=tuple(pair for pair in pairs if pair[1].complete),
        missing=tuple(merge.name for merge, target in pairs if not target.complete),
        root=_root(output, day, stores),
    )


def _recorded_data(plan: Plan, output: str, day: str, stores: Stores) -> dict[str, dict[str, Any]]:
    """Task -> what its data were, as the manifests say of those complete merges that needed any."""
    found: dict[str, dict[str, Any]] = {}
    if "{id}" in output:
        return found  # the id says where a merge is, and the data are part of it
    root = output_root(output, "", day)
    for merge in plan.merges:
        if needs_data(plan.recipe, merge):
            manifest = read_manifest(stores.open(join(root, *merge.name.split("/")))) or {}
            for name, data in manifest.get("inputs", {}).get("data", {}).items():
                found[name] = {**data, **found.get(name, {})}
    return found


def _root(output: str, day: str, stores: Stores) -> str:
    """The folder of all merges: `output`, up to a part that names a merge's id."""
    parts = output.split("/")
    fixed = next((index for index, part in enumerate(parts) if "{id}" in part), len(parts))
    return stores.open(output_root("/".join(parts[:fixed]) or ".", "", day)).url


def models_of(
    plan: Plan, base: Checkpoint, tasks: Sequence[str], found: Found, stores: Stores
) -> dict[str, ScoredModel]:
    """The models by name, in the order in which they are scored: those on the base's own weights first.

    Args:
        plan: of the recipe.
        base: headers of the base as it lies there, before anything was untied.
        tasks: whose single adapters are scored.
        found: the merges.
        stores: opens them.

    Raises:
        Refusal: an adapter that cannot be active, a merge that cannot be read.
    """
    models = {BASE: ScoredModel(name=BASE, checkpoint=plan.base, texts=plan.base)}
    for name in tasks:
        models[f"{SINGLE}/{name}"] = _single(plan, plan.adapters[name])
    of_adapters = [pair for pair in found.complete if pair[0].export == "adapter"]
    for merge, target in of_adapters:
        models[merge.name] = _exported(plan, base, merge, target, stores)
    for merge, target in found.complete:
        if merge.export != "adapter":
            models[merge.name] = _checkpoint(plan, merge, target, stores)
    return models


def _single(plan: Plan, adapter: Adapter) -> ScoredModel:
    if adapter.tokens:
        raise RecipeError(
            f"adapters.{adapter.name}: it trains single tokens of {next(iter(adapter.tokens))}, which cannot be active "
            "on the base; take its eval out of the recipe, or score its merges with --command"
        )
    sites = {name: plan.sites[name] for name in adapter.factors}
    return ScoredModel(
        name=f"{SINGLE}/{adapter.name}", checkpoint=plan.base, texts=plan.base, adapter=adapter, sites=sites
    )


def _exported(plan: Plan, base: Checkpoint, merge: Merge, target: Target, stores: Stores) -> ScoredModel:
    """An exported adapter on the base, fitted as the adapter was whose names it has."""
    url = join(target.url, "adapter")
    first = plan.recipe.adapters[leading(merge, plan.adapters).name]
    recipe = plan.recipe.model_copy(
        update={"adapters": {merge.name: AdapterSource(path=url, key_mapping=first.key_mapping)}}
    )
    stored = read_adapter(merge.name, stores.open(url))
    fitted = fit_adapters(recipe, base, {merge.name: stored})
    return ScoredModel(
        name=merge.name,
        checkpoint=plan.base,
        texts=plan.base,
        adapter=fitted.adapters[merge.name],
        sites=fitted.sites,
    )


def _checkpoint(plan: Plan, merge: Merge, target: Target, stores: Stores) -> ScoredModel:
    checkpoint = read_checkpoint(stores.open(target.url))
    grown = any(plan.resized(plan.adapters[name]) for name in merge.adapters)
    return ScoredModel(name=merge.name, checkpoint=checkpoint, texts=checkpoint if grown else plan.base)


def changed_bytes(model: ScoredModel) -> int:
    """Of the weights that an active adapter changes, in float32."""
    if model.adapter is None:
        return 0
    tensors = dict.fromkeys(model.sites[name].tensor for name in model.adapter.factors)
    return sum(4 * math.prod(model.checkpoint.tensors[tensor].shape) for tensor in tensors)
