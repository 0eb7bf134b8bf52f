"""Which unit a free worker takes next: one whose data is there already.

Owns: the order of the units of a run, and what each place has read. A place is a node, or a worker. Units that read the
same form a queue in their own order; a place takes from the queue of which it lacks least, and among equals from the
one that fewest places have, so that places divide the data among them instead of each reading all of it. What a place
begins anew is the longest such queue; where it has all that is read, queues go one after another in the recipe's order,
so that one merge is published before the next one is begun.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from ray_merge.runtime.crew import Job


class Held:
    """What each place has read: names of data, see `pool.Task.data`."""

    def __init__(self) -> None:
        self._names: dict[str, set[str]] = {}

    def read(self, place: str, data: frozenset[str]) -> frozenset[str]:
        """From now on `data` is at `place`; returns what was not there before."""
        names = self._names.setdefault(place, set())
        new = data - names
        names |= new
        return new

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
        self._held, self._count = held, 0
        self._again: deque[Job] = deque()
        self._queues: dict[frozenset[str], deque[Job]] = {}
        for job in jobs:
            self._queues.setdefault(job.data, deque()).append(job)
            self._count += 1
        # Kept up to date and not counted anew: with 1000 queues and 100 places a choice would take 7 to 18 ms.
        self._places = {data: held.places(data) for data in self._queues}
        self._lacking: dict[str, dict[frozenset[str], int]] = {}
        self._using: dict[str, list[frozenset[str]]] = {}
        for data in self._queues:
            for name in data:
                self._using.setdefault(name, []).append(data)

    def __len__(self) -> int:
        return self._count

    @property
    def has_lost(self) -> bool:
        """Whether the next one has lost a worker."""
        return bool(self._again) and self._again[0].lost > 0

    def take(self, place: str) -> Job:
        """The next unit for a worker at `place`; those that were put back come first.

        Raises:
            IndexError: none waits.
        """
        job = self._again.popleft() if self._again else self._next(place)
        self._count -= 1
        lacking = self._lacking_at(place)
        for name in self._held.read(place, job.data):
            for data in self._using.get(name, ()):
                if data in lacking:
                    lacking[data] -= 1
                    self._places[data] += lacking[data] == 0
        return job

    def put_back(self, jobs: Sequence[Job]) -> None:
        """These did not come to their end: they go before all others."""
        self._again.extendleft(reversed(jobs))
        self._count += len(jobs)

    def _next(self, place: str) -> Job:
        lacking = self._lacking_at(place)

        def cost(data: frozenset[str]) -> tuple[int, int, int]:
            lacks = lacking[data]
            return lacks, self._places[data], -len(self._queues[data]) if lacks else 0

        # The first of equals, as dictionaries keep their order: the recipe's.
        nearest = min(self._queues, key=cost, default=None)
        if nearest is None:
            raise IndexError("no unit waits")
        queue = self._queues[nearest]
        job = queue.popleft()
        if not queue:
            del self._queues[nearest]
        return job

    def _lacking_at(self, place: str) -> dict[frozenset[str], int]:
        if place not in self._lacking:
            self._lacking[place] = {data: self._held.lacking(place, data) for data in self._queues}
        return self._lacking[place]


__all__ = ["Held", "Waiting"]
