"""The loop that computes moments: ids -> what is in the store -> check the data -> stages -> objects.

What is there already (drive/cover.py) is reused by every later run; what is missing is computed, and a run that was
killed anywhere is finished by running it again.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ray_merge.calibration import data_identity
from ray_merge.drive.cover import Key, by_task, check_free, covered, missing_objects, object_stem
from ray_merge.drive.events import Event
from ray_merge.drive.identify import Versions, calibration_inputs, file_versions, model_versions
from ray_merge.errors import RunFailed
from ray_merge.identity import MOMENTS_VERSION, digest
from ray_merge.plan.fisher import Likelihood
from ray_merge.plan.moments import MomentsPlan, TaskData
from ray_merge.pool_steps import Step, StepPool
from ray_merge.recipe import SPREAD, Placement
from ray_merge.spec import Adapter, Site
from ray_merge.storage.adapter import CONFIG_FILE as ADAPTER_CONFIG
from ray_merge.storage.digest import DigestCache
from ray_merge.storage.store import Stores
from ray_merge.work.job import MomentsIndex
from ray_merge.work.stage_job import (
    CheckUnit,
    DataCheck,
    ForwardUnit,
    RehearsalUnit,
    StageJob,
    Stored,
    Wanted,
)

StepPoolFactory = Callable[[StageJob], StepPool]
"""Makes the pool with one place for each stage; called only when something is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What is computed of every task's inputs.

    Args:
        what: in words.
        inputs: everything but the base and the part that decides an object of a task.
        steps: those that make what is missing: (plan, missing) -> steps, chain by chain.
        likelihoods: task -> what is differentiated.
    """

    what: str
    inputs: Callable[[MomentsPlan, TaskData, DigestCache, Stores], dict[str, Any]]
    steps: Callable[[MomentsPlan, Mapping[Key, Wanted]], list[Step]]
    likelihoods: Mapping[str, Likelihood] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class MomentsResult:
    """What a computation of moments did.

    Args:
        index: where they lie.
        ids: (task, part) -> id of the object that this run made, or else of the one that holds the part's first site.
        computed: objects that this run made.
        reused: parts of tasks that this run made nothing of.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Where and how moments are computed.

    Args:
        store: URL of the store.
        adapters: those that are active while their task's inputs run.
        sites: of those adapters.
        cache: node-local folder.
        device: torch device of the workers.
        make_pool: makes the pool.
        placement: of the stages over a cluster's nodes.
        progress: called with every event.
        checks: which data are looked at before anything is written; those of the tasks that lack something by default.
    """

    store: str
    adapters: Mapping[str, Adapter]
    sites: Mapping[str, Site]
    cache: Path
    device: str
    make_pool: StepPoolFactory
    placement: Placement = SPREAD
    progress: Callable[[Event], None] = lambda _: None
    checks: Sequence[CheckUnit] | None = None


def ensure_moments(plan: MomentsPlan, work: Work, kind: Kind | None = None) -> MomentsResult:
    """Compute the moments that the store lacks.

    Args:
        plan: what is needed.
        work: where and how.
        kind: what is computed; moments by default.

    Raises:
        Refusal: found before anything was written: data that cannot be used, a model that cannot be cut.
        RunFailed: found later; running again computes what is left.
    """
    started = time.monotonic()
    stores, kind = Stores(), kind or MOMENTS
    digests = DigestCache(work.cache / "digests")
    stems, versions = object_stems(plan, kind, digests, stores)
    store = stores.open(work.store)
    cover = covered(plan, stems, store)
    missing = missing_objects(plan, stems, cover)
    check_free(missing.values(), store)
    job = StageJob(
        plan=plan,
        adapters=work.adapters,
        sites=work.sites,
        likelihoods=kind.likelihoods,
        versions=versions,
        store=store.url,
        scratch=str(work.cache / "scratch"),
        cache=str(work.cache),
        attempt=uuid.uuid4().hex[:12],
        device=work.device,
        placement=work.placement,
    )
    steps = kind.steps(plan, missing)
    checks, made = _run(job, kind, steps, missing, work, stores) if steps else ([], [])
    cover = covered(plan, stems, store) if steps else cover
    lost = missing_objects(plan, stems, cover)
    if lost:
        (task, _), one = next(iter(lost.items()))
        raise RunFailed(
            f"{one.sites[0]} has no {kind.what} of {task}: {plan.class_name} never called it while the data ran "
            "through; leave it out of the adapters' modules, or use task data that reaches it"
        )
    return MomentsResult(
        index=MomentsIndex(
            store=job.store, objects=by_task(plan, cover), conv1d=plan.conv1d, unwatched=plan.unwatched
        ),
        ids={
            key: missing[key].id if key in missing else Path(next(iter(sites.values())).path).stem
            for key, sites in cover.items()
        },
        computed=len(made),
        reused=len(stems) - len(made),
        units_run=len(steps),
        checks=tuple(checks),
        stages=len(plan.stages),
        seconds=time.monotonic() - started,
        n_bytes=sum(one.n_bytes for one in made),
    )


def object_stems(
    plan: MomentsPlan, kind: Kind, digests: DigestCache, stores: Stores
) -> tuple[dict[Key, str], dict[str, str]]:
    """First half of the ids, 32 hex digits: all but the sites; and a digest of each task's data."""
    base = dict(model_versions(plan.base, digests, stores))
    stems, versions = {}, {}
    for task in plan.tasks:
        inputs = kind.inputs(plan, task, digests, stores)
        versions[task.name] = digest(inputs["data"])
        for part in plan.parts:
            stems[task.name, part.name] = object_stem({**inputs, "base": base, "part": part.name})
    return stems, versions


