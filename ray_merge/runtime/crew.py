"""The actors of a pool: start them, hear who answers, replace who died.

Owns: one slot per worker, the greeting that proves a worker stands, and the count of deaths that a unit may cause.
Never: lets Ray restart an actor, and never fetches a result; `crew_pool.py` does that and says here what it found.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import OutOfMemoryError, RayError

from ray_merge.errors import RayMergeError, RunFailed, UnitFailed
from ray_merge.recipe import Placement
from ray_merge.runtime.actors import CALLS_AT_ONCE, Greeting
from ray_merge.runtime.fetch import DEAD
from ray_merge.runtime.placement import Demand, in_place, refuse_unmeetable, reserve_nodes, unmet
from ray_merge.runtime.telemetry import unit_ended, worker_lost

GREET_AGAIN_SECONDS = 1.0

logger = logging.getLogger("ray_merge.pool")


@dataclass(eq=False)
class Job:
    """A unit on its way.

    Attributes:
        id: names the unit in errors.
        lost: workers lost under it, for whatever reason.
        deaths: of those, the ones that died of themselves.
        data: see `pool.Task`.
    """

    id: str
    unit: Any
    lost: int = 0
    deaths: int = 0
    done: bool = False
    data: frozenset[str] = frozenset()


AnyJob = TypeVar("AnyJob", bound=Job)

Hire = Callable[[int, dict[str, Any]], Any]
"""Create the actor of a slot with Ray's options."""


@dataclass(eq=False)
class Slot(Generic[AnyJob]):
    """The place of one worker; the actor in it changes when it dies.

    Attributes:
        greeting: the call that waits for the actor to answer, if one is out.
        greet_after: when an actor that is away is called again, in monotonic seconds.
        worker: `host:pid` while the actor is known to answer, else None.
        node: Ray's id of the node that it answered from last.
        answered: when it was last known to, in monotonic seconds.
        flying: the calls in flight in order of submission, which is the order in which the actor begins them.
        suspect: what ran when the actor was lost.
        failed_starts: actors in a row that died before they answered.
    """

    index: int
    actor: ActorHandle[Any]
    greeting: ObjectRef[Any] | None
    greet_after: float = 0.0
    worker: str | None = None
    node: str = ""
    answered: float = field(default_factory=time.monotonic)
    flying: dict[ObjectRef[Any], AnyJob] = field(default_factory=dict)
    suspect: AnyJob | None = None
    failed_starts: int = 0


class Crew(Generic[AnyJob]):
    """All slots of one pool.

    Args:
        hire: creates an actor.
        demand: what each worker asks of its node.
        size: how many slots.
        placement: of the workers over the nodes.
        attempts: how many deaths one unit, or one slot as it starts, may see.
        kind: of job, for metrics.
        needs_all: a run cannot go on without any one of the workers; else one is enough.
        enough: how many of them the nodes must have room for; all by default.
    """

    def __init__(
        self,
        hire: Hire,
        demand: Demand,
        size: int,
        placement: Placement,
        attempts: int,
        kind: str,
        *,
        needs_all: bool = False,
        enough: int | None = None,
    ) -> None:
        self._hire, self._demand, self._size = hire, demand, size
        self._placement, self._attempts, self._needs_all = placement, attempts, needs_all
        self.kind, self._enough = kind, enough or size
        self._group: Any = None
        self.last_loss = "none has answered yet"
        self.slots: list[Slot[AnyJob]] = []

    def start(self, may_grow: bool, start_seconds: float) -> None:
        """Place and create the actors; their greetings are out afterwards.

        Raises:
            Refusal: the nodes that there are, or that come within `start_seconds`, cannot hold them.
        """
        wait_seconds = start_seconds if may_grow else 0.0
        if self._placement.mode == "one_per_node":
            refuse_unmeetable(self._demand, self._size, self._placement, wait_seconds)
            self._group = reserve_nodes(self._demand, self._size, self._placement, start_seconds)
        # Actors come before the count of nodes: an autoscaler adds nodes only for what is waiting.
        self.slots = [Slot(index, *self._spawn(index)) for index in range(self._size)]
        refuse_unmeetable(self._demand, self._enough, self._placement, wait_seconds)

    def _spawn(self, index: int) -> tuple[ActorHandle[Any], ObjectRef[Any]]:
        where = in_place(self._placement, self._group, index)
        options = {**self._demand.options(), **where}
        options["max_concurrency"] = CALLS_AT_ONCE
        actor: Any = self._hire(index, options)
        return actor, actor.greet.remote()

    def unmet(self, found: str) -> str:
        """The demand against the cluster, in one sentence."""
        return unmet(self._demand, self._size, self._placement, found)

    def begin_run(self) -> None:
        """The time for which workers may be away begins now."""
        for slot in self.slots:
            slot.answered = time.monotonic()

    def greet_the_absent(self, deadline_seconds: float) -> None:
        """Call the actors that are away, and give up when those that are needed have not answered for too long.

        Raises:
            RunFailed: too few answered for `deadline_seconds`; it names the last loss and the cluster's resources.
        """
        now = time.monotonic()
        for slot in self.slots:
            if slot.worker:
                slot.answered = now
        pick = min if self._needs_all else max
        away = pick(self.slots, key=lambda slot: slot.answered)
        if now - away.answered > deadline_seconds:
            who = f"no worker {away.index}" if self._needs_all else "none"
            found = f"has had {who} that answers for {deadline_seconds:g} s (last: {self.last_loss})"
            raise RunFailed(self.unmet(found))
        for slot in self.slots:
            if slot.worker is None and slot.greeting is None and now >= slot.greet_after:
                slot.greeting = slot.actor.greet.remote()

    def hear(self, slot: Slot[AnyJob], answer: Greeting | RayError, failure: type[RayMergeError]) -> None:
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
            slot.node = answer.node
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

    def lose(self, slot: Slot[AnyJob], error: RayError, suspect: AnyJob | None) -> None:
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

    def _note(self, slot: Slot[AnyJob], error: RayError) -> None:
        self.last_loss = f"{slot.worker or f'worker {slot.index}'}: {cause(error)}"
        unit = f"unit {slot.suspect.id} was running" if slot.suspect else "no unit was running"
        worker_lost(self.kind)
        unit_id = slot.suspect.id if slot.suspect else None
        logger.warning("lost %s; %s", self.last_loss, unit, extra={"unit": unit_id})

    def _replace(self, slot: Slot[AnyJob], error: RayError) -> None:
        job, slot.suspect = slot.suspect, None
        ray.kill(slot.actor, no_restart=True)
        if job and not job.done and not getattr(error, "preempted", False):
            job.deaths += 1
            if job.deaths >= self._attempts:
                unit_ended(self.kind, "failed")
                raise UnitFailed(job.id, job.lost, self._reason(job, error))
        slot.actor, slot.greeting = self._spawn(slot.index)

    def _reason(self, job: AnyJob, error: RayError) -> str:
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


__all__ = ["AnyJob", "Crew", "Hire", "Job", "Slot", "cause"]
