"""Makes a worker in the process where it will run."""

from __future__ import annotations

from dataclasses import dataclass

from ray_merge.plan.moments import MomentsPlan
from ray_merge.pool import Worker
from ray_merge.pool_steps import StepWorker
from ray_merge.work.job import Job
from ray_merge.work.learn_job import LearnJob
from ray_merge.work.stage_job import StageJob

AnyStageJob = StageJob | LearnJob
"""A job that runs inputs through stages: moments and Fisher diagonals, or learning."""


def stages_of(job: AnyStageJob) -> MomentsPlan:
    """The model of a job, and where it is cut."""
    return job.plan.stages if isinstance(job, LearnJob) else job.plan


@dataclass(frozen=True, slots=True)
class WorkerFactory:
    """Makes the worker in the process where it will run; picklable, and torch is imported only there."""

    job: Job

    def __call__(self) -> Worker:
        """The worker of this process."""
        from ray_merge.work.worker import MergeWorker

        return MergeWorker(self.job)


@dataclass(frozen=True, slots=True)
class StageWorkerFactory:
    """Makes the worker of one stage in the process where it will run; picklable, as above."""

    job: AnyStageJob

    def __call__(self, place: int) -> StepWorker:
        """The worker of stage `place`."""
        if isinstance(self.job, LearnJob):
            from ray_merge.work.learn_worker import LearnWorker

            return LearnWorker(self.job, place)
        from ray_merge.work.stage_worker import StageWorker

        return StageWorker(self.job, place)
