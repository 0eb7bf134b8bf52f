"""A Ray pool for a job that runs inputs through stages: which session, one actor for each stage, its memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from ray_merge.pool import Closing, Done
from ray_merge.pool_steps import StepPool
from ray_merge.runtime.session import open_session
from ray_merge.runtime.step_pool import RayStepPool
from ray_merge.step_schedule import Step
from ray_merge.work.factory import AnyStageJob, StageWorkerFactory, stages_of
from ray_merge.work.learn_job import LearnJob

STORE_SHARE = 0.2
"""Of this machine's memory that an embedded Ray may use for what stages hand on; beyond it Ray spills to disk."""


class StagePool(Closing):
    """A `RayStepPool` together with the session that it runs on; closing it closes both.

    Args:
        job: what the workers are made for.
        address: "local", "auto" or HOST:PORT.
    """

    def __init__(self, job: AnyStageJob, *, address: str) -> None:
        plan = stages_of(job)
        with ExitStack() as stack:
            # One more chain than stages is under way, and a value is there twice while the next stage takes it.
            wanted = 2 * (len(plan.stages) + 1) * plan.handed_bytes
            room = int(STORE_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
            session = stack.enter_context(open_session(address, object_store_bytes=min(wanted, room)))
            self._pool: StepPool = stack.enter_context(
                RayStepPool(
                    StageWorkerFactory(job),
                    len(plan.stages),
                    session=session,
                    memory_bytes=plan.peak_bytes,
                    kind="learn" if isinstance(job, LearnJob) else "moments",
                    placement=job.placement,
                    num_gpus=1 if job.device.startswith("cuda") else 0,
                )
            )
            self._stack = stack.pop_all()

    @property
    def n_places(self) -> int:
        """How many stages there are."""
        return self._pool.n_places

    def run(self, steps: Sequence[Step]) -> Iterator[Done]:
        """See `StepPool.run`."""
        return self._pool.run(steps)

    def close(self) -> None:
        """End the actors and leave (or end) the cluster."""
        self._stack.close()
