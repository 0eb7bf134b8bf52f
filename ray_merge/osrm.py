"""`ray_merge.init_adapters`: OSRM's adapters to fine-tune from, one for each task of a recipe."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_merge.drive.events import Event
from ray_merge.drive.moments import MomentsResult
from ray_merge.drive.osrm import InitialAdapter, OsrmResult, Place, look, osrm_inputs, write_adapters
from ray_merge.drive.osrm_files import remarks
from ray_merge.engines import Engine, counted, memory_ceiling, osrm_pools
from ray_merge.errors import RecipeError, Refusal
from ray_merge.moments import Engines, Fitted, compute, fit_all, moments_plan
from ray_merge.plan.memory import RUNTIME_BYTES
from ray_merge.plan.moments import tasks_with_data
from ray_merge.plan.osrm import OsrmTask, other_tasks, plan_osrm, required_init
from ray_merge.recipe import Calibration, Recipe
from ray_merge.recipe.arguments import check_count
from ray_merge.recipe.model import Init
from ray_merge.recipe.read import read_recipe, refuse_lost
from ray_merge.storage.cache import cache_folder
from ray_merge.storage.digest import DigestCache
from ray_merge.storage.store import Stores
from ray_merge.work.osrm_job import OsrmJob

EIGEN_MATRICES = 6
"""(I, I) float64 matrices that one worker holds in an eigendecomposition (measured for I = 2048: 4.9)."""


def init_adapters(
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
) -> OsrmResult:
    """Write an adapter for every task of a recipe whose rows of A the other tasks' inputs hardly reach, with B = 0.

    With `init.project`, the adapters that the recipe has are written anew on such rows instead. Moments that the store
    has are reused, and adapters that are there already are left alone.

    Args:
        recipe: path, URL, or the recipe as a mapping.
        output: in place of `init.output`; the store of moments stays where the recipe says.
        engine: "ray", or "local" for everything in this process.
        address: "local" embeds a Ray of this machine, "auto" or "HOST:PORT" joins a cluster.
        workers: how many units run at once; by default one per CPU.
        memory: ceiling for one worker, for example "1200MB".
        device: "cpu", "cuda" or "cuda:N", for the moments.
        cache_dir: node-local folder for adapters, digests and tokenizers.
        progress: called with every event.

    Raises:
        Refusal: nothing was written.
        RunFailed: it stopped later; run again to finish it.
    """
    started = time.monotonic()
    check_count("workers", workers)
    progress = counted(engine, progress)
    parsed, _ = read_recipe(recipe)
    init = required_init(parsed)
    if output is not None:
        init = init.model_copy(update={"output": output})
        parsed = parsed.model_copy(update={"init": init})
    refuse_lost("init.output", init.output)
    engines = Engines(
        engine=engine,
        address=address,
        workers=workers,
        memory=memory,
        device=device,
        cache=cache_folder(cache_dir),
    )
    names = _needed(parsed, init)
    data = tasks_with_data(parsed, names, "init")
    fitted = fit_all(parsed, engines.cache)
    plan = moments_plan(parsed, fitted, data, engines, init.target_modules)
    tasks = plan_osrm(parsed, fitted.base, fitted.adapters, plan)
    peak_bytes = _peak_bytes(parsed, init, tasks, engines)
    _refuse_inside_base(init, fitted.base.url)
    stores = Stores()
    digests = DigestCache(engines.cache / "digests")
    inputs = osrm_inputs(parsed, tasks, plan, fitted.adapters, digests, stores)
    places = look(parsed, tasks, inputs, fitted.base.url, stores)
    if all(place.complete for place in places):
        return _result(init, places, places, None, 0, started)
    moments = compute(parsed, fitted, names, "init", engines, targets=init.target_modules, progress=progress)
    job = _job(parsed, init, fitted, places, inputs, moments, engines, peak_bytes)
    pools = osrm_pools(engines.engine, engines.address, engines.workers)
    after, units_run = write_adapters(job, parsed, places, fitted.base.url, pools, progress)
    return _result(init, places, after, moments, units_run, started)


def _needed(recipe: Recipe, init: Init) -> list[str]:
    """The tasks whose moments somebody stays clear of, in the recipe's order."""
    others = other_tasks(recipe, init).values()
    return [name for name in recipe.adapters if any(name in some for some in others)]


def _peak_bytes(recipe: Recipe, init: Init, tasks: Sequence[OsrmTask], engines: Engines) -> int:
    """Estimated resident bytes of one worker.

    Raises:
        Refusal: more than the ceiling.
    """
    calibration = recipe.calibration or Calibration()
    widest = max((site for task in tasks for site in task.sites), key=lambda site: site.n_inputs)
    n_bytes = EIGEN_MATRICES * 8 * widest.n_inputs**2
    rows = calibration.sketch_rows * max(len(task.others) for task in tasks)
    if calibration.precision == "sketch" and rows + init.r <= widest.n_inputs:
        n_bytes = min(n_bytes, 4 * 8 * rows * widest.n_inputs)
    peak = RUNTIME_BYTES + n_bytes
    if engines.memory is not None and peak > (ceiling := memory_ceiling(engines.memory, 0)):
        raise Refusal(
            f"--memory: the directions of {widest.site} with its {widest.n_inputs} inputs take about "
            f"{peak / 1e6:.0f} MB, the ceiling is {ceiling / 1e6:.0f} MB; raise it, or write calibration: "
            "{precision: sketch}"
        )
    return peak


def _refuse_inside_base(init: Init, base_url: str) -> None:
    where = [url if "://" in url else os.path.realpath(url) for url in (init.output, base_url)]
    if f"{where[0]}/".startswith(f"{where[1]}/"):
        raise RecipeError(
            f"init.output {init.output} lies inside the base model {base_url}; choose another folder"
        )


def _job(
    recipe: Recipe,
    init: Init,
    fitted: Fitted,
    places: Sequence[Place],
    inputs: Mapping[str, Mapping[str, Any]],
    moments: MomentsResult,
    engines: Engines,
    peak_bytes: int,
) -> OsrmJob:
    return OsrmJob(
        init=init,
        seed=(recipe.calibration or Calibration()).seed,
        tasks={place.task.name: place.task for place in places},
        inputs=inputs,
        ids={place.task.name: place.task_id for place in places},
        index=moments.index,
        adapters=fitted.adapters if init.project else {},
        sites=fitted.sites if init.project else {},
        output=Stores().open(init.output).url,
        scratch=str(engines.cache / "scratch"),
        cache=str(engines.cache),
        attempt=uuid.uuid4().hex[:12],
        peak_bytes=peak_bytes,
    )


def _result(
    init: Init,
    before: Sequence[Place],
    after: Sequence[Place],
    moments: MomentsResult | None,
    units_run: int,
    started: float,
) -> OsrmResult:
    return OsrmResult(
        adapters=tuple(
            InitialAdapter(
                task=place.task.name,
                id=place.task_id,
                url=place.url,
                done=not was.complete,
                sites=place.found,
            )
            for was, place in zip(before, after, strict=True)
        ),
        moments=moments,
        units_run=units_run,
        seconds=time.monotonic() - started,
        remarks={place.task.name: remarks(init, place.found) for place in after},
    )
