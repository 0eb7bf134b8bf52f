"""`ray_merge.plan`, `run` and `methods`: the command line's logic, for Python.

`plan` and `run` are functions here and modules elsewhere in the package; the package's `__getattr__` and this
file are what a user sees.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from ray_merge.drive.run import Event, PoolFactory, RunResult, Settings
from ray_merge.drive.run import run as drive_run
from ray_merge.errors import RecipeError, Refusal
from ray_merge.methods.registry import METHODS, describe
from ray_merge.plan import DEFAULT_MEMORY_BYTES, Plan, make_plan, read_inputs
from ray_merge.pool import LocalPool, Pool
from ray_merge.recipe import Recipe, Source, expand, load_recipe, parse_size, select
from ray_merge.storage.store import open_store
from ray_merge.work.factory import WorkerFactory
from ray_merge.work.job import Job
from ray_merge.work.pickles import unpickler

Engine = Literal["ray", "local"]


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/ray-merge`, else `~/.cache/ray-merge`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ray-merge"


def _cache(cache_dir: str | Path | None) -> Path:
    return Path(default_cache_dir() if cache_dir is None else cache_dir).expanduser().absolute()


def read_recipe(recipe: str | Path | dict[str, Any]) -> tuple[Recipe, Source]:
    """A recipe from a local path, a URL or a mapping."""
    if isinstance(recipe, str) and "://" in recipe:
        folder, _, name = recipe.rpartition("/")
        store = open_store(folder)
        if store.info(name) is None:
            raise RecipeError(f"recipe {recipe} does not exist")
        return load_recipe(recipe, store.read(name).decode("utf-8", "replace"))
    return load_recipe(recipe)


def plan(
    recipe: str | Path | dict[str, Any],
    *,
    output: str | None = None,
    only: Sequence[str] = (),
    memory: str | int | None = None,
    cache_dir: str | Path | None = None,
) -> Plan:
    """What a recipe would read, merge and write, and whether it can; reads headers and configs alone.

    Args:
        recipe: path, URL, or the recipe as a mapping.
        output: in place of the recipe's own.
        only: names or globs of merges; all of them when empty.
        memory: ceiling per worker, for example "640MB".
        cache_dir: node-local folder, where pickled adapters that the recipe allows are converted.

    Raises:
        Refusal: the recipe cannot be run; the message says where and what to do.
    """
    parsed, source = read_recipe(recipe)
    if output is not None:
        parsed = parsed.model_copy(update={"output": output})
    merges = select(expand(parsed, source), only)
    base, adapters = read_inputs(parsed, merges, unpickler(_cache(cache_dir) / "adapters"))
    ceiling = _memory(memory)
    planned = make_plan(parsed, merges, base, adapters, memory_bytes=ceiling)
    if memory is not None and planned.peak_bytes > ceiling:
        raise Refusal(
            f"--memory {memory}: one worker needs about {planned.peak_bytes / 1e6:.0f} MB even for one merge at "
            f"a time, the ceiling is {ceiling / 1e6:.0f} MB; raise it, or merge fewer adapters at once"
        )
    return planned


def _memory(memory: str | int | None) -> int:
    try:
        return DEFAULT_MEMORY_BYTES if memory is None else parse_size(memory)
    except ValueError as error:
        raise Refusal(f"--memory: {error}") from error


def run(
    recipe: str | Path | dict[str, Any],
    *,
    output: str | None = None,
    only: Sequence[str] = (),
    engine: Engine = "ray",
    address: str = "local",
    workers: int | None = None,
    memory: str | int | None = None,
    device: str = "cpu",
    cache_dir: str | Path | None = None,
    date: str | None = None,
    progress: Callable[[Event], None] = lambda _: None,
) -> RunResult:
    """Run a recipe; a merge that is complete is left alone, one that was begun is finished.

    Args:
        recipe: path, URL, or the recipe as a mapping.
        output: in place of the recipe's own.
        only: names or globs of merges; all of them when empty.
        engine: "ray", or "local" for everything in this process.
        address: "local" embeds a Ray of this machine, "auto" or "HOST:PORT" joins a cluster.
        workers: how many; by default one per CPU, of the cluster or (threads of this process) of this machine.
        memory: ceiling per worker, for example "640MB".
        device: "cpu", "cuda" or "cuda:N".
        cache_dir: node-local folder for adapters and digests.
        date: UTC day for `{date}` in `output`.
        progress: called with every event of the run.

    Raises:
        Refusal: nothing was written.
        RunFailed: the run stopped later; run again to finish it.
    """
    planned = plan(recipe, output=output, only=only, memory=memory, cache_dir=cache_dir)
    settings = Settings(cache=_cache(cache_dir), device=device, date=date)
    make_pool = _local_pools(workers) if engine == "local" else _ray_pools(address, workers)
    return drive_run(planned, settings, make_pool, progress)


def _local_pools(workers: int | None) -> PoolFactory:
    def make(job: Job, n_units: int) -> Pool:
        # One GPU is one place to work: threads would only share its memory.
        room = workers or (1 if job.device != "cpu" else len(os.sched_getaffinity(0)))
        return LocalPool(WorkerFactory(job)(), max(1, min(n_units, room)))

    return make


def _ray_pools(address: str, workers: int | None) -> PoolFactory:
    def make(job: Job, n_units: int) -> Pool:
        from ray_merge.runtime.merge_pool import MergePool  # Ray is loaded only when there is work

        return MergePool(job, n_units, address=address, workers=workers)

    return make


def methods() -> list[dict[str, Any]]:
    """Every merge method: name, family, what it needs, spaces, parameters, reference."""
    return [describe(method) for method in METHODS]
