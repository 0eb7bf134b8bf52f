"""Where a unit reads what it merges into: base tensors as stored or decoded, and tensors that adapters saved.

Owns: chunks of one output tensor's beginning, in order, whatever it is stored as. Never adds anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ray_merge.algebra.dequantise import STORED_DTYPES, dequantise_rows
from ray_merge.plan import OutTensor, Shard
from ray_merge.spec import DTYPE_BYTES, TensorEntry
from ray_merge.storage.checkpoint import Checkpoint
from ray_merge.storage.quantised import Quantised, part_ranges, row_unit
from ray_merge.storage.store import Store, Stores, check_unchanged
from ray_merge.storage.stream import CHUNK_BYTES, Reader
from ray_merge.work.factors import AdapterFiles
from ray_merge.work.tensors import TORCH_DTYPES, from_bytes

Span = tuple[int, int]


def open_base(stores: Stores, base: Checkpoint) -> Store:
    """The base's folder, as the plan saw its weights."""
    return stores.open(base.url).pinned(base.weight_files)


def check_base(store: Store, base: Checkpoint, shard: Shard) -> None:
    """Refuse files of one shard that are not those of the plan: before the first read, and after the last one.

    Raises:
        RunFailed: a file is another one, or gone.
    """
    names = {tensor.source.file for tensor in shard.tensors}
    for tensor in shard.tensors:
        if tensor.source.name in base.quantised:
            names |= {part.file for part in base.quantised[tensor.source.name].parts.values()}
    for planned in base.weight_files:
        if planned.path in names:
            check_unchanged(store, planned)


class Sources:
    """Reads the beginnings of output tensors in one unit.

    Args:
        base: the base checkpoint.
        reader: of its files.
        files: of the adapters.

    Attributes:
        n_decoded: bytes so far that became numbers, as stored; all others were passed on as they were.
    """

    def __init__(self, base: Checkpoint, reader: Reader, files: AdapterFiles) -> None:
        self._base = base
        self._reader = reader
        self._files = files
        self.n_decoded = 0

    @property
    def n_read(self) -> int:
        """Bytes of the base read so far."""
        return self._reader.n_bytes

    def raw(self, tensor: OutTensor) -> Iterator[bytes | memoryview | Tensor]:
        """All elements in order: bytes as stored, or decoded rows of a quantised weight."""
        source = tensor.source
        if not tensor.owner and source.name in self._base.quantised:
            columns = source.shape[-1]
            yield from self.rows(
                tensor, self.spans(tensor, (0, math.prod(source.shape) // columns), columns, 1), columns
            )
            return
        spans = [
            (at, min(at + CHUNK_BYTES, source.end)) for at in range(source.start, source.end, CHUNK_BYTES)
        ]
        yield from self._bytes(tensor, spans)

    def spans(self, tensor: OutTensor, rows: Span, columns: int, grid_rows: int) -> list[Span]:
        """Chunks of some rows of a tensor seen with `columns` columns, about `CHUNK_BYTES` each.

        Args:
            tensor: which.
            rows: first and last + 1.
            columns: of the matrix that it is seen as.
            grid_rows: rows that an update computes at once; other borders would compute rows twice.
        """
        unit = self._unit(tensor)
        row_bytes = DTYPE_BYTES[tensor.source.dtype] * columns
        step = grid_rows * max(1, CHUNK_BYTES // max(1, row_bytes * grid_rows))
        step = -(-step // unit) * unit
        return [(start, min(start + step, rows[1])) for start in range(rows[0], rows[1], step)]

    def _unit(self, tensor: OutTensor) -> int:
        quantised = None if tensor.owner else self._base.quantised.get(tensor.source.name)
        return 1 if quantised is None else row_unit(quantised)

    def rows(self, tensor: OutTensor, spans: Sequence[Span], columns: int) -> Iterator[Tensor]:
        """The rows of each span, (stop - start, columns), in the dtype of the source."""
        source = tensor.source
        dtype = TORCH_DTYPES[source.dtype]
        quantised = None if tensor.owner else self._base.quantised.get(source.name)
        if quantised is not None:
            for start, stop in spans:
                yield self._decoded(quantised, start, stop).to(dtype)
            return
        row_bytes = DTYPE_BYTES[source.dtype] * columns
        ranges = [
            (source.start + start * row_bytes, source.start + stop * row_bytes) for start, stop in spans
        ]
        for (start, stop), data in zip(spans, self._bytes(tensor, ranges), strict=True):
            self.n_decoded += len(data)
            yield from_bytes(data, dtype, (stop - start, columns))

    def matrix(self, tensor: OutTensor, rows: Span, columns: int) -> Tensor:
        """Some rows at once, for updates that depend on the whole weight."""
        whole = torch.empty((rows[1] - rows[0], columns), dtype=TORCH_DTYPES[tensor.source.dtype])
        spans = self.spans(tensor, rows, columns, 1)
        for (start, stop), given in zip(spans, self.rows(tensor, spans, columns), strict=True):
            whole[start - rows[0] : stop - rows[0]] = given
        return whole

    def _bytes(self, tensor: OutTensor, ranges: Sequence[Span]) -> Iterator[bytes | memoryview]:
        if tensor.owner:
            file = self._files.saved(tensor.owner)
            return (file.read_bytes(start, end) for start, end in ranges)
        return self._reader.stream([(tensor.source.file, start, end) for start, end in ranges])

    def _decoded(self, quantised: Quantised, start: int, stop: int) -> Tensor:
        parts = {}
        for role, (first, last) in part_ranges(quantised, start, stop).items():
            entry: TensorEntry = quantised.parts[role]
            data = self._reader.read(entry.file, first, last)
            self.n_decoded += len(data)
            dtype = STORED_DTYPES.get(entry.dtype) or TORCH_DTYPES[entry.dtype]
            parts[role] = from_bytes(data, dtype, ((last - first) // DTYPE_BYTES[entry.dtype],))
        return dequantise_rows(quantised.scheme, parts, quantised.settings, quantised.shape, start, stop)
