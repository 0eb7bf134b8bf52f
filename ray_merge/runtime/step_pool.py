"""The pool of steps over Ray actors: one actor per place, and values that go from actor to actor.

Owns: the references to what steps handed on, and the rule by which a lost value is made again.
Never: fetches what a step handed on, except by Ray's own hand: values below 100 kB travel with the small results.

A step's call has two results. The driver fetches the first and holds the second as a reference, which is an argument
of the calls that need it. An actor's death leaves it whole; the loss of the node that holds it does not, and is found
out by a call that needs it (up to half a minute later, tried with Ray 2.60). That call has then not begun: the step
that made the value runs again, and so do those before it whose values were dropped already. Ray cannot do this itself
for actors whose calls it may not repeat. How a lost worker is told apart: `crew_pool.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray import ObjectRef, cloudpickle
from ray.exceptions import RayError

from ray_merge import logs
from ray_merge.errors import Refusal, UnitFailed
from ray_merge.pool import UNITS_PER_WORKER, Done
from ray_merge.pool_steps import StepWorker
from ray_merge.recipe import SPREAD, Placement
from ray_merge.runtime.crew import Crew, Job, Slot, cause
from ray_merge.runtime.crew_pool import CrewPool, done_by
from ray_merge.runtime.fetch import fetch, hush, is_loss, lost_argument, raise_for
from ray_merge.runtime.placement import Demand, shared_cpus
from ray_merge.runtime.session import Session
from ray_merge.runtime.step_actors import RemoteStepActor
from ray_merge.runtime.telemetry import Label
from ray_merge.step_schedule import Schedule, Step


@dataclass(eq=False)
class StepJob(Job):
    """A step on its way.

    Attributes:
        index: of the step in the list.
        given: what its call was given.
        handed: what its call hands on.
        remade: how often that was lost.
    """

    index: int = 0
    given: list[ObjectRef[Any]] = field(default_factory=list)
    handed: ObjectRef[Any] | None = None
    remade: int = 0


class RayStepPool(CrewPool[StepJob]):
    """One actor per place on a Ray cluster; see `ray_merge.pool_steps.StepPool` for the contract.

    Args:
        worker_factory: picklable; called in each actor with its place.
        n_places: how many places there are.
        session: the open connection to Ray.
        memory_bytes: what each place asks Ray for, or one number for all of them; None asks for nothing.
        kind: of job, for metrics and the dashboard.
        window_per_place: steps submitted to one actor at a time: one computes, the next one's arguments arrive.
        in_flight: how many chains are under way at once; default: one more than places.
        placement: of the workers over the nodes.
        num_gpus: whole GPUs per place.
        attempts: how many deaths of an actor one step may see before it fails, and how many losses of what it
            handed on.
        deadline_seconds: how long a run goes on while the actor of any one place does not answer.
        start_seconds: how long the start waits for nodes and for all actors, with what their factories load.

    Raises:
        Refusal: the cluster cannot hold the actors, they do not all stand in time, or its versions are not the
            driver's.
        RayMergeError: what the factory raised.
    """

    def __init__(
        self,
        worker_factory: Callable[[int], StepWorker],
        n_places: int,
        *,
        session: Session,
        memory_bytes: int | None,
        kind: str = "unit",
        window_per_place: int = UNITS_PER_WORKER,
        in_flight: int | None = None,
        placement: Placement = SPREAD,
        num_gpus: int = 0,
        attempts: int = 4,
        deadline_seconds: float = 600.0,
        start_seconds: float = 300.0,
    ) -> None:
        in_flight = n_places + 1 if in_flight is None else in_flight
        if min(n_places, window_per_place, in_flight, attempts) < 1:
            raise ValueError(
                f"{n_places=}, {window_per_place=}, {in_flight=} and {attempts=} must be at least 1"
            )
        label = Label(kind, logs.recipe(), logs.is_json())
        pickled: bytes = cloudpickle.dumps(worker_factory)  # type: ignore[no-untyped-call]

        def hire(index: int, options: dict[str, Any]) -> Any:
            return RemoteStepActor.options(**options).remote(label, pickled, index)

        demand = shared_cpus(Demand(num_gpus, memory_bytes), n_places, placement)
        crew: Crew[StepJob] = Crew(hire, demand, n_places, placement, attempts, kind, needs_all=True)
        super().__init__(crew, deadline_seconds)
        self._n_places, self._window, self._in_flight = n_places, window_per_place, in_flight
        self._attempts = attempts
        self._schedule = Schedule([], n_places, None)
        self._jobs: list[StepJob] = []
        self._start(session.may_grow, start_seconds)

    @property
    def n_places(self) -> int:
        """How many places there are."""
        return self._n_places

    def run(self, steps: Sequence[Step]) -> Iterator[Done]:
        """Run the steps on the actors; see `StepPool.run`.

        Raises:
            UnitFailed: the actors under one step died `attempts` times, or what it handed on was lost as often.
            RunFailed: the actor of a place did not answer for `deadline_seconds`, or new ones die while they start.
        """
        return self._run(Schedule(steps, self._n_places, self._in_flight))

    def _welcome(self, start_seconds: float) -> None:
        slots = self._crew.slots
        if not self._hear_until(lambda: all(slot.worker for slot in slots), start_seconds):
            n_there = sum(slot.worker is not None for slot in slots)
            raise Refusal(self._crew.unmet(f"started {n_there or 'none'} of them in {start_seconds:g} s"))

    def _run(self, schedule: Schedule) -> Iterator[Done]:
        self._begin()
        self._schedule = schedule
        self._jobs = [StepJob(step.id, step.unit, index=index) for index, step in enumerate(schedule.steps)]
        yield from self._loop(lambda: schedule.left)

    def _submit(self) -> None:
        for slot in self._crew.slots:
            while slot.worker and (job := self._job_for(slot)):
                job.done = False
                job.given = self._schedule.begin(job.index)
                call: Any = slot.actor.run.options(num_returns=2)
                result, job.handed = call.remote(job.id, job.unit, *job.given)
                slot.flying[result] = job

    def _job_for(self, slot: Slot[StepJob]) -> StepJob | None:
        index = self._schedule.peek(slot.index)
        if index is None:
            return None
        job = self._jobs[index]
        # A step that lost an actor runs alone, so that the next death is not laid at a neighbour's door.
        alone = job.lost or any(other.lost for other in slot.flying.values())
        return job if len(slot.flying) < (1 if alone else self._window) else None

    def _take(self, slot: Slot[StepJob], job: StepJob, ref: ObjectRef[Any]) -> list[Done]:
        handed = job.handed
        assert handed is not None, f"step {job.id} is not in flight"
        try:
            done = done_by(slot, job, fetch(ref))
        except RayError as error:
            hush(handed)
            lost = lost_argument(error)
            if lost is not None:
                self._make_again(job, lost, error)
                return []
            if is_loss(error):
                raise
            raise_for(job.id, 1 + job.lost, error)
        job.given, job.handed = [], None
        return [done] if self._schedule.finish(job.index, handed) else []

    def _make_again(self, job: StepJob, lost: str, error: RayError) -> None:
        """What a call was given is gone: its step waits until that is made again."""
        given, job.given, job.handed = job.given, [], None
        self._schedule.give_back(job.index)
        makers = list(zip(self._schedule.needs(job.index), given, strict=True))
        for index, ref in [pair for pair in makers if pair[1].hex() == lost] or makers:
            maker = self._jobs[index]
            if self._schedule.lost(index, ref):
                maker.remade += 1
                if maker.remade >= self._attempts:
                    text = f"what it handed on was lost {maker.remade} times, the last time: {cause(error)}"
                    raise UnitFailed(maker.id, 1 + maker.lost, text) from error

    def _put_back(self, jobs: Sequence[StepJob]) -> None:
        for job in jobs:
            job.given, job.handed = [], None
            self._schedule.give_back(job.index)

    def _drop(self) -> None:
        super()._drop()
        self._schedule, self._jobs = Schedule([], self._n_places, None), []


__all__ = ["RayStepPool"]