def task_inputs(
    plan: MomentsPlan, task: TaskData, digests: DigestCache, stores: Stores, *, fisher: bool = False
) -> dict[str, Any]:
    """Everything but the base, the part and the sites that decides the moments of a task."""
    return {
        "moments": MOMENTS_VERSION,
        "class": plan.class_name,
        "task": task.name,  # the sample depends on it
        "data": dict(data_identity(task.data, stores, digests, where=f"adapters.{task.name}.data")),
        "calibration": calibration_inputs(plan.calibration, fisher=fisher),
        "adapter": None if task.adapter is None else adapter_inputs(task.adapter, digests, stores),
    }


def adapter_inputs(adapter: Adapter, digests: DigestCache, stores: Stores) -> dict[str, Any]:
    """Versions of an adapter's files and of those that it started from, and what each of its tensors does."""
    found: dict[str, Any] = dict(_files(adapter, digests, stores))
    if adapter.initial is not None:
        found["initial"] = dict(_files(adapter.initial, digests, stores))
    fitted = {
        "factors": {site: asdict(update) for site, update in adapter.factors.items()},
        "modules": dict(adapter.modules),
        "replaced": {tensor: asdict(entry) for tensor, entry in adapter.replaced.items()},
        "heads": [asdict(entry) for entry in adapter.heads],
    }
    return {**found, "fitted": digest(fitted)}


def _files(adapter: Adapter, digests: DigestCache, stores: Stores) -> Versions:
    return file_versions(stores.open(adapter.url), [ADAPTER_CONFIG, adapter.file], digests)


def check_units(plan: MomentsPlan, kind: Kind, names: Collection[str] | None = None) -> list[CheckUnit]:
    """What has to be looked at before anything of a plan is written; of all tasks by default."""
    chosen = [task for task in plan.tasks if names is None or task.name in names]
    # Without its adapter, which is large and tells nothing about data.
    return [CheckUnit(replace(task, adapter=None), kind.likelihoods.get(task.name)) for task in chosen]


def forward_steps(plan: MomentsPlan, missing: Mapping[Key, Wanted]) -> list[Step]:
    """The steps that make what is missing: each task from the first stage to the last one that lacks something."""
    steps: list[Step] = []
    for task in plan.tasks:
        wanted = wanted_objects(plan, task.name, missing)
        last = max((stage for stage, some in enumerate(wanted) if some), default=-1)
        steps += forward_chain(task.name, wanted[: last + 1], hand_on_last=False)
    return steps


def wanted_objects(plan: MomentsPlan, task: str, missing: Mapping[Key, Wanted]) -> list[tuple[Wanted, ...]]:
    """For each stage the objects of a task that it has to make."""
    return [
        tuple(missing[task, part.name] for part in plan.parts_of(stage) if (task, part.name) in missing)
        for stage in range(len(plan.stages))
    ]


def forward_chain(task: str, wanted: Sequence[tuple[Wanted, ...]], *, hand_on_last: bool) -> list[Step]:
    """A task's inputs through the first stages, one step each.

    Args:
        task: whose inputs.
        wanted: for each of those stages the objects to make.
        hand_on_last: whether the last of those stages hands on too.
    """
    steps: list[Step] = []
    for stage, objects in enumerate(wanted):
        unit = ForwardUnit(task, stage, objects, hand_on=hand_on_last or stage < len(wanted) - 1)
        steps.append(Step(unit.id, unit, stage, (steps[-1].id,) if steps else (), task))
    return steps


MOMENTS = Kind(what="moments", inputs=task_inputs, steps=forward_steps)


def _run(
    job: StageJob,
    kind: Kind,
    steps: Sequence[Step],
    missing: Mapping[Key, Wanted],
    work: Work,
    stores: Stores,
) -> tuple[list[DataCheck], list[Stored]]:
    plan, progress = job.plan, work.progress
    names = [task.name for task in plan.tasks if any(task.name == name for name, _ in missing)]
    n_stages = len(plan.stages)
    text = f"{kind.what} of {len(names)} task(s) in {n_stages} stage(s): {len(missing)} object(s) are missing"
    progress(Event(kind="start", text=text, units=(0, len(steps))))
    made: list[Stored] = []
    try:
        with work.make_pool(job) as pool:
            units = check_units(plan, kind, names) if work.checks is None else work.checks
            # Any place can look at data; all of them do, so that it is done sooner.
            looks = [Step(unit.id, unit, index % n_stages) for index, unit in enumerate(units)]
            checks = [done.value for done in pool.run(looks)] if looks else []
            if n_stages > 1:
                list(pool.run(_rehearsal(names[0], n_stages)))
            if looks:
                progress(Event(kind="check", text=f"looked at the data of {len(looks)} task(s)"))
            for count, done in enumerate(pool.run(steps), start=1):
                made += done.value
                progress(Event(kind="unit", text=done.id, units=(count, len(steps))))
    finally:
        _sweep(job, stores)
    order = {task.name: index for index, task in enumerate(plan.tasks)}
    return sorted(checks, key=lambda one: order.get(one.task, 0)), [one for one in made if not one.adopted]


def _rehearsal(task: str, n_stages: int) -> list[Step]:
    """One input through all stages, before anything is written: a model that cannot be cut shows it there."""
    steps: list[Step] = []
    for stage in range(n_stages):
        unit = RehearsalUnit(task, stage, hand_on=stage < n_stages - 1)
        steps.append(Step(unit.id, unit, stage, (steps[-1].id,) if steps else (), "rehearsal"))
    return steps


def _sweep(job: StageJob, stores: Stores) -> None:
    """Remove this run's unfinished files."""
    root = stores.open(job.store).local_root
    folder = (Path(job.scratch) if root is None else root) / "attempts"
    shutil.rmtree(folder / job.attempt, ignore_errors=True)
    with suppress(OSError):
        folder.rmdir()
