"""The loop that computes moments: ids -> what is in the store -> check the data -> stages -> objects.

An object's name is its id, and its id covers everything that decides its bytes: base, data, sampling, sites, and the
adapter where that is active. What is there already is reused by every later run; what is missing is computed, and a
run that was killed anywhere is finished by running it again.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ray_merge.calibration import data_identity
from ray_merge.drive.events import Event
from ray_merge.drive.identify import Versions, base_versions, file_versions
from ray_merge.errors import RunFailed
from ray_merge.identity import MOMENTS_VERSION, digest
from ray_merge.plan.fisher import Likelihood
from ray_merge.plan.moments import MomentsPlan, TaskData
from ray_merge.pool_steps import Step, StepPool
from ray_merge.spec import Adapter, Site
from ray_merge.storage.adapter import CONFIG_FILE as ADAPTER_CONFIG
from ray_merge.storage.digest import DigestCache
from ray_merge.storage.store import ObjectInfo, Stores
from ray_merge.work.job import MomentsIndex
from ray_merge.work.stage_job import CheckUnit, DataCheck, ForwardUnit, StageJob, Stored, moments_path

StepPoolFactory = Callable[[StageJob], StepPool]
"""Makes the pool with one place for each stage; called only when something is missing."""

Placement = Literal["spread", "one_per_node"]

Key = tuple[str, str]
"""Task and part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What is computed of every task's inputs.

    Args:
        what: in words.
        inputs: everything but the base and the part that decides an object of a task.
        steps: those that make what is missing: (plan, ids, missing) -> steps, chain by chain.
        likelihoods: task -> what is differentiated.
    """

    what: str
    inputs: Callable[[MomentsPlan, TaskData, DigestCache, Stores], dict[str, Any]]
    steps: Callable[[MomentsPlan, Mapping[Key, str], Mapping[Key, str]], list[Step]]
    likelihoods: Mapping[str, Likelihood] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class MomentsResult:
    """What a computation of moments did.

    Args:
        index: where they lie.
        ids: (task, part) -> id.
        computed: objects that this run made.
        reused: objects that were there.
        units_run: (task, stage) units of this run.
        checks: what each task's data held; empty where nothing was missing.
        stages: how many.
        seconds: wall.
        n_bytes: of the objects that were made.
    """

    index: MomentsIndex
    ids: Mapping[Key, str]
    computed: int
    reused: int
    units_run: int
    checks: tuple[DataCheck, ...]
    stages: int
    seconds: float
    n_bytes: int


def ensure_moments(
    plan: MomentsPlan,
    store: str,
    adapters: Mapping[str, Adapter],
    sites: Mapping[str, Site],
    *,
    cache: Path,
    device: str,
    make_pool: StepPoolFactory,
    placement: Placement = "spread",
    progress: Callable[[Event], None] = lambda _: None,
    kind: Kind | None = None,
) -> MomentsResult:
    """Compute the moments that the store lacks.

    Args:
        plan: what is needed.
        store: URL of the store.
        adapters: those that are active while their task's inputs run.
        sites: of those adapters.
        cache: node-local folder.
        device: torch device of the workers.
        make_pool: makes the pool.
        placement: of the stages over a cluster's nodes.
        progress: called with every event.
        kind: what is computed; moments by default.

    Raises:
        Refusal: found before anything was written: data that cannot be used.
        RunFailed: found later; running again computes what is left.
    """
    started = time.monotonic()
    stores, kind = Stores(), kind or MOMENTS
    ids = object_ids(plan, kind, DigestCache(cache / "digests"), stores)
    missing = _missing(plan, ids, _there(stores, store))
    job = StageJob(
        plan=plan,
        adapters=adapters,
        sites=sites,
        likelihoods=kind.likelihoods,
        store=stores.open(store).url,
        scratch=str(cache / "scratch"),
        cache=str(cache),
        attempt=uuid.uuid4().hex[:12],
        device=device,
        placement=placement,
    )
    steps = kind.steps(plan, ids, missing)
    checks, made = _run(job, kind, steps, missing, make_pool, progress, stores) if steps else ([], [])
    there = _there(stores, store)
    lost = _missing(plan, ids, there)
    if lost:
        task, part = next(iter(lost))
        raise RunFailed(
            f"{part} has no {kind.what} of {task}: {plan.class_name} never called it while the data ran through; leave "
            "it out of the adapters' modules, or use task data that reaches it"
        )
    return MomentsResult(
        index=_index(plan, ids, there, job.store),
        ids=ids,
        computed=len(made),
        reused=len(ids) - len(missing),
        units_run=len(steps),
        checks=tuple(checks),
        stages=len(plan.stages),
        seconds=time.monotonic() - started,
        n_bytes=sum(one.n_bytes for one in made),
    )


def object_ids(plan: MomentsPlan, kind: Kind, digests: DigestCache, stores: Stores) -> dict[Key, str]:
    """(task, part) -> the id of what is computed of it, 64 hex digits."""
    base = base_versions(plan.base, digests, stores)
    ids = {}
    for task in plan.tasks:
        inputs = kind.inputs(plan, task, digests, stores)
        for part in plan.parts:
            document = {**inputs, "base": dict(base), "part": part.name, "sites": sorted(part.modules)}
            ids[task.name, part.name] = digest(document)
    return ids


def task_inputs(plan: MomentsPlan, task: TaskData, digests: DigestCache, stores: Stores) -> dict[str, Any]:
    """Everything but the base and the part that decides the moments of a task."""
    return {
        "moments": MOMENTS_VERSION,
        "class": plan.class_name,
        "task": task.name,  # the sample depends on it
        "data": dict(data_identity(task.data, stores, digests)),
        "calibration": plan.calibration.model_dump(),
        "adapter": None if task.adapter is None else _adapter_inputs(task.adapter, digests, stores),
    }


def _adapter_inputs(adapter: Adapter, digests: DigestCache, stores: Stores) -> dict[str, Any]:
    """Versions of its files and of those that it started from, and which module each site was taken for."""
    found: dict[str, Any] = dict(_files(adapter, digests, stores))
    if adapter.initial is not None:
        found["initial"] = dict(_files(adapter.initial, digests, stores))
    return {**found, "modules": digest(dict(adapter.modules))}


def _files(adapter: Adapter, digests: DigestCache, stores: Stores) -> Versions:
    return file_versions(stores.open(adapter.url), [ADAPTER_CONFIG, adapter.file], digests)


def _there(stores: Stores, store: str) -> dict[str, ObjectInfo]:
    return {info.path: info for info in stores.open(store).list("moments")}


def _missing(plan: MomentsPlan, ids: Mapping[Key, str], there: Mapping[str, ObjectInfo]) -> dict[Key, str]:
    return {key: one for key, one in ids.items() if moments_path(one) not in there}


def forward_steps(plan: MomentsPlan, ids: Mapping[Key, str], missing: Mapping[Key, str]) -> list[Step]:
    """The steps that make what is missing: each task from the first stage to the last one that lacks something."""
    steps: list[Step] = []
    for task in plan.tasks:
        wanted = wanted_parts(plan, task.name, ids, missing)
        last = max((stage for stage, some in enumerate(wanted) if some), default=-1)
        steps += forward_chain(task.name, wanted[: last + 1], hand_on_last=False)
    return steps


def wanted_parts(
    plan: MomentsPlan, task: str, ids: Mapping[Key, str], missing: Mapping[Key, str]
) -> list[tuple[tuple[str, str], ...]]:
    """For each stage the parts that lack an object of a task, with its id."""
    return [
        tuple(
            (part.name, ids[task, part.name]) for part in plan.parts_of(stage) if (task, part.name) in missing
        )
        for stage in range(len(plan.stages))
    ]


def forward_chain(
    task: str, wanted: Sequence[tuple[tuple[str, str], ...]], *, hand_on_last: bool
) -> list[Step]:
    """A task's inputs through the first stages, one step each.

    Args:
        task: whose inputs.
        wanted: for each of those stages the parts to make, with their ids.
        hand_on_last: whether the last of those stages hands on too.
    """
    steps: list[Step] = []
    for stage, parts in enumerate(wanted):
        unit = ForwardUnit(task, stage, parts, hand_on=hand_on_last or stage < len(wanted) - 1)
        steps.append(Step(unit.id, unit, stage, (steps[-1].id,) if steps else (), task))
    return steps


MOMENTS = Kind(what="moments", inputs=task_inputs, steps=forward_steps)


def _run(
    job: StageJob,
    kind: Kind,
    steps: Sequence[Step],
    missing: Mapping[Key, str],
    make_pool: StepPoolFactory,
    progress: Callable[[Event], None],
    stores: Stores,
) -> tuple[list[DataCheck], list[Stored]]:
    plan = job.plan
    names = [task.name for task in plan.tasks if any(task.name == name for name, _ in missing)]
    n_stages = len(plan.stages)
    text = f"{kind.what} of {len(names)} task(s) in {n_stages} stage(s): {len(missing)} object(s) are missing"
    progress(Event(kind="start", text=text, units=(0, len(steps))))
    made: list[Stored] = []
    try:
        with make_pool(job) as pool:
            units = [CheckUnit(name) for name in names]
            # Any place can look at data; all of them do, so that it is done sooner.
            looks = [
                Step(unit.id, unit, index % len(plan.stages), (), unit.task)
                for index, unit in enumerate(units)
            ]
            checks = {done.value.task: done.value for done in pool.run(looks)}
            progress(Event(kind="check", text=f"looked at the data of {len(checks)} task(s)"))
            for count, done in enumerate(pool.run(steps), start=1):
                made += done.value
                progress(Event(kind="unit", text=done.id, units=(count, len(steps))))
    finally:
        _sweep(job, stores)
    return [checks[name] for name in names], [one for one in made if not one.adopted]


def _index(
    plan: MomentsPlan, ids: Mapping[Key, str], there: Mapping[str, ObjectInfo], store: str
) -> MomentsIndex:
    objects: dict[str, dict[str, ObjectInfo]] = {task.name: {} for task in plan.tasks}
    for part in plan.parts:
        for task in plan.tasks:
            info = there[moments_path(ids[task.name, part.name])]
            objects[task.name] |= dict.fromkeys(part.modules, info)
    return MomentsIndex(store=store, objects=objects, conv1d=plan.conv1d, unwatched=plan.unwatched)


def _sweep(job: StageJob, stores: Stores) -> None:
    """Remove this run's unfinished files."""
    root = stores.open(job.store).local_root
    folder = (Path(job.scratch) if root is None else root) / "attempts"
    shutil.rmtree(folder / job.attempt, ignore_errors=True)
    with suppress(OSError):
        folder.rmdir()
