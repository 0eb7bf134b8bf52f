"""Which sites of which task the store has, and which objects are left to be made.

Owns the names of objects. The first half of an id covers everything that decides the bytes of a site's entry: base,
data, sampling, the part, and the adapter where that is active; the second half names the sites. What any object of the
same first half holds of a site is what every other one would hold, so a run with other adapters reuses it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from ray_merge.errors import CheckpointError, RunFailed
from ray_merge.identity import digest
from ray_merge.plan.moments import MomentsPlan
from ray_merge.storage.headers import read_header
from ray_merge.storage.ordered import in_order
from ray_merge.storage.store import ObjectInfo, Store
from ray_merge.work.stage_job import METADATA_KEY, Wanted, moments_path

Key = tuple[str, str]
"""Task and part."""

Cover = dict[Key, dict[str, ObjectInfo]]
"""For each task and part the sites that the store has, in the part's order, each with the object that holds it."""

HALF = 32
"""Hex digits of either half of an id."""


def object_stem(document: Mapping[str, object]) -> str:
    """The first half of the ids of whatever is made of these inputs."""
    return digest(document)[:HALF]


def object_id(stem: str, sites: Iterable[str]) -> str:
    """The id of an object that holds some sites of a part, 64 hex digits."""
    return stem + digest(sorted(sites))[:HALF]


def covered(plan: MomentsPlan, stems: Mapping[Key, str], store: Store) -> Cover:
    """What the store has of everything that a plan wants.

    An object with exactly the wanted sites is known by its name. Others of the same stem, which a run with other
    adapters left, are asked for their sites; one that cannot be read holds none.
    """
    there = {info.path: info for info in store.list("moments")}
    by_stem: dict[str, list[ObjectInfo]] = {}
    for path, info in sorted(there.items()):
        by_stem.setdefault(Path(path).name[:HALF], []).append(info)
    parts = {part.name: part.modules for part in plan.parts}
    exact = {key: there.get(moments_path(object_id(stem, parts[key[1]]))) for key, stem in stems.items()}
    asked = [
        info
        for key, stem in stems.items()
        if (one := exact[key]) is None or not one.n_bytes
        for info in by_stem.get(stem, ())
    ]
    held = dict(
        zip([info.path for info in asked], in_order(lambda one: _sites_in(store, one), asked), strict=True)
    )
    cover: Cover = {}
    for key, stem in stems.items():
        found: dict[str, ObjectInfo] = {}
        if (one := exact[key]) is not None and one.n_bytes:
            found = dict.fromkeys(parts[key[1]], one)
        for info in by_stem.get(stem, ()):
            for site in held.get(info.path, ()):
                found.setdefault(site, info)
        cover[key] = {site: found[site] for site in parts[key[1]] if site in found}
    return cover


def _sites_in(store: Store, info: ObjectInfo) -> tuple[str, ...]:
    try:
        return tuple(json.loads(read_header(store, info.path).metadata[METADATA_KEY])["sites"])
    except (CheckpointError, KeyError, ValueError, TypeError):
        return ()


def missing_objects(plan: MomentsPlan, stems: Mapping[Key, str], cover: Cover) -> dict[Key, Wanted]:
    """The objects that have to be made, each of the sites that no other holds."""
    parts = {part.name: part.modules for part in plan.parts}
    missing = {}
    for key, stem in stems.items():
        sites = tuple(site for site in parts[key[1]] if site not in cover[key])
        if sites:
            missing[key] = Wanted(key[1], object_id(stem, sites), sites)
    return missing


def check_free(missing: Iterable[Wanted], store: Store) -> None:
    """Refuse to make an object whose name is taken: it was asked for its sites, and is damaged.

    Raises:
        RunFailed: the object; an object is never overwritten.
    """
    there = {info.path for info in store.list("moments")}
    for one in missing:
        if moments_path(one.id) in there:
            raise RunFailed(f"{store.url}/{moments_path(one.id)} is damaged; remove it and run again")


def by_task(plan: MomentsPlan, cover: Cover) -> dict[str, dict[str, ObjectInfo]]:
    """Task -> site -> the object that holds it."""
    found: dict[str, dict[str, ObjectInfo]] = {task.name: {} for task in plan.tasks}
    for (task, _), sites in cover.items():
        found[task] |= sites
    return found
