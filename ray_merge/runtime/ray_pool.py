"""The pool over Ray actors: submit a bounded window, take what completes, submit again what was lost.

Owns: every `ray.get` of this package, and the window.
Never: lets Ray repeat a call. The driver submits a lost unit again, to whichever worker is free.

How a lost worker is told apart (tried with Ray 2.60, actors without restarts):

* `ActorDiedError`, `OutOfMemoryError` and the like are final and name the cause. The oldest unit in flight there
  was the one running, or the one being uploaded: the death is counted against it, and the actor is replaced. A unit
  that lost a worker runs alone from then on, so the culprit is found in the end.
* `ActorUnavailableError` only says that the line is broken; a dead node looks like that for about 15 s. Nothing is
  counted. The units go to other workers while the driver greets the actor once a second until it answers or is dead.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import ray
from ray import ObjectRef, cloudpickle
from ray.exceptions import RayError, RayTaskError

from ray_merge.errors import RayMergeError, Refusal, RunFailed
from ray_merge.pool import UNITS_PER_WORKER, Done, Task, Worker, refuse_repeated_ids, unit_failed
from ray_merge.runtime.actors import Greeting
from ray_merge.runtime.crew import AWAY, DEAD, Crew, Job, Slot
from ray_merge.runtime.placement import Demand, Placement
from ray_merge.runtime.session import Session

TICK_SECONDS = 1.0  # between two looks at the clock
SETTLE_SECONDS = 5.0  # Ray reports the calls of one dead actor within about a second of each other
LATE_SECONDS = 5.0  # after the first worker stands, how long the start waits for the others


class RayPool:
    """One actor per worker on a Ray cluster; see `ray_merge.pool.Pool` for the contract.

    Args:
        worker_factory: picklable; called once in each actor.
        session: the open connection to Ray.
        workers: how many actors.
        memory_bytes: the plan's peak of one worker, requested from Ray so that it never stacks workers beyond a
            node's memory; None requests nothing.
        window_per_worker: units submitted to one actor at a time: one computes, the other is uploaded or waits.
        placement: `spread` over the nodes, or `one_per_node`.
        num_gpus: whole GPUs per worker.
        attempts: how many deaths of a worker one unit may see before it fails.
        deadline_seconds: how long a run goes on while no worker at all answers.
        start_seconds: how long the start waits for nodes and for the first worker.

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
        memory_bytes: int | None,
        window_per_worker: int = UNITS_PER_WORKER,
        placement: Placement = "spread",
        num_gpus: int = 0,
        attempts: int = 4,
        deadline_seconds: float = 300.0,
        start_seconds: float = 120.0,
    ) -> None:
        if min(workers, window_per_worker, attempts) < 1:
            raise ValueError(f"{workers=}, {window_per_worker=} and {attempts=} must be at least 1")
        pickled: bytes = cloudpickle.dumps(worker_factory)  # type: ignore[no-untyped-call]
        self._crew = Crew(pickled, Demand(num_gpus, memory_bytes), workers, placement, attempts)
        self._size, self._window, self._deadline_seconds = workers, window_per_worker, deadline_seconds
        self._waiting: deque[Job] = deque()
        self._running = False
        try:
            self._crew.start(session.may_grow, start_seconds)
            self._welcome_the_first(start_seconds)
        except BaseException:
            self.close()
            raise

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

    def close(self) -> None:
        """Kill the actors and free their places; the session stays open."""
        self._crew.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _welcome_the_first(self, start_seconds: float) -> None:
        greetings = {slot.greeting: slot for slot in self._crew.slots if slot.greeting is not None}
        if not _wait(list(greetings), 1, start_seconds):
            raise Refusal(self._crew.unmet(f"started none of them in {start_seconds:g} s"))
        ready = _wait(list(greetings), len(greetings), LATE_SECONDS)
        for ref in ready:
            self._crew.hear(greetings[ref], _answer(ref), Refusal)

    def _run(self, tasks: Sequence[Task]) -> Iterator[Done]:
        if self._running:
            raise RuntimeError("this pool is in the middle of another run")
        self._running = True
        self._waiting = deque(Job(task) for task in tasks)
        left = len(tasks)
        try:
            while left:
                self._submit()
                for done in self._next():
                    left -= 1
                    yield done
        finally:
            self._running = False
            self._drop()

    def _submit(self) -> None:
        ready = [slot for slot in self._crew.slots if slot.worker]
        while self._waiting and ready:
            # Towards the end nothing is bound to a busy worker while another is about to be free.
            window = self._window if len(self._waiting) > len(ready) else 1
            slot = min(ready, key=lambda slot: (len(slot.flying), slot.index))
            # A unit that lost a worker runs alone, so that the next death is not laid at a neighbour's door.
            if self._waiting[0].lost or any(job.lost for job in slot.flying.values()):
                window = 1
            if len(slot.flying) >= window:
                return
            job = self._waiting.popleft()
            slot.flying[slot.actor.run.remote(job.task.unit)] = job

    def _next(self) -> list[Done]:
        """Wait for one event, at most one tick, and return what it completed."""
        self._crew.greet_the_absent(self._deadline_seconds)
        owners = {ref: slot for slot in self._crew.slots for ref in slot.flying}
        owners |= {slot.greeting: slot for slot in self._crew.slots if slot.greeting is not None}
        if not owners:
            time.sleep(TICK_SECONDS)
            return []
        ready = _wait(list(owners), 1, TICK_SECONDS)
        if not ready:
            return []
        ref, slot = ready[0], owners[ready[0]]
        if ref == slot.greeting:
            self._crew.hear(slot, _answer(ref), RunFailed)
            return []
        try:
            done = _value(slot, slot.flying[ref], ref)
        except (*DEAD, *AWAY) as error:
            return self._lose(slot, error)
        del slot.flying[ref]
        return [done]

    def _lose(self, slot: Slot, error: RayError) -> list[Done]:
        """A worker is lost: keep what it had finished, and put the rest back in front."""
        _wait(list(slot.flying), len(slot.flying), SETTLE_SECONDS)
        results, orphans = [], []
        for ref, job in slot.flying.items():
            try:
                results.append(_value(slot, job, ref))
            except (*DEAD, *AWAY):
                orphans.append(job)
        slot.flying.clear()
        self._waiting.extendleft(reversed(orphans))
        self._crew.lose(slot, error, orphans[0] if orphans else None)
        return results

    def _drop(self) -> None:
        """Forget what is in flight; what still waits at an actor is not started any more."""
        self._waiting.clear()
        for slot in self._crew.slots:
            for ref in slot.flying:
                ray.cancel(ref, recursive=False)
            slot.flying.clear()


