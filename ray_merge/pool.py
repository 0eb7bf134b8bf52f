"""Where units run: the protocol that drivers are written against, and the pool of this very process.

Owns: the words Task, Done, Worker and Pool, and the rule that turns a unit's exception into this package's tree.
Never: knows Ray, torch or what a unit does. `runtime/ray_pool.py` is the same protocol over Ray actors.

The contract that both pools keep:

* a worker is stateless between calls and its units are idempotent, so any call may be repeated;
* results arrive in the order in which they complete, each task exactly once, from a bounded window;
* an error of `ray_merge.errors` arrives as it was raised and is not retried, any other becomes `UnitFailed`;
  the units that were waiting behind the failed one are dropped.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from ray_merge.errors import RayMergeError, UnitFailed


class Worker(Protocol):
    """What a pool calls; made once per process by a factory, then given one unit after another."""

    def run(self, unit: Any) -> Any:
        """Do one unit and return its small, picklable result; a repeated call has the same effect."""
        ...


@dataclass(frozen=True)
class Task:
    """One unit to run.

    Attributes:
        id: unique among the tasks of one `Pool.run`; it names the unit in errors.
        unit: a small picklable frozen dataclass; no tensor, no open file.
    """

    id: str
    unit: Any


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


class LocalPool:
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
        waiting, flying = deque(tasks), set[Future[Done]]()
        with ThreadPoolExecutor(self._threads, thread_name_prefix="unit") as pool:
            try:
                while waiting or flying:
                    while waiting and len(flying) < self._threads:
                        flying.add(pool.submit(self._do, waiting.popleft()))
                    done, flying = wait(flying, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
            finally:
                # Running units end by themselves; what has not begun is dropped.
                pool.shutdown(wait=True, cancel_futures=True)

    def _do(self, task: Task) -> Done:
        try:
            value = self._worker.run(task.unit)
        except RayMergeError:
            raise
        except Exception as error:
            raise unit_failed(task.id, 1, error) from error
        return Done(task.id, value, self._label, 1)

    def close(self) -> None:
        """Nothing to end: the worker belongs to the caller."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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
    "Done",
    "LocalPool",
    "Pool",
    "Task",
    "Worker",
    "refuse_repeated_ids",
    "unit_failed",
    "worker_label",
]
