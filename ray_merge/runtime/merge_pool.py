"""Ray pools for jobs of units: which session, how many workers, how much memory for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import ray

from ray_merge.errors import Refusal
from ray_merge.pool import Closing, Done, Pool, Task, Worker
from ray_merge.recipe import Placement
from ray_merge.runtime.placement import Demand, room_for
from ray_merge.runtime.ray_pool import DataPlace, RayPool
from ray_merge.runtime.session import open_session
from ray_merge.work.factory import WorkerFactory
from ray_merge.work.job import Job


class JobPool(Closing):
    """A `RayPool` together with the session that it runs on; closing it closes both.

    Args:
        factory: makes a worker; picklable.
        n_units: there are never more workers than units.
        kind: of job, for metrics and the dashboard.
        memory_bytes: peak of one worker.
        placement: of the workers over a cluster's nodes.
        device: a GPU device takes one GPU for each worker.
        address: "local", "auto" or HOST:PORT.
        workers: how many; None for one per CPU (or per GPU, with a GPU device) of the cluster, as far as the memory
            of its nodes goes.
        data_stays: see `RayPool`.
    """

    def __init__(
        self,
        factory: Callable[[], Worker],
        n_units: int,
        *,
        kind: str,
        memory_bytes: int,
        placement: Placement,
        device: str,
        address: str,
        workers: int | None,
        data_stays: DataPlace = "node",
    ) -> None:
        gpus = 1 if device.startswith("cuda") else 0
        with ExitStack() as stack:
            session = stack.enter_context(open_session(address))
            resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
            if workers is None and resources.get("GPU" if gpus else "CPU", 0) < 1:
                wanted, else_ = ("GPU", "use --device cpu") if gpus else ("CPU", "give --workers N")
                raise Refusal(
                    f"the Ray cluster at {address} has no {wanted} for a worker; add nodes or {else_}"
                )
            # Where none fits now, one is asked for: the pool waits for a node that may come, and says what is missing.
            room = workers or room_for(Demand(gpus, memory_bytes), placement)
            self._pool: Pool = stack.enter_context(
                RayPool(
                    factory,
                    session=session,
                    workers=max(1, min(n_units, room)),
                    # Nobody asked for so many: a node that has just been lost counts for some 15 s more.
                    enough=None if workers else 1,
                    memory_bytes=memory_bytes,
                    kind=kind,
                    placement=placement,
                    num_gpus=gpus,
                    data_stays=data_stays,
                )
            )
            self._stack = stack.pop_all()

    @property
    def size(self) -> int:
        """How many units run at once."""
        return self._pool.size

    def run(self, tasks: Sequence[Task]) -> Iterator[Done]:
        """See `Pool.run`."""
        return self._pool.run(tasks)

    def close(self) -> None:
        """End the workers and leave (or end) the cluster."""
        self._stack.close()


class MergePool(JobPool):
    """The pool of a merge job.

    Args:
        job: what the workers are made for.
        n_units: there are never more workers than units.
        address: "local", "auto" or HOST:PORT.
        workers: how many; None for one per CPU (or per GPU, with a GPU device) of the cluster, as far as the memory
            of its nodes goes.
    """

    def __init__(self, job: Job, n_units: int, *, address: str, workers: int | None) -> None:
        super().__init__(
            WorkerFactory(job),
            n_units,
            kind="merge",
            memory_bytes=job.plan.peak_bytes,
            placement=job.plan.recipe.placement,
            device=job.device,
            address=address,
            workers=workers,
        )
