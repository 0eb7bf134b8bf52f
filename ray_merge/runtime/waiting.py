"""Which unit a free worker takes next: one whose data is there already.

Owns: the order of the units of a run, and what each place has read. A place is a node, or a worker. Units that read the
same form a queue in their own order; a place takes from the queue of which it lacks least, and among equals from the
one that fewest places have begun, so that places divide the data among them instead of each reading all of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from ray_merge.runtime.crew import Job


class Held:
    """What each place has read: names of data, see `pool.Task.data`."""

    def __init__(self) -> None:
        self._names: dict[str, set[str]] = {}

    def read(self, place: str, data: Iterable[str]) -> None:
        """From now on `data` is at `place`."""
        self._names.setdefault(place, set()).update(data)

    def lacking(self, place: str, data: frozenset[str]) -> int:
        """How many of `data` would have to be read for a unit at `place`."""
        return len(data - self._names.get(place, set()))

    def places(self, data: frozenset[str]) -> int:
        """How many places have all of `data`."""
        return sum(data <= names for names in self._names.values())


class Waiting:
    """The units of one run that no worker has.

    Args:
        jobs: in the order in which they are wanted.
        held: what the places have read in earlier runs; kept up to date.
    """

    def __init__(self, jobs: Iterable[Job], held: Held) -> None:
        self._held = held
        self._again: deque[Job] = deque()
        self._queues: dict[frozenset[str], deque[Job]] = {}
        for job in jobs:
            self._queues.setdefault(job.data, deque()).append(job)

    def __len__(self) -> int:
        return len(self._again) + sum(map(len, self._queues.values()))

    @property
    def has_lost(self) -> bool:
        """Whether the next one has lost a worker."""
        return bool(self._again) and self._again[0].lost > 0

    def take(self, place: str) -> Job:
        """The next unit for a worker at `place`; those that were put back come first.

        Raises:
            IndexError: none waits.
        """
        if self._again:
            job = self._again.popleft()
        else:
            # The first of equals, as dictionaries keep their order: the recipe's.
            data = min(self._queues, key=lambda data: self._cost(place, data), default=None)
            if data is None:
                raise IndexError("no unit waits")
            job = self._queues[data].popleft()
            if not self._queues[data]:
                del self._queues[data]
        self._held.read(place, job.data)
        return job

    def put_back(self, jobs: Sequence[Job]) -> None:
        """These did not come to their end: they go before all others."""
        self._again.extendleft(reversed(jobs))

    def _cost(self, place: str, data: frozenset[str]) -> tuple[int, int, int]:
        return self._held.lacking(place, data), self._held.places(data), -len(self._queues[data])


__all__ = ["Held", "Waiting"]
