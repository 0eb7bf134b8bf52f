"""Parquet files: only the row groups and columns that are asked for are read, by ranges of the object."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

from ray_merge.calibration.columns import ROWS_AT_ONCE, Row
from ray_merge.calibration.files import DataFile
from ray_merge.errors import RecipeError
from ray_merge.storage.store import ObjectInfo, Store


class ParquetTable:
    """A parquet file. The arguments are those of every table: the file, how many rows to look at, and its place."""

    def __init__(self, file: DataFile, limit: int | None, place: str) -> None:
        import pyarrow
        from pyarrow import parquet

        self._place = place
        # What pyarrow raises for bad bytes; a store's own errors pass.
        self._bad = (pyarrow.ArrowException, OSError)
        try:
            source = pyarrow.PythonFile(_ObjectFile(file.store, file.info), mode="r")
            self._file = parquet.ParquetFile(source)
        except self._bad as error:
            raise RecipeError(f"{place} is no parquet file ({_first_line(error)}); write it again") from error
        self.columns = tuple(self._file.schema_arrow.names)
        n_rows: int = self._file.metadata.num_rows
        self.n_rows = n_rows if limit is None else min(n_rows, limit)

    def take(self, rows: Sequence[int], columns: Sequence[str]) -> Iterator[Row]:
        """See Table."""
        try:
            yield from self._take(rows, columns)
        except self._bad as error:
            raise RecipeError(
                f"{self._place} cannot be read ({_first_line(error)}); write it again"
            ) from error

    def _take(self, rows: Sequence[int], columns: Sequence[str]) -> Iterator[Row]:
        metadata = self._file.metadata
        start = 0
        for group in range(metadata.num_row_groups):
            end = start + metadata.row_group(group).num_rows
            wanted = [row for row in rows if start <= row < end]
            if wanted:
                yield from self._take_group(group, start, wanted, columns)
            start = end

    def _take_group(
        self, group: int, start: int, rows: Sequence[int], columns: Sequence[str]
    ) -> Iterator[Row]:
        batches = self._file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=list(columns))
        left = list(rows)
        for batch in batches:
            while left and left[0] < start + batch.num_rows:
                row = left.pop(0)
                place = f"{self._place}: row {row + 1}"
                values = {name: _plain(batch.column(name)[row - start], place, name) for name in columns}
                yield Row(place, values)
            start += batch.num_rows
            if not left:
                return


def _plain(value: Any, place: str, column: str) -> Any:
    """A parquet value; lists of lists of numbers become one numpy array without a Python object per number."""
    import pyarrow
    from pyarrow import compute

    if isinstance(value, pyarrow.ExtensionScalar):
        value = value.value
    if not isinstance(value, pyarrow.ListScalar | pyarrow.FixedSizeListScalar) or not value.is_valid:
        return value.as_py()
    items, shape = value.values, [len(value.values)]
    while pyarrow.types.is_list(items.type) or _is_other_list(items.type):
        lengths = [] if items.null_count else compute.list_value_length(items).unique().to_pylist()
        if len(lengths) > 1 or items.null_count:
            raise RecipeError(f"{place}: the lists in column {column!r} have different lengths; pad them")
        items = items.flatten()
        shape.append(lengths[0] if lengths else 0)
    if items.null_count:
        raise RecipeError(f"{place}: column {column!r} holds null; remove the row, or fill it")
    return items.to_numpy(zero_copy_only=False).reshape(shape)


def _is_other_list(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_large_list(kind) or types.is_fixed_size_list(kind))


class _ObjectFile(io.RawIOBase):
    """A stored object as a file that pyarrow can seek in: each read is one range."""

    def __init__(self, store: Store, info: ObjectInfo) -> None:
        super().__init__()
        self._store, self._info, self._at = store, info, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._info.n_bytes}[whence]
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._info.n_bytes)
        if end <= self._at:
            return 0
        data = self._store.read(self._info.path, self._at, end)
        buffer[: len(data)] = data
        self._at = end
        return len(data)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
