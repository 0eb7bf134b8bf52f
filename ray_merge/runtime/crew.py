"""The actors of a pool: start them, hear who answers, replace who died.

Owns: one slot per worker, the greeting that proves a worker stands, and the count of deaths that a unit may cause.
Never: lets Ray restart an actor, and never fetches a result; `ray_pool.py` does that and says here what it found.
"""

from __future__ import annotations

import logging
import platform
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    WorkerCrashedError,
)

from ray_merge.errors import RayMergeError, RunFailed, UnitFailed
from ray_merge.pool import Task
from ray_merge.runtime.actors import CALLS_AT_ONCE, Greeting, RemoteUnitActor
from ray_merge.runtime.placement import Demand, Placement, refuse_unmeetable, reserve_nodes, strategy, unmet

DEAD = (ActorDiedError, OutOfMemoryError, NodeDiedError, WorkerCrashedError)
AWAY = (ActorUnavailableError, ObjectLostError, GetTimeoutError)
GREET_AGAIN_SECONDS = 1.0

logger = logging.getLogger("ray_merge.pool")


@dataclass(eq=False)
class Job:
    """A task on its way.

    Attributes:
        lost: workers lost under it, for whatever reason.
        deaths: of those, the ones that died of themselves.
    """

    task: Task
    lost: int = 0
    deaths: int = 0
    done: bool = False


@dataclass(eq=False)
class Slot:
    """The place of one worker; the actor in it changes when it dies.

    Attributes:
        greeting: the call that waits for the actor to answer, if one is out.
        greet_after: when an actor that is away is called again, in monotonic seconds.
        worker: `host:pid` while the actor is known to answer, else None.
        flying: the calls in flight in order of submission, which is the order in which the actor begins them.
        suspect: what ran when the actor was lost.
        failed_starts: actors in a row that died before they answered.
    """

    index: int
    actor: ActorHandle[Any]
    greeting: ObjectRef[Any] | None
    greet_after: float = 0.0
    worker: str | None = None
    flying: dict[ObjectRef[Any], Job] = field(default_factory=dict)
    suspect: Job | None = None
    failed_starts: int = 0


