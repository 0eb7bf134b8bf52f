"""The pool over Ray actors: submit a bounded window, take what completes, submit again what was lost.

Owns: the window; `waiting.py` says which unit is next.
Never: lets Ray repeat a call. The driver submits a lost unit again, to whichever worker is free; `crew_pool.py` says
how a lost worker is told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from ray import ObjectRef, cloudpickle
from ray.exceptions import RayError

from ray_merge import logs
from ray_merge.errors import Refusal
from ray_merge.pool import UNITS_PER_WORKER, Done, Task, Worker, refuse_repeated_ids
from ray_merge.recipe import SPREAD, Placement
from ray_merge.runtime.actors import RemoteUnitActor
from ray_merge.runtime.crew import Crew, Job, Slot
from ray_merge.runtime.crew_pool import CrewPool, done_by
from ray_merge.runtime.fetch import fetch, is_loss, raise_for
from ray_merge.runtime.placement import Demand
from ray_merge.runtime.session import Session
from ray_merge.runtime.telemetry import Label
from ray_merge.runtime.waiting import Held, Waiting

DataPlace = Literal["node", "worker"]

LATE_SECONDS = 5.0  # after the first worker stands, how long the start waits for the others


class RayPool(CrewPool[Job]):
    """One actor per worker on a Ray cluster; see `ray_merge.pool.Pool` for the contract.

    Args:
        worker_factory: picklable; called once in each actor.
        session: the open connection to Ray.
        workers: how many actors.
        enough: how many of them the nodes must have room for, the others may wait for ever; all by default.
        memory_bytes: the plan's peak of one worker, requested from Ray so that it never stacks workers beyond a
            node's memory; None requests nothing.
        kind: of job, for metrics and the dashboard.
        window_per_worker: units submitted to one actor at a time: one computes, the other is uploaded or waits.
        placement: of the workers over the nodes.
        num_gpus: whole GPUs per worker.
        attempts: how many deaths of a worker one unit may see before it fails.
        deadline_seconds: how long a run goes on while no worker at all answers.
        start_seconds: how long the start waits for nodes and for the first worker.
        data_stays: where what a unit has read is found again, for the choice of the next one: `Task.data`.

    Raises:
        Refusal: the cluster cannot hold the workers, none stands in time, or its versions are not the driver's.
        RayMergeError: what the factory raised.
    """

    def __init__(
        self,
        worker_factory: Callable[[], Worker],
        *,
        session: Session,
        workers: int,
        enough: int | None = None,
        memory_bytes: int | None,
        kind: str = "unit",
        window_per_worker: int = UNITS_PER_WORKER,
        placement: Placement = SPREAD,
        num_gpus: int = 0,
        attempts: int = 4,
        deadline_seconds: float = 300.0,
        start_seconds: float = 120.0,
        data_stays: DataPlace = "node",
    ) -> None:
        if min(workers, window_per_worker, attempts) < 1:
            raise ValueError(f"{workers=}, {window_per_worker=} and {attempts=} must be at least 1")
        label = Label(kind, logs.recipe(), logs.is_json())
        pickled: bytes = cloudpickle.dumps(worker_factory)  # type: ignore[no-untyped-call]

        def hire(index: int, options: dict[str, Any]) -> Any:
            return RemoteUnitActor.options(**options).remote(label, pickled)

        demand = Demand(num_gpus, memory_bytes)
        super().__init__(
            Crew(hire, demand, workers, placement, attempts, kind, enough=enough), deadline_seconds
        )
        self._size, self._window = workers, window_per_worker
        self._data_stays, self._held = data_stays, Held()
        self._waiting = Waiting((), self._held)
        self._left = 0
        self._start(session.may_grow, start_seconds)

    @property
    def size(self) -> int:
        """How many units run at once."""
        return self._size

    def run(self, tasks: Sequence[Task]) -> Iterator[Done]:
        """Run the tasks on the actors; see `Pool.run`.

        Raises:
            UnitFailed: the workers under one unit died `attempts` times, with the last cause.
            RunFailed: no worker answered for `deadline_seconds`, or new ones die while they start.
        """
        refuse_repeated_ids(tasks)
        return self._run(tasks)

    def _welcome(self, start_seconds: float) -> None:
        if not self._hear_until(lambda: any(slot.worker for slot in self._crew.slots), start_seconds):
            raise Refusal(self._crew.unmet(f"started none of them in {start_seconds:g} s"))
        self._hear_until(lambda: all(slot.worker for slot in self._crew.slots), LATE_SECONDS)

    def _run(self, tasks: Sequence[Task]) -> Iterator[Done]:
        self._begin()
        self._waiting = Waiting((Job(task.id, task.unit, data=task.data) for task in tasks), self._held)
        self._left = len(tasks)
        yield from self._loop(lambda: self._left)

    def _submit(self) -> None:
        ready = [slot for slot in self._crew.slots if slot.worker]
        while self._waiting and ready:
            # Towards the end nothing is bound to a busy worker while another is about to be free.
            window = self._window if len(self._waiting) > len(ready) else 1
            slot = min(ready, key=lambda slot: (len(slot.flying), slot.index))
            # A unit that lost a worker runs alone, so that the next death is not laid at a neighbour's door.
            if self._waiting.has_lost or any(job.lost for job in slot.flying.values()):
                window = 1
            if len(slot.flying) >= window:
                return
            job = self._waiting.take(str(slot.node if self._data_stays == "node" else slot.worker))
            slot.flying[slot.actor.run.remote(job.id, job.unit)] = job

    def _take(self, slot: Slot[Job], job: Job, ref: ObjectRef[Any]) -> list[Done]:
        try:
            done = done_by(slot, job, fetch(ref))
        except RayError as error:
            if is_loss(error):
                raise
            raise_for(job.id, 1 + job.lost, error)
        self._left -= 1
        return [done]

    def _put_back(self, jobs: Sequence[Job]) -> None:
        self._waiting.put_back(jobs)

    def _drop(self) -> None:
        self._waiting = Waiting((), self._held)
        super()._drop()


__all__ = ["DataPlace", "RayPool"]