def _value(slot: Slot, job: Job, ref: ObjectRef[Any]) -> Done:
    """Fetch one result.

    Raises:
        RayMergeError: the unit raised it, or raised something else (`UnitFailed`).
        RayError: of the kinds DEAD and AWAY; the worker is lost.
    """
    try:
        value = _fetch(ref)
    except (*DEAD, *AWAY):
        raise
    except RayTaskError as error:
        if isinstance(error.cause, RayMergeError):
            raise error.cause from error
        raise unit_failed(job.task.id, 1 + job.lost, error.cause) from error
    except RayError as error:
        raise unit_failed(job.task.id, 1 + job.lost, error) from error
    job.done = True
    return Done(job.task.id, value, slot.worker or "unknown", 1 + job.lost)


def _answer(ref: ObjectRef[Any]) -> Greeting | RayError:
    try:
        greeting: Greeting = _fetch(ref)
    except (*DEAD, *AWAY) as error:
        return error
    return greeting


def _wait(refs: list[ObjectRef[Any]], count: int, seconds: float) -> list[ObjectRef[Any]]:
    with _own_signals():
        return ray.wait(refs, num_returns=count, timeout=seconds, fetch_local=False)[0]


def _fetch(ref: ObjectRef[Any]) -> Any:
    with _own_signals():
        return ray.get(ref, timeout=SETTLE_SECONDS)


@contextmanager
def _own_signals() -> Iterator[None]:
    """What a signal handler raises leaves Ray's compiled calls wrapped in a SystemError; unwrap it."""
    try:
        yield
    except SystemError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None


__all__ = ["RayPool"]
