"""Which pool a command gets: Ray's, or the one of this very process.

Owns: how many workers, and that Ray is loaded only when there is work.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from ray_merge.drive.events import Event
from ray_merge.drive.osrm import OsrmPoolFactory
from ray_merge.drive.run import PoolFactory
from ray_merge.errors import Refusal
from ray_merge.pool import LocalPool, Pool
from ray_merge.pool_steps import LocalStepPool, StepPool
from ray_merge.recipe import SPREAD, parse_size
from ray_merge.work.evaluate_job import EvaluateJob, EvaluatePoolFactory, EvaluateWorkerFactory
from ray_merge.work.factory import AnyStageJob, StageWorkerFactory, WorkerFactory, stages_of
from ray_merge.work.job import Job
from ray_merge.work.osrm_job import OsrmJob, OsrmWorkerFactory

Engine = Literal["ray", "local"]

USABLE_PERCENT = 80
"""Of a machine's memory; the rest is the system's, Ray's and the driver's."""


def unit_pools(engine: Engine, address: str, workers: int | None) -> PoolFactory:
    """Makes the pool of a merge job."""

    def local(job: Job, n_units: int) -> Pool:
        # One GPU is one place to work: threads would only share its memory.
        return LocalPool(WorkerFactory(job)(), max(1, min(n_units, local_room(job.device, workers))))

    def ray(job: Job, n_units: int) -> Pool:
        from ray_merge.runtime.merge_pool import MergePool

        return MergePool(job, n_units, address=address, workers=workers)

    return local if engine == "local" else ray


def stage_pools(
    engine: Engine, address: str, workers: int | None, *, ceiling: int | None = None
) -> Callable[[AnyStageJob], StepPool]:
    """Makes the pool of a job that runs inputs through stages: one place for each.

    Args:
        engine: "ray", or "local" for this process.
        address: of Ray.
        workers: how many stages compute at once in this process.
        ceiling: for one stage; this process then holds one after another, so that it is one for the process.
    """

    def local(job: AnyStageJob) -> StepPool:
        plan = stages_of(job)
        n_stages = len(plan.stages)
        room = USABLE_PERCENT * memory_bytes() // 100 if ceiling is None else ceiling
        keep = min(n_stages, max(1, room // plan.peak_bytes))
        threads = min(keep, local_room(job.device, workers))
        # Between two stages that are not held at once the hidden states of all chains under way are kept.
        left = max(0, room - keep * plan.peak_bytes)
        in_flight = None if keep == n_stages else 1 + left // max(1, plan.handed_bytes)
        return LocalStepPool(
            StageWorkerFactory(job), n_stages, threads=threads, in_flight=in_flight, keep_workers=keep
        )

    def ray(job: AnyStageJob) -> StepPool:
        from ray_merge.runtime.stage_pool import StagePool

        return StagePool(job, address=address)

    return local if engine == "local" else ray


def osrm_pools(engine: Engine, address: str, workers: int | None) -> OsrmPoolFactory:
    """Makes the pool of an init."""

    def local(job: OsrmJob, n_units: int) -> Pool:
        return LocalPool(OsrmWorkerFactory(job)(), max(1, min(n_units, local_room("cpu", workers))))

    def ray(job: OsrmJob, n_units: int) -> Pool:
        from ray_merge.runtime.merge_pool import JobPool

        return JobPool(
            OsrmWorkerFactory(job),
            n_units,
            kind="osrm",
            memory_bytes=job.peak_bytes,
            placement=SPREAD,
            device="cpu",
            address=address,
            workers=workers,
        )

    return local if engine == "local" else ray


def evaluate_pools(engine: Engine, address: str, workers: int | None) -> EvaluatePoolFactory:
    """Makes the pool of an evaluation."""

    def local(job: EvaluateJob, n_units: int) -> Pool:
        # Each unit at work holds a whole model.
        fitting = USABLE_PERCENT * memory_bytes() // 100 // job.peak_bytes
        room = max(1, min(n_units, local_room(job.device, workers), fitting))
        return LocalPool(EvaluateWorkerFactory(replace(job, room=room))(), room)

    def ray(job: EvaluateJob, n_units: int) -> Pool:
        from ray_merge.runtime.merge_pool import JobPool

        return JobPool(
            EvaluateWorkerFactory(job),
            n_units,
            kind="evaluate",
            memory_bytes=job.peak_bytes,
            placement=job.placement,
            device=job.device,
            address=address,
            workers=workers,
            data_stays="worker",  # a loaded model
        )

    return local if engine == "local" else ray


def counted(engine: Engine, progress: Callable[[Event], None]) -> Callable[[Event], None]:
    """Progress that Ray's metrics show too; once a unit is done, Ray is loaded and there is a session."""

    def both(event: Event) -> None:
        progress(event)
        if event.kind in ("unit", "learn"):
            from ray_merge.runtime.telemetry import progressed

            progressed(event.units, event.n_bytes)

    return progress if engine == "local" else both


def local_room(device: str, workers: int | None) -> int:
    """How many units run at once in this process."""
    return workers or (1 if device != "cpu" else len(os.sched_getaffinity(0)))


def memory_bytes() -> int:
    """Physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def stage_ceiling(memory: str | int | None, workers: int) -> int:
    """Bytes that one stage may take: as asked, or an equal share of a machine like this one for each worker."""
    return memory_ceiling(memory, USABLE_PERCENT * memory_bytes() // 100 // workers)


def memory_ceiling(memory: str | int | None, default: int) -> int:
    """Bytes of a `--memory` option.

    Raises:
        Refusal: it is no size.
    """
    try:
        return default if memory is None else parse_size(memory)
    except ValueError as error:
        raise Refusal(f"--memory: {error}") from error
