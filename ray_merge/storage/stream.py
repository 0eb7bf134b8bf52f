"""Byte ranges of one object, one after another, the next ones read ahead while the current one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from ray_merge.spec import DTYPE_BYTES, TensorEntry
from ray_merge.storage.store import Store

CHUNK_BYTES = 2 * 2**20
"""As stored. A touched chunk of bfloat16 lives in up to six float32 copies (base, update, sum, loss ...): 24 MB."""

AHEAD = 4
"""Chunks read ahead, on as many threads: at 30 ms a request they carry 270 MB/s from an object store."""


def row_chunks(entry: TensorEntry, grid_rows: int) -> list[tuple[int, int]]:
    """The rows [start, stop) of each chunk of a 2-D tensor: about `CHUNK_BYTES`, whole multiples of the grid.

    Args:
        entry: the tensor.
        grid_rows: rows that an update computes at once; other chunk borders would compute rows twice.
    """
    n_rows, row_bytes = entry.shape[0], DTYPE_BYTES[entry.dtype] * entry.shape[1]
    step = grid_rows * max(1, CHUNK_BYTES // max(1, row_bytes * grid_rows))
    return [(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


def byte_chunks(entry: TensorEntry) -> list[tuple[int, int]]:
    """Chunks of any tensor as byte ranges from the beginning of its file, whole elements each."""
    return [
        (start, min(start + CHUNK_BYTES, entry.end)) for start in range(entry.start, entry.end, CHUNK_BYTES)
    ]


def rows_to_bytes(entry: TensorEntry, rows: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Byte ranges, from the beginning of the file, of row ranges of a 2-D tensor."""
    row_bytes = DTYPE_BYTES[entry.dtype] * entry.shape[1]
    return [(entry.start + start * row_bytes, entry.start + stop * row_bytes) for start, stop in rows]


class Reader:
    """Reads ranges of a store's objects with read-ahead on one thread; use as a context manager."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.n_bytes = 0
        self._threads = ThreadPoolExecutor(max_workers=AHEAD, thread_name_prefix="read-ahead")

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def stream(self, requests: Sequence[tuple[str, int, int]]) -> Iterator[bytes]:
        """The bytes of each (file, start, end), in order, at most `AHEAD` ranges ahead of the caller."""
        waiting: deque[Future[bytes]] = deque()
        for file, start, end in requests:
            waiting.append(self._threads.submit(self.store.read, file, start, end))
            if len(waiting) > AHEAD:
                yield self._take(waiting)
        while waiting:
            yield self._take(waiting)

    def _take(self, waiting: deque[Future[bytes]]) -> bytes:
        data = waiting.popleft().result()
        self.n_bytes += len(data)
        return data
