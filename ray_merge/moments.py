"""`ray_merge.calibrate`: moments of a recipe's tasks into its store, and what a run takes from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_merge.drive.events import Event
from ray_merge.drive.moments import (
    MomentsResult,
    Work,
    ensure_moments,
)
from ray_merge.drive.outputs import store_url
from ray_merge.engines import Engine, counted, local_room, stage_ceiling, stage_pools
from ray_merge.errors import NotCuttable, RecipeError
from ray_merge.fit import fit_adapters
from ray_merge.plan import read_named
from ray_merge.plan.moments import (
    MomentsPlan,
    TaskData,
    plan_moments,
    tasks_with_data,
)
from ray_merge.pool_steps import StepPool
from ray_merge.recipe import Calibration, Recipe
from ray_merge.recipe.arguments import check_count
from ray_merge.recipe.read import read_recipe
from ray_merge.spec import Adapter, Site
from ray_merge.storage.cache import cache_folder
from ray_merge.storage.checkpoint import Checkpoint
from ray_merge.work.factory import AnyStageJob
from ray_merge.work.pickles import unpickler
from ray_merge.work.stage_job import CheckUnit


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """Where and how to run.

    Args:
        engine: "ray", or "local" for everything in this process.
        address: "local" embeds a Ray of this machine, "auto" or "HOST:PORT" joins a cluster.
        workers: how many stages can be held at once; by default one per CPU of this machine.
        memory: ceiling for one stage, for example "1200MB"; more stages are cut to keep it. By default an equal share
            of a machine like this one for each worker.
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
    pools: Callable[[AnyStageJob], StepPool] | None = None

    def make_pool(self, job: AnyStageJob) -> StepPool:
        """The pool for a job of stages."""
        if self.pools is not None:
            return self.pools(job)
        ceiling = None if self.memory is None else stage_ceiling(self.memory, 1)
        return stage_pools(self.engine, self.address, self.workers, ceiling=ceiling)(job)


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
    check_count("workers", workers)
    progress = counted(engine, progress)
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
    """
    tasks = with_adapters(recipe, fitted, tasks_with_data(recipe, names, why))

    def ensure(recipe: Recipe) -> MomentsResult:
        plan = moments_plan(recipe, fitted, tasks, engines, targets)
        return ensure_moments(plan, work_of(recipe, fitted, names, engines, progress))

    return cut_or_whole(recipe, ensure, progress)


def cut_or_whole(
    recipe: Recipe, ensure: Callable[[Recipe], MomentsResult], progress: Callable[[Event], None]
) -> MomentsResult:
    """In stages, or in one where the model turns out not to be cuttable and the recipe did not ask for more."""
    try:
        return ensure(recipe)
    except NotCuttable as error:
        if recipe.stages is not None:
            raise
        progress(Event(kind="start", text=f"as one stage: {error}"))
        return ensure(recipe.model_copy(update={"stages": 1}))


def work_of(
    recipe: Recipe,
    fitted: Fitted,
    active: Sequence[str],
    engines: Engines,
    progress: Callable[[Event], None],
    checks: Sequence[CheckUnit] | None = None,
) -> Work:
    """Where and how the moments of a recipe are computed, with some adapters active."""
    return Work(
        store=store_url(recipe),
        adapters={name: fitted.adapters[name] for name in active if name in fitted.adapters},
        sites=fitted.sites,
        cache=engines.cache,
        device=engines.device,
        make_pool=engines.make_pool,
        placement=recipe.placement,
        progress=progress,
        checks=checks,
    )


def moments_plan(
    recipe: Recipe, fitted: Fitted, tasks: Sequence[TaskData], engines: Engines, targets: Sequence[str]
) -> MomentsPlan:
    """Lay out stages for as many workers as there are; a cluster's own size is not asked for before it is needed."""
    workers = local_room(engines.device, engines.workers)
    ceiling = stage_ceiling(engines.memory, workers)
    return plan_moments(
        recipe, fitted.base, tasks, fitted.sites, targets, memory_bytes=ceiling, workers=workers
    )


def with_adapters(recipe: Recipe, fitted: Fitted, tasks: Sequence[TaskData]) -> list[TaskData]:
    """The tasks, with their own adapters where `calibration.features` says so.

    Raises:
        RecipeError: an adapter that is to be active has no path, or cannot be active.
    """
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
