"""The moments that the merges of a plan need: laid out from headers, computed when a run comes to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

from ray_merge.drive.events import Event
from ray_merge.drive.fisher import ensure_fisher, fisher_kind
from ray_merge.drive.moments import MOMENTS, MomentsResult, check_units, ensure_moments
from ray_merge.drive.run import Statistics
from ray_merge.engines import local_room, stage_ceiling
from ray_merge.errors import RecipeError
from ray_merge.methods.registry import get, statistics_kind
from ray_merge.moments import Engines, Fitted, cut_or_whole, moments_plan, with_adapters, work_of
from ray_merge.plan import Plan
from ray_merge.plan.fisher import FisherPlan, Labels, plan_fisher
from ray_merge.plan.moments import MomentsPlan, StageFacts, TaskData, stage_facts, tasks_with_data
from ray_merge.recipe import Recipe
from ray_merge.spec import Merge
from ray_merge.work.stage_job import CheckUnit


@dataclass(frozen=True, slots=True)
class Needed:
    """The moments of one kind that merges need, laid out.

    Args:
        kind: "gram", or "fisher/" and whose labels.
        why: what needs them.
        fitted: the adapters of those merges and their sites, and no others.
        plans: one for each model class that is run.
    """

    kind: str
    why: str
    fitted: Fitted
    plans: tuple[MomentsPlan, ...] | tuple[FisherPlan, ...]

    @property
    def stages(self) -> tuple[MomentsPlan, ...]:
        """The plan of stages of each model class."""
        return tuple(one.stages if isinstance(one, FisherPlan) else one for one in self.plans)

    @property
    def facts(self) -> tuple[StageFacts, ...]:
        """What each plan takes."""
        return tuple(stage_facts(self.kind, one) for one in self.stages)

    def checks(self) -> list[CheckUnit]:
        """The data to be looked at."""
        kinds = [
            fisher_kind(one.likelihoods) if isinstance(one, FisherPlan) else MOMENTS for one in self.plans
        ]
        pairs = zip(self.stages, kinds, strict=True)
        return [unit for stages, kind in pairs for unit in check_units(stages, kind)]

    def as_one_stage(self, recipe: Recipe, engines: Engines) -> Needed:
        """The same with a recipe that asks for one stage."""
        return Needed(
            self.kind, self.why, self.fitted, _plans(recipe, self.kind, self.why, self.fitted, engines)
        )


def plan_needed(plan: Plan, merges: Sequence[Merge], engines: Engines) -> list[Needed]:
    """Lay out the moments that merges need; reads headers alone.

    Raises:
        Refusal: a task without data, a site that has no moments, a model that cannot be cut as asked.
    """
    needed = []
    for kind, some in by_kind(merges, diagnostics=plan.recipe.diagnostics).items():
        names = [name for name in plan.adapters if any(name in merge.adapters for merge in some)]
        adapters = {name: plan.adapters[name] for name in names}
        sites = {site: plan.sites[site] for adapter in adapters.values() for site in adapter.factors}
        fitted = Fitted(plan.base, adapters, sites)
        why = some[0].method if get(some[0].method).statistics else "diagnostics: true"
        needed.append(Needed(kind, why, fitted, _plans(plan.recipe, kind, why, fitted, engines)))
        for stages in needed[-1].stages:
            check_watched(some, fitted, stages.unwatched)
    return needed


def _plans(
    recipe: Recipe, kind: str, why: str, fitted: Fitted, engines: Engines
) -> tuple[MomentsPlan, ...] | tuple[FisherPlan, ...]:
    tasks = tasks_with_data(recipe, list(fitted.adapters), why)
    method, _, labels = kind.partition("/")
    if method == "fisher":
        return tuple(_fisher_plans(recipe, fitted, tasks, cast("Labels", labels), engines))
    return (moments_plan(recipe, fitted, with_adapters(recipe, fitted, tasks), engines, ()),)


def _fisher_plans(
    recipe: Recipe, fitted: Fitted, tasks: Sequence[TaskData], labels: Labels, engines: Engines
) -> list[FisherPlan]:
    own = [TaskData(task.name, task.data, fitted.adapters[task.name]) for task in tasks]
    workers = local_room(engines.device, engines.workers)
    ceiling = stage_ceiling(engines.memory, workers)
    return plan_fisher(recipe, fitted.base, own, fitted.sites, labels, memory_bytes=ceiling, workers=workers)


def compute_needed(
    plan: Plan, needed: Sequence[Needed], engines: Engines, progress: Callable[[Event], None]
) -> Statistics:
    """Compute what is missing of every kind; the data of all kinds are looked at before any of them writes."""
    # In the pool of the first kind that lacks something the data of all kinds are looked at, and then no more.
    checks = [unit for one in needed for unit in one.checks()]
    found = {}
    for one in needed:
        result = cut_or_whole(plan.recipe, partial(_ensure, plan, one, engines, progress, checks), progress)
        checks = [] if result.units_run else checks
        found[one.kind] = result.index
    return found


def _ensure(
    plan: Plan,
    one: Needed,
    engines: Engines,
    progress: Callable[[Event], None],
    checks: Sequence[CheckUnit],
    recipe: Recipe,
) -> MomentsResult:
    """Compute one kind in the stages that were planned, or as the recipe, which asks for one stage, says."""
    again = one if recipe is plan.recipe else one.as_one_stage(recipe, engines)
    work = work_of(recipe, one.fitted, list(one.fitted.adapters), engines, progress, checks)
    fisher = [plan for plan in again.plans if isinstance(plan, FisherPlan)]
    return ensure_fisher(fisher, work) if fisher else ensure_moments(again.stages[0], work)


def by_kind(merges: Sequence[Merge], *, diagnostics: bool = False) -> dict[str, list[Merge]]:
    """Merges by the kind of statistics that they need; those that need none are left out.

    Diagnostics take the Gram matrices of every merge.
    """
    kinds: dict[str, list[Merge]] = {}
    for merge in merges:
        kind = statistics_kind(get(merge.method), merge.parameters)
        if kind:
            kinds.setdefault(kind, []).append(merge)
    if diagnostics and merges:
        kinds["gram"] = list(merges)
    return kinds


def check_watched(merges: Sequence[Merge], fitted: Fitted, unwatched: Mapping[str, str]) -> None:
    """Refuse a merge by moments that touches a site which has none.

    Raises:
        RecipeError: the site, why, and the way out.
    """
    for merge in merges:
        touched = {site for name in merge.adapters for site in fitted.adapters[name].factors}
        odd = next((site for site in unwatched if site in touched), None)
        if odd is not None and merge.parameters.get("without_moments") == "refuse":
            raise RecipeError(
                f"merge {merge.name!r}: {odd} is not watched, which {merge.method} needs ({unwatched[odd]}); leave "
                "that module out, or write without_moments: average, which averages the updates there"
            )
