"""Learned merges of a run, from ids to phi: what is in the store already, the pool, and the loop of each merge.

A merge whose last state is there starts nothing. Data of all tasks are looked at before any group of merges learns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray_merge.calibration import data_identity
from ray_merge.drive.events import Event
from ray_merge.drive.identify import calibration_inputs, file_versions, model_versions
from ray_merge.drive.moments import adapter_inputs
from ray_merge.errors import RunFailed
from ray_merge.identity import LEARN_VERSION, digest
from ray_merge.learn.leaves import leaf_names
from ray_merge.learn.loop import Lesson, learn
from ray_merge.learn.state import state_path, unpack
from ray_merge.plan.learn import Learning, LearnPlan
from ray_merge.plan.task_heads import TaskHead
from ray_merge.pool_steps import Step, StepPool
from ray_merge.recipe import SPREAD, Placement
from ray_merge.spec import Adapter, Site
from ray_merge.storage.digest import DigestCache
from ray_merge.storage.store import ObjectInfo, Store, Stores
from ray_merge.work.job import PhiIndex
from ray_merge.work.learn_job import DataRead, LearnJob, ReadUnit

LearnPoolFactory = Callable[[LearnJob], StepPool]
"""Makes the pool with one place for each stage; called only when something is to be learned."""

Samples = Mapping[tuple[str, str], DataRead]
"""What was found of each sample: (task, calibration as JSON) -> its rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class School:
    """Where and how merges learn.

    Args:
        store: URL of the recipe's store.
        adapters: by name.
        sites: of those adapters.
        cache: node-local folder.
        device: torch device of the stages.
        data: task -> what its data were when the merge ids were made, under "data".
        make_pool: makes the pool.
        placement: of the stages over a cluster's nodes.
        progress: called with every event.
    """

    store: str
    adapters: Mapping[str, Adapter]
    sites: Mapping[str, Site]
    cache: Path
    device: str
    data: Mapping[str, Mapping[str, Any]]
    make_pool: LearnPoolFactory
    placement: Placement = SPREAD
    progress: Callable[[Event], None] = lambda _: None


def look_at_data(plans: Sequence[LearnPlan], merge_ids: Mapping[str, str], school: School) -> Samples:
    """Look at the data of every task of the merges that have no last state; writes nothing.

    Args:
        plans: one for each model class.
        merge_ids: merge name -> 64 hex digits.
        school: where and how.

    Raises:
        Refusal: data that cannot be used, or a device that is not there.
        RunFailed: data changed since the run was planned.
    """
    stores = Stores()
    missing = _missing(plans, merge_ids, stores.open(school.store))
    if not missing:
        return {}
    units: dict[tuple[str, str], ReadUnit] = {}
    for plan, some in missing:
        versions = {name: digest(data) for name, data in _data(plan, school, stores).items()}
        for one in (plan.learnings[index] for index in some):
            tasks = [task for task in plan.stages.tasks if task.name in one.tasks]
            made = [
                ReadUnit(replace(task, adapter=None), plan.calibration(one), versions[task.name])
                for task in tasks
            ]
            units |= {unit.sample: unit for unit in made}
    # Any place of any plan can look at data: one pool does it for all of them, before anything is learned.
    with school.make_pool(_job(missing[0][0], school, {})) as pool:
        found = {
            done.id: done.value for done in pool.run([Step(unit.id, unit, 0) for unit in units.values()])
        }
    school.progress(Event(kind="check", text=f"looked at the data of {len(units)} task(s)"))
    return {sample: found[unit.id] for sample, unit in units.items()}


def ensure_learned(
    plans: Sequence[LearnPlan], merge_ids: Mapping[str, str], school: School, samples: Samples
) -> dict[str, PhiIndex]:
    """The phi of every merge of the plans, by merge name; learned where the store has no last state.

    Args:
        plans: one for each model class.
        merge_ids: merge name -> 64 hex digits.
        school: where and how.
        samples: what `look_at_data` found.

    Raises:
        Refusal: a model that cannot be cut, or another device; earlier merges may have states (`states_of`).
        RunFailed: found later; running again goes on from the last committed state.
    """
    stores = Stores()
    store = stores.open(school.store)
    for plan, missing in _missing(plans, merge_ids, store):
        _learn_group(plan, missing, merge_ids, school, samples, stores)
    return {one.merge.name: _index(store, plan, one, merge_ids) for plan in plans for one in plan.learnings}


def states_of(plans: Sequence[LearnPlan], merge_ids: Mapping[str, str], school: School) -> set[str]:
    """Names of all states that merges of the plans have in the store."""
    store = Stores().open(school.store)
    names = [one.merge.name for plan in plans for one in plan.learnings]
    return {info.path for name in names for info in store.list(f"learn/{merge_ids[name]}")}


