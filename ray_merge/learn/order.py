"""Which rows of a task's sample make up the batch of a step: a stream of shuffled passes, cut into batches.

Depends on the seed, the task and the step alone, so a run that goes on after a kill draws the same rows.
"""

from __future__ import annotations

import hashlib
from random import Random


class Order:
    """The batches of one task.

    Args:
        seed: of the merge.
        task: name.
        n_rows: in its sample, at least 1.
        batch_size: rows of a step; a sample with fewer rows gives some of them twice.
    """

    def __init__(self, seed: int, task: str, n_rows: int, batch_size: int) -> None:
        self._seed, self._task = seed, task
        self._n_rows, self._batch_size = n_rows, batch_size
        self._last: tuple[int, list[int]] = (-1, [])

    def batch(self, step: int) -> tuple[int, ...]:
        """Places in the sample, for step 0, 1, ..."""
        first = step * self._batch_size
        return tuple(self._at(place) for place in range(first, first + self._batch_size))

    def _at(self, place: int) -> int:
        round_, index = divmod(place, self._n_rows)
        if self._last[0] != round_:
            self._last = round_, self._shuffled(round_)
        return self._last[1][index]

    def _shuffled(self, round_: int) -> list[int]:
        content = hashlib.sha256(f"{self._seed}\nlearn\n{self._task}\n{round_}".encode()).digest()
        rows = list(range(self._n_rows))
        Random(int.from_bytes(content[:8], "big")).shuffle(rows)
        return rows


def cut(rows: tuple[int, ...], size: int) -> list[tuple[int, ...]]:
    """Micro-batches of at most `size` rows; 0 for the whole."""
    step = size or len(rows)
    return [rows[start : start + step] for start in range(0, len(rows), step)]
