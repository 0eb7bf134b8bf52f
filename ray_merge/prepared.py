"""Moments and phi: what merges of a plan need before they can be made.

Laid out from headers, made when a run comes to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ray_merge.drive.events import Event
from ray_merge.drive.outputs import store_url
from ray_merge.drive.run import Preparation, Prepared
from ray_merge.engines import local_room, stage_ceiling
from ray_merge.errors import NotCuttable, Refusal, RunFailed
from ray_merge.moments import Engines
from ray_merge.needed import Needed, compute_needed, plan_needed
from ray_merge.plan import Plan
from ray_merge.plan.learn import LearnPlan, plan_learning
from ray_merge.plan.moments import StageFacts, stage_facts
from ray_merge.spec import Merge
from ray_merge.work.job import PhiIndex

if TYPE_CHECKING:
    from ray_merge.learn.run import Samples, School


def preparation(plan: Plan, engines: Engines, progress: Callable[[Event], None]) -> Preparation:
    """Finds or makes what merges of a plan need, for `drive.run`."""

    def make(
        merges: Sequence[Merge], ids: Mapping[str, str], data: Mapping[str, Mapping[str, Any]]
    ) -> Callable[[Callable[[], None]], Prepared] | None:
        needed = plan_needed(plan, merges, engines)
        learning = lessons(plan, merges, engines)
        if not needed and not learning:
            return None
        school = _school(plan, data, engines, progress)
        return partial(_prepare, plan, needed, learning, ids, school, engines)

    return make


def _prepare(
    plan: Plan,
    needed: Sequence[Needed],
    learning: Sequence[LearnPlan],
    ids: Mapping[str, str],
    school: School,
    engines: Engines,
    ready: Callable[[], None],
) -> Prepared:
    """Moments, then phi; what learning needs is looked at before either of them writes."""
    if not learning:
        return Prepared(moments=compute_needed(plan, needed, engines, school.progress))
    from ray_merge.learn.run import look_at_data, states_of  # with torch, which a plan does not need

    samples = look_at_data(learning, ids, school)
    ready()
    moments = compute_needed(plan, needed, engines, school.progress)
    before = states_of(learning, ids, school)
    try:
        phi = _learned(plan, learning, ids, school, samples, engines)
    except Refusal as error:
        if not needed and states_of(learning, ids, school) == before:
            raise
        raise RunFailed(f"{error}; what was computed and learned before is kept") from error
    return Prepared(moments=moments, phi=phi)


def _school(
    plan: Plan, data: Mapping[str, Mapping[str, Any]], engines: Engines, progress: Callable[[Event], None]
) -> School:
    from ray_merge.learn.run import School  # with torch, which a plan does not need

    return School(
        store=store_url(plan.recipe),
        adapters=plan.adapters,
        sites=plan.sites,
        cache=engines.cache,
        device=engines.device,
        data=data,
        make_pool=engines.make_pool,
        placement=plan.recipe.placement,
        progress=progress,
    )


def prepared_facts(plan: Plan, engines: Engines) -> tuple[StageFacts, ...]:
    """What the stages of a plan take, with every refusal that headers can show."""
    needed = plan_needed(plan, plan.merges, engines)
    learning = lessons(plan, plan.merges, engines)
    facts = [fact for one in needed for fact in one.facts]
    return (*facts, *(stage_facts("learn", one.stages) for one in learning))


def lessons(plan: Plan, merges: Sequence[Merge], engines: Engines) -> list[LearnPlan]:
    """The learning of those merges that learn, in as many stages as there are workers."""
    workers = local_room(engines.device, engines.workers)
    return plan_learning(
        plan,
        merges,
        memory_bytes=stage_ceiling(engines.memory, workers),
        workers=workers,
    )


def _learned(
    plan: Plan,
    learning: Sequence[LearnPlan],
    ids: Mapping[str, str],
    school: School,
    samples: Samples,
    engines: Engines,
) -> Mapping[str, PhiIndex]:
    from ray_merge.learn.run import ensure_learned  # with torch, which a plan does not need

    try:
        return ensure_learned(learning, ids, school, samples)
    except NotCuttable as error:
        if plan.recipe.stages is not None:
            raise
        school.progress(Event(kind="start", text=f"as one stage: {error}"))
        whole = replace(plan, recipe=plan.recipe.model_copy(update={"stages": 1}))
        merges = [one.merge for group in learning for one in group.learnings]
        return ensure_learned(lessons(whole, merges, engines), ids, school, samples)