def _missing(
    plans: Sequence[LearnPlan], merge_ids: Mapping[str, str], store: Store
) -> list[tuple[LearnPlan, list[int]]]:
    """The plans that have merges without a last state, and the indices of these."""
    pairs = [
        (plan, [index for index, one in enumerate(plan.learnings) if _last(store, one, merge_ids) is None])
        for plan in plans
    ]
    return [(plan, some) for plan, some in pairs if some]


def _last(store: Store, one: Learning, merge_ids: Mapping[str, str]) -> ObjectInfo | None:
    """The last state of a merge, if it is there.

    Raises:
        RunFailed: it is there and damaged.
    """
    path = state_path(merge_ids[one.merge.name], int(one.merge.parameters["steps"]))
    info = store.info(path)
    if info is not None and unpack(store.read(path)) is None:
        raise RunFailed(f"{store.url}/{path} is damaged; remove it and run again")
    return info


def _index(store: Store, plan: LearnPlan, one: Learning, merge_ids: Mapping[str, str]) -> PhiIndex:
    info = _last(store, one, merge_ids)
    assert info is not None, f"{one.merge.name} was learned and has no last state"
    return PhiIndex(store.url, info, leaf_names(plan, one), one.tasks)


def _data(plan: LearnPlan, school: School, stores: Stores) -> dict[str, dict[str, Any]]:
    """What the data of each task are now.

    Raises:
        RunFailed: not what they were when the merge ids were made.
    """
    digests = DigestCache(school.cache / "digests")
    data = {
        task.name: dict(data_identity(task.data, stores, digests, where=f"adapters.{task.name}.data"))
        for task in plan.stages.tasks
    }
    for name, found in data.items():
        if found != school.data[name]["data"]:
            raise RunFailed(f"the data of {name} changed since the run was planned; run again")
    return data


def _job(plan: LearnPlan, school: School, data: Mapping[str, Mapping[str, Any]]) -> LearnJob:
    return LearnJob(
        plan=plan,
        adapters={task.name: school.adapters[task.name] for task in plan.stages.tasks},
        sites=school.sites,
        versions={name: digest(dict(found)) for name, found in data.items()},
        cache=str(school.cache),
        device=school.device,
        placement=school.placement,
    )


def _learn_group(
    plan: LearnPlan,
    missing: Sequence[int],
    merge_ids: Mapping[str, str],
    school: School,
    samples: Samples,
    stores: Stores,
) -> None:
    digests = DigestCache(school.cache / "digests")
    data = _data(plan, school, stores)
    base = dict(model_versions(plan.stages.base, digests, stores))
    text = f"{len(missing)} merge(s) learn in {len(plan.stages.stages)} stage(s) of {plan.stages.class_name}"
    school.progress(Event(kind="start", text=text))
    with school.make_pool(_job(plan, school, data)) as pool:
        for index in missing:
            one = plan.learnings[index]
            inputs = {
                name: _anchor_inputs(plan, one, name, base, data[name], school, digests, stores)
                for name in one.tasks
            }
            sample = plan.calibration(one).model_dump_json()
            lesson = Lesson(
                plan=plan,
                index=index,
                merge_id=merge_ids[one.merge.name],
                inputs=inputs,
                lengths={name: samples[name, sample].lengths for name in one.tasks},
                store=stores.open(school.store),
                progress=school.progress,
            )
            learn(lesson, pool)


def _anchor_inputs(
    plan: LearnPlan,
    one: Learning,
    name: str,
    base: Mapping[str, str],
    data: Mapping[str, Any],
    school: School,
    digests: DigestCache,
    stores: Stores,
) -> dict[str, Any]:
    """Everything that decides the value of a task with its adapter alone, but for the measure's parameters."""
    head = one.heads.get(name)
    return {
        "learn": LEARN_VERSION,
        "base": dict(base),
        "class": plan.stages.class_name,
        "task": name,
        "adapter": adapter_inputs(school.adapters[name], digests, stores),
        "head": None if head is None else _head_inputs(head, digests, stores),
        "data": dict(data),
        "calibration": calibration_inputs(plan.calibration(one), fisher=True),
        "dtype": plan.dtype,
        "precision": plan.precision,
    }


def _head_inputs(head: TaskHead, digests: DigestCache, stores: Stores) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": head.kind, "outputs": head.n_outputs}
    if head.file is not None:
        name = head.file.info.path
        found["file"] = dict(file_versions(stores.open(head.file.url), [name], digests))[name]
        found["logit_scale"] = head.file.logit_scale
    return found
