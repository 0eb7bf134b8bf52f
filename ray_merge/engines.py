"""Which pool a command gets: Ray's, or the one of this very process.

Owns: how many workers, and that Ray is loaded only when there is work.
"""

from __future__ import annotations

import os
from typing import Literal

from ray_merge.drive.moments import StepPoolFactory
from ray_merge.drive.osrm import OsrmPoolFactory
from ray_merge.drive.run import PoolFactory
from ray_merge.errors import Refusal
from ray_merge.pool import LocalPool, Pool
from ray_merge.pool_steps import LocalStepPool, StepPool
from ray_merge.recipe import parse_size
from ray_merge.work.factory import StageWorkerFactory, WorkerFactory
from ray_merge.work.job import Job
from ray_merge.work.osrm_job import OsrmJob, OsrmWorkerFactory
from ray_merge.work.stage_job import StageJob

Engine = Literal["ray", "local"]


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
    engine: Engine, address: str, workers: int | None, *, one_at_a_time: bool = False
) -> StepPoolFactory:
    """Makes the pool of a job that runs inputs through stages: one place for each.

    Args:
        engine: "ray", or "local" for this process.
        address: of Ray.
        workers: how many stages compute at once in this process.
        one_at_a_time: this process holds one stage after another, so that a ceiling for one is one for it.
    """

    def local(job: StageJob) -> StepPool:
        n_stages = len(job.plan.stages)
        threads = 1 if one_at_a_time else min(n_stages, local_room(job.device, workers))
        keep = 1 if one_at_a_time else None
        return LocalStepPool(StageWorkerFactory(job), n_stages, threads=threads, keep_workers=keep)

    def ray(job: StageJob) -> StepPool:
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
            memory_bytes=job.peak_bytes,
            placement="spread",
            device="cpu",
            address=address,
            workers=workers,
        )

    return local if engine == "local" else ray


def local_room(device: str, workers: int | None) -> int:
    """How many units run at once in this process."""
    return workers or (1 if device != "cpu" else len(os.sched_getaffinity(0)))


def memory_ceiling(memory: str | int | None, default: int) -> int:
    """Bytes of a `--memory` option.

    Raises:
        Refusal: it is no size.
    """
    try:
        return default if memory is None else parse_size(memory)
    except ValueError as error:
        raise Refusal(f"--memory: {error}") from error
