"""Makes a worker in the process where it will run."""

from __future__ import annotations

from dataclasses import dataclass

from ray_merge.pool import Worker
from ray_merge.work.job import Job


@dataclass(frozen=True, slots=True)
class WorkerFactory:
    """Makes the worker in the process where it will run; picklable, and torch is imported only there."""

    job: Job

    def __call__(self) -> Worker:
        """The worker of this process."""
        from ray_merge.work.worker import MergeWorker

        return MergeWorker(self.job)
