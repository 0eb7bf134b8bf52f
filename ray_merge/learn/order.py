"""Which rows of a task's sample make up the batch of a step: a stream of shuffled passes, cut into batches.

Depends on the seed, the task and the step alone, so a run that goes on after a kill draws the same rows.
"""

from __future__ import annotations

import hashlib
from random import Random

GROUPED_BATCHES = 16
"""Batches whose rows are put in order of length together."""


class Order:
    """The batches of one task.

    Args:
        seed: of the merge.
        task: name.
        n_rows: in its sample, at least 1.
        batch_size: rows of a step; a sample with fewer rows gives some of them twice.
        grouped: whether rows of similar lengths come together, so that little is padding.
    """

    def __init__(self, seed: int, task: str, n_rows: int, batch_size: int, *, grouped: bool = False) -> None:
        self._seed, self._task = seed, task
        self._n_rows, self._batch_size, self._grouped = n_rows, batch_size, grouped
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
        draw = Random(int.from_bytes(content[:8], "big"))
        rows = list(range(self._n_rows))
        draw.shuffle(rows)
        return self._by_length(rows, draw) if self._grouped else rows

    def _by_length(self, rows: list[int], draw: Random) -> list[int]:
        """Batches cut from some hundred shuffled rows that were put in order of length, as samples are; then shuffled.

        What is left at the end of a pass stays as it was, so that batches begin where they did.
        """
        size, batches = self._batch_size, []
        whole = len(rows) // size * size
        for start in range(0, whole, size * GROUPED_BATCHES):
            some = sorted(rows[start : min(whole, start + size * GROUPED_BATCHES)])
            batches += [some[at : at + size] for at in range(0, len(some), size)]
        draw.shuffle(batches)
        return [row for batch in batches for row in batch] + rows[whole:]


def cut(rows: tuple[int, ...], size: int) -> list[tuple[int, ...]]:
    """Micro-batches of at most `size` rows; 0 for the whole."""
    step = size or len(rows)
    return [rows[start : start + step] for start in range(0, len(rows), step)]
