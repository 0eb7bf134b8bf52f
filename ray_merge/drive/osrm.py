"""The loop that writes OSRM's adapters: ids -> what is there -> parts -> one file a task -> card -> config.

An adapter counts once its adapter_config.json is there, which is put last. Every object is put if absent: what is
there with the same id is kept, anything else is refused before a unit runs. A run that was killed anywhere is finished
by running it again; factors that were found are in the store.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray_merge.drive.events import Event
from ray_merge.drive.identify import base_versions
from ray_merge.drive.moments import MomentsResult, adapter_inputs, task_inputs
from ray_merge.drive.osrm_files import initial_card, initial_config
from ray_merge.errors import CheckpointError, OutputConflict
from ray_merge.identity import difference, digest
from ray_merge.plan.moments import MomentsPlan, TaskData
from ray_merge.plan.osrm import OsrmTask, required_init
from ray_merge.pool import Pool, Task
from ray_merge.recipe import Calibration, Recipe
from ray_merge.spec import Adapter
from ray_merge.storage.adapter import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from ray_merge.storage.commit import commit_bytes, pretty_json
from ray_merge.storage.digest import DigestCache
from ray_merge.storage.headers import read_header
from ray_merge.storage.store import Store, Stores, join
from ray_merge.work.osrm_job import JoinUnit, OsrmJob, PartUnit, SiteInit, part_path, read_inputs, read_state

OSRM_VERSION = 2
"""Raised whenever the same inputs would give other factors, or another header (work/osrm_job.py); part of the ids."""

OsrmPoolFactory = Callable[[OsrmJob, int], Pool]
"""Makes the pool for a job of so many units; called only when something is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an adapter goes, and what is there.

    Args:
        task: whose.
        url: its folder.
        task_id: 64 hex digits.
        config: adapter_config.json, as it is or will be.
        found: what its weights' header says of every site; empty where there are none.
        has_config: whether the config is there, which makes an adapter of the folder.
    """

    task: OsrmTask
    url: str
    task_id: str
    config: bytes
    found: Mapping[str, SiteInit]
    has_config: bool

    @property
    def complete(self) -> bool:
        """Nothing is left to do."""
        return self.has_config and bool(self.found)


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialAdapter:
    """One adapter after a run; `done` says whether this run wrote it or found it there."""

    task: str
    id: str
    url: str
    done: bool
    sites: Mapping[str, SiteInit]


@dataclass(frozen=True, slots=True, kw_only=True)
class OsrmResult:
    """What an init did.

    Args:
        adapters: in the recipe's order.
        moments: what was computed or reused for it; None where every adapter was there.
        units_run: by this run, besides those of moments.
        seconds: wall.
        remarks: task -> what a person should know of its directions.
    """

    adapters: tuple[InitialAdapter, ...]
    moments: MomentsResult | None
    units_run: int
    seconds: float
    remarks: Mapping[str, Sequence[str]]


def osrm_inputs(
    recipe: Recipe,
    tasks: Sequence[OsrmTask],
    plan: MomentsPlan,
    adapters: Mapping[str, Adapter],
    digests: DigestCache,
    stores: Stores,
) -> dict[str, dict[str, Any]]:
    """Task -> everything that decides its adapter's factors: the others' inputs, and how the rows are chosen.

    Its digest is the id. Not the ids of the moments: those also depend on which other sites are watched along.
    """
    init, base = required_init(recipe), dict(base_versions(plan.base, digests, stores))
    active = (recipe.calibration or Calibration()).features == "adapter"
    seen = {}
    for one in plan.tasks:
        own = adapters.get(one.name) if active else None
        seen[one.name] = task_inputs(plan, TaskData(one.name, one.data, own), digests, stores)
    found = {}
    for task in tasks:
        projected = adapters[task.name] if init.project else None
        found[task.name] = {
            "osrm": OSRM_VERSION,
            "task": task.name,
            "base": base,
            "others": [seen[name] for name in task.others],
            "init": init.model_dump(exclude={"output", "others", "target_modules"}),
            "seed": plan.calibration.seed,
            "sites": {site.site: site.module for site in task.sites},
            "projected": projected and adapter_inputs(projected, digests, stores),
        }
    return found


def look(
    recipe: Recipe,
    tasks: Sequence[OsrmTask],
    inputs: Mapping[str, Mapping[str, Any]],
    base_url: str,
    stores: Stores,
) -> list[Place]:
    """Where each adapter goes and what is there.

    Args:
        recipe: with an init.
        tasks: all of them.
        inputs: from `osrm_inputs`.
        base_url: where the base lies.
        stores: opens the output.

    Raises:
        OutputConflict: something else is there.
    """
    output = required_init(recipe).output
    return [
        _look(recipe, task, inputs[task.name], join(output, task.name), base_url, stores) for task in tasks
    ]


def _look(
    recipe: Recipe, task: OsrmTask, inputs: Mapping[str, Any], url: str, base_url: str, stores: Stores
) -> Place:
    store, ours = stores.open(url), initial_config(recipe, task, base_url)
    config = pretty_json(ours)
    has_config = store.info(CONFIG_FILE) is not None
    if has_config and (there := store.read(CONFIG_FILE)) != config:
        raise OutputConflict(
            f"{store.url}/{CONFIG_FILE} has sha256 {_sha256(there)}, this recipe makes {_sha256(config)} "
            f"({_changed(there, ours)}); choose another init.output, or remove that folder"
        )
    found = _found(store, inputs)
    return Place(
        task=task, url=store.url, task_id=digest(inputs), config=config, found=found, has_config=has_config
    )


def _found(store: Store, inputs: Mapping[str, Any]) -> dict[str, SiteInit]:
    if store.info(WEIGHTS_FILE) is None:
        return {}
    try:
        metadata = read_header(store, WEIGHTS_FILE).metadata
    except CheckpointError:
        metadata = {}
    (owner, found), task_id = read_state(metadata), digest(inputs)
    if owner != task_id:
        what = f"id {owner[:12]}" if owner else "something that init did not write"
        before = read_inputs(metadata)
        changed = f" ({difference(before, inputs)})" if before else ""
        raise OutputConflict(
            f"{store.url}/{WEIGHTS_FILE} holds {what}, this recipe makes id {task_id[:12]}{changed}; choose another "
            "init.output, or remove that folder"
        )
    return found


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _changed(there: bytes, ours: Mapping[str, object]) -> str:
    try:
        return difference(dict(json.loads(there)), ours) or "the same settings, written otherwise"
    except (ValueError, TypeError, RecursionError):
        return "it is no JSON object"


def write_adapters(
    job: OsrmJob,
    recipe: Recipe,
    places: Sequence[Place],
    base_url: str,
    make_pool: OsrmPoolFactory,
    progress: Callable[[Event], None] = lambda _: None,
) -> tuple[list[Place], int]:
    """Complete every adapter.

    Args:
        job: what the workers are told.
        recipe: with an init.
        places: of all adapters.
        base_url: where the base lies.
        make_pool: makes the pool.
        progress: called with every event.

    Returns:
        The places as they are now, and how many units ran.

    Raises:
        RunFailed: running again finishes what is left.
    """
    stores = Stores()
    lacking = [place.task for place in places if not place.found]
    parts = [unit for task in lacking for unit in _missing_parts(job, task, stores)]
    joins = [JoinUnit(task.name) for task in lacking]
    count, total = 0, len(parts) + len(joins)
    found = {place.task.name: place.found for place in places}
    progress(Event(kind="start", text=f"{len(lacking)} initial adapter(s)", units=(0, total)))
    try:
        with make_pool(job, total) if total else nullcontext() as pool:
            for units in (parts, joins):
                for done in pool.run([Task(unit.id, unit) for unit in units]) if pool else ():
                    count += 1
                    if done.value.found:
                        found[done.id.removeprefix("join/")] = done.value.found
                    progress(Event(kind="unit", text=done.id, units=(count, total)))
    finally:
        _sweep(job, stores)
    after = [replace(place, found=found[place.task.name]) for place in places]
    for place in after:
        folder = stores.open(place.url)
        card = initial_card(recipe, place.task, place.task_id, base_url, place.found)
        if not place.has_config:
            folder.put_if_absent(CARD_FILE, card, {})  # whoever wrote another one may keep it
        commit_bytes(folder, CONFIG_FILE, place.config, place.task_id)
        progress(Event(kind="merge", text=place.url, units=(count, total)))
    return after, count


def _missing_parts(job: OsrmJob, task: OsrmTask, stores: Stores) -> list[PartUnit]:
    task_id = job.ids[task.name]
    there = {info.path for info in stores.open(job.index.store).list(f"osrm/{task_id}")}
    return [
        PartUnit(task.name, part)
        for index, part in enumerate(task.parts)
        if part_path(task_id, index) not in there
    ]


def _sweep(job: OsrmJob, stores: Stores) -> None:
    """Remove this run's unfinished files."""
    root = stores.open(job.index.store).local_root
    folder = (Path(job.scratch) if root is None else root) / "attempts"
    shutil.rmtree(folder / job.attempt, ignore_errors=True)
    with suppress(OSError):
        folder.rmdir()
