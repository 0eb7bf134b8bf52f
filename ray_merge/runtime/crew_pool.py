"""What the pools over Ray actors share: the start, the loop over events, and the end.

Owns: when a worker counts as lost, and what becomes of the calls that were in flight there.
Never: lets Ray repeat a call, or knows which call comes next; the two pools do.

How a lost worker is told apart (tried with Ray 2.60, actors without restarts):

* `ActorDiedError`, `OutOfMemoryError` and the like are final and name the cause. The oldest unit in flight there
  was the one running, or the one being uploaded: the death is counted against it, and the actor is replaced. A unit
  that lost a worker runs alone from then on, so the culprit is found in the end.
* `ActorUnavailableError` only says that the line is broken; a dead node looks like that for about 15 s. Nothing is
  counted. The units wait for another worker while the driver greets the actor once a second until it answers or is
  dead.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import ray
from ray import ObjectRef
from ray.exceptions import RayError

from ray_merge.errors import RayMergeError, Refusal, RunFailed
from ray_merge.pool import Closing, Done
from ray_merge.runtime.crew import Crew, Job, Slot
from ray_merge.runtime.fetch import SETTLE_SECONDS, answer, wait_for
from ray_merge.runtime.telemetry import forget_progress, repeat_progress, unit_ended

TICK_SECONDS = 1.0  # between two looks at the clock

AnyJob = TypeVar("AnyJob", bound=Job)


class CrewPool(Closing, Generic[AnyJob]):
    """One run at a time over the actors of a crew; a context manager that kills them on exit.

    Args:
        crew: not started yet.
        deadline_seconds: how long a run goes on without the workers that it cannot do without.
    """

    def __init__(self, crew: Crew[AnyJob], deadline_seconds: float) -> None:
        self._crew = crew
        self._deadline_seconds, self._patience_seconds = deadline_seconds, math.inf
        self._failure: type[RayMergeError] = Refusal
        self._running = False

    @abstractmethod
    def _submit(self) -> None:
        """Give the workers that stand what they have room for."""

    @abstractmethod
    def _take(self, slot: Slot[AnyJob], job: AnyJob, ref: ObjectRef[Any]) -> list[Done]:
        """Fetch one result; an empty list if it does not count.

        Raises:
            RayMergeError: the unit failed.
            RayError: `is_loss`; the worker is lost.
        """

    @abstractmethod
    def _put_back(self, jobs: Sequence[AnyJob]) -> None:
        """These did not come to their end, and wait again."""

    def _start(self, may_grow: bool, start_seconds: float) -> None:
        try:
            self._crew.start(may_grow, start_seconds)
            self._welcome(start_seconds)
        except BaseException:
            self.close()
            raise
        self._patience_seconds, self._failure = self._deadline_seconds, RunFailed

    @abstractmethod
    def _welcome(self, start_seconds: float) -> None:
        """Hear of the workers that the pool cannot begin without.

        Raises:
            RayMergeError: there is none, or not in time.
        """

    def _hear_until(self, enough: Callable[[], bool], seconds: float) -> bool:
        """Hear greetings until it is enough, but not longer than `seconds`; returns whether it was."""
        end = time.monotonic() + seconds
        while not enough() and (left := end - time.monotonic()) > 0:
            self._next(min(left, TICK_SECONDS))
        return enough()

    def _loop(self, unfinished: Callable[[], object]) -> Iterator[Done]:
        self._crew.begin_run()
        try:
            while unfinished():
                repeat_progress()
                self._submit()
                yield from self._next(TICK_SECONDS)
        finally:
            self._running = False
            self._drop()

    def _begin(self) -> None:
        if self._running:
            raise RuntimeError("this pool is in the middle of another run")
        self._running = True

    def _next(self, seconds: float) -> list[Done]:
        """Wait for one event, at most so long, and return what it completed."""
        self._crew.greet_the_absent(self._patience_seconds)
        owners = {ref: slot for slot in self._crew.slots for ref in slot.flying}
        owners |= {slot.greeting: slot for slot in self._crew.slots if slot.greeting is not None}
        if not owners:
            time.sleep(seconds)
            return []
        ready = wait_for(list(owners), 1, seconds)
        if not ready:
            return []
        ref, slot = ready[0], owners[ready[0]]
        if ref == slot.greeting:
            self._crew.hear(slot, answer(ref), self._failure)
            return []
        try:
            results = self._count(slot, slot.flying[ref], ref)
        except RayError as error:
            return self._lose(slot, error)
        del slot.flying[ref]
        return results

    def _count(self, slot: Slot[AnyJob], job: AnyJob, ref: ObjectRef[Any]) -> list[Done]:
        try:
            results = self._take(slot, job, ref)
        except RayMergeError:
            unit_ended(self._crew.kind, "failed")
            raise
        for _ in results:
            unit_ended(self._crew.kind, "done")
        return results

    def _lose(self, slot: Slot[AnyJob], error: RayError) -> list[Done]:
        """A worker is lost: keep what it had finished, and let the rest wait again."""
        wait_for(list(slot.flying), len(slot.flying), SETTLE_SECONDS)
        results, orphans = [], []
        for ref, job in slot.flying.items():
            try:
                results += self._count(slot, job, ref)
            except RayError:
                orphans.append(job)
        slot.flying.clear()
        self._put_back(orphans)
        self._crew.lose(slot, error, orphans[0] if orphans else None)
        return results

    def _drop(self) -> None:
        """Forget what is in flight; what still waits at an actor is not started any more."""
        for slot in self._crew.slots:
            for ref in slot.flying:
                ray.cancel(ref, recursive=False)
            slot.flying.clear()

    def close(self) -> None:
        """Kill the actors and free their places; the session stays open."""
        self._crew.close()
        forget_progress()


def done_by(slot: Slot[AnyJob], job: AnyJob, value: Any) -> Done:
    """The result of a call that came to its end."""
    job.done = True
    return Done(job.id, value, slot.worker or "unknown", 1 + job.lost)


__all__ = ["CrewPool", "done_by"]
