"""`ray_merge.calibrate`: moments of a recipe's tasks into its store, and what a run takes from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from ray_merge.drive.events import Event
from ray_merge.drive.fisher import ensure_fisher
from ray_merge.drive.moments import MomentsResult, StepPoolFactory, ensure_moments
from ray_merge.drive.outputs import store_url
from ray_merge.drive.run import StatisticsMaker
from ray_merge.engines import Engine, local_room, memory_ceiling, stage_pools
from ray_merge.errors import RecipeError
from ray_merge.fit import fit_adapters
from ray_merge.methods.registry import get, statistics_kind
from ray_merge.plan import read_named
from ray_merge.plan.fisher import Labels, plan_fisher
from ray_merge.plan.moments import MomentsPlan, TaskData, plan_moments, tasks_with_data
from ray_merge.pool_steps import StepPool
from ray_merge.recipe import Calibration, Recipe
from ray_merge.recipe.read import read_recipe
from ray_merge.spec import Adapter, Merge, Site
from ray_merge.storage.cache import cache_folder
from ray_merge.storage.checkpoint import Checkpoint
from ray_merge.work.job import MomentsIndex
from ray_merge.work.pickles import unpickler
from ray_merge.work.stage_job import StageJob

Check = Callable[[Mapping[str, str]], None]
"""Refuses what cannot be used: called with site -> why it is not watched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """Where and how to run.

    Args:
        engine: "ray", or "local" for everything in this process.
        address: "local" embeds a Ray of this machine, "auto" or "HOST:PORT" joins a cluster.
        workers: how many stages can be held at once; by default one per CPU.
        memory: ceiling for one stage, for example "1200MB"; more stages are cut to keep it.
        device: "cpu", "cuda" or "cuda:N".
        cache: node-local folder.
        pools: makes the pool where something is missing, in place of the engine's.
    """

    engine: Engine = "ray"
    address: str = "local"
    workers: int | None = None
    memory: str | int | None = None
    device: str = "cpu"
    cache: Path
    pools: StepPoolFactory | None = None

    def make_pool(self, job: StageJob) -> StepPool:
        """The pool for a job of stages."""
        if self.pools is not None:
            return self.pools(job)
        return stage_pools(self.engine, self.address, self.workers, one_at_a_time=self.memory is not None)(
            job
        )


@dataclass(frozen=True, slots=True)
class Fitted:
    """A base, the adapters that have a path, and their sites."""

    base: Checkpoint
    adapters: Mapping[str, Adapter]
    sites: Mapping[str, Site]


def calibrate(
    recipe: str | Path | dict[str, Any],
    *,
    output: str | None = None,
    engine: Engine = "ray",
    address: str = "local",
    workers: int | None = None,
    memory: str | int | None = None,
    device: str = "cpu",
    cache_dir: str | Path | None = None,
    progress: Callable[[Event], None] = lambda _: None,
) -> MomentsResult:
    """Compute the moments of every task of a recipe that has data; those in the store already are left alone.

    Args:
        recipe: path, URL, or the recipe as a mapping.
        output: in place of the recipe's own; the store lies below it by default.
        engine: "ray", or "local" for everything in this process.
        address: "local" embeds a Ray of this machine, "auto" or "HOST:PORT" joins a cluster.
        workers: how many stages can be held at once; by default one per CPU.
        memory: ceiling for one stage, for example "1200MB".
        device: "cpu", "cuda" or "cuda:N".
        cache_dir: node-local folder for adapters, digests and tokenizers.
        progress: called with every event.

    Raises:
        Refusal: nothing was written.
        RunFailed: it stopped later; run again to finish it.
    """
    parsed, _ = read_recipe(recipe, output)
    engines = Engines(
        engine=engine,
        address=address,
        workers=workers,
        memory=memory,
        device=device,
        cache=cache_folder(cache_dir),
    )
    names = [name for name, source in parsed.adapters.items() if source.data is not None]
    if not names:
        raise RecipeError(
            "no adapter of the recipe has data; add `data: URL` with unlabelled inputs to each task"
        )
    fitted = fit_all(parsed, engines.cache)
    targets = parsed.init.target_modules if parsed.init is not None else ()
    if not fitted.sites and not targets:
        raise RecipeError(
            "nothing to watch: no adapter of the recipe has a path, and there is no init with target_modules"
        )
    return compute(parsed, fitted, names, "calibrate", engines, targets=targets, progress=progress)


def fit_all(recipe: Recipe, cache: Path) -> Fitted:
    """The base, and every adapter of a recipe that has a path, fitted to it."""
    names = [name for name, source in recipe.adapters.items() if source.path is not None]
    base, stored = read_named(recipe, names, unpickler(cache / "adapters"))
    fitted = fit_adapters(recipe, base, stored)
    return Fitted(fitted.base, fitted.adapters, fitted.sites)


