"""Byte ranges of one object, one after another, the next ones read ahead while the current one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from ray_merge.storage.store import Store

CHUNK_BYTES = 2 * 2**20
"""As stored. A touched chunk of bfloat16 lives in up to six float32 copies (base, update, sum, loss ...): 24 MB."""

REQUEST_BYTES = 4 * 2**20
"""Ranges that follow each other are asked for together up to this length. From SeaweedFS on loopback 6 requests of
4 MiB took 0.80 of the time of 12 of 2 MiB (672 MB, median of 8, benchmarks/s3_speed.py's merge order)."""

AHEAD = 6
"""Requests read ahead, on as many threads: at 30 ms each they carry 800 MB/s from an object store. With the one in use
they hold 28 MiB (traced); what still holds a range holds its whole request."""


@dataclass(slots=True)
class _Request:
    """Bytes `start`..`end` of a file, in which several ranges end at `ends`."""

    file: str
    start: int
    end: int
    ends: list[int]


class Reader:
    """Reads ranges of a store's objects with read-ahead on a few threads; use as a context manager."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.n_bytes = 0
        self._threads = ThreadPoolExecutor(max_workers=AHEAD, thread_name_prefix="read-ahead")

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def stream(self, ranges: Sequence[tuple[str, int, int]]) -> Iterator[bytes | memoryview]:
        """The bytes of each (file, start, end), in order, at most `AHEAD` requests ahead of the caller."""
        waiting: deque[tuple[_Request, Future[bytes]]] = deque()
        for request in _requests(ranges):
            data = self._threads.submit(self.store.read, request.file, request.start, request.end)
            waiting.append((request, data))
            if len(waiting) > AHEAD:
                yield from self._take(waiting)
        while waiting:
            yield from self._take(waiting)

    def read(self, file: str, start: int, end: int) -> bytes | memoryview:
        """One range at once."""
        return next(self.stream([(file, start, end)]))

    def _take(self, waiting: deque[tuple[_Request, Future[bytes]]]) -> Iterator[bytes | memoryview]:
        request, future = waiting.popleft()
        data = future.result()
        del future  # or it would hold the bytes until the last range of them was used
        self.n_bytes += len(data)
        if len(request.ends) == 1:
            yield data
            return
        start = 0
        for end in request.ends:
            yield memoryview(data)[start : end - request.start]
            start = end - request.start


def _requests(ranges: Sequence[tuple[str, int, int]]) -> Iterator[_Request]:
    """Neighbours in one request of at most `REQUEST_BYTES`, longer ranges as they are."""
    last: _Request | None = None
    for file, start, end in ranges:
        if last and (file, start) == (last.file, last.end) and end - last.start <= REQUEST_BYTES:
            last.end = end
            last.ends.append(end)
            continue
        if last:
            yield last
        last = _Request(file, start, end, [end])
    if last:
        yield last
