"""`ray_merge.plan`, `run` and `methods`: the command line's logic, for Python.

`plan` and `run` are functions here and modules elsewhere in the package; the package's `__getattr__` and this
file are what a user sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray_merge.drive.events import Event
from ray_merge.drive.identify import read_inputs_identity
from ray_merge.drive.outputs import Target
from ray_merge.drive.result import RunResult
from ray_merge.drive.run import Settings
from ray_merge.drive.run import run as drive_run
from ray_merge.drive.targets import check_output, find_targets
from ray_merge.engines import Engine, counted, memory_ceiling, unit_pools
from ray_merge.errors import Refusal
from ray_merge.methods.registry import METHODS, describe
from ray_merge.moments import Engines
from ray_merge.plan import DEFAULT_MEMORY_BYTES, Plan, make_plan, read_inputs
from ray_merge.prepared import preparation, prepared_facts
from ray_merge.recipe import expand, require_merges, select
from ray_merge.recipe.arguments import check_count
from ray_merge.recipe.read import read_recipe
from ray_merge.storage.cache import cache_folder
from ray_merge.storage.digest import DigestCache
from ray_merge.storage.store import Stores
from ray_merge.work.pickles import unpickler


def plan(
    recipe: str | Path | dict[str, Any],
    *,
    output: str | None = None,
    only: Sequence[str] = (),
    workers: int | None = None,
    memory: str | int | None = None,
    cache_dir: str | Path | None = None,
) -> Plan:
    """What a recipe would read, merge and write, and whether it can; reads headers and configs alone.

    Args:
        recipe: path, URL, or the recipe as a mapping.
        output: in place of the recipe's own.
        only: names or globs of merges; all of them when empty.
        workers: how many a run would have, for the stages of what is learned; by default one per CPU.
        memory: ceiling per worker, for example "640MB".
        cache_dir: node-local folder, where pickled adapters that the recipe allows are converted.

    Raises:
        Refusal: the recipe cannot be run; the message says where and what to do.
    """
    check_count("workers", workers)
    planned = _plan(recipe, output, only, memory, cache_dir)
    check_output(planned)
    engines = Engines(workers=workers, memory=memory, cache=cache_folder(cache_dir))
    return replace(planned, moments=prepared_facts(planned, engines))


def _plan(
    recipe: str | Path | dict[str, Any],
    output: str | None,
    only: Sequence[str],
    memory: str | int | None,
    cache_dir: str | Path | None,
) -> Plan:
    """Everything but the moments: a run that has nothing to do must not import transformers."""
    parsed, source = read_recipe(recipe, output)
    require_merges(parsed, source)
    merges = select(expand(parsed, source), only)
    base, adapters = read_inputs(parsed, merges, unpickler(cache_folder(cache_dir) / "adapters"))
    ceiling = memory_ceiling(memory, DEFAULT_MEMORY_BYTES)
    planned = make_plan(parsed, merges, base, adapters, memory_bytes=ceiling)
    if memory is not None and planned.peak_bytes > ceiling:
        raise Refusal(
            f"--memory {memory}: one worker needs about {planned.peak_bytes / 1e6:.0f} MB even for one merge at "
            f"a time, the ceiling is {ceiling / 1e6:.0f} MB; raise it, or merge fewer adapters at once"
        )
    return planned


def outlook(
    recipe: str | Path | dict[str, Any],
    *,
    output: str | None = None,
    only: Sequence[str] = (),
    date: str | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[Plan, list[Target]]:
    """What a run would make, with ids, and what of it is there already; writes nothing and starts no worker.

    Args:
        recipe: path, URL, or the recipe as a mapping.
        output: in place of the recipe's own.
        only: names or globs of merges; all of them when empty.
        date: UTC day for `{date}` in `output`.
        cache_dir: node-local folder for digests.

    Raises:
        Refusal: the recipe cannot be run.
    """
    planned = _plan(recipe, output, only, None, cache_dir)
    stores = Stores()
    inputs = read_inputs_identity(planned, DigestCache(cache_folder(cache_dir) / "digests"), stores)
    return planned, find_targets(planned, inputs, date, stores)


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
    check_count("workers", workers)
    progress = counted(engine, progress)
    planned = _plan(recipe, output, only, memory, cache_dir)
    settings = Settings(cache=cache_folder(cache_dir), device=device, date=date)
    engines = Engines(
        engine=engine, address=address, workers=workers, memory=memory, device=device, cache=settings.cache
    )
    prepare = preparation(planned, engines, progress)
    return drive_run(planned, settings, unit_pools(engine, address, workers), progress, prepare)


def methods() -> list[dict[str, Any]]:
    """Every merge method: name, family, what it needs, spaces, parameters, reference."""
    return [describe(method) for method in METHODS]
