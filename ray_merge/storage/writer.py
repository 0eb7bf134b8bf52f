"""A safetensors file written in one pass to a scratch path, hashed while it is written.

A file is complete and hashed before it is put under its final name; nothing half-written is ever visible.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from ray_merge.storage.headers import make_header


class ScratchFile:
    """Writes the planned tensors in order; `n_bytes` and `sha256` hold once `close` was called.

    Args:
        path: scratch path; its folder exists.
        tensors: (name, dtype, shape) of every tensor, in the order in which `write` will deliver their bytes.
        metadata: the header's metadata.
    """

    def __init__(
        self, path: Path, tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        header, entries = make_header(tensors, metadata)
        self.path = path
        self.n_bytes = 0
        self._planned_bytes = max((entry.end for entry in entries.values()), default=len(header))
        self._hash = hashlib.sha256()
        self._file = path.open("xb", buffering=0)
        self.write(header)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes of the tensor whose turn it is."""
        view = memoryview(data)
        if not view.nbytes:  # a view with a zero in its shape cannot be cast
            return
        view = view.cast("B")  # slices below count bytes, whatever the elements were
        self._hash.update(view)
        self.n_bytes += view.nbytes
        while view.nbytes:
            written = self._file.write(view)
            view = view[written:]

    def close(self) -> str:
        """Finish the file.

        Returns:
            Its sha256 as 64 hex digits.

        Raises:
            RuntimeError: fewer or more bytes than planned were written (a bug, not bad input).
        """
        self._file.close()
        if self.n_bytes != self._planned_bytes:
            raise RuntimeError(f"{self.path.name}: wrote {self.n_bytes} bytes, planned {self._planned_bytes}")
        return self._hash.hexdigest()

    def discard(self) -> None:
        """Close and delete the scratch file; harmless when it is gone."""
        self._file.close()
        self.path.unlink(missing_ok=True)
