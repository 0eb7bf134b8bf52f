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

CHUNK_COPIES = 14
"""Tensors of one chunk in an election: entries, mask, weighted, five running sums, and temporaries."""

QR_COPIES = 4
"""Input, LAPACK's copy, Q, and the product of Q with the small factor."""


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
    where = space or method.spaces[0]
    if method.family == "sum":
        return factors + (QR_COPIES * FLOAT64 * total * (rows + columns) if method.name == "svd" else 0)
    if where == "dense":
        return factors + _entrywise(shape, FLOAT32)
    left, right = min(total, rows), min(total, columns)
    bases = QR_COPIES * FLOAT64 * total * (rows + columns) + 6 * FLOAT64 * total * total
    coordinates = (left, columns if where == "knots" else right)
    merged = 2 * (FLOAT64 + FLOAT32) * (coordinates[0] * coordinates[1] + left * (rows + columns))
    return factors + bases + merged + _entrywise(coordinates, FLOAT64)


def _entrywise(shape: tuple[int, int], item_bytes: int) -> int:
    entries = shape[0] * shape[1]
    chunk = min(shape[0], chunk_rows(shape[1])) * shape[1]
    return item_bytes * (SELECT_COPIES * min(entries, GATHERED_ENTRIES) + CHUNK_COPIES * chunk)
