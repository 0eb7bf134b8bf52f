"""A safetensors file written in one pass to a scratch path, hashed while it is written.

A file is complete and hashed before it is put under its final name; nothing half-written is ever visible.
Hashing and writing happen on a thread of their own, so that they overlap with the arithmetic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import BoundedSemaphore

from ray_merge.storage.headers import make_header

PENDING_WRITES = 16
"""Pieces that wait for the writing thread at most; of 2 MiB each where they are passed through."""


class WriteBehind:
    """One thread that does what it is given in order; use as a context manager around the files of one unit.

    Args:
        check: called before each piece is queued; raises where the unit must not go on.
    """

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self._check = check
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write-behind")
        self._room = BoundedSemaphore(PENDING_WRITES)
        self._last: Future[None] | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def do(self, call: Callable[[], object]) -> None:
        """Queue a call; waits while `PENDING_WRITES` are queued.

        Raises:
            BaseException: what an earlier call raised; nothing was done since.
        """
        self._raise()
        self._check()
        self._room.acquire()
        self._last = self._thread.submit(self._run, call)

    def wait(self) -> None:
        """Wait until everything is done.

        Raises:
            BaseException: what a call raised.
        """
        if self._last is not None:
            self._last.result()
        self._raise()

    def _run(self, call: Callable[[], object]) -> None:
        try:
            if self._error is None:
                call()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the thread that waits raises it
            self._error = error
        finally:
            self._room.release()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


class ScratchFile:
    """Writes the planned tensors in order; `n_bytes` and `sha256` hold once `close` was called.

    Args:
        path: scratch path; its folder exists.
        tensors: (name, dtype, shape) of every tensor, in the order in which `write` will deliver their bytes.
        metadata: the header's metadata.
        behind: the thread that hashes and writes; it outlives the file. Without one, `write` does.
    """

    def __init__(
        self,
        path: Path,
        tensors: Sequence[tuple[str, str, tuple[int, ...]]],
        metadata: Mapping[str, str],
        behind: WriteBehind | None = None,
    ) -> None:
        header, entries = make_header(tensors, metadata)
        self.path = path
        self.n_bytes = 0
        self._planned_bytes = max((entry.end for entry in entries.values()), default=len(header))
        self._hash = hashlib.sha256()
        self._behind = behind
        self._file = path.open("xb", buffering=0)
        self.write(header)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes of the tensor whose turn it is; they must not change any more."""
        view = memoryview(data)
        if not view.nbytes:  # a view with a zero in its shape cannot be cast
            return
        self.n_bytes += view.nbytes
        # Cast, because the slices below count bytes, whatever the elements were.
        if self._behind is None:
            self._append(view.cast("B"))
        else:
            self._behind.do(partial(self._append, view.cast("B")))

    def _append(self, view: memoryview) -> None:
        self._hash.update(view)
        while view.nbytes:
            written = self._file.write(view)
            view = view[written:]

    def close(self) -> str:
        """Finish the file.

        Returns:
            Its sha256 as 64 hex digits.

        Raises:
            RuntimeError: fewer or more bytes than planned were written (a bug, not bad input).
            OSError: the disk is full, or failed.
        """
        if self._behind is not None:
            self._behind.wait()
        self._file.close()
        if self.n_bytes != self._planned_bytes:
            raise RuntimeError(f"{self.path.name}: wrote {self.n_bytes} bytes, planned {self._planned_bytes}")
        return self._hash.hexdigest()

    def discard(self) -> None:
        """Close and delete the scratch file; harmless when it is gone. Nothing may be queued for it any more."""
        self._file.close()
        self.path.unlink(missing_ok=True)