class Crew:
    """All slots of one pool.

    Args:
        pickled_factory: what each actor makes its worker from.
        demand: what each worker asks of its node.
        size: how many slots.
        placement: `spread` or `one_per_node`.
        attempts: how many deaths one unit, or one slot as it starts, may see.
    """

    def __init__(
        self, pickled_factory: bytes, demand: Demand, size: int, placement: Placement, attempts: int
    ) -> None:
        self._factory, self._demand, self._size = pickled_factory, demand, size
        self._placement, self._attempts = placement, attempts
        self._group: Any = None
        self._answered = time.monotonic()
        self.last_loss = "none has answered yet"
        self.slots: list[Slot] = []

    def start(self, may_grow: bool, start_seconds: float) -> None:
        """Place and create the actors; their greetings are out afterwards.

        Raises:
            Refusal: the nodes that there are, or that come within `start_seconds`, cannot hold them.
        """
        wait_seconds = start_seconds if may_grow else 0.0
        if self._placement == "one_per_node":
            refuse_unmeetable(self._demand, self._size, self._placement, wait_seconds)
            self._group = reserve_nodes(self._demand, self._size, start_seconds)
        # Actors come before the count of nodes: an autoscaler adds nodes only for what is waiting.
        self.slots = [Slot(index, *self._spawn(index)) for index in range(self._size)]
        refuse_unmeetable(self._demand, self._size, self._placement, wait_seconds)

    def _spawn(self, index: int) -> tuple[ActorHandle[Any], ObjectRef[Any]]:
        options = {**self._demand.options(), "scheduling_strategy": strategy(self._group, index)}
        options["max_concurrency"] = CALLS_AT_ONCE
        actor: Any = RemoteUnitActor.options(**options).remote(self._factory)
        return actor, actor.greet.remote()

    def unmet(self, found: str) -> str:
        """The demand against the cluster, in one sentence."""
        return unmet(self._demand, self._size, self._placement, found)

    def greet_the_absent(self, deadline_seconds: float) -> None:
        """Call the actors that are away, and give up when none has answered for too long.

        Raises:
            RunFailed: nobody answered for `deadline_seconds`; it names the last loss and the cluster's resources.
        """
        now = time.monotonic()
        if any(slot.worker for slot in self.slots):
            self._answered = now
        elif now - self._answered > deadline_seconds:
            found = f"has had none that answers for {deadline_seconds:g} s (last: {self.last_loss})"
            raise RunFailed(self.unmet(found))
        for slot in self.slots:
            if slot.worker is None and slot.greeting is None and now >= slot.greet_after:
                slot.greeting = slot.actor.greet.remote()

    def hear(self, slot: Slot, answer: Greeting | RayError, failure: type[RayMergeError]) -> None:
        """Take the answer to a greeting: the worker stands, is still away, or is dead.

        Args:
            slot: who was greeted.
            answer: what came back; an error of the kinds AWAY and DEAD.
            failure: the class to raise, Refusal at the start and RunFailed later.

        Raises:
            RayMergeError: no worker can be made there: its factory failed, it dies as it starts, or it has other
                versions of Ray or Python than the driver.
        """
        slot.greeting = None
        if isinstance(answer, Greeting):
            if answer.error is not None:
                raise answer.error
            _check_versions(answer, failure)
            slot.worker, slot.suspect, slot.failed_starts = answer.worker, None, 0
            return
        if not isinstance(answer, DEAD):
            slot.greet_after = time.monotonic() + GREET_AGAIN_SECONDS
            return
        if slot.suspect is None:
            slot.failed_starts += 1
            if slot.failed_starts >= self._attempts or getattr(answer, "actor_init_failed", False):
                text = f"worker {slot.index} died {slot.failed_starts} time(s) as it started: {cause(answer)}"
                raise failure(text) from answer
        self._note(slot, answer)
        self._replace(slot, answer)

    def lose(self, slot: Slot, error: RayError, suspect: Job | None) -> None:
        """A worker did not give its results: find out about it, or replace it when the error is final.

        Raises:
            UnitFailed: too many workers died under the suspect.
        """
        slot.suspect = suspect
        if suspect is not None:
            suspect.lost += 1
        self._note(slot, error)
        slot.worker, slot.greet_after = None, time.monotonic() + GREET_AGAIN_SECONDS
        if isinstance(error, DEAD):
            self._replace(slot, error)

    def _note(self, slot: Slot, error: RayError) -> None:
        self.last_loss = f"{slot.worker or f'worker {slot.index}'}: {cause(error)}"
        unit = f"unit {slot.suspect.task.id} was running" if slot.suspect else "no unit was running"
        logger.warning("lost %s; %s", self.last_loss, unit)

    def _replace(self, slot: Slot, error: RayError) -> None:
        job, slot.suspect = slot.suspect, None
        ray.kill(slot.actor, no_restart=True)
        if job and not job.done and not getattr(error, "preempted", False):
            job.deaths += 1
            if job.deaths >= self._attempts:
                raise UnitFailed(job.task.id, job.lost, self._reason(job, error))
        slot.actor, slot.greeting = self._spawn(slot.index)

    def _reason(self, job: Job, error: RayError) -> str:
        if isinstance(error, OutOfMemoryError):
            planned = self._demand.memory_bytes
            plan = "no memory was planned for it" if planned is None else f"the plan gave it {planned} bytes"
            return f"its worker died {job.deaths} times, the last time of memory ({plan}): {cause(error)}"
        return f"its worker died {job.deaths} times, the last time: {cause(error)}"

    def close(self) -> None:
        """Kill the actors and give their places back; a second call does nothing."""
        slots, self.slots = self.slots, []
        group, self._group = self._group, None
        if not ray.is_initialized():
            return
        for slot in slots:
            ray.kill(slot.actor, no_restart=True)
        if group is not None:
            ray.util.remove_placement_group(group)


def cause(error: RayError) -> str:
    """Ray's text on one line, without its frame, its advice and its tables of processes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [
        line for line in lines if not line.startswith(("class_name:", "actor_id:", "namespace:", "name:"))
    ]
    text = " ".join(told[:6]).split("Some common causes include")[0].split("Object store memory usage")[0]
    return f"{type(error).__name__}: {text.strip()}"


def _check_versions(greeting: Greeting, failure: type[RayMergeError]) -> None:
    here, there = platform.python_version().split(".")[:2], greeting.python_version.split(".")[:2]
    if greeting.ray_version != ray.__version__ or here != there:
        raise failure(
            f"worker {greeting.worker} has Ray {greeting.ray_version} and Python {greeting.python_version}, the driver "
            f"has Ray {ray.__version__} and Python {platform.python_version()}; use one image for both"
        )


__all__ = ["AWAY", "DEAD", "Crew", "Job", "Slot", "cause"]
