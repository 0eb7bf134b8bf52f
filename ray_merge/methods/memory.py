"""How many bytes one merge holds at one site; torch-free, an upper estimate for the plan.

Owns: the count of tensors that are alive together in `algebra/` and in the kernels, by space. Checked
against measured peaks in `tests/methods/test_memory.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ray_merge.algebra.grid import SHARED_CHUNK_ENTRIES, chunk_rows

FLOAT32, FLOAT64 = 4, 8
GATHERED_ENTRIES = 2**20
"""Entries selected at once when a threshold is looked for (`algebra/select.py`)."""

SELECT_COPIES = 4
"""Gathered magnitudes, their concatenation, kthvalue's own copy and its int64 indices (2 of float32)."""

CHUNK_COPIES = 28
"""Tensors of one chunk in an election, as measured: entries, mask, five running sums, temporaries, and what the
allocator keeps of freed ones."""

SUM_CHUNK_COPIES = 4
"""Tensors of one chunk where rows are a plain product."""

QR_COPIES = 3
"""Input, LAPACK's copy, and Q."""


@dataclass(frozen=True, slots=True)
class SiteBytes:
    """Bytes of one merge at one site.

    Args:
        shared: factors and bases, held once for all merges of the same adapters.
        held: what this merge keeps while the base's rows go by.
        passing: temporaries; only one merge has them at a time.
    """

    shared: int
    held: int
    passing: int

    @property
    def total(self) -> int:
        """What the merge takes by itself."""
        return self.shared + self.held + self.passing


Sizes = Callable[[str, tuple[int, int], Sequence[int]], SiteBytes]
"""(space, (O, I), ranks of the adapters that touch the site) -> bytes of one merge there. I is the number of inputs
of a method that merges by Gram matrices."""


def factors(space: str, shape: tuple[int, int], ranks: Sequence[int]) -> SiteBytes:
    """A product of factors whose rows are computed when the base's go by."""
    thin = sum(ranks) * sum(shape)
    return SiteBytes(FLOAT32 * thin, FLOAT32 * thin, SUM_CHUNK_COPIES * FLOAT32 * _chunk_entries(shape))


def truncated(space: str, shape: tuple[int, int], ranks: Sequence[int]) -> SiteBytes:
    """A product of factors that was made by QR and an SVD of an (R, R) matrix, in float64."""
    total, plain = sum(ranks), factors(space, shape, ranks)
    made = FLOAT64 * (QR_COPIES * total * sum(shape) + 4 * total * total)
    return SiteBytes(plain.shared, plain.held, plain.passing + made)


def combined(space: str, shape: tuple[int, int], ranks: Sequence[int]) -> SiteBytes:
    """A product of the KnOTS basis and coordinates added up; left sides stay alive while the basis is made of them."""
    total, plain = sum(ranks), factors(space, shape, ranks)
    left, right = (QR_COPIES + 1) * total * shape[0], 2 * total * shape[1]
    made = FLOAT64 * (left + right + 4 * total * total)
    return SiteBytes(plain.shared, plain.held, plain.passing + made)


def entrywise(space: str, shape: tuple[int, int], ranks: Sequence[int]) -> SiteBytes:
    """A rule over entries: of the deltas, chunk by chunk, or of coordinates in a basis of all factors."""
    total = sum(ranks)
    thin = total * sum(shape)
    if space == "dense":
        kept = FLOAT32 * min(len(ranks) * _chunk_entries(shape), SHARED_CHUNK_ENTRIES)
        return SiteBytes(2 * FLOAT32 * thin + kept, 0, _entrywise(shape, FLOAT32))
    bases = FLOAT64 * (thin + 2 * total * total)
    while_made = FLOAT64 * ((QR_COPIES - 1) * thin + 2 * total * total)
    left, right = min(total, shape[0]), min(total, shape[1])
    coordinates = (left, shape[1] if space == "knots" else right)
    n_merged = coordinates[0] * coordinates[1]
    merged = FLOAT32 * (left * shape[0] + coordinates[0] * shape[1])
    passing = (
        while_made + 2 * FLOAT64 * n_merged + FLOAT64 * left * shape[0] + _entrywise(coordinates, FLOAT64)
    )
    out = SUM_CHUNK_COPIES * FLOAT32 * _chunk_entries(shape)
    return SiteBytes(2 * FLOAT32 * thin + bases, merged, out + passing)


def _entrywise(shape: tuple[int, int], item_bytes: int) -> int:
    # One 15-bit digit of a float64 leaves 4 bits of fraction: a digit holds under 1/16 of a smooth spread of entries.
    gathered = min(shape[0] * shape[1] // 16, GATHERED_ENTRIES)
    return item_bytes * (SELECT_COPIES * gathered + CHUNK_COPIES * _chunk_entries(shape))


def _chunk_entries(shape: tuple[int, int]) -> int:
    return min(shape[0], chunk_rows(shape[1])) * shape[1]
