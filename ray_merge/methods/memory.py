"""How many bytes one merge holds at one site; torch-free, an upper estimate for the plan.

Owns: the count of tensors that are alive together in `algebra/` and in the kernels, by space. Checked
against measured peaks in `tests/methods/test_memory.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ray_merge.algebra.grid import chunk_rows
from ray_merge.methods.declare import Method

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


def working_bytes(method: Method, space: str | None, shape: tuple[int, int], ranks: Sequence[int]) -> int:
    """Bytes held by the factors, bases, coordinates and temporaries of one merge at one site.

    Args:
        method: which.
        space: where it works; None is its default.
        shape: (O, I).
        ranks: of the adapters that touch the site.
    """
    rows, columns = shape
    total = sum(ranks)
    factors = 2 * FLOAT32 * total * (rows + columns)
    bases = FLOAT64 * (QR_COPIES * total * (rows + columns) + 4 * total * total)
    out = SUM_CHUNK_COPIES * FLOAT32 * _chunk_entries(shape)
    where = space or method.spaces[0]
    if method.family == "sum":
        return factors + out + (bases if method.name == "svd" else 0)
    if where == "dense":
        return factors + _entrywise(shape, FLOAT32)
    left, right = min(total, rows), min(total, columns)
    coordinates = (left, columns if where == "knots" else right)
    merged = (2 * FLOAT64 + FLOAT32) * coordinates[0] * coordinates[1] + (FLOAT64 + FLOAT32) * left * rows
    return factors + bases + merged + out + _entrywise(coordinates, FLOAT64)


def _entrywise(shape: tuple[int, int], item_bytes: int) -> int:
    # One 15-bit digit of a float64 leaves 4 bits of fraction: a digit holds under 1/16 of a smooth spread of entries.
    gathered = min(shape[0] * shape[1] // 16, GATHERED_ENTRIES)
    return item_bytes * (SELECT_COPIES * gathered + CHUNK_COPIES * _chunk_entries(shape))


def _chunk_entries(shape: tuple[int, int]) -> int:
    return min(shape[0], chunk_rows(shape[1])) * shape[1]
