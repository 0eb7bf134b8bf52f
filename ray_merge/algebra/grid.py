"""The fixed grid of row chunks; torch-free, because plans estimate memory with it.

Owns: how many rows are computed at once. It depends on the number of columns alone, never on the caller's
blocks, the worker or the dtype, so that a row has the same bits however it is asked for and a random mask
belongs to a chunk. Never computes entries.
"""

from __future__ import annotations

from collections.abc import Iterator

CHUNK_BYTES = 2**20
"""What stays in a core's own cache: a product with 128 columns and its rounding take 4.1 ms per million entries in
chunks of 1 MiB, 4.9 in chunks of 4 MiB; a sign election gains a third."""

MIN_ROWS = 16
FLOAT32_BYTES = 4

SHARED_CHUNK_ENTRIES = 8 * 2**20
"""Entries of dense deltas kept for the other merges of a group: the chunks of 32 adapters, 32 MiB of float32."""


def chunk_rows(n_columns: int) -> int:
    """Rows of one chunk: about 1 MiB of float32, at least 16."""
    return max(MIN_ROWS, CHUNK_BYTES // (FLOAT32_BYTES * max(1, n_columns)))


def chunk_spans(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """The (start, stop) rows of every chunk of a matrix of `shape`, in order."""
    step = chunk_rows(shape[1])
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def chunks_over(n_columns: int, start: int, stop: int) -> Iterator[int]:
    """Indices of the chunks that rows `start` to `stop` touch."""
    step = chunk_rows(n_columns)
    return iter(range(start // step, -(-stop // step)) if stop > start else ())
