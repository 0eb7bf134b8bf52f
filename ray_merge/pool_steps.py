"""Where steps run that hand something large on to each other: the protocol, and the pool of this very process.

Owns: the words StepWorker and StepPool, and the life of the workers in this process.
Never: knows Ray, torch or what a step does. `runtime/step_pool.py` is the same protocol over Ray actors.

The contract that both pools keep, besides that of `pool.py`:

* each place has one worker, made by a factory, which computes one step at a time;
* a step returns two things: a small result, which the driver gets, and what it hands on, which the driver never gets;
* steps begin when what they need is there, earlier ones of the list first, from a bounded number of chains;
* what a step handed on is dropped as soon as the last step that needs it is done, and made again if it is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from ray_merge.errors import RayMergeError, RunFailed
from ray_merge.pool import Closing, Done, Turn, Turns, unit_failed, worker_label
from ray_merge.step_schedule import Schedule, Step


class StepWorker(Protocol):
    """What a pool calls at one place; made by `worker_factory(place)`."""

    def run(self, unit: Any, given: Sequence[Any], turn: Turn) -> tuple[Any, Any]:
        """Do one step; a repeated call has the same effect and the same results.

        Args:
            unit: what to do.
            given: what the needed steps handed on, in the order of `Step.needs`. It is shared with other steps, and
                arrays from Ray are read-only: never write into it.
            turn: has begun; see `ray_merge.pool.Turn`.

        Returns:
            The small, picklable result, and what is handed on (None for nothing).
        """
        ...


class StepPool(Protocol):
    """Runs steps; a context manager that ends its workers on exit."""

    @property
    def n_places(self) -> int:
        """How many places there are."""
        ...

    def run(self, steps: Sequence[Step]) -> Iterator[Done]:
        """Run every step and yield the small results as they complete, each exactly once.

        Args:
            steps: each after those that it needs, chain by chain.

        Raises:
            RayMergeError: what the first failing step or its worker's factory raised, with its own type.
            UnitFailed: a step raised something else, or its workers died too often.
            ValueError: the list is not in order; see `Schedule`.
        """
        ...

    def close(self) -> None:
        """End the workers; a second call does nothing."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class LocalStepPool(Closing):
    """The same steps in this process, on threads.

    Args:
        worker_factory: makes the worker of a place, when its first step begins.
        n_places: how many places there are.
        threads: how many steps run at once, each at another place; with one they run in the order of the list.
        in_flight: how many chains are under way at once; default: one more than places, or all of them where
            `keep_workers` is below the number of places.
        keep_workers: how many places have a worker at once, for a machine that cannot hold all; the least recently
            used is dropped before another is made, and steps of places that have one go first. So a worker is made
            once for all chains that are under way.
    """

    def __init__(
        self,
        worker_factory: Callable[[int], StepWorker],
        n_places: int,
        *,
        threads: int = 1,
        in_flight: int | None = None,
        keep_workers: int | None = None,
    ) -> None:
        keep = n_places if keep_workers is None else keep_workers
        if min(n_places, threads, keep, 1 if in_flight is None else in_flight) < 1:
            raise ValueError(
                f"{n_places=}, {threads=}, {in_flight=} and {keep_workers=} must be at least 1 where given"
            )
        self._factory, self._n_places, self._threads, self._keep = worker_factory, n_places, threads, keep
        self._in_flight = n_places + 1 if in_flight is None and keep >= n_places else in_flight
        # By place, least recently used first; None while its first step makes it.
        self._workers: dict[int, StepWorker | None] = {}
        self._label = worker_label()
        self._running = False

    @property
    def n_places(self) -> int:
        """How many places there are."""
        return self._n_places

    def run(self, steps: Sequence[Step]) -> Iterator[Done]:
        """Run the steps; see `StepPool.run`."""
        return self._run(Schedule(steps, self._n_places, self._in_flight))

    def _run(self, schedule: Schedule) -> Iterator[Done]:
        if self._running:
            raise RuntimeError("this pool is in the middle of another run")
        self._running = True
        flying: dict[Future[tuple[Any, Any]], int] = {}
        turns = Turns(self._threads)
        with ThreadPoolExecutor(self._threads, thread_name_prefix="step") as pool:
            try:
                while schedule.left:
                    self._submit(schedule, flying, turns, pool)
                    results, failed = self._settle(schedule, flying)
                    # What succeeded counts, even where another step failed at the same time.
                    yield from results
                    if failed:
                        failed[0].result()
            finally:
                turns.close()
                pool.shutdown(wait=True, cancel_futures=True)
                self._running = False

    def _submit(
        self,
        schedule: Schedule,
        flying: dict[Future[tuple[Any, Any]], int],
        turns: Turns,
        pool: ThreadPoolExecutor,
    ) -> None:
        while len(flying) < self._threads:
            busy = [schedule.steps[index].place for index in flying.values()]
            index = self._choose(schedule, busy)
            if index is None:
                return
            step = schedule.steps[index]
            self._seat(schedule, step.place, busy)
            given = schedule.begin(index)
            flying[pool.submit(self._do, step, given, turns.queue())] = index

    def _choose(self, schedule: Schedule, busy: list[int]) -> int | None:
        """The next step at an idle place: the first of the list, or of the place that was used last."""
        idle = [place for place in range(self._n_places) if place not in busy]
        first = {place: index for place in idle if (index := schedule.peek(place)) is not None}
        if self._keep < self._n_places:
            for place in reversed(self._workers):
                if place in first:
                    return first[place]
            if self._is_full() and not self._to_drop(schedule, busy):
                return None
        return min(first.values(), default=None)

    def _is_full(self) -> bool:
        return len(self._workers) >= self._keep

    def _to_drop(self, schedule: Schedule, busy: list[int]) -> list[int]:
        """Places whose worker may go, the best first: not at work, and no step under way leads back to them."""
        return [place for place in self._workers if place not in busy and not schedule.expects(place)]

    def _seat(self, schedule: Schedule, place: int, busy: list[int]) -> None:
        if place not in self._workers and self._is_full():
            del self._workers[self._to_drop(schedule, busy)[0]]
        self._workers[place] = self._workers.pop(place, None)

    def _do(self, step: Step, given: list[Any], turn: Turn) -> tuple[Any, Any]:
        with turn:
            worker = self._workers[step.place]
            if worker is None:
                worker = self._workers[step.place] = made(lambda: self._factory(step.place))
            try:
                result, handed = worker.run(step.unit, given, turn)
            except RayMergeError:
                raise
            except Exception as error:
                raise unit_failed(step.id, 1, error) from error
        return result, handed

    def _settle(
        self, schedule: Schedule, flying: dict[Future[tuple[Any, Any]], int]
    ) -> tuple[list[Done], list[Future[tuple[Any, Any]]]]:
        """Wait for a step: what is done, and what failed. No name of this call keeps a value after it."""
        ended, _ = wait(flying, return_when=FIRST_COMPLETED)
        results, failed = [], []
        for future in sorted(ended, key=lambda one: flying[one]):
            index = flying.pop(future)
            if future.exception() is not None:
                failed.append(future)
                continue
            result, handed = future.result()
            schedule.finish(index, handed)
            results.append(Done(schedule.steps[index].id, result, self._label, 1))
        return results, failed

    def close(self) -> None:
        """Drop the workers."""
        self._workers.clear()


AnyWorker = TypeVar("AnyWorker")


def made(factory: Callable[[], AnyWorker]) -> AnyWorker:
    """Make a worker.

    Raises:
        RayMergeError: what the factory raised; a `RunFailed` that names anything else.
    """
    try:
        return factory()
    except RayMergeError:
        raise
    except Exception as error:
        raise RunFailed(
            f"{worker_label()} could not make its worker: {type(error).__name__}: {error}"
        ) from error


__all__ = ["LocalStepPool", "Schedule", "Step", "StepPool", "StepWorker", "made"]
