"""Where units run: the protocol that drivers are written against, and the pool of this very process.

Owns: the words Task, Done, Turn, Worker and Pool, and the rule that turns a unit's exception into this package's tree.
Never: knows Ray, torch or what a unit does. `runtime/ray_pool.py` is the same protocol over Ray actors.

The contract that both pools keep:

* a worker is stateless between calls and its units are idempotent, so any call may be repeated;
* a worker gets two units at a time, of which one computes: see `Turns`;
* results arrive in the order in which they complete, each task exactly once, from a bounded window;
* an error of `ray_merge.errors` arrives as it was raised and is not retried, any other becomes `UnitFailed`;
  the units that were waiting behind the failed one are dropped.
"""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Condition
from types import TracebackType
from typing import Any, Protocol, Self

from ray_merge.errors import RayMergeError, UnitFailed


class Worker(Protocol):
    """What a pool calls; made once per process by a factory, then given one unit after another."""

    def run(self, unit: Any, turn: Turn) -> Any:
        """Do one unit and return its small, picklable result; a repeated call has the same effect.

        Args:
            unit: what to do.
            turn: has begun; the worker may end it early, when the unit only waits for storage from then on.
        """
        ...


class Turns:
    """Who may compute: so many units at once, in the order in which they queued.

    A worker is given two units: while the first is uploaded, the second is read and merged.

    Args:
        room: units that compute at the same time.
    """

    def __init__(self, room: int) -> None:
        self._free = room
        self._queued = 0
        self._served = 0
        self.closed = False
        self._changed = Condition()

    def queue(self) -> Turn:
        """The next place in the queue; who takes it must enter it, or nobody behind it ever will."""
        with self._changed:
            self._queued += 1
            return Turn(self, self._queued - 1)

    def close(self) -> None:
        """Nobody begins any more, and who computes stops at the next `check`: they get a `Dropped`."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def _enter(self, place: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.closed or (self._served == place and self._free > 0))
            if self.closed:
                raise Dropped(f"unit {place} was dropped before it began")
            self._served += 1
            self._free -= 1
            self._changed.notify_all()

    def _leave(self) -> None:
        with self._changed:
            self._free += 1
            self._changed.notify_all()


class Dropped(Exception):
    """A unit that does not begin, or does not go on, because its pool has stopped; nobody waits for its result."""


class Turn:
    """One unit's right to a processor and to the memory that was planned; a context manager."""

    def __init__(self, turns: Turns, place: int) -> None:
        self._turns, self._place, self._ended = turns, place, False

    def check(self) -> None:
        """Go on, or not: called once for each chunk of work, so that a stopped pool ends soon.

        Raises:
            Dropped: the pool has stopped; nobody waits for this unit.
        """
        if self._turns.closed:
            raise Dropped("the pool has stopped")

    def end(self) -> None:
        """Let the next unit begin; a second call does nothing."""
        if not self._ended:
            self._ended = True
            self._turns._leave()

    def __enter__(self) -> Self:
        self._turns._enter(self._place)
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


UNITS_PER_WORKER = 2
"""In flight at one worker: one is read and merged, the other is uploaded or waits for its turn."""


@dataclass(frozen=True)
class Task:
    """One unit to run.

    Attributes:
        id: unique among the tasks of one `Pool.run`; it names the unit in errors.
        unit: a small picklable frozen dataclass; no tensor, no open file.
        data: names of what it reads and what stays where it was read, so that units can follow it (adapters in a
            node's cache, a model in a worker's memory). A pool may leave it aside.
    """

    id: str
    unit: Any
    data: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Done:
    """The result of one unit.

    Attributes:
        id: the task's id.
        value: what `Worker.run` returned.
        worker: `host:pid` of the process that did it.
        attempts: 1 plus the number of workers that were lost under this unit.
    """

    id: str
    value: Any
    worker: str
    attempts: int


class Pool(Protocol):
    """Runs units; a context manager that ends its workers on exit.

    Attributes:
        size: how many units run at once.
    """

    @property
    def size(self) -> int:
        """How many units run at once."""
        ...

    def run(self, tasks: Sequence[Task]) -> Iterator[Done]:
        """Run every task and yield the results as they complete.

        Raises:
            RayMergeError: what the first failing unit raised, with its own type.
            UnitFailed: a unit raised something else, or its workers died too often.
        """
        ...

    def close(self) -> None:
        """End the workers; a second call does nothing."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Closing(ABC):
    """A context manager that closes what it is."""

    @abstractmethod
    def close(self) -> None:
        """Give back what is held; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LocalPool(Closing):
    """The same units in this process, on threads.

    Args:
        worker: its `run` may be called from several threads at once.
        threads: how many units run at once; with one they run in the order of the tasks.
    """

    def __init__(self, worker: Worker, threads: int = 1) -> None:
        if threads < 1:
            raise ValueError(f"{threads=} must be at least 1")
        self._worker = worker
        self._label = worker_label()
        self._threads = threads

    @property
    def size(self) -> int:
        """How many units run at once."""
        return self._threads

    def run(self, tasks: Sequence[Task]) -> Iterator[Done]:
        """Run the tasks; see `Pool.run`."""
        refuse_repeated_ids(tasks)
        return self._run(tasks)

    def _run(self, tasks: Sequence[Task]) -> Iterator[Done]:
        waiting, flying = deque(enumerate(tasks)), dict[Future[Done], int]()
        turns, n_threads = Turns(self._threads), UNITS_PER_WORKER * self._threads
        with ThreadPoolExecutor(n_threads, thread_name_prefix="unit") as pool:
            try:
                while waiting or flying:
                    while waiting and len(flying) < n_threads:
                        place, task = waiting.popleft()
                        flying[pool.submit(self._do, task, turns.queue())] = place
                    done, _ = wait(flying, return_when=FIRST_COMPLETED)
                    # What succeeded counts, even where another unit failed at the same time.
                    for future in sorted(done, key=lambda one: (one.exception() is not None, flying[one])):
                        del flying[future]
                        yield future.result()
            finally:
                turns.close()
                pool.shutdown(wait=True, cancel_futures=True)

    def _do(self, task: Task, turn: Turn) -> Done:
        try:
            with turn:
                value = self._worker.run(task.unit, turn)
        except RayMergeError:
            raise
        except Exception as error:
            raise unit_failed(task.id, 1, error) from error
        return Done(task.id, value, self._label, 1)

    def close(self) -> None:
        """Nothing to end: the worker belongs to the caller."""


def worker_label() -> str:
    """Name this process as `host:pid`, the way receipts and reports show it."""
    return f"{socket.gethostname()}:{os.getpid()}"


def unit_failed(unit_id: str, attempts: int, error: BaseException) -> UnitFailed:
    """Name an error that is not of this package: its type and its text, on one line."""
    text = " ".join(str(error).split())
    return UnitFailed(unit_id, attempts, f"{type(error).__name__}: {text}" if text else type(error).__name__)


def refuse_repeated_ids(tasks: Sequence[Task]) -> None:
    """Stop at once when two tasks share an id, because their results could not be told apart.

    Raises:
        ValueError: the first repeated id and both of its positions.
    """
    seen: dict[str, int] = {}
    for index, task in enumerate(tasks):
        if task.id in seen:
            raise ValueError(
                f"task id {task.id!r} stands at positions {seen[task.id]} and {index} of one run"
            )
        seen[task.id] = index


__all__ = [
    "Closing",
    "Done",
    "LocalPool",
    "Pool",
    "Task",
    "Turn",
    "Turns",
    "Worker",
    "refuse_repeated_ids",
    "unit_failed",
    "worker_label",
]