def compute(
    recipe: Recipe,
    fitted: Fitted,
    names: Sequence[str],
    why: str,
    engines: Engines,
    *,
    targets: Sequence[str] = (),
    progress: Callable[[Event], None],
    check: Check = lambda _: None,
) -> MomentsResult:
    """Moments of the tasks called `names` at the sites of all adapters and at the modules called `targets`.

    Args:
        recipe: the validated recipe.
        fitted: its base and adapters.
        names: of the tasks, each of which must have data.
        why: what needs them, for messages.
        engines: where and how to run.
        targets: modules besides those of adapters.
        progress: called with every event.
        check: called before anything is computed.
    """
    tasks = _with_adapters(recipe, fitted, tasks_with_data(recipe, names, why))
    plan = moments_plan(recipe, fitted, tasks, engines, targets)
    check(plan.unwatched)
    return ensure_moments(
        plan,
        store_url(recipe),
        {task.name: task.adapter for task in tasks if task.adapter is not None},
        fitted.sites,
        cache=engines.cache,
        device=engines.device,
        make_pool=engines.make_pool,
        placement=recipe.placement,
        progress=progress,
    )


def compute_fisher(
    recipe: Recipe,
    fitted: Fitted,
    names: Sequence[str],
    labels: Labels,
    engines: Engines,
    *,
    progress: Callable[[Event], None],
    check: Check = lambda _: None,
) -> MomentsResult:
    """Fisher diagonals of the tasks called `names`, each with its own adapter active, at the sites of all adapters.

    Args:
        recipe: the validated recipe.
        fitted: its base and adapters.
        names: of the tasks, each of which must have data and an adapter.
        labels: whose log-likelihood is differentiated.
        engines: where and how to run.
        progress: called with every event.
        check: called before anything is computed.
    """
    found = tasks_with_data(recipe, names, "fisher")
    tasks = [TaskData(task.name, task.data, fitted.adapters[task.name]) for task in found]
    ceiling = None if engines.memory is None else memory_ceiling(engines.memory, 0)
    workers = local_room(engines.device, engines.workers)
    plans = plan_fisher(
        recipe, fitted.base, tasks, fitted.sites, labels, memory_bytes=ceiling, workers=workers
    )
    for plan in plans:
        check(plan.stages.unwatched)
    return ensure_fisher(
        plans,
        store_url(recipe),
        {task.name: fitted.adapters[task.name] for task in tasks},
        fitted.sites,
        cache=engines.cache,
        device=engines.device,
        make_pool=engines.make_pool,
        placement=recipe.placement,
        progress=progress,
    )


def moments_plan(
    recipe: Recipe, fitted: Fitted, tasks: Sequence[TaskData], engines: Engines, targets: Sequence[str]
) -> MomentsPlan:
    """Lay out stages for as many workers as there are; a cluster's own size is not asked for before it is needed."""
    ceiling = None if engines.memory is None else memory_ceiling(engines.memory, 0)
    workers = local_room(engines.device, engines.workers)
    return plan_moments(
        recipe, fitted.base, tasks, fitted.sites, targets, memory_bytes=ceiling, workers=workers
    )


def _with_adapters(recipe: Recipe, fitted: Fitted, tasks: Sequence[TaskData]) -> list[TaskData]:
    calibration = recipe.calibration or Calibration()
    if calibration.features == "base":
        return list(tasks)
    without = next((task.name for task in tasks if task.name not in fitted.adapters), None)
    if without is not None:
        raise RecipeError(
            f"calibration.features: adapter, but adapter {without} has no path; give its folder, or use features: base"
        )
    trained = next((task.name for task in tasks if fitted.adapters[task.name].tokens), None)
    if trained is not None:
        raise RecipeError(
            f"calibration.features: adapter, but adapter {trained} trains single tokens of an embedding, which cannot "
            "be active while inputs run through stages; use features: base"
        )
    return [TaskData(task.name, task.data, fitted.adapters[task.name]) for task in tasks]


def statistics_of(recipe: Recipe, engines: Engines, progress: Callable[[Event], None]) -> StatisticsMaker:
    """Finds or computes the moments that merges need, for `drive.run`."""

    def make(merges: Sequence[Merge]) -> Mapping[str, MomentsIndex]:
        found: dict[str, MomentsIndex] = {}
        for kind, some in by_kind(merges, diagnostics=recipe.diagnostics).items():
            names = [name for name in recipe.adapters if any(name in merge.adapters for merge in some)]
            fitted = fit_all(recipe, engines.cache)
            check = partial(check_watched, some, fitted)
            method, _, labels = kind.partition("/")
            if method == "fisher":
                result = compute_fisher(
                    recipe, fitted, names, cast("Labels", labels), engines, progress=progress, check=check
                )
            else:
                targets = recipe.init.target_modules if recipe.init is not None else ()
                why = some[0].method
                result = compute(
                    recipe, fitted, names, why, engines, targets=targets, progress=progress, check=check
                )
            found[kind] = result.index
        return found

    return make


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
