"""Where each merge goes, and what is there already: complete, begun, or somebody else's."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ray_merge.errors import OutputConflict, RecipeError
from ray_merge.identity import difference
from ray_merge.recipe import Recipe
from ray_merge.spec import Receipt
from ray_merge.storage.commit import (
    MANIFEST,
    RECIPE,
    REMOVING,
    STATE_FOLDER,
    broken,
    has_receipts,
    read_manifest,
    read_receipts,
    recorded_id,
    refuse_removal,
    sizes_of,
)
from ray_merge.storage.store import Store, Stores, join


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One merge's place and what is known about it.

    Args:
        root: the output that it lies in.
        url: its folder.
        merge_id: 64 hex digits.
        inputs: what the id was made of.
        complete: True when its manifest is there, with what it stands for.
        receipts: by object name, of a run that was stopped; none below a manifest whose files are gone.
    """

    root: str
    url: str
    merge_id: str
    inputs: Mapping[str, Any]
    complete: bool
    receipts: Mapping[str, Receipt]


def today() -> str:
    """The day in UTC, as `{date}` is written."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


def output_root(template: str, merge_id: str, date: str | None = None) -> str:
    """`output` of a recipe with `{date}` (UTC day) and `{id}` (12 hex digits of the merge id) filled in."""
    day = date or today()
    if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", day):
        raise RecipeError(f"date {day!r}: write it as 2026-01-31")
    # Not str.format: it would also take {date.year} and {id:>9}.
    root = template.replace("{date}", day).replace("{id}", merge_id[:12])
    if "{" in root or "}" in root:
        raise RecipeError(f"output {template!r}: only {{date}} and {{id}} may stand in braces")
    return root


def store_url(recipe: Recipe) -> str:
    """The store of a recipe: `store`, or `.ray_merge` in the part of `output` that has no date and no id."""
    if recipe.store is not None:
        return recipe.store
    parts = recipe.output.split("/")
    fixed = next((index for index, part in enumerate(parts) if "{" in part), len(parts))
    return join("/".join(parts[:fixed]) or ("/" if recipe.output.startswith("/") else "."), STATE_FOLDER)


def look(
    template: str, name: str, merge_id: str, inputs: Mapping[str, Any], date: str | None, stores: Stores
) -> Target:
    """What is at a merge's place.

    Raises:
        OutputConflict: another merge, one that `gc` removes, or files that this package did not write.
    """
    root = stores.open(output_root(template, merge_id, date)).url
    url = join(root, *name.split("/"))
    store = stores.open(url)
    _refuse_inside(root, name, stores)
    _refuse_outside(root, store)
    target = Target(root=root, url=url, merge_id=merge_id, inputs=inputs, complete=False, receipts={})
    objects = sizes_of(store)
    if REMOVING in objects:
        refuse_removal(store)
    manifest = read_manifest(store) if MANIFEST in objects else None
    if manifest is not None:
        _check_owner(store, str(manifest.get("id")), merge_id, difference(manifest.get("inputs", {}), inputs))
        # Where it is broken all units run again, and adopt what is there still.
        return replace(target, complete=not broken(store, manifest, objects))
    owner = recorded_id(store) if RECIPE in objects else None
    if owner is None:
        state = f"{STATE_FOLDER}/"  # of a recipe whose output is this folder
        first = next((path for path in objects if not path.startswith(state)), None)
        if first is None:
            return target
        owner = recorded_id(store)  # another driver may have begun this merge since we looked
        objects = sizes_of(store)
        if owner is None and has_receipts(store, merge_id, objects):
            return target  # of a run that `gc` overtook: it is made again, and what is there is adopted
        if owner is None:
            raise OutputConflict(
                f"{url} holds something else ({first}) and no {RECIPE}; choose another output or empty that folder"
            )
    _check_owner(store, owner, merge_id, "an unfinished run of other inputs")
    return replace(target, receipts=read_receipts(store, merge_id, objects))


def _refuse_inside(root: str, name: str, stores: Stores) -> None:
    # `scale/lambda=0.2` inside a merge `scale` of another recipe: the outer folder would not be one merge.
    parts = name.split("/")
    for count in range(1, len(parts)):
        outer = stores.open(join(root, *parts[:count]))
        owner = recorded_id(outer)
        if owner is not None:
            raise OutputConflict(
                f"{outer.url} is merge id {owner[:12]}, and {name!r} would lie inside it; choose another output or name"
            )


def _refuse_outside(root: str, store: Store) -> None:
    if store.local_root is None:
        return
    leads = os.path.realpath(store.local_root)
    if not f"{leads}/".startswith(f"{os.path.realpath(root).rstrip('/')}/"):
        raise OutputConflict(
            f"{store.url} is a link that leads out of the output, to {leads}; give that folder as output, "
            "or remove the link"
        )


def _check_owner(store: Store, owner: str, merge_id: str, change: str) -> None:
    if owner != merge_id:
        raise OutputConflict(
            f"{store.url} holds merge id {owner[:12]}, this recipe makes {merge_id[:12]} ({change}); choose another "
            "output, or put {id} into it"
        )
